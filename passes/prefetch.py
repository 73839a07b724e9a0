"""Prefetch: start the broadcasts of layer-sharded weights ahead of use, into reused buffers.

A weight that one rank owns is broadcast at its use. With a window of n layers, layer i's broadcasts
start where layer i - n begins, so that they run behind the layers between, and are waited for at
the use. Received weights live in a pool of n + 1 buffers per kind of weight, taken in turn: a rank
holds its own weights and the pool, whatever the number of layers. A window of 0 starts each
broadcast at its use.

A buffer is never received into while an earlier tenant is still to be read: a start is placed after
the last read of the weight that used the buffer before. `Verify` checks this independently.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace

from torch import fx

from rolemesh.compiler.ir import dialect
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.nodes import add_call, copy_node
from rolemesh.compiler.ir.program import Program, origin
from rolemesh.passes.seed import layer_of

__all__ = ["Prefetch", "last_read"]


@dataclass(frozen=True)
class Prefetch:
    """The pass; see the module docstring.

    Attributes:
        window: Layers ahead of use, at least 0.
    """

    window: int = 1
    name = "prefetch"
    requires = "a partitioned graph"
    ensures = "every broadcast of a stored weight is a start into a pooled buffer and a wait"

    def __post_init__(self) -> None:
        if self.window < 0:
            raise RolemeshError(
                "RM018",
                what=f"the prefetch window is {self.window}",
                where="option prefetch",
                why="it counts layers ahead of use",
                fix="use 0, 1 or 2",
            )

    def apply(self, program: Program) -> Program:
        """The program with pooled broadcasts; unchanged if no rank owns a weight."""
        position = {node: index for index, node in enumerate(program.graph.nodes)}
        names = {
            node: entry.name
            for node, entry in zip(program.placeholders, program.inputs, strict=True)
        }
        layers: dict[int, list[fx.Node]] = defaultdict(list)
        kinds: dict[str, int] = defaultdict(int)
        slots: dict[fx.Node, str] = {}
        tenants: dict[str, fx.Node] = {}
        previous: dict[fx.Node, fx.Node] = {}
        for node in program.ops:
            if node.target is not dialect.BROADCAST:
                continue
            (source,) = node.all_input_nodes
            if source not in names:
                continue
            name = names[source]
            layer = layer_of(name)
            kind = name.replace(f".{layer}.", ".*.", 1)
            ordinal = kinds[kind]
            kinds[kind] += 1
            layers[ordinal if layer is None else layer].append(node)
            slots[node] = f"{kind}#{ordinal % (self.window + 1)}"
            if slots[node] in tenants:
                previous[node] = tenants[slots[node]]
            tenants[slots[node]] = node
        if not slots:
            return program.after(self.name)
        order = sorted(layers, key=lambda layer: position[layers[layer][0]])
        starts: dict[int, list[fx.Node]] = defaultdict(list)
        first = position[next(iter(program.ops))]
        for index, layer in enumerate(order):
            for node in layers[layer]:
                if self.window == 0:
                    place = position[node]
                elif index < self.window:
                    place = first
                else:
                    place = position[layers[order[index - self.window]][0]]
                if node in previous:
                    place = max(place, 1 + last_read(previous[node], position))
                starts[min(place, position[node])].append(node)
        return self._rewrite(program, position, starts, slots)

    def _rewrite(
        self,
        program: Program,
        position: dict[fx.Node, int],
        starts: dict[int, list[fx.Node]],
        slots: dict[fx.Node, str],
    ) -> Program:
        graph = fx.Graph()
        values: dict[fx.Node, fx.Node] = {}
        layouts: dict[fx.Node, tuple[Layout, ...]] = {}
        started: dict[fx.Node, fx.Node] = {}
        for node in program.graph.nodes:
            for later in starts.get(position[node], ()):
                weight = later.args[0]
                assert isinstance(weight, fx.Node)
                start = add_call(
                    graph,
                    dialect.BROADCAST_START,
                    (values[weight],),
                    {**later.kwargs, "slot": slots[later]},
                )
                where = origin(later)
                start.meta["type"] = later.meta["type"]
                reason = f"{self.window} layers ahead: {where.reason}"
                start.meta["origin"] = replace(where, reason=reason)
                layouts[start] = program.layouts[later]
                started[later] = start
            if node in slots:
                new = add_call(graph, dialect.WAIT, (started[node],))
                new.meta.update(node.meta)
            else:
                new = copy_node(graph, node, values.__getitem__)
            values[node] = new
            if node in program.layouts:
                layouts[new] = program.layouts[node]
        return program.after(self.name, graph=graph, layouts=layouts)


def last_read(node: fx.Node, position: dict[fx.Node, int]) -> int:
    """Position of the last node that reads a received weight, through views of it too."""
    last, queue = position[node], [node]
    while queue:
        for user in queue.pop().users:
            last = max(last, position[user])
            if _may_alias(user):
                queue.append(user)
    return last


def _may_alias(node: fx.Node) -> bool:
    """Whether a node's result may share memory with its first operand."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        same_memory = (dialect.SHARD, dialect.WAIT)
        return not isinstance(node.target, dialect.MeshOp) or node.target in same_memory
    return any(result.alias_info is not None for result in schema.returns) or (
        schema.name in ("aten::reshape", "aten::contiguous", "aten::_unsafe_view")
    )
