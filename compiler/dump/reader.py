"""Reading a run directory: `Run`, its programs, their stages, and the nodes of a stage.

All of it is plain data, checked against the index's checksums as it is read; torch is not imported.
"""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rolemesh.compiler.dump.files import (
    INDEX,
    KIND_RUN,
    KIND_STAGE,
    load_json,
    load_text,
    require_kind,
    unreadable,
)
from rolemesh.compiler.ir.errors import RolemeshError

__all__ = ["Node", "RecordedProgram", "Run", "Stage", "open_run", "open_source"]


@dataclass(frozen=True)
class Node:
    """One node of a stage.

    Attributes:
        data: What the stage's file says of it; see docs/debugging.md.
    """

    data: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Its name, unique in its stage."""
        return str(self.data["name"])

    @property
    def op(self) -> str:
        """`aten.mm.default`, `mesh.all_gather`, `getitem`, or `input`."""
        return str(self.data["op"])

    @property
    def module(self) -> str:
        """Module path; empty if unknown."""
        return str(self.data.get("module", ""))

    @property
    def source(self) -> str:
        """`file.py:line` of the model's code; empty if unknown."""
        return str(self.data.get("source", ""))

    @property
    def reason(self) -> str:
        """Why a pass inserted it; empty for nodes of the captured model."""
        return str(self.data.get("reason", ""))

    @property
    def kinds(self) -> tuple[str, ...]:
        """The type of each result as text, with its layout: `f32[2, 13@tp, 64]`."""
        return tuple(self.data["kinds"])

    @property
    def layouts(self) -> list[list[Any]]:
        """For each result, a placement per mesh axis; empty before seeding."""
        found: list[list[Any]] = self.data.get("layouts", [])
        return found

    @property
    def decision(self) -> Mapping[str, Any] | None:
        """What propagation decided; None outside of the stages that decide."""
        return self.data.get("decision")

    @property
    def collective(self) -> Mapping[str, Any] | None:
        """What it moves; None if it is no collective."""
        return self.data.get("collective")

    @cached_property
    def operands(self) -> tuple[str, ...]:
        """Names of the nodes among its arguments, in order, repeats kept."""
        return tuple(_nodes_in([self.data.get("args", []), *self.data.get("kwargs", {}).values()]))


def _nodes_in(value: object) -> Iterator[str]:
    if isinstance(value, list):
        for item in value:
            yield from _nodes_in(item)
    elif isinstance(value, dict) and "node" in value:
        yield value["node"]


@dataclass(frozen=True)
class Stage:
    """A Program after one pass.

    Attributes:
        program: Id of the program, `<role>/<phase>`.
        number: Its place among the stages.
        name: The pass.
        data: What its file holds.
        text: The Program's text.
    """

    program: str
    number: int
    name: str
    data: Mapping[str, Any]
    text: str

    @cached_property
    def nodes(self) -> dict[str, Node]:
        """All nodes but the output, by name, in order."""
        return {entry["name"]: Node(entry) for entry in self.data["nodes"]}

    @property
    def head(self) -> Mapping[str, Any]:
        """The Program's signature: name, phase, mesh, inputs, outputs, history, symbols."""
        found: Mapping[str, Any] = self.data["program"]
        return found

    @property
    def mesh(self) -> Mapping[str, int]:
        """Axis sizes by name; empty before seeding."""
        return self.head["mesh"] or {}

    @property
    def rules(self) -> Sequence[str]:
        """Sharding rules as text, by the number that decisions give."""
        found: Sequence[str] = self.data["rules"]
        return found

    @cached_property
    def users(self) -> dict[str, tuple[str, ...]]:
        """For each node, the nodes that read it, in order."""
        found: dict[str, dict[str, None]] = {name: {} for name in self.nodes}
        for node in self.nodes.values():
            for operand in node.operands:
                found[operand][node.name] = None
        return {name: tuple(users) for name, users in found.items()}


@dataclass(frozen=True)
class RecordedProgram:
    """One program of a run.

    Attributes:
        folder: The run directory.
        entry: What the index says of it.
        loaded: Its only stage, if that was read from a file or from stdin by itself.
    """

    folder: Path
    entry: Mapping[str, Any]
    loaded: Stage | None = None

    @property
    def id(self) -> str:
        """`<role>/<phase>`, with a number if there are several."""
        return str(self.entry["id"])

    @property
    def role(self) -> str:
        """The role; empty if there is none."""
        return self.entry["role"] or ""

    @property
    def phase(self) -> str:
        """The phase."""
        return str(self.entry["phase"])

    @property
    def stage_names(self) -> tuple[str, ...]:
        """The passes, in order."""
        return tuple(str(entry["pass"]) for entry in self.entry["stages"])

    @property
    def graphs(self) -> tuple[Path, ...]:
        """Files of GE graphs (`.pbtxt`), by rank."""
        return tuple(self.folder / entry["pbtxt"]["file"] for entry in self.entry.get("ge", ()))

    def stages(self) -> Iterator[Stage]:
        """All stages, read one after the other."""
        return (self.stage(number) for number in range(len(self.entry["stages"])))

    def stage(self, which: str | int = "last") -> Stage:
        """One stage.

        Args:
            which: Its number, the name of its pass, or `last`.

        Raises:
            RolemeshError: RM018 if there is none such, RM035 if its files cannot be read.
        """
        stages = self.entry["stages"]
        names = [entry["pass"] for entry in stages]
        text = str(which)
        if text == "last" and stages:
            number = len(stages) - 1
        elif text.isdecimal() and int(text) < len(stages):
            number = int(text)
        elif text in names:
            number = names.index(text)
        else:
            raise _unknown("stage", text, [*names, "last"], f"{self.folder}, {self.id}")
        if self.loaded is not None:
            return self.loaded
        entry = stages[number]
        path = self.folder / entry["json"]["file"]
        data = load_json(path, entry["json"]["sha256"])
        require_kind(data, KIND_STAGE, path)
        shown = load_text(self.folder / entry["text"]["file"], entry["text"]["sha256"])
        return Stage(self.id, number, entry["pass"], data, shown)


@dataclass(frozen=True)
class Run:
    """A run directory.

    Attributes:
        folder: The folder.
        index: What its index holds.
        only: Its only program, of a stage that was read by itself.
    """

    folder: Path
    index: Mapping[str, Any]
    only: RecordedProgram | None = None

    @cached_property
    def programs(self) -> tuple[RecordedProgram, ...]:
        """All programs, in the order they were compiled."""
        if self.only is not None:
            return (self.only,)
        return tuple(RecordedProgram(self.folder, entry) for entry in self.index["programs"])

    def program(self, name: str | None = None) -> RecordedProgram:
        """One program.

        Args:
            name: Its id, or a phase or role that only one program has; None if there is only one.

        Raises:
            RolemeshError: RM018 if no or no single program fits.
        """
        ids = [program.id for program in self.programs]
        if name is None:
            fitting = list(self.programs)
        else:
            exact = [program for program in self.programs if program.id == name]
            fitting = exact or [p for p in self.programs if name in (p.phase, p.role)]
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            raise RolemeshError(
                "RM018",
                what=f"{len(fitting)} programs fit" + ("" if name is None else f" {name!r}"),
                where=str(self.folder),
                why=f"they are {', '.join(program.id for program in fitting)}",
                fix="name one of them with --program",
            )
        parts = [part for program in self.programs for part in (program.phase, program.role)]
        raise _unknown("program", str(name), ids, str(self.folder), parts)


def open_stage(content: str, name: str) -> Run:
    """A stage's JSON as a run of one program with one stage.

    Args:
        content: The JSON, as a stage's file or `rolemesh show --json` has it.
        name: Where it is from, for errors.

    Raises:
        RolemeshError: RM035 if it is no stage.
    """
    path = Path(name)
    try:
        data = json.loads(content)
    except ValueError as error:
        raise unreadable(path, f"it is no JSON: {error}") from error
    if not isinstance(data, dict):
        raise unreadable(path, "it holds no JSON object")
    require_kind(data, KIND_STAGE, path)
    try:
        head = data["program"]
        role, _, phase = head["name"].partition(".")
        stage = Stage(head["name"], 0, data["stage"], data, "")
        list(stage.nodes)
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, error) from error
    entry = {"id": head["name"], "role": role, "phase": phase, "stages": [{"pass": data["stage"]}]}
    return Run(path, {"programs": [entry]}, RecordedProgram(path, entry, stage))


def open_source(source: str, rank: int | None = None) -> Run:
    """What a command line names: a run directory, a stage's JSON file, or `-` for one on stdin.

    Raises:
        RolemeshError: RM035 if it is none of them.
    """
    if source == "-":
        return open_stage(sys.stdin.read(), "standard input")
    path = Path(source)
    if path.suffix == ".json" and path.is_file():
        try:
            return open_stage(path.read_text(encoding="utf-8"), source)
        except (OSError, UnicodeDecodeError) as error:
            raise unreadable(path, f"{type(error).__name__}: {error}") from error
    return open_run(source, rank)


def _damaged(path: Path, error: Exception) -> RolemeshError:
    """The error for a file that is JSON of the right kind, but lacks something."""
    return unreadable(path, f"it was edited: {type(error).__name__}: {error}")


def _unknown(
    what: str, name: str, known: Sequence[str], where: str, short: Sequence[str] = ()
) -> RolemeshError:
    """The error for a name that is none of those known, in full or for short."""
    close = difflib.get_close_matches(name, [*known, *filter(None, short)], n=1)
    return RolemeshError(
        "RM018",
        what=f"there is no {what} {name!r}",
        where=where,
        why=f"there are {', '.join(known) or 'none'}",
        fix=f"did you mean {close[0]!r}?" if close else f"name one of them, if any, as {what}",
    )


def open_run(folder: str | Path, rank: int | None = None) -> Run:
    """A run directory.

    Args:
        folder: The folder; if several ranks wrote to it, one of theirs is opened.
        rank: Which rank's; by default rank 0's.

    Raises:
        RolemeshError: RM035 if it is none, or its index cannot be read.
    """
    path = Path(folder)
    of_rank = path / f"rank_{rank or 0}"
    if of_rank.is_dir() and (rank is not None or not (path / INDEX).is_file()):
        path = of_rank
    elif rank is not None:
        raise unreadable(of_rank, "no rank of that number wrote there")
    if not path.is_dir():
        raise unreadable(path, "there is no such folder")
    index = load_json(path / INDEX)
    require_kind(index, KIND_RUN, path / INDEX)
    try:
        _require_entries(index)
    except (KeyError, TypeError) as error:
        raise _damaged(path / INDEX, error) from error
    return Run(path, index)


def _require_entries(index: Mapping[str, Any]) -> None:
    """Read everything of an index once; the index has no checksum of its own."""
    for program in index["programs"]:
        _ = program["id"] + program["phase"], program["role"]
        files = [(stage, "json") for stage in program["stages"]]
        files += [(graph, "pbtxt") for graph in program.get("ge", [])]
        for entry, kind in files:
            for form in ("text", kind):
                _ = entry[form]["file"] + entry[form]["sha256"]
        _ = [stage["pass"] for stage in program["stages"]]
