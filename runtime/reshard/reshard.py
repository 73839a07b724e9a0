"""`rolemesh.reshard`: from one checkpoint on disk to another layout or format.

rolemesh.reshard("hf", "decode.json", "decode")     # files for the ranks of a manifest
rolemesh.reshard("decode", "safetensors", "plain")  # whole tensors again
rolemesh.reshard("dcp", "decode.json").plan.digest  # nothing is written
"""

from __future__ import annotations

import hashlib
import heapq
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from rolemesh.compiler.ir.boxes import distribute
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.manifest import Manifest, StoredTensor
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.runtime.progress import bar
from rolemesh.runtime.reshard.execute import NOTE_BYTES, Work, carry_out
from rolemesh.runtime.reshard.files import read_manifest
from rolemesh.runtime.reshard.journal import Workplace
from rolemesh.runtime.reshard.plan import STAGING_BYTES, Plan, plan_reshard
from rolemesh.runtime.reshard.sinks import SHARD_BYTES, Sink, make_sink
from rolemesh.runtime.reshard.sources import MANIFEST, Source, open_source
from rolemesh.runtime.reshard.units import tasks_of, units_of

__all__ = ["FORMATS", "WHOLE", "Resharded", "reshard"]

FORMATS = ("rank", "safetensors", "dcp")
"""What a checkpoint can be written as; `rolemesh.runtime.reshard.sinks` describes them."""

WHOLE = ("safetensors", "dcp")
"""The formats that need no manifest: tensors are whole, as the source has them."""

_UNIT_BYTES = 4 << 20
"""Most bytes of a unit: enough for disks, and the threads seldom wait for one another."""


@dataclass(frozen=True)
class Resharded:
    """What a reshard did, or would do.

    Attributes:
        plan: The plan between the files of both sides.
        file_format: What is written.
        source: The manifest of the source's files.
        target: The manifest of the files written.
        files: The files with tensors, by rank; a rank that holds nothing may have none.
        nbytes: Bytes of tensors that are written.
        resumed: How many of them an earlier run had written.
        out: Where the checkpoint is; None if nothing was written.
    """

    plan: Plan
    file_format: str
    source: Manifest
    target: Manifest
    files: tuple[str, ...]
    nbytes: int
    resumed: int
    out: Path | None


def reshard(
    source: str | os.PathLike[str],
    target: Manifest | str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    file_format: str | None = None,
    staging: int = STAGING_BYTES,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    progress: bool | None = None,
    note_bytes: int = NOTE_BYTES,
) -> Resharded:
    """Write a checkpoint's tensors in another layout, or another format.

    A run that was stopped goes on where it was when it is called again with equal arguments. The
    folder `out` appears when all of it is there and every byte of the source has been found good.

    Args:
        source: A safetensors file or an index, or a folder with a safetensors checkpoint, a
            checkpoint of torch.distributed.checkpoint, or what this function wrote.
        target: A layout manifest, a file with one, or a folder of files of ranks whose layout is
            wanted; or `safetensors` or `dcp` for whole tensors as the source has them.
        out: The folder to write; None to write nothing.
        file_format: `rank` (a file for each rank, the default for a manifest), `safetensors` (whole
            tensors) or `dcp`.
        staging: Most bytes of tensors in memory.
        shard_bytes: For `safetensors`: bytes of tensors in a file.
        overwrite: Replace a checkpoint that was written here, once the new one is whole; and what
            is left of an unfinished reshard to `out`.
        progress: Show a bar on standard error; None to do so on a terminal.
        note_bytes: Bytes that are written before what is done is noted for a later run.

    Raises:
        RolemeshError: RM032 if the source cannot be read, is damaged or changes meanwhile; RM038 if
            a manifest is invalid; RM039 if source and target do not fit; RM041 if `out` exists or
            cannot be written; RM018 for a bad option. `out` is then what it was.
    """
    wanted, file_format = _target(target, file_format)
    if out is not None:
        _apart(Path(source), Path(out))
    found = open_source(source)
    if wanted is None:
        wanted = _whole(found.manifest)
    same_ranks = (found.kind, file_format) == ("rank", "rank")
    sink = make_sink(file_format, wanted, _order(found, wanted), shard_bytes)
    plan = plan_reshard(
        found.manifest, sink.manifest, processes=None if same_ranks else {}, staging=staging
    )
    tasks = tasks_of(plan, sink.manifest)
    listed = [tasks[name] for name in sink.manifest.tensors if name in tasks]
    limit = max(1, min(staging // 3, _UNIT_BYTES))
    units = tuple(units_of(listed, found.manifest, sink.manifest, limit))
    work = Work(found, sink, units)
    resumed = (
        0
        if out is None
        else _write(work, Path(out), _key(found, sink, plan), overwrite, progress, note_bytes)
    )
    return Resharded(
        plan,
        file_format,
        found.manifest,
        sink.manifest,
        tuple(file.name if file.size else "" for file in sink.files),
        work.nbytes,
        resumed,
        None if out is None else Path(out),
    )


def _write(
    work: Work, out: Path, key: str, overwrite: bool, progress: bool | None, note_bytes: int
) -> int:
    """Do what is left of the work; the bytes that were done before."""
    workplace = Workplace(out, key, overwrite=overwrite)
    resumed = sum(work.written(unit) for unit in work.units[: workplace.done])
    try:
        if workplace.published:
            return work.nbytes
        shown = sys.stderr.isatty() if progress is None else progress
        with bar(work.nbytes, "resharding", shown=shown, done=resumed) as advance:
            carry_out(work, workplace, advance, note_bytes)
    finally:
        workplace.close()
    return resumed


def _target(
    target: Manifest | str | os.PathLike[str], file_format: str | None
) -> tuple[Manifest | None, str]:
    """The manifest that is wanted, None for whole tensors as the source has them; the format."""
    word = target if isinstance(target, str) and target in WHOLE else None
    file_format = file_format or word or "rank"
    if file_format not in FORMATS or (word is not None and file_format != word):
        raise RolemeshError(
            "RM018",
            f"format {file_format!r} cannot be written here",
            where="option file_format",
            why=f"a manifest is written as {', '.join(FORMATS)}"
            if word is None
            else f"target {word!r} names the format already",
            fix="name one of them, or give a layout manifest as the target",
        )
    if word is not None:
        return None, file_format
    if isinstance(target, Manifest):
        return target, file_format
    path = Path(target)
    return read_manifest(path / MANIFEST if path.is_dir() else path), file_format


def _whole(source: Manifest) -> Manifest:
    """Whole tensors, on one rank."""
    alone = Mesh({"rank": 1})
    layout = Layout.replicated(alone)
    tensors = {
        name: StoredTensor(
            tensor.dtype,
            distribute(layout, tensor.distribution.shape, alone),
            tensor.aliases,
            tensor.parts,
        )
        for name, tensor in source.tensors.items()
    }
    return Manifest(alone, tensors, source.role, source.generation)


def _order(source: Source, target: Manifest) -> list[str]:
    """The target's tensors in the order in which what fills them lies in the source's files.

    Where files have tensors in common, and in one order, so do all of them together: each is read
    from its beginning to its end.
    """
    by_file: dict[int, list[tuple[int, str]]] = {}
    for (name, rank, piece), at in source.at.items():
        if not piece:
            by_file.setdefault(rank, []).append((at, name))
    first: dict[str, tuple[int, int]] = {}
    after: dict[str, list[str]] = {}
    waits: dict[str, int] = {}
    for rank in sorted(by_file):
        before = None
        for at, name in sorted(by_file[rank]):
            first.setdefault(name, (rank, at))
            if before is not None:
                after.setdefault(before, []).append(name)
                waits[name] = waits.get(name, 0) + 1
            before = name
    ready = [(place, name) for name, place in first.items() if not waits.get(name)]
    heapq.heapify(ready)
    position: dict[str, int] = {}
    while ready:
        _, name = heapq.heappop(ready)
        position[name] = len(position)
        for other in after.get(name, ()):
            waits[other] -= 1
            if not waits[other]:
                heapq.heappush(ready, (first[other], other))
    last = len(position)  # of tensors that files have in different orders, and empty ones

    def place(name: str) -> tuple[int, tuple[int, int], str]:
        tensor = target.tensors[name]
        names = (name, *tensor.aliases, *(part.name for part in tensor.parts[:1]))
        regions = [region for region in map(source.manifest.find, names) if region is not None]
        own = regions[0].tensor if regions else name
        return position.get(own, last), first.get(own, (0, 0)), name

    return sorted(target.tensors, key=place)


def _key(source: Source, sink: Sink, plan: Plan) -> str:
    """Identifies the bytes that are read, those that are written, and the steps between."""
    if source.checksums is not None:
        read: list[object] = [source.checksums.digest]
    else:
        stats = [(source.folder / file).stat() for file in (*source.files, *source.others)]
        read = [[stat.st_size, stat.st_mtime_ns] for stat in stats]
    found = hashlib.sha256(json.dumps([plan.digest, sink.kind, source.files, read]).encode())
    for file in sink.files:
        found.update(f"{file.name} {file.size} {len(file.parts)}".encode())
        for at, data in file.parts:
            found.update(f"{at} {len(data)}".encode() + data)
    for name, data in sorted(sink.others.items()):
        found.update(f"{name} {len(data)}".encode() + data)
    return found.hexdigest()


def _apart(source: Path, out: Path) -> None:
    """Refuse to write a checkpoint into the one that is read, or over it."""
    one, other = source.resolve(), out.resolve()
    if one == other or one in other.parents or other in one.parents:
        raise RolemeshError(
            "RM041",
            f"{out} cannot be written",
            where=f"source {source}",
            why="one is within the other, and the source is only read",
            fix="name another folder",
        )
