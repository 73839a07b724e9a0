"""How the Hcom ops of a GE graph exchange tensors with other ranks.

A group is named as torchair names it without HCCL: `tag=TAG;rank_list=0,1,2`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from rolemesh.compiler.ir.errors import RolemeshError

__all__ = ["Communicator", "Request", "group_ranks"]


@dataclass(frozen=True)
class Request:
    """One collective that a rank takes part in.

    All members of a group must make equal requests, but for `send_counts` and `receive_counts`.

    Attributes:
        kind: `all_gather`, `reduce_scatter`, `all_reduce`, `all_to_all` or `broadcast`.
        group: Name of the group.
        node: Name of the GE op, for errors.
        reduction: For reductions, `sum`, `max`, `min` or `prod`.
        root: For a broadcast, the position in the group that sends.
        send_counts: For all_to_all, elements for each member; empty for equal blocks.
        receive_counts: For all_to_all, elements from each member; empty for equal blocks.
    """

    kind: str
    group: str
    node: str
    reduction: str = ""
    root: int = 0
    send_counts: tuple[int, ...] = ()
    receive_counts: tuple[int, ...] = ()


class Communicator(Protocol):
    """Makes exchanges for one rank."""

    def exchange(self, request: Request, wire: torch.Tensor) -> torch.Tensor:
        """Take part in a collective.

        Args:
            request: The collective.
            wire: What this rank puts in, contiguous. An all_gather joins along dim 0, a
                reduce_scatter cuts dim 0, an all_to_all moves flat elements.

        Returns:
            What this rank gets, in new memory: for all_to_all a flat tensor.

        Raises:
            RolemeshError: RM030 for a group that does not exist or does not hold this rank, and for
                members whose requests differ or that do not arrive.
        """


def group_ranks(name: str) -> tuple[str, tuple[int, ...]]:
    """Tag and ranks of a group by its name.

    Raises:
        RolemeshError: RM030 if the name is not of the form above.
    """
    tag, middle, ranks = name.partition(";rank_list=")
    numbers: Sequence[str] = ranks.split(",")
    if not tag.startswith("tag=") or not middle or not all(x.isdecimal() for x in numbers):
        raise RolemeshError(
            "RM030",
            what=f"{name!r} names no group of ranks",
            where="attribute group of a Hcom op",
            why="without HCCL a group is named tag=TAG;rank_list=0,1,...",
            fix="convert the graph where it runs: HCCL names are valid in one job only",
        )
    return tag.removeprefix("tag="), tuple(int(x) for x in numbers)
