"""The ranks that load together: which of them share a node, and how they refuse together.

Ranks of one node read each byte of a checkpoint once between them, and exchange it through a group
of their own. All groups here move CPU tensors, whatever the default group moves.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.runtime.config import Config
from rolemesh.runtime.groups import timeout_of

__all__ = ["ALONE", "Ranks", "all_ranks", "this_node"]

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This rank among those that load the same model.

    Attributes:
        rank: This rank.
        members: The ranks of its node, in order.
        node: Their group; None if there are no processes.
        world: The group of all ranks; None if there are no processes.
    """

    rank: int
    members: tuple[int, ...]
    node: dist.ProcessGroup | None
    world: dist.ProcessGroup | None

    @property
    def leads(self) -> bool:
        """Whether this is the first rank of its node."""
        return self.rank == self.members[0]

    def from_leader(self, value: T | None) -> T:
        """The value that the first rank of this node passes."""
        if self.node is not None:
            box = [value]
            dist.broadcast_object_list(box, src=self.members[0], group=self.node)
            value = box[0]
        assert value is not None, "the leader passes a value"
        return value

    def first_problem(self, problem: RolemeshError | None) -> RolemeshError | None:
        """The problem of the first rank that has one, the same on all ranks."""
        if self.world is None:
            return problem
        problems: list[RolemeshError | None] = [None] * dist.get_world_size(self.world)
        dist.all_gather_object(problems, problem, group=self.world)
        return next((found for found in problems if found is not None), None)


ALONE = Ranks(0, (0,), None, None)
"""The only process."""


@contextmanager
def all_ranks(node: str) -> Iterator[Ranks]:
    """The ranks of the default group. All of them must enter, and leave, together.

    Args:
        node: Names this rank's node: ranks that pass the same name share their reads.
    """
    default = dist.group.WORLD
    assert default is not None, "groups_for has made sure of it"
    timeout = timeout_of(default, Config.read())
    made: list[dist.ProcessGroup] = []

    def new_group(ranks: list[int]) -> dist.ProcessGroup | None:
        group = dist.new_group(ranks, timeout=timeout, backend="gloo", group_desc="checkpoint")
        if not isinstance(group, dist.ProcessGroup):
            return None  # this rank is not in it
        made.append(group)
        return group

    rank, size = dist.get_rank(), dist.get_world_size()
    moves_cpu_tensors = torch.device("cpu") in default._device_types
    world = default if moves_cpu_tensors else new_group(list(range(size)))
    nodes = [""] * size
    dist.all_gather_object(nodes, node, group=world)
    mine, members = world, tuple(range(size))
    if len(set(nodes)) > 1:
        for name in dict.fromkeys(nodes):
            ranks = [index for index, other in enumerate(nodes) if other == name]
            group = new_group(ranks)
            if rank in ranks:
                mine, members = group, tuple(ranks)
    yield Ranks(rank, members, mine, world)
    for group in made:  # not after an error: a group with a dead member may not end in bounded time
        dist.destroy_process_group(group)


def this_node() -> str:
    """Names the machine: its host name, and the run of its kernel.

    Containers of one machine have different host names; machines may share one.
    """
    boot = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{socket.gethostname()}/{boot}"
