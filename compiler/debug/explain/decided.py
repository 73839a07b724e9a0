"""What propagation and push_back decided of a recorded program, put so that it can be asked about.

`Decided` reads three stages: `propagate` and `push_back`, whose decisions differ where a choice was
changed afterwards, and the last one, where inserted ops are. Values are named by their nodes; names
survive passes. Placements are in the form of a stage's JSON. No torch is imported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

from rolemesh.compiler.dump.reader import Node, RecordedProgram, Stage
from rolemesh.compiler.ir.errors import RolemeshError

__all__ = [
    "CONSTRAIN",
    "WHOLE",
    "Decided",
    "Decision",
    "Operand",
    "Pin",
    "Placement",
    "Priced",
    "op_name",
    "placement_words",
]

WHOLE = "replicated"
"""The placement of a value that every rank holds."""
CONSTRAIN = "rolemesh.constrain.default"
Placement: TypeAlias = "str | Mapping[str, Any]"
"""A placement on one axis, as `compiler.ir.serial_values` writes it."""


@dataclass(frozen=True)
class Priced:
    """A choice that propagation priced.

    Attributes:
        choice: What it does.
        price: Bytes received, and work as bytes.
        moved: What bringing the operands there costs.
        follows: What suggested it; empty for a choice that is always there.
        ratio: Its price in units of the cheapest one's; None if that is nothing.
    """

    choice: str
    price: float
    moved: float
    follows: str
    ratio: float | None


@dataclass(frozen=True)
class Operand:
    """An operand of a decided op, on one axis.

    Attributes:
        node: Its node.
        name: Its name for people: a stored tensor's, or the node's.
        kind: Its type with its layout.
        has: Its placement.
        needs: The placement that the op's choice needs; None if the op does not read it.
    """

    node: str
    name: str
    kind: str
    has: Placement
    needs: Placement | None


@dataclass(frozen=True)
class Decision:
    """What was decided for one op on one axis.

    Attributes:
        stage: The pass that decided it.
        rule: The sharding rule as text.
        choice: What the axis does; its letter is a factor of the rule.
        reason: Why, in the pass's words; empty if there was nothing to choose.
        alternatives: All choices that were priced, the cheapest first.
        operands: The op's operands.
        result: The placement of its first result.
    """

    stage: str
    rule: str
    choice: str
    reason: str
    alternatives: tuple[Priced, ...]
    operands: tuple[Operand, ...]
    result: Placement


@dataclass(frozen=True)
class Pin:
    """A layout that a value must have.

    Attributes:
        input: The input whose new value it is; empty if it is none's.
        layout: A placement per axis; empty for a constraint of the user.
        text: Why, for people.
    """

    input: str
    layout: tuple[Placement, ...]
    text: str


class Decided:
    """The decisions of one recorded program.

    Args:
        program: The program; it has been propagated and pushed back.

    Raises:
        RolemeshError: RM018 if it has not both stages, RM035 if they cannot be read.
    """

    def __init__(self, program: RecordedProgram) -> None:
        self.program = program
        missing = {"propagate", "push_back"}.difference(program.stage_names)
        if missing:
            raise RolemeshError(
                "RM018",
                what=f"{program.id} has no stage {' and no stage '.join(sorted(missing))}",
                where=str(program.folder),
                why="what was decided is told from the stages propagate and push_back together",
                fix="name a whole run directory; if the compiler failed before, rolemesh show it",
            )
        self.before: Stage = program.stage("propagate")
        self.stage: Stage = program.stage("push_back")
        self._read: dict[int, Stage] = {}
        self.axes: tuple[str, ...] = tuple(self.stage.mesh)
        self.ranks: tuple[int, ...] = tuple(self.stage.mesh.values())

    def partitioned(self) -> Iterator[Stage]:
        """The stages with inserted ops, the last one first; each is read once."""
        names = self.program.stage_names
        for number in range(len(names) - 1, names.index("push_back"), -1):
            if number not in self._read:
                self._read[number] = self.program.stage(number)
            yield self._read[number]

    @cached_property
    def inputs(self) -> Mapping[str, Mapping[str, Any]]:
        """What the signature says of each input, by node."""
        return {entry["node"]: entry for entry in self.stage.head["inputs"]}

    @cached_property
    def pins(self) -> Mapping[str, Pin]:
        """Layouts that values must have: of new values of inputs, of fixed outputs, of constraints.

        The same as `passes.constraints.pinned_values`.
        """
        head, found = self.stage.head, {}
        fixed: Mapping[str, list[Placement]] = head.get("pinned", {})
        for index, output in enumerate(head["outputs"]):
            name = _node_of(output)
            if name not in self.stage.nodes or self.stage.nodes[name].op == "input":
                continue
            if "mutates" in output:
                entry = head["inputs"][output["mutates"]]
                layout = tuple(self.stage.nodes[entry["node"]].layouts[0])
                text = f"it is the new value of {entry['name']}, which lies so"
                found[name] = Pin(entry["node"], layout, text)
            elif any(placement != WHOLE for placement in fixed.get(str(index), ())):
                text = f"output {index} must lie so for the program that reads it"
                found[name] = Pin("", tuple(fixed[str(index)]), text)
        for node in self.stage.nodes.values():
            if node.op == CONSTRAIN:
                found[node.name] = Pin("", (), f"constrained by the user: {node.data['args'][1]}")
        return found

    def returned(self, name: str) -> list[tuple[str, tuple[Placement, ...]]]:
        """How a value must lie where the program returns it.

        Returns:
            For each output that it is, the input whose new value that is, or nothing, and a
            placement per axis.
        """
        head = self.stage.head
        fixed: Mapping[str, list[Placement]] = head.get("pinned", {})
        whole = [WHOLE] * len(self.axes)
        found = []
        for index, output in enumerate(head["outputs"]):
            if _node_of(output) == name:
                if "mutates" in output:
                    entry = head["inputs"][output["mutates"]]["node"]
                    found.append((str(entry), tuple(self.stage.nodes[entry].layouts[0])))
                else:
                    found.append(("", tuple(fixed.get(str(index), whole))))
        return found

    def label(self, name: str) -> str:
        """A value's name for people."""
        return str(self.inputs[name]["name"]) if name in self.inputs else f"%{name}"

    def operands(self, name: str) -> list[str]:
        """Tensor operands in the order of the rule: arguments, lists flattened, repeats kept."""
        nodes = self.stage.nodes
        return [
            operand
            for operand in nodes[name].operands
            if len(nodes[operand].data["types"]) == 1 and not nodes[operand].data.get("several")
        ]

    def readers(self, name: str) -> list[str]:
        """The ops that read a value; of one of several results, those that read it."""
        found: list[str] = []
        for user in self.stage.users[name]:
            found.extend(self.readers(user) if self.stage.nodes[user].op == "getitem" else [user])
        return found

    def placement(self, name: str, axis: int, stage: Stage | None = None) -> Placement:
        """Where a value lies on an axis; of several results, the first."""
        found: Placement = (stage or self.stage).nodes[name].layouts[0][axis]
        return found

    def kind(self, name: str) -> str:
        """A value's type with its layout, for people."""
        return ", ".join(self.stage.nodes[name].kinds)

    def changed(self, name: str, axis: int) -> bool:
        """Whether push_back chose otherwise than propagate."""
        old, new = (s.nodes[name].decision for s in (self.before, self.stage))
        assert old is not None
        assert new is not None
        return any(old[key][axis] != new[key][axis] for key in ("choices", "reasons"))

    def decision(self, name: str, axis: int, *, first: bool = False) -> Decision:
        """What was decided for an op.

        Args:
            name: Its node.
            axis: The axis.
            first: What propagate decided, whatever push_back made of it.
        """
        changed = self.changed(name, axis)
        stage = self.before if first or not changed else self.stage
        node = stage.nodes[name]
        data = node.decision
        assert data is not None
        # push_back prices nothing: the alternatives that it keeps are those to the first choice.
        of_axis = data.get("alternatives", ()) if stage is self.before else ()
        return Decision(
            stage.name,
            stage.rules[data["rule"]],
            data["choices"][axis],
            data["reasons"][axis],
            _priced(of_axis[axis] if of_axis else ()),
            tuple(
                Operand(
                    operand,
                    self.label(operand),
                    ", ".join(stage.nodes[operand].kinds),
                    self.placement(operand, axis, stage),
                    needs[axis],
                )
                for operand, needs in zip(self.operands(name), node.data["needs"], strict=True)
            ),
            self.placement(name, axis, stage),
        )

    def expression(self, node: Node) -> str:
        """A node as a call of its op on its operands."""
        return f"{op_name(node)}({', '.join(map(self.label, node.operands))})"


def _priced(entries: Sequence[Mapping[str, Any]]) -> tuple[Priced, ...]:
    least = entries[0]["price"] if entries else 0
    return tuple(
        Priced(
            entry["choice"],
            entry["price"],
            entry["moved"],
            entry["follows"],
            round(entry["price"] / least, 3) if least else None,
        )
        for entry in entries
    )


def _node_of(output: Mapping[str, Any]) -> str:
    value = output["value"]
    return str(value["node"]) if isinstance(value, dict) and "node" in value else ""


def op_name(node: Node) -> str:
    """An op without its overload: `aten.mm`, `mesh.all_gather`."""
    namespace, _, rest = node.op.partition(".")
    return f"{namespace}.{rest.rpartition('.')[0] or rest}" if rest else namespace


def placement_words(placement: Placement) -> str:
    """A placement in words."""
    if isinstance(placement, str):
        return "whole"
    ((kind, value),) = placement.items()
    if kind == "partial":
        return f"a pending {value}"
    if kind == "owner":
        return f"whole on rank {value} only"
    if kind == "routed":
        return f"rows of dim {value[1]} valid where %{value[0].split(':')[1]} sends them"
    if kind == "segmented":
        return f"dim {value[0]} in segments, each split"
    dim, outer, size = value
    return f"dim {dim} split" if outer == 1 else f"dim {dim} split, as [{outer}, {size}, ..]"
