"""Collectives over gloo as one exchange between all pairs of ranks.

Gloo runs an all_gather and an all_reduce around a ring, in steps that wait for each other, and a
reduce_scatter is an all_reduce of a copy (`ProcessGroupGloo::reduce_scatter_tensor_coalesced`,
https://github.com/pytorch/pytorch/pull/118911). An all_to_all sends to every rank at once. So, with
n bytes on p ranks,

| collective | becomes | received |
|---|---|---|
| reduce_scatter | an all_to_all of the chunks; their sum | (p - 1) n / p, as before |
| all_gather | an all_to_all of p - 1 copies; the blocks in order | (p - 1) n, as before |
| all_reduce of `LARGEST` or less | the same; their sum | (p - 1) n, before 2 (p - 1) n / p |

The last is how accelerators reduce few bytes too (the one-shot kernels of `custom_all_reduce` in
vLLM). Packing, unpacking and the sum are ops of ATen, which a compiler fuses with what is around
them.

Invariants:

* Sums go from the first rank to the last on every rank, so that all get the same bits.
* What ran between the start of a collective and the wait for it still does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import NamedTuple, cast

import torch
import torch.distributed as dist
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from rolemesh.compiler.ir.ledger import Collective

__all__ = ["LARGEST", "Position", "exchange_directly", "exchanged", "position_on_gloo"]

_aten, _c10d = torch.ops.aten, torch.ops._c10d_functional

LARGEST = 64 * 1024
"""Bytes up to which an all_reduce is one exchange. For 4 ranks of one machine that takes 0.6 of the
ring's time, up to 256 KiB (`benchmarks/bench_exchanges.py`); but bytes received grow with ranks."""


class Position(NamedTuple):
    """This process in a group."""

    rank: int
    ranks: int


def exchange_directly(
    graph: fx.Graph,
    find: Callable[[str, torch.device], Position | None],
    largest: int = LARGEST,
) -> None:
    """Put exchanges in the place of collectives.

    Args:
        graph: A rank's flat graph, with `meta["val"]`; changed.
        find: From the name of a group and the device of a value to this process's position in the
            group; None if its collectives are to stay.
        largest: Bytes up to which an all_reduce is one exchange.
    """
    for kind in _STARTS:
        for node in graph.find_nodes(op="call_function", target=kind):
            wire, group = node.args[0], node.args[-1]
            value = wire.meta["val"]
            position = find(str(group), value.device)
            if position is not None and position.ranks > 1 and _is_taken(node, value, largest):
                _Exchange(graph, node, position).put()
    graph.lint()


def _is_taken(node: fx.Node, value: torch.Tensor, largest: int) -> bool:
    """Whether an exchange is to take a collective's place."""
    if any(user.target is not _c10d.wait_tensor.default for user in node.users):
        return False
    if node.target is _c10d.all_gather_into_tensor.default:
        return True
    if node.args[1] not in _COMBINE:
        return False
    size = value.numel() * value.itemsize
    return node.target is not _c10d.all_reduce.default or statically_known_true(size <= largest)


class _Exchange:
    """One collective that becomes an exchange."""

    def __init__(self, graph: fx.Graph, node: fx.Node, position: Position) -> None:
        self.graph, self.node = graph, node
        self.rank, self.ranks = position
        self.wire = cast(fx.Node, node.args[0])

    def put(self) -> None:
        """Put it in the place of the collective and of its waits."""
        waits = list(self.node.users)
        with self.graph.inserting_before(self.node):
            started = self._started()
        for wait in waits:
            with self.graph.inserting_before(wait):
                done = self._call(_c10d.wait_tensor.default, started)
                result = self._result(done)
            wait.replace_all_uses_with(result)
            self.graph.erase_node(wait)
        self.graph.erase_node(self.node)

    @property
    def _is_scatter(self) -> bool:
        return self.node.target is _c10d.reduce_scatter_tensor.default

    def _started(self) -> fx.Node:
        """Blocks for each rank, stacked, and sent; a rank needs none from itself if all get its."""
        group = self.node.args[-1]
        if self._is_scatter:
            rows = (self.ranks, -1, *self._sizes()[1:])
            blocks = self._call(_aten.reshape.default, self.wire, rows)
            counts = [1] * self.ranks
        else:
            blocks = self._call(_aten.unsqueeze.default, self.wire, 0)
            if self.ranks > 2:
                sizes = (self.ranks - 1, *[-1] * len(self._sizes()))
                copies = self._call(_aten.expand.default, blocks, sizes)
                blocks = self._call(
                    _aten.clone.default, copies, memory_format=torch.contiguous_format
                )
            counts = [int(rank != self.rank) for rank in range(self.ranks)]
        return self._call(_c10d.all_to_all_single.default, blocks, counts, counts, group)

    def _result(self, done: fx.Node) -> fx.Node:
        """The collective's result, of the blocks that arrived."""
        count = self.ranks if self._is_scatter else self.ranks - 1
        parts = [self._call(_aten.select.int, done, 0, index) for index in range(count)]
        if not self._is_scatter:
            parts.insert(self.rank, self.wire)
        if self.node.target is _c10d.all_gather_into_tensor.default:
            return self._call(_aten.cat.default, parts)
        combine = _COMBINE[str(self.node.args[1])]
        return reduce(lambda total, part: self._call(combine, total, part), parts)

    def _sizes(self) -> list[int | fx.Node]:
        """The wire's sizes; those that are symbols as nodes."""
        shape: Sequence[int | torch.SymInt] = self.wire.meta["val"].shape
        return [
            self._call(_aten.sym_size.int, self.wire, dim)
            if isinstance(size, torch.SymInt)
            else size
            for dim, size in enumerate(shape)
        ]

    def _call(self, target: torch._ops.OpOverload, *args: object, **kwargs: object) -> fx.Node:
        given = cast(tuple[fx.node.Argument, ...], args)
        node = self.graph.call_function(target, given, cast(dict[str, fx.node.Argument], kwargs))
        values, options = fx.map_arg((given, node.kwargs), lambda operand: operand.meta["val"])
        with self.wire.meta["val"].fake_mode:
            node.meta["val"] = target(*values, **options)
        return node


_STARTS = (
    _c10d.reduce_scatter_tensor.default,
    _c10d.all_gather_into_tensor.default,
    _c10d.all_reduce.default,
)

_COMBINE = {
    "sum": _aten.add.Tensor,
    "max": _aten.maximum.default,
    "min": _aten.minimum.default,
}
"""What makes one value of two, by reduction."""


def position_on_gloo(name: str, device: torch.device) -> Position | None:
    """This process's position in a group that moves values of the device over gloo.

    Args:
        name: Name of the group.
        device: The device.

    Returns:
        The position; None if it is another backend that does.
    """
    group = dist.distributed_c10d._resolve_process_group(dist.distributed_c10d.GroupName(name))
    kind = torch.device(device.type)
    if kind not in group._device_types or group._get_backend(kind).name() != "gloo":
        return None
    return Position(group.rank(), group.size())


def exchanged(moved: Collective, ranks: int) -> tuple[str, int]:
    """What a collective over gloo becomes, as who records traffic sees it.

    Args:
        moved: The collective, over one axis.
        ranks: Ranks of the axis.

    Returns:
        Name of the collective that runs, and the bytes that a rank receives in it.
    """
    size = math.prod(moved.shape) * moved.dtype.itemsize
    if moved.op == "all_reduce" and size <= LARGEST and ranks > 1:
        return "all_to_all", (ranks - 1) * size
    if moved.op in ("all_gather", "reduce_scatter") and ranks > 1:
        return "all_to_all", moved.bytes_received
    return moved.op, moved.bytes_received
