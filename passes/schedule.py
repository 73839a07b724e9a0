"""Schedule: collectives start as soon as they can, and are waited for as late as they can.

Between two collectives of a program there is often work that neither needs: queries while keys are
gathered, experts that all tokens share while those of a group are summed. Here the ops that a
collective needs come first, then its start, then what it can run behind, then its wait and what
reads it. So do weights that `Prefetch` sent ahead: what reads them comes last. A collective with no
work to run behind, or with work that is small against it, stays as it is.

Ops move between two neighbouring collectives only, so a value lives longer by that stretch at most.
Collectives of weights alone, which any op could run behind, start `window` layers ahead of their
use, as `Prefetch` starts broadcasts: a rank holds the weights of `window + 1` layers at a time.

Invariants: collectives of activations keep their order, and those of a group are waited for in the
order of their starts; every rank has the same order, for the text is one.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import fx
from torch._ops import OpOverload

from rolemesh.compiler.ir import dialect
from rolemesh.compiler.ir.dialect import MeshOp
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.ledger import collective
from rolemesh.compiler.ir.nodes import add_call, copy_node
from rolemesh.compiler.ir.program import Program, origin, tensor_types
from rolemesh.passes.bucket import reads_call
from rolemesh.passes.seed import layer_of

__all__ = ["Schedule"]


@dataclass(frozen=True)
class Schedule:
    """The pass; see the module docstring.

    Attributes:
        window: Layers ahead of use that collectives of weights start, at least 0.
    """

    window: int = 1
    name = "schedule"
    requires = "a partitioned graph, its broadcasts prefetched"
    ensures = "collectives with independent work beside them run behind it"

    def __post_init__(self) -> None:
        if self.window < 0:
            raise RolemeshError(
                "RM018",
                what=f"the window of the schedule is {self.window}",
                where="pass schedule",
                why="it counts layers ahead of use",
                fix="use 0, 1 or 2",
            )

    def apply(self, program: Program) -> Program:
        """The program in its new order; unchanged if no collective has work to run behind."""
        order = _Order(self._ahead(program)).found()
        behind = _overlapped(program, order)
        if not behind:
            return program.after(self.name)
        return _rewritten(program, order, behind, self.name)

    def _ahead(self, program: Program) -> list[fx.Node]:
        """The ops with collectives of weights as far ahead as the window lets them be."""
        given = reads_call(program)
        layers: dict[int | None, list[fx.Node]] = defaultdict(list)
        ops = list(program.ops)
        for node in ops:
            if node.target in dialect.STARTS and node not in given:
                layers[layer_of(origin(node).module)].append(node)
        if not layers or not self.window:
            return ops
        position = {node: index for index, node in enumerate(ops)}
        chains = list(layers.values())
        moved: set[fx.Node] = set()
        before: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for index, weights in enumerate(chains):
            place = ops[0] if index < self.window else chains[index - self.window][0]
            for weight in weights:
                chain = [node for node in _leading(weight, position) if node not in moved]
                moved.update(chain)
                before[place].extend(chain)
        found: list[fx.Node] = []
        for node in ops:
            found.extend(before[node])
            if node not in moved:
                found.append(node)
        return found


def _leading(node: fx.Node, position: dict[fx.Node, int]) -> list[fx.Node]:
    """An op with all that it is computed from, in order."""
    seen, queue = {node}, [node]
    while queue:
        for operand in queue.pop().all_input_nodes:
            if operand.op != "placeholder" and operand not in seen:
                seen.add(operand)
                queue.append(operand)
    return sorted(seen, key=position.__getitem__)


@dataclass(frozen=True)
class _Wait:
    """The place where a collective is waited for."""

    node: fx.Node


class _Order:
    """The ops of one graph in a new order, a collective standing for its start."""

    def __init__(self, ops: Sequence[fx.Node]) -> None:
        self.ops = ops
        self.order: list[fx.Node | _Wait] = []
        self.flying: dict[fx.Node, object] = {}

    def found(self) -> list[fx.Node | _Wait]:
        stretch: list[fx.Node] = []
        for node in self.ops:
            if node.target is dialect.BROADCAST_START:  # its buffer is free from here on
                self._emit([*stretch, node])
                stretch = []
            elif node.target in dialect.STARTS:
                needed = self._needed(node, stretch)
                self._emit([other for other in stretch if other in needed])
                self._start(node)
                self._emit([other for other in stretch if other not in needed])
                stretch = []
            elif node.target is dialect.WAIT:
                self.flying[node] = None
            else:
                stretch.append(node)
        self._emit(stretch)
        for node in list(self.flying):
            if node in self.flying:
                self._wait(node)
        return self.order

    def _needed(self, node: fx.Node, stretch: Sequence[fx.Node]) -> set[fx.Node]:
        """What of a stretch leads to a node."""
        found, among = {node}, set(stretch)
        for other in reversed([*stretch, node]):
            if other in found:
                found.update(operand for operand in other.all_input_nodes if operand in among)
        return found

    def _start(self, node: fx.Node) -> None:
        self._read(node)
        self.order.append(node)
        self.flying[node] = node.kwargs["axes"]

    def _emit(self, nodes: Iterable[fx.Node]) -> None:
        """Ops in order, those that must wait for a collective last."""
        late: list[fx.Node] = []
        held = set(self.flying)
        for node in nodes:
            if any(operand in held for operand in node.all_input_nodes):
                held.add(node)
                late.append(node)
            else:
                self.order.append(node)
        for node in late:
            self._read(node)
            self.order.append(node)

    def _read(self, node: fx.Node) -> None:
        for operand in node.all_input_nodes:
            if operand in self.flying:
                self._wait(operand)

    def _wait(self, node: fx.Node) -> None:
        """Wait for a collective, and before it for those of its group that started earlier."""
        axes = self.flying[node]
        if node.target is dialect.WAIT:  # the order of its start has been decided
            del self.flying[node]
            self.order.append(node)
            return
        for other in [n for n, group in self.flying.items() if group == axes]:
            del self.flying[other]
            self.order.append(_Wait(other))
            if other is node:
                return


def _overlapped(program: Program, order: Sequence[fx.Node | _Wait]) -> set[fx.Node]:
    """Collectives with enough work between their start and the wait for them."""
    products = written = 0
    started: dict[fx.Node, tuple[int, int]] = {}
    found: set[fx.Node] = set()
    works: dict[int, _Work] = {}  # by op
    nbytes: dict[object, int] = {}  # by type and layout
    for entry in order:
        if isinstance(entry, _Wait):
            before = started[entry.node]
            received = collective(program, entry.node).bytes_received
            wrote = float(written - before[1])  # a cost: of a symbolic size, the hint's
            if products > before[0] or wrote >= max(received, 1):
                found.add(entry.node)
        elif entry.target in dialect.STARTS:
            started[entry] = products, written
        elif isinstance(entry.target, OpOverload):
            work = works.get(id(entry.target))
            if work is None:
                work = works[id(entry.target)] = _work(entry.target)
            products += work.product
            if work.writes:
                of_kind = (entry.meta["type"], id(program.layouts[entry]))
                if of_kind not in nbytes:
                    nbytes[of_kind] = _local_bytes(program, entry)
                written += nbytes[of_kind]
    return found


class _Work(NamedTuple):
    """Whether an op works more than it writes, and whether it writes at all."""

    product: bool
    writes: bool


def _work(op: OpOverload) -> _Work:
    name = op._schema.name
    product = not name.startswith("aten::") or any(word in name for word in _PRODUCTS)
    return _Work(product, all(result.alias_info is None for result in op._schema.returns))


_PRODUCTS = ("mm", "attention", "convolution")
"""Parts of the names of ops that work more than they write."""


def _local_bytes(program: Program, node: fx.Node) -> int:
    """Bytes of an op's results on one rank."""
    return sum(
        math.prod(layout.local_shape(kind.shape, program.the_mesh)) * kind.dtype.itemsize
        for kind, layout in zip(tensor_types(node), program.layouts[node], strict=True)
    )


def _rewritten(
    program: Program, order: Sequence[fx.Node | _Wait], behind: set[fx.Node], name: str
) -> Program:
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    layouts: dict[fx.Node, tuple[Layout, ...]] = {}
    copy: Callable[[fx.Node], fx.Node] = values.__getitem__
    output = program.graph.output_node()
    for entry in (*program.placeholders, *order, output):
        node = entry.node if isinstance(entry, _Wait) else entry
        if isinstance(entry, _Wait):
            if node not in behind:
                continue
            values[node] = new = add_call(graph, dialect.WAIT, (values[node],), name=node.name)
            new.meta.update(node.meta)
        elif node in behind:
            assert isinstance(node.target, MeshOp)
            target = dialect.STARTS[node.target]
            args = fx.map_arg(node.args, copy)
            values[node] = new = add_call(graph, target, args, node.kwargs, f"{node.name}_start")
            new.meta["type"] = node.meta["type"]
            where = origin(node)
            new.meta["origin"] = replace(where, reason=f"starts early: {where.reason}")
        else:
            values[node] = new = copy_node(graph, node, copy)
        if node in program.layouts:
            layouts[new] = program.layouts[node]
    return program.after(name, graph=graph, layouts=layouts)
