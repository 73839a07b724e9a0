"""Absorb: apply the weight that expands keys and values to queries and results instead.

What a model caches may be smaller than its keys and values: latents, which each call expands to
keys and values of many heads, over the whole cache. With latents `X [S, L]` and the weights `W_K`,
`W_V` of a head,

    softmax(Q (X W_K)^T) (X W_V)  =  softmax((Q W_K^T) X^T) X W_V

and on the right no product with a weight has a row for each cached token. For T queries and widths
N of keys and V of values, the left side takes `2 S L (N + V) + 2 T S (N + V)` operations a head,
the right side `2 T L (N + V) + 4 T S L`: it has less to do where T is small against S and L, as in
decode (DeepSeek-V2, section 2.1.2). For each expansion the pass takes the side with fewer
operations on a rank. Where tokens are split along the sequence ranks share the queries, but each
would expand the whole cache, or a part, and gather the rest (`rolemesh.passes.push_back`). Symbolic
sizes count as traced, as in all costs.

What is matched is no model but products: keys or values that are `X @ W` behind what only moves
elements (`rolemesh.passes.expansions`), next to features that no weight expands (rotary ones, which
heads share), in the forms of attention of `rolemesh.passes.attending`. An expansion that anything
else reads stays.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import fx

from rolemesh.compiler.ir.nodes import copy_node
from rolemesh.compiler.ir.placement import Segmented, Shard, ceil_div
from rolemesh.compiler.ir.program import Program, tensor_type
from rolemesh.passes.attending import Attending, find_attending
from rolemesh.passes.caches import Caches
from rolemesh.passes.calls import flops
from rolemesh.passes.canonical_forms import Emitter
from rolemesh.passes.cost import CostTable
from rolemesh.passes.expansions import Expansion, Piece
from rolemesh.passes.rules import default_rules
from rolemesh.passes.rules.registry import Rules
from rolemesh.passes.tokens import token_inputs

__all__ = ["Absorb"]


@dataclass(frozen=True)
class Absorb:
    """The pass; see the module docstring.

    Attributes:
        costs: Prices of collectives and arithmetic.
        rules: Sharding rules, which say how ops move elements.
    """

    costs: CostTable = field(default_factory=CostTable)
    rules: Rules = field(default_factory=default_rules)
    name = "absorb"
    requires = "a canonicalised Program with layouts of its inputs alone"
    ensures = "no attention reads expanded keys or values where fewer operations give the same"

    def apply(self, program: Program) -> Program:
        """The program with expansions absorbed where that pays; the same graph if it nowhere does.

        Layouts and seeds of inputs stay.
        """
        ranks = _Ranks(program, self.costs)
        chosen: dict[fx.Node, Attending] = {}
        for group in _groups(program, self.rules):
            if _only_attended(group) and ranks.pays(group):
                chosen.update((one.node, one) for one in group)
        if not chosen:
            return program.after(self.name)
        graph, values = _rewritten(program, chosen)
        return program.after(
            self.name,
            graph=graph,
            layouts={values[node]: layouts for node, layouts in program.layouts.items()},
            seeds={values[node]: why for node, why in program.seeds.items()},
        )


def _groups(program: Program, rules: Rules) -> list[list[Attending]]:
    """Attention by the expansions that it reads: groups have none in common."""
    group_of: dict[fx.Node, list[Attending]] = {}
    for node in program.ops:
        found = find_attending(node, rules)
        if found is None:
            continue
        group = [found]
        for product in _products(group):
            known = group_of.get(product, [])
            group += [one for one in known if one not in group]
        group_of.update(dict.fromkeys(_products(group), group))
    return list({id(group): group for group in group_of.values()}.values())


def _expanded(group: Sequence[Attending]) -> Iterator[tuple[Piece, Expansion]]:
    for one in group:
        for side in one.sides:
            for piece in side.operand.pieces:
                if piece.expansion is not None:
                    yield piece, piece.expansion


def _products(group: Sequence[Attending]) -> set[fx.Node]:
    return {expansion.product for _, expansion in _expanded(group)}


def _only_attended(group: Sequence[Attending]) -> bool:
    """Whether all that comes of the expansions goes into this attention, so that they can go."""
    ends = {one.node for one in group}
    passed = {node for one in group for side in one.sides for node in side.operand.passed}
    queue = list(_products(group))
    seen = set(queue)
    while queue:
        node = queue.pop()
        for user in node.users:
            if user.op == "output" or (user in ends and node not in passed):
                return False
            if user not in seen and user not in ends:
                seen.add(user)
                queue.append(user)
    return True


class _Ranks:
    """How many parts of an op's work ranks do side by side, by the layouts of a Program's inputs.

    Tokens split by batch, and weights split by heads, split the work of expansions and of attention
    alike. Tokens split along the sequence split the queries, and of expansions those of new tokens.
    """

    def __init__(self, program: Program, costs: CostTable) -> None:
        self.program = program
        self.costs = costs
        self.caches = Caches(program)
        tokens = sorted(token_inputs(program), key=program.placeholders.index)
        self.tokens = program.layout(tokens[0]).placements if tokens and program.mesh else ()

    def pays(self, group: Sequence[Attending]) -> bool:
        """Whether a rank has fewer operations without the expansions."""
        before = after = 0.0
        for piece, expansion in {e.product: (p, e) for p, e in _expanded(group)}.values():
            before += self._expanding(expansion.product, *self._parts(piece, expansion))
        for one in group:
            piece, expansion = next(_expanded([one]))
            queries, _ = self._parts(piece, expansion)
            before += float(flops(one.node)) / queries
            after += float(one.flops) / queries
        return after < before

    def _expanding(self, product: fx.Node, queries: float, keys: float) -> float:
        """Operations of an expansion on a rank, with a gather counted as what takes as long."""
        work, nbytes = float(flops(product)), float(tensor_type(product).nbytes)
        received = nbytes / keys * (1 - keys / queries) * self.costs.all_gather
        return min(work / keys, work / queries + received * self.costs.flops_per_byte)

    def _parts(self, piece: Piece, expansion: Expansion) -> tuple[float, float]:
        """Into how many parts ranks split queries, and rows or columns of an expansion."""
        mesh = self.program.mesh
        queries = keys = 1.0
        if mesh is None:
            return queries, keys
        weight = self._stored(expansion.weight.value)
        for axis, ranks in enumerate(mesh.sizes):
            tokens = self.tokens[axis] if self.tokens else None
            if isinstance(tokens, Shard):
                parts = float(tokens.size) / float(ceil_div(tokens.size, ranks))
                queries *= parts
                keys *= 1.0 if tokens.dim == 1 and self.caches.holds(piece.source.value) else parts
            elif weight is not None and isinstance(
                self.program.layout(weight).placements[axis], Shard | Segmented
            ):
                queries *= ranks
                keys *= ranks
        return queries, keys

    def _stored(self, value: fx.Node) -> fx.Node | None:
        """The input that a value is, perhaps cast."""
        while value.op == "call_function" and len(value.all_input_nodes) == 1:
            value = value.all_input_nodes[0]
        return value if value.op == "placeholder" else None


def _rewritten(
    program: Program, chosen: dict[fx.Node, Attending]
) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """A graph with some attention re-associated, and its values by those of the old one."""
    new = Emitter(program.graph, ())
    values: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        source = node.args[0] if node.target is operator.getitem else None
        if node in chosen:
            new.current = node
            values[node] = chosen[node].emit(new, values)
        elif source in chosen:
            values[node] = values[source]
        else:
            values[node] = copy_node(new.graph, node, values.__getitem__)
    for node in reversed(new.graph.nodes):
        if node.op == "call_function" and not node.users:
            new.graph.erase_node(node)
    return new.graph, values
