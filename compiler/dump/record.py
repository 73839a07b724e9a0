"""Writing a run directory while the compiler works.

A `RunWriter` belongs to one folder of one process; `writer_for` gives it. Each time a Program is
sharded, its `program` makes a `ProgramRecord`, which takes the Program after every pass and writes
it at once, so that the stages before a pass that fails are there to look at. The index is written
once the passes have run, or failed; it names only files that are whole.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed as dist

from rolemesh import __version__
from rolemesh.compiler.dump.files import (
    INDEX,
    KIND_RUN,
    SCHEMA_VERSION,
    checksum,
    load_json,
    stage_name,
)
from rolemesh.compiler.dump.index_page import index_page
from rolemesh.compiler.dump.stage_json import StageEncoder, unchanged
from rolemesh.compiler.ir.atomic import write_whole
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.ledger import collectives
from rolemesh.compiler.ir.program import Program
from rolemesh.compiler.ir.serial_values import Json
from rolemesh.compiler.ir.text import first_line, program_text
from rolemesh.lowering.ge.files import safe_name
from rolemesh.lowering.ge.options import GeOptions
from rolemesh.runtime.config import Config, Torchrun

__all__ = ["ProgramRecord", "RunWriter", "writer_for"]


class ProgramRecord:
    """One Program on its way through the passes.

    Attributes:
        base: `<role>/<phase>`; several Programs of one phase are numbered.
        folder: Where its files are.
        seconds: Seconds that each pass took, by stage name. Not written: no two runs agree.
    """

    def __init__(self, run: RunWriter, base: str, name: str, role: str | None, phase: str) -> None:
        self._run = run
        self.base = base
        self._encoder = StageEncoder()
        self._last: tuple[Program, str] | None = None
        self.folder = run.folder / name
        self.seconds: dict[str, float] = {}
        self.entry: dict[str, Json] = {"id": name, "role": role, "phase": phase, "stages": []}

    def stage(self, program: Program, pass_name: str, seconds: float = 0.0) -> None:
        """Write the Program after a pass."""
        started = time.perf_counter()
        stages = self.entry["stages"]
        assert isinstance(stages, list)
        name = stage_name(len(stages), pass_name)
        mesh = program.mesh
        moved = collectives(program) if "partition" in program.history else ()
        entry: dict[str, Json] = {
            "number": len(stages),
            "pass": pass_name,
            "nodes": sum(1 for _ in program.ops),
            "collectives": len(moved),
            "bytes": sum(int(record.bytes_received) for record in moved),
            "text": self._write(f"{name}.txt", self._text(program)),
            "json": self._write(
                f"{name}.json", self._encoder.encode(program, pass_name, len(stages))
            ),
        }
        if mesh is not None:
            self.entry["mesh"] = dict(zip(mesh.names, mesh.sizes, strict=True))
        stages.append(entry)
        self.seconds[name] = seconds
        self._run.seconds += time.perf_counter() - started

    def finish(self) -> None:
        """Write the index. No stage follows."""
        self._encoder, self._last = StageEncoder(), None  # they hold the graphs
        self._run.write_index()

    def _text(self, program: Program) -> str:
        """The Program's text; that of the stage before where only the first line differs."""
        if self._last is not None and unchanged(self._last[0], program):
            body = self._last[1]
        else:
            body = program_text(program).partition("\n")[2]
        self._last = program, body
        return f"{first_line(program)}\n{body}"

    @contextmanager
    def lowering(self, options: GeOptions) -> Iterator[GeOptions]:
        """Lower the Program inside the block with the options that this gives.

        The graphs are then written here, unless the options name another folder.
        """
        if options.dump is not None:
            yield options
            return
        folder = self.folder / "ge"
        yield dataclasses.replace(options, dump=str(folder))
        graphs = sorted(folder.glob("*.pbtxt"), key=_rank)
        self.entry["ge"] = [self._graph(path) for path in graphs]
        self._run.write_index()

    def _write(self, name: str, text: str) -> dict[str, Json]:
        content = text.encode()
        self._run.write(self.folder / name, content)
        return self._file(self.folder / name, content)

    def _graph(self, path: Path) -> dict[str, Json]:
        found: dict[str, Json] = {"rank": _rank(path)}
        for kind, file in (("text", path.with_suffix(".txt")), ("pbtxt", path)):
            found[kind] = self._file(file, file.read_bytes())
        return found

    def _file(self, path: Path, content: bytes) -> dict[str, Json]:
        return {"file": path.relative_to(self._run.folder).as_posix(), "sha256": checksum(content)}


def _rank(graph: Path) -> int:
    """The rank whose graph a file `<role>.<phase>.rank<r>.pbtxt` has."""
    return int(graph.stem.rpartition(".rank")[2])


class RunWriter:
    """The run directory of one process.

    Args:
        folder: The folder. What an earlier run wrote there is replaced.

    Attributes:
        folder: The folder.
        seconds: Seconds that writing took.

    Raises:
        RolemeshError: RM036 if the folder has other files, or cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seconds = 0.0
        self.programs: list[ProgramRecord] = []
        self._clear()
        self.write_index()

    def program(self, role: str | None, phase: str) -> ProgramRecord:
        """Start to record a Program of a role's phase; each has a folder of its own."""
        base = f"{safe_name(role or 'no_role')}/{safe_name(phase or 'call')}"
        number = 1 + sum(record.base == base for record in self.programs)
        name = base if number == 1 else f"{base}.{number}"
        record = ProgramRecord(self, base, name, role, phase)
        self.programs.append(record)
        return record

    def write_index(self) -> None:
        """Write `index.json` and `index.md`."""
        programs: list[Json] = [record.entry for record in self.programs]
        index: dict[str, Json] = {
            "schema_version": SCHEMA_VERSION,
            "kind": KIND_RUN,
            "rolemesh": __version__,
            "torch": torch.__version__,
            "programs": programs,
        }
        self.write(self.folder / "index.md", index_page(index).encode())
        self.write(self.folder / INDEX, (json.dumps(index, indent=1) + "\n").encode())

    def write(self, path: Path, content: bytes) -> None:
        """Write one whole file."""
        with self._refusing():
            write_whole(path, content, parents=True)

    def _clear(self) -> None:
        """Remove what an earlier run wrote, as its index lists it, and nothing else."""
        with self._refusing():
            self.folder.mkdir(parents=True, exist_ok=True)
            present = [path for path in self.folder.iterdir() if not path.name.startswith("rank_")]
            if not present:
                return
            if not (self.folder / INDEX).is_file():
                raise _not_empty(self.folder)
            index = load_json(self.folder / INDEX)
            if index.get("kind") != KIND_RUN:
                raise _not_empty(self.folder)
            for name in (*_listed(index), INDEX, "index.md"):
                self._remove(Path(name))

    def _remove(self, name: Path) -> None:
        """Remove a file of the folder, and the folders that it leaves empty."""
        if name.is_absolute() or ".." in name.parts:
            return  # the index was edited
        (self.folder / name).unlink(missing_ok=True)
        with suppress(OSError):  # raised by the first that is not empty
            for parent in name.parents[:-1]:
                (self.folder / parent).rmdir()

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RolemeshError(
                "RM036",
                what=f"cannot write the run directory {str(self.folder)!r}",
                where="option dump, or ROLEMESH_DUMP",
                why=f"{type(error).__name__}: {error}",
                fix="name a folder that this process can make, or write to",
            ) from error


def _listed(value: object) -> Iterator[str]:
    """Paths of all files that an index names, relative to its folder."""
    if isinstance(value, dict) and isinstance(value.get("file"), str):
        yield value["file"]
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _listed(item)


def _not_empty(folder: Path) -> RolemeshError:
    return RolemeshError(
        "RM036",
        what=f"{str(folder)!r} has files that are not a run directory's",
        where="option dump, or ROLEMESH_DUMP",
        why="a run directory that is there already is replaced, and nothing else is touched",
        fix="name an empty or new folder",
    )


_WRITERS: dict[tuple[int, Path], RunWriter] = {}


def writer_for(folder: str | None) -> RunWriter | None:
    """This process's writer of a folder; of several ranks, each has a subfolder `rank_<r>`.

    Args:
        folder: The folder; by default what ROLEMESH_DUMP says.

    Returns:
        The writer; None if no folder is named.

    Raises:
        RolemeshError: RM036 if the folder cannot be used.
    """
    folder = folder or Config.read().dump
    if folder is None:
        return None
    path = Path(folder).absolute()
    launched = Torchrun.read()
    if dist.is_initialized():
        rank, ranks = dist.get_rank(), dist.get_world_size()
    else:
        rank, ranks = (launched.rank, launched.world_size) if launched else (0, 1)
    if ranks > 1:
        path = path / f"rank_{rank}"
    key = (os.getpid(), path)  # a forked process is another run
    if key not in _WRITERS:
        _WRITERS[key] = RunWriter(path)
    return _WRITERS[key]
