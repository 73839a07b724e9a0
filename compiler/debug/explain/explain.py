"""Why a value lies as it does, and why a collective is there, from a run directory.

`explain` finds the node that a name means and gives everything that was decided about it as plain
data; `compiler.debug.explain_text` writes it for people.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from rolemesh.compiler.debug.explain.chains import Chain, Chains
from rolemesh.compiler.debug.explain.decided import Decided
from rolemesh.compiler.debug.explain.moves import Move, Moves
from rolemesh.compiler.dump.reader import RecordedProgram, Stage
from rolemesh.compiler.ir.errors import RolemeshError

__all__ = ["Explanation", "explain"]

_LISTED = 12


@dataclass(frozen=True)
class Explanation:
    """Everything that explains one node.

    Attributes:
        program: Id of the program.
        stage: The stage that the node was found in.
        node: The node.
        name: Its name for people: of an input, its fully qualified name.
        op: Its op.
        expression: Its op's call; empty for an input.
        module: Module path; empty if unknown.
        source: `file.py:line` of the model's code; empty if unknown.
        kind: Its type with its layout.
        local: The shape that each rank holds of its first result; None before partitioning.
        layout: For a value of the model, why it lies so, axis by axis.
        moves: For a value of the model, the mesh ops that bring it elsewhere; those that bring
            another form of its elements, a transposed weight, too.
        move: For an inserted op, what it is for.
    """

    program: str
    stage: str
    node: str
    name: str
    op: str
    expression: str
    module: str
    source: str
    kind: str
    local: Sequence[object] | None
    layout: tuple[Chain, ...]
    moves: tuple[str, ...]
    move: Move | None

    def as_json(self) -> Mapping[str, object]:
        """The same as JSON data."""
        return asdict(self)


def explain(program: RecordedProgram, name: str, axis: str | None = None) -> Explanation:
    """Explain a node.

    Args:
        program: The program, recorded through push_back at least.
        name: A node's name, the fully qualified name of an input, or a pattern that fits one.
        axis: Explain this mesh axis only.

    Raises:
        RolemeshError: RM018 if the name fits no node or several, or is that of a node that
            canonicalise replaced; RM002 if there is no such axis; RM035 if a stage cannot be read.
    """
    decided = Decided(program)
    if axis is not None and axis not in decided.axes:
        raise RolemeshError(
            "RM002",
            what=f"the mesh has no axis {axis!r}",
            where=f"option --axis, {program.id}",
            why=f"its axes are {', '.join(decided.axes)}",
            fix="use one of those names, or leave the option out for all of them",
        )
    axes = [index for index, found in enumerate(decided.axes) if axis in (None, found)]
    node_name, stage = _find(decided, name.removeprefix("%"))
    chains = Chains(decided)
    node = stage.nodes[node_name]
    last = next(decided.partitioned(), None)
    local = last.nodes[node_name].data.get("local") if last and node_name in last.nodes else None
    inserted = node_name not in decided.stage.nodes
    move = Moves(decided, chains, stage).of(node_name, axes) if inserted else None
    return Explanation(
        program.id,
        stage.name,
        node_name,
        decided.label(node_name),
        node.op,
        "" if node.op == "input" else decided.expression(node),
        node.module,
        node.source,
        ", ".join(node.kinds),
        local[0] if local else None,
        () if inserted else tuple(chains.chain(node_name, index) for index in axes),
        () if inserted or last is None else Moves(decided, chains, last).moved(node_name),
        move,
    )


def _find(decided: Decided, name: str) -> tuple[str, Stage]:
    """The node that a name means, and the stage that explains it: the latest one that has it."""
    known: dict[str, Stage] = {}
    for stage in (decided.stage, *decided.partitioned()):
        known |= {node: stage for node in stage.nodes if node not in known}
        if name in known:
            return name, known[name]
    inputs = {str(entry["name"]): node for node, entry in decided.inputs.items()}
    if name in inputs:
        return inputs[name], decided.stage
    names = {**{node: node for node in known}, **inputs}
    fitting = sorted({names[found] for found in fnmatch.filter(names, name)})
    if len(fitting) == 1:
        return fitting[0], known[fitting[0]]
    if fitting:
        listed = [decided.label(found) for found in fitting[:_LISTED]]
        more = f" and {len(fitting) - _LISTED} more" if len(fitting) > _LISTED else ""
        raise RolemeshError(
            "RM018",
            what=f"{len(fitting)} nodes fit {name!r}",
            where=f"argument NODE, {decided.program.id}",
            why=f"they are {', '.join(listed)}{more}",
            fix="name one of them",
        )
    raise _unknown(decided, name, list(names))


def _unknown(decided: Decided, name: str, known: list[str]) -> RolemeshError:
    """The error for a name that no node has, or has no longer."""
    where = f"argument NODE, {decided.program.id}"
    gone = None
    for stage in decided.program.stages():
        if name in stage.nodes:
            gone = stage.nodes[name]
        elif gone is not None:
            left = [
                f"%{node.name}"
                for node in decided.stage.nodes.values()
                if gone.source and (node.module, node.source) == (gone.module, gone.source)
            ]
            place = f"{gone.module or 'the model'} at {gone.source or 'an unknown line'}"
            return RolemeshError(
                "RM018",
                what=f"%{name} is there only before {stage.name}, which replaced it",
                where=where,
                why=f"it is {gone.op} in {place}; layouts are decided for what is left",
                fix=f"ask for {', '.join(left)}" if left else "ask for what its users read",
            )
    close = difflib.get_close_matches(name, known, n=3)
    return RolemeshError(
        "RM018",
        what=f"there is no node {name!r}",
        where=where,
        why="a node is named as in the text of a stage, a weight or cache by its full name",
        fix=f"did you mean {' or '.join(map(repr, close))}?" if close else "see rolemesh show",
    )
