"""Why an inserted op is there: the value it moves, from which layout to which, and for whom.

Partition inserts mesh ops between a value, where propagation left it, and an op that needs it
elsewhere. One move may take several of them (rows are masked, then summed), and one may be written
as two (a broadcast that starts ahead and is waited for). `Moves` finds the whole move that a mesh
op belongs to, and what was decided on both of its ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rolemesh.compiler.debug.explain.chains import OUTPUT, Chain, Chains
from rolemesh.compiler.debug.explain.decided import Decided, Placement
from rolemesh.compiler.dump.reader import Node, Stage

__all__ = ["Move", "MoveStep", "Moves", "Side"]


_SAME_DATA = frozenset(
    {
        "aten._to_copy.default",
        "aten.permute.default",
        "aten.reshape.default",
        "aten.t.default",
        "aten.transpose.int",
        "aten.unsqueeze.default",
    }
)
"""Ops that make another form of the same elements; the same as in `passes.naming`."""


@dataclass(frozen=True)
class MoveStep:
    """One mesh op of a move.

    Attributes:
        node: The node.
        op: The op.
        kind: The value's type and layout after it.
        collective: What it moves: op, axes, dim, shape, dtype, bytes received per rank and their
            formula; None if nothing is exchanged.
        reason: The cause that the pass recorded.
        slot: The pooled buffer that a broadcast is received into; empty for other ops.
    """

    node: str
    op: str
    kind: str
    collective: Mapping[str, Any] | None
    reason: str
    slot: str


@dataclass(frozen=True)
class Side:
    """A move on one axis.

    Attributes:
        axis: The axis.
        before: How the value lies.
        after: How it is needed.
        value: Why it lies so.
        user: Why it is needed otherwise: the chain of the op that reads it.
    """

    axis: str
    before: Placement
    after: Placement
    value: Chain
    user: Chain


@dataclass(frozen=True)
class Move:
    """A value on its way from the layout it has to one that is needed.

    Attributes:
        value: The value's node in the decided program.
        value_name: Its name for people.
        user: The op it is moved for, or `output`.
        user_expression: That op's call; empty for `output`.
        purpose: `operand`, if the user reads the value; `output`, if the program returns it;
            `marks`, if it tells which rows of the user's result a rank has; `pads`, if it lies
            where it should, and what its uneven chunks are padded with must not count.
        before: The value's type with the layout it has.
        after: The same with the layout it is needed in.
        steps: The mesh ops, in order.
        sides: What changes, axis by axis; of pads, the axes that pad.
        also_for: Other ops that read the value in the same layout, and so share the move.
        sizes: Values of the symbols in the formulas of bytes.
        ahead: How many ops run between the start of a broadcast and the wait for it; None for
            other moves.
    """

    value: str
    value_name: str
    user: str
    user_expression: str
    purpose: str
    before: str
    after: str
    steps: tuple[MoveStep, ...]
    sides: tuple[Side, ...]
    also_for: tuple[str, ...]
    sizes: Mapping[str, int]
    ahead: int | None


class Moves:
    """Finds the moves of one stage."""

    def __init__(self, decided: Decided, chains: Chains, stage: Stage) -> None:
        self.decided = decided
        self.chains = chains
        self.stage = stage

    def of(self, name: str, axes: Sequence[int]) -> Move:
        """The move that a mesh op belongs to, with its sides on these axes."""
        decided, nodes = self.decided, self.stage.nodes
        steps = self._steps(nodes[name])
        value, user = (str(nodes[name].data[key]) for key in ("value", "user"))
        before = tuple(decided.stage.nodes[value].layouts[0])
        purpose, after = self._need(value, user, steps)
        # What is returned lies as the input does whose new value it is.
        inputs = [name for name, layout in decided.returned(value) if layout == after]
        end = user if purpose != "output" else inputs[0] or OUTPUT
        changed = [axis for axis in axes if before[axis] != after[axis]]
        if before == after:
            purpose, padded = "pads", _kwargs(steps[-1])["axes"]
            changed = [axis for axis in axes if decided.axes[axis] in padded]
        return Move(
            value,
            decided.label(value),
            user,
            "" if user == OUTPUT else decided.expression(decided.stage.nodes[user]),
            purpose,
            decided.kind(value),
            steps[-1].kinds[0],
            tuple(map(_step, steps)),
            tuple(
                Side(
                    decided.axes[axis],
                    before[axis],
                    after[axis],
                    self.chains.chain(value, axis),
                    self.chains.chain(end, axis),
                )
                for axis in changed
            ),
            tuple(other for other in self._sharing(value, after) if other != user),
            self.stage.data.get("sizes", {}),
            self._ahead(steps),
        )

    def moved(self, value: str) -> tuple[str, ...]:
        """The mesh ops that move a value, or what is only another form of it, in order."""
        same = {value}
        for node in self.decided.stage.nodes.values():
            if node.op in _SAME_DATA and node.operands[0] in same:
                same.add(node.name)
        nodes = self.stage.nodes.values()
        return tuple(node.name for node in nodes if node.data.get("value") in same)

    def _steps(self, node: Node) -> list[Node]:
        """The mesh ops of a move, from the value on: they read each other first."""
        nodes, value, user = self.stage.nodes, node.data["value"], node.data["user"]
        steps = [node]
        while (source := nodes[steps[0].operands[0]]).data.get("value") == value or self._of_bundle(
            steps[0], source
        ):
            steps.insert(0, source)
        further: Node | None = node
        while further is not None:
            readers = (nodes[reader] for reader in self.stage.users[further.name])
            further = next(
                (
                    reader
                    for reader in readers
                    if reader.operands[0] == steps[-1].name
                    and (reader.data.get("value"), reader.data.get("user")) == (value, user)
                ),
                None,
            )
            if further is not None:
                steps.append(further)
        return steps

    def _of_bundle(self, node: Node, source: Node) -> bool:
        """Whether a node is one of several values that its source moves, or waits for them."""
        return node.op in ("getitem", "mesh.wait") and source.op.startswith("mesh.")

    def _ahead(self, steps: list[Node]) -> int | None:
        """How many ops run between a collective's start and the wait for it."""
        order = {name: number for number, name in enumerate(self.stage.nodes)}
        places = {step.op: order[step.name] for step in steps}
        if "mesh.wait" not in places:
            return None
        start = next(place for op, place in places.items() if op.endswith("_start"))
        return places["mesh.wait"] - start - 1

    def _need(self, value: str, user: str, steps: list[Node]) -> tuple[str, tuple[Placement, ...]]:
        """What the value is moved for, and the layout it is needed in."""
        decided, reached = self.decided, tuple(steps[-1].layouts[0])
        if user == OUTPUT:
            return "output", self._wanted(
                [need for _, need in decided.returned(value)], value, reached
            )
        if any(step.op == "mesh.owned_rows" for step in steps):
            return "marks", reached
        needs = self._needs(user, value)
        if not needs:
            return "marks", reached
        return "operand", self._wanted(needs, value, reached)

    def _wanted(
        self, needs: list[tuple[Placement, ...]], value: str, reached: tuple[Placement, ...]
    ) -> tuple[Placement, ...]:
        """The one of several layouts that a move leads to; it may end in another spelling of it."""
        have = tuple(self.decided.stage.nodes[value].layouts[0])
        others = [need for need in needs if need != have] or needs
        return reached if reached in others else others[0]

    def _needs(self, user: str, value: str) -> list[tuple[Placement, ...]]:
        """The layouts that an op needs a value in, where it reads it."""
        operands = self.decided.operands(user)
        needs = self.decided.stage.nodes[user].data["needs"]
        return [
            tuple(need)
            for operand, need in zip(operands, needs, strict=True)
            if operand == value and None not in need
        ]

    def _sharing(self, value: str, after: tuple[Placement, ...]) -> list[str]:
        found = [
            reader
            for reader in self.decided.stage.users[value]
            if "needs" in self.decided.stage.nodes[reader].data
            and after in self._needs(reader, value)
        ]
        returned = any(after == layout for _, layout in self.decided.returned(value))
        return [*found, OUTPUT] if returned else found


def _kwargs(node: Node) -> Mapping[str, Any]:
    found: Mapping[str, Any] = node.data.get("kwargs", {})
    return found


def _step(node: Node) -> MoveStep:
    return MoveStep(
        node.name,
        node.op,
        node.kinds[0],
        node.collective,
        node.reason,
        str(_kwargs(node).get("slot", "")),
    )
