"""Push what users want back into producers, where that saves work or traffic.

Propagation runs forward and does not know users. Walking backward, three things are put right:

- A value that depends on no sharded input (a mask, a position, expanded keys) is computed whole
  even if every user wants the same chunk of it: its producer is made to compute only the chunk,
  if that needs no traffic. So is one that was made of a sum, to be rounded say: the sum is
  scattered then.
- A value that repeats a smaller one (tokens expanded to the experts they go to) is a chunk that
  every user then gathers: its producer is made to compute the whole, so that the smaller value is
  gathered instead.
- A product of a whole cache (the keys of cached latents) is computed by every rank: it is made a
  chunk on each, which users gather, if receiving the rest costs less than computing it.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.placement import (
    REPLICATE,
    Partial,
    Placement,
    Replicate,
    Routed,
    Shard,
    same_placement,
)
from rolemesh.compiler.ir.program import Decision, Program, operand_nodes, tensor_types
from rolemesh.compiler.ir.rule import (
    Choice,
    JoinSegments,
    Kind,
    Route,
    Split,
    SplitSegments,
    TakeSegments,
    Whole,
)
from rolemesh.compiler.ir.tensor import TensorType
from rolemesh.passes.caches import Caches
from rolemesh.passes.calls import flops
from rolemesh.passes.constraints import constraint_of
from rolemesh.passes.cost import CostTable, reshard_cost
from rolemesh.passes.naming import op_label, stored_names
from rolemesh.passes.seed import Stays

__all__ = ["EARLY", "PushBack"]

aten = torch.ops.aten
_FREE = CostTable()
EARLY = "gathered early: "
"""Marks the reason of a value computed whole for its users; what follows is their reason."""

_VIEWS = frozenset(
    {
        aten.reshape.default,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.transpose.int,
        aten.permute.default,
        aten.expand.default,
    }
)
"""Ops that cost nothing: moving a gather before one of them can only bring it nearer to others."""
_Wanted = dict[fx.Node, list[Placement | None]]


@dataclass(frozen=True)
class PushBack:
    """The pass; see the module docstring.

    Attributes:
        costs: Prices of collectives and arithmetic.
        stays: By axis, what is never moved along it. If anything is, nothing is gathered early.
    """

    costs: CostTable = field(default_factory=CostTable)
    stays: Mapping[str, Stays] = field(default_factory=dict)
    name = "push_back"
    requires = "decisions"
    ensures = "no value whose users all want it elsewhere, if its producer can give that for less"

    def apply(self, program: Program) -> Program:
        """The program with some whole decisions turned into splits."""
        mesh = program.the_mesh
        layouts = dict(program.layouts)
        decisions = dict(program.decisions)
        for axis, ranks in enumerate(mesh.sizes):
            if ranks > 1:
                stays = self.stays.get(mesh.names[axis], Stays.NOTHING)
                early = stays is Stays.NOTHING
                _Axis(program, layouts, decisions, axis, self.costs, early).run()
        return program.after(self.name, layouts=layouts, decisions=decisions)


class _Axis:
    """The backward pass over one mesh axis; it updates `layouts` and `decisions` in place."""

    def __init__(
        self,
        program: Program,
        layouts: dict[fx.Node, tuple[Layout, ...]],
        decisions: dict[fx.Node, Decision],
        axis: int,
        costs: CostTable,
        early: bool,
    ) -> None:
        self.early = early
        self.program = program
        self.costs = costs
        self.caches = Caches(program)
        self.layouts = layouts
        self.decisions = decisions
        self.axis = axis
        self.ranks = program.the_mesh.sizes[axis]
        self.names = stored_names(program)
        self.wanted: _Wanted = {}
        self.gathered_for: dict[fx.Node, str] = {}
        self.needs: dict[tuple[int, Choice], Sequence[Placement | None]] = {}
        self.works: dict[int, int] = {}

    def run(self) -> None:
        for index, value in enumerate(self.program.results):
            if isinstance(value, fx.Node):
                need = self.program.output_layout(index).placements[self.axis]
                self.wanted.setdefault(value, []).append(need)
        for node in reversed(list(self.program.ops)):
            if node.target is operator.getitem:
                continue  # its users' wants are read when its source is reached
            operands = operand_nodes(node)
            if constraint_of(node) is None:
                self._improve(node, operands)
            decision = self.decisions[node]
            needs = self._needs(decision, decision.choices[self.axis])
            for position, (operand, want) in enumerate(zip(operands, needs, strict=True)):
                if position not in decision.rule.unread:
                    self.wanted.setdefault(operand, []).append(want)

    def _needs(self, decision: Decision, choice: Choice) -> Sequence[Placement | None]:
        """What a choice needs of each operand; equal calls share it."""
        key = (id(decision.call), choice)
        found = self.needs.get(key)
        if found is None:
            count, rule = len(decision.call.operands), decision.rule
            found = self.needs[key] = [rule.operand_placement(i, choice) for i in range(count)]
        return found

    def _flops(self, node: fx.Node) -> int:
        key = id(self.decisions[node].call)
        if key not in self.works:
            self.works[key] = flops(node)
        return self.works[key]

    def _improve(self, node: fx.Node, operands: list[fx.Node]) -> None:
        decision = self.decisions[node]
        wishes = _wishes(node, self.wanted)
        if isinstance(decision.choices[self.axis], Whole):
            choice = _common_choice(
                node, decision, operands, wishes, self.layouts, self.axis, self.ranks
            )
            if choice is not None:
                self._choose(node, choice, "all users want this chunk")
            elif (choice := self._shared_out(node, operands, wishes)) is not None:
                self._choose(node, choice, "computing the whole cache costs more than a gather")
        elif self.early and self._gathers_early(node, operands, wishes):
            self._choose(node, Whole(), EARLY + self._gathering_user(node))

    def _gathers_early(
        self, node: fx.Node, operands: list[fx.Node], wishes: list[list[Placement | None]]
    ) -> bool:
        """Whether all users gather a result that is larger than what it is made from."""
        decision, axis, ranks = self.decisions[node], self.axis, self.ranks
        if not isinstance(decision.choices[axis], Split) or self._flops(node):
            return False
        wants = [want for wishes_of_one in wishes for want in wishes_of_one]
        if not wants or not all(isinstance(want, Replicate | Routed) for want in wants):
            return False
        late = sum(
            reshard_cost(layout.placements[axis], REPLICATE, value.nbytes, ranks, _FREE)
            for value, layout in zip(tensor_types(node), self.layouts[node], strict=True)
        )
        early = 0.0
        for operand, need in zip(operands, self._needs(decision, Whole()), strict=True):
            nbytes = operand.meta["type"].nbytes
            early += reshard_cost(self._placement(operand), need, nbytes, ranks, _FREE)
        return early < late or (early == late and node.target in _VIEWS)

    def _shared_out(
        self, node: fx.Node, operands: list[fx.Node], wishes: list[list[Placement | None]]
    ) -> Split | None:
        """Rows of a product of a whole cache, if a rank's time is less with a part and a gather."""
        work, rule = self._flops(node), self.decisions[node].rule
        if not work or not all(isinstance(want, Replicate) for wants in wishes for want in wants):
            return None
        if len(tensor_types(node)) > 1 or not any(map(self.caches.holds, operands)):
            return None
        if not all(isinstance(self._placement(operand), Replicate) for operand in operands):
            return None
        (value,) = tensor_types(node)
        rows = Split(rule.results[0][0][0], 1, value.shape[0])
        if len(rule.results[0][0]) > 1 or any(
            _claims(choice, rows.factor) for choice in self.decisions[node].choices
        ):
            return None
        gathered = reshard_cost(
            rule.result_placement(0, rows), REPLICATE, value.nbytes, self.ranks, self.costs
        )
        saved = float(work) / self.costs.flops_per_byte * (self.ranks - 1) / self.ranks
        return rows if gathered < saved else None

    def _placement(self, value: fx.Node) -> Placement:
        return self.layouts[value][0].placements[self.axis]

    def _gathering_user(self, node: fx.Node) -> str:
        """The op that a value is gathered for in the end, for people."""
        user = next(iter(node.users))
        if user.op == "output":
            found = "every rank returns the whole output"
        else:
            found = self.gathered_for.get(user, f"{op_label(user, self.names)} needs all of it")
        self.gathered_for[node] = found
        return found

    def _choose(self, node: fx.Node, choice: Choice, reason: str) -> None:
        axis, old = self.axis, self.decisions[node]
        self.decisions[node] = replace(
            old,
            choices=(*old.choices[:axis], choice, *old.choices[axis + 1 :]),
            reasons=(*old.reasons[:axis], reason, *old.reasons[axis + 1 :]),
        )
        self.layouts[node] = tuple(
            layout.replace(axis, old.rule.result_placement(i, choice))
            for i, layout in enumerate(self.layouts[node])
        )
        for user in node.users:
            if user.target is operator.getitem:
                position = user.args[1]
                assert isinstance(position, int)
                self.layouts[user] = (self.layouts[node][position],)


def _wishes(node: fx.Node, wanted: _Wanted) -> list[list[Placement | None]]:
    """What users want of each result of a node."""
    types = tensor_types(node)
    wishes: list[list[Placement | None]] = [[] for _ in types]
    if not isinstance(node.meta["type"], TensorType):
        for user in node.users:
            position = user.args[1]
            assert isinstance(position, int)
            wishes[position].extend(wanted.get(user, ()))
    elif wishes:
        wishes[0].extend(wanted.get(node, ()))
    return wishes


def _claims(choice: Choice, factor: int) -> bool:
    """Whether another axis may be in the way of a split of a factor."""
    if isinstance(choice, Split | Route):
        return choice.factor == factor
    return isinstance(choice, SplitSegments | TakeSegments | JoinSegments)


def _common_choice(
    node: fx.Node,
    decision: Decision,
    operands: list[fx.Node],
    wishes: list[list[Placement | None]],
    layouts: dict[fx.Node, tuple[Layout, ...]],
    axis: int,
    ranks: int,
) -> Split | None:
    rule = decision.rule
    found: Split | None = None
    for position, (value, wants) in enumerate(zip(tensor_types(node), wishes, strict=True)):
        for want in wants:
            if not isinstance(want, Shard):
                return None
            if want != wants[0] and not (
                wants[0] is not None and same_placement(want, wants[0], value.shape, ranks)
            ):
                return None
            choice = rule.match(rule.results[position], want, ranks)
            if not isinstance(choice, Split) or rule.kinds[choice.factor] is not Kind.PASS:
                return None
            if found is not None and choice != found:
                return None
            found = choice
    if found is None:
        return None
    others = (c for i, c in enumerate(decision.choices) if i != axis)
    if any(_claims(other, found.factor) for other in others):
        return None
    for position, operand in enumerate(operands):
        source = layouts[operand][0].placements[axis]
        if _is_dearer(operand, source, rule.operand_placement(position, found), ranks):
            return None
    return found


def _is_dearer(operand: fx.Node, source: Placement, target: Placement | None, ranks: int) -> bool:
    """Whether an operand that is used whole costs more if it is brought to a chunk instead."""
    if isinstance(source, Replicate):
        return False
    if isinstance(source, Partial) and isinstance(target, Shard) and len(operand.users) == 1:
        return False  # summed as it is scattered, in place of everywhere
    return reshard_cost(source, target, operand.meta["type"].nbytes, ranks, _FREE) > 0
