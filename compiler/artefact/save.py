"""`rolemesh.save`: compiled programs to a folder.

A saved program says no rank, so any process may save it, and one is enough. Processes that save the
same programs at the same path write the same bytes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from rolemesh.compiler.api import Compiled, Lowered, LoweredRanks
from rolemesh.compiler.artefact.calling import encode_convention
from rolemesh.compiler.artefact.folder import (
    CALLING,
    CAPTURED,
    CONSTANTS,
    MANIFEST,
    PARTITIONED,
    canonical,
    program_bytes,
    unwritable,
    write,
)
from rolemesh.compiler.artefact.graphs import keep_graphs
from rolemesh.compiler.artefact.key import here, options_json, target_options_json
from rolemesh.compiler.cache.folder import default_folder
from rolemesh.compiler.cache.programs import program_json, tensor_bytes
from rolemesh.compiler.cache.sharded import Kept
from rolemesh.compiler.cache.text import digest
from rolemesh.compiler.capture.convention import Convention
from rolemesh.compiler.ir.manifest_json import encode_manifest
from rolemesh.compiler.ir.serial_values import Json
from rolemesh.compiler.manifest import manifest
from rolemesh.runtime.rank import RankProgram

__all__ = ["Savable", "kept_for", "save"]

Savable = Compiled | Lowered | LoweredRanks
"""What can be saved: what was compiled here, for this rank or for all, or what is to be compiled
where it is loaded."""


def save(
    compiled: Savable | Sequence[Savable], path: str | os.PathLike[str], *, generation: int = 0
) -> None:
    """Write compiled programs to a folder, for `rolemesh.load` in other processes.

    The folder has the programs, not the weights. It is the same for all ranks: one of them may
    write it, or all. It appears at once; an artefact that is there is replaced.

    Args:
        compiled: What `Lowered.compile()` returned, or the `Lowered` itself, which no process group
            is needed for; of target `ge` also what `Lowered.lockstep()` returned, with the graphs
            of all ranks. Several programs of one model, such as its prefill and its decode, have
            the same options.
        path: The folder.
        generation: Generation of the weights, for the layout manifests.

    Raises:
        RolemeshError: RM044 if a program cannot be saved, programs do not go together, or the
            folder cannot be written.
    """
    given = [compiled] if isinstance(compiled, Savable) else list(compiled)
    programs = [item if isinstance(item, Lowered) else item.lowered for item in given]
    _check(programs)
    first = programs[0]
    files: dict[str, bytes] = {}
    names: list[str] = []
    for lowered in programs:
        name = _name(lowered, names)
        names.append(name)
        for file, content in _files(lowered, generation).items():
            files[f"{name}/{file}"] = content
    convention = first.sharded.traced.convention
    assert isinstance(convention, Convention)
    key: dict[str, Json] = {
        **here(first.target.name),
        "settings": {**convention.settings},
        "options": options_json(first.sharded.options),
        "target": first.target.name,
        "target_options": target_options_json(first.options),
    }
    write(Path(path), {"key": key, "programs": [*names]}, files)
    for item, name in zip(given, names, strict=True):
        keep_graphs(Path(path), name, item)
        if isinstance(item, Compiled):
            _keep(item, files[f"{name}/{PARTITIONED}"])


def _check(programs: Sequence[Lowered]) -> None:
    if not programs:
        raise unwritable("rolemesh.save", "there are no programs", "pass what compile() returned")
    first = programs[0]
    for lowered in programs:
        traced = lowered.sharded.traced
        if isinstance(traced.convention, str):
            raise unwritable(
                traced.program.name,
                traced.convention,
                "change that, or use torch.compile, whose cache keeps such calls too",
            )
        if "meta" in traced.convention.devices:
            raise unwritable(
                traced.program.name,
                "it was traced on the meta device, and says so to the ops that make tensors",
                "trace it on the device that it runs on; tensors whose storage was freed will do",
            )
        same = (
            lowered.sharded.options == first.sharded.options
            and lowered.target is first.target
            and lowered.options == first.options
        )
        if not same:
            raise unwritable(
                lowered.sharded.program.name,
                "the programs have different meshes, roles, options or targets",
                "shard and lower all programs of an artefact alike",
            )


def _name(lowered: Lowered, known: Sequence[str]) -> str:
    """The name of a program: its phase, with a number where that is taken."""
    phase = lowered.sharded.program.phase or "program"
    names = (phase if n == 1 else f"{phase}_{n}" for n in range(1, len(known) + 2))
    return next(name for name in names if name not in known)


def _files(lowered: Lowered, generation: int) -> dict[str, bytes]:
    sharded = lowered.sharded
    traced, captured = sharded.traced, sharded.traced.entry.captured
    convention = traced.convention
    assert isinstance(convention, Convention)
    devices: list[Json] = [tensor.device.type for tensor in captured.constants]
    layouts = manifest(sharded, aliases=convention.aliases, generation=generation)
    try:
        found = {
            CAPTURED: program_bytes(program_json(traced.program)),
            PARTITIONED: program_bytes(program_json(sharded.program)),
            CALLING: canonical(encode_convention(convention) | {"constants": devices}),
            MANIFEST: encode_manifest(layouts),
        }
        if captured.constants:
            found[CONSTANTS] = tensor_bytes(captured.constants)
    except TypeError as error:
        raise unwritable(
            sharded.program.name, str(error), "use torch.compile, which keeps no such program"
        ) from error
    return found


def _keep(compiled: Compiled, partitioned: bytes) -> None:
    """Keep what the target made on this rank, where this rank will look for it."""
    lowered, program = compiled.lowered, compiled.programs.first
    kept = kept_for(partitioned)
    assert isinstance(program, RankProgram), "training steps are not saved"
    if kept is None or program.saved is None:
        return
    hints = lowered.sharded.captured.hints
    place = kept.lowered(lowered.target, lowered.options, compiled.groups, hints)
    if place is not None and place.load() != program.saved:
        place.save(program.saved)


def kept_for(partitioned: bytes) -> Kept | None:
    """Where this machine keeps what targets make of a saved program; None without a cache.

    Args:
        partitioned: Content of the program's file.
    """
    folder = default_folder()
    return None if folder is None else Kept(folder, digest("artefact", partitioned.decode()))
