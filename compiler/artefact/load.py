"""`rolemesh.load`: an artefact to compiled programs over a model, without Dynamo and AOTAutograd.

Invariants:

* Nothing of an artefact is used before all of it was checked: bytes, key, model, options, ranks.
* Ranks load the same artefact, or none of them loads it.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
from torch import nn

from rolemesh.compiler.api import Compiled, Lowered, Sharded
from rolemesh.compiler.artefact.calling import (
    SavedEntry,
    decode_convention,
    unlike_traced,
    weights_of,
)
from rolemesh.compiler.artefact.folder import (
    CALLING,
    CAPTURED,
    CONSTANTS,
    PARTITIONED,
    Folder,
    damaged,
    read_files,
    read_folder,
)
from rolemesh.compiler.artefact.graphs import graphs_in
from rolemesh.compiler.artefact.key import (
    differences,
    here,
    misfit,
    model_differences,
    options_from,
    options_json,
    target_options_from,
    target_options_json,
)
from rolemesh.compiler.artefact.ranks import Meeting, join_world
from rolemesh.compiler.artefact.save import Savable, kept_for, save
from rolemesh.compiler.cache.programs import program_from, signature_from, tensors_from
from rolemesh.compiler.cache.sharded import Kept
from rolemesh.compiler.capture.convention import Convention, Difference
from rolemesh.compiler.capture.entry import Captured, reference_executor
from rolemesh.compiler.capture.tracing import Traced
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.program import Program
from rolemesh.compiler.ir.serial_values import Json
from rolemesh.compiler.ir.spec import P
from rolemesh.compiler.pipeline import MeshLike, Stages, as_mesh
from rolemesh.lowering.ge.options import GeOptions
from rolemesh.lowering.targets import target as target_named
from rolemesh.passes.base import collection_paused
from rolemesh.passes.cost import CostTable
from rolemesh.runtime.phase import current_phase

__all__ = ["ArtefactWarning", "Loaded", "Saved", "load", "open_artefact"]


class ArtefactWarning(UserWarning):
    """An artefact was not used, and its programs were compiled again."""


@dataclass(frozen=True, eq=False)
class Saved(Sharded):
    """A sharded Program from an artefact.

    Attributes:
        place: Where this machine keeps what targets make of it; None for nowhere.
    """

    place: Kept | None = None

    @property
    def captured(self) -> Program:
        """The traced Program, without its ops unless it is to be sharded for other sizes."""
        return self.traced.entry.captured.program

    def kept(self, program: Program) -> Kept | None:
        """Where this process keeps what targets make of a sharded Program; None for nowhere."""
        return self.place if program is self.program else None


@dataclass(frozen=True, eq=False)
class Loaded:
    """Compiled programs of one model, which share its weights.

    Attributes:
        programs: The programs, in the order in which they were saved.
    """

    programs: tuple[Compiled, ...]

    def __call__(self, *args: object, **kwargs: object) -> object:
        """What the model returns, computed by all ranks; every rank must make the call.

        Of several programs the one that takes the arguments runs; inside
        `with rolemesh.phase("decode")`, one of that phase.

        Raises:
            RolemeshError: RM020 if no program takes the arguments, RM004 for a phase that none has.
        """
        phase = current_phase()
        chosen = [p for p in self.programs if phase in (None, p.sharded.program.phase)]
        if not chosen:
            phases = ", ".join(p.sharded.program.phase for p in self.programs)
            raise RolemeshError(
                "RM004",
                f"the artefact has no program for phase {phase!r}",
                where="the loaded programs",
                why=f"their phases are {phases}",
                fix="use one of these, or save a program of that phase too",
            )
        if len(chosen) == 1:
            return chosen[0](*args, **kwargs)
        found = []
        for program in chosen:
            entry = program.sharded.traced.entry
            assert isinstance(entry, SavedEntry)
            unlike = entry.differences(args, kwargs)
            if not unlike:
                return program(*args, **kwargs)
            found += [d._replace(name=f"{program.sharded.program.name}: {d.name}") for d in unlike]
        raise unlike_traced(found)


def load(
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    mesh: MeshLike | None = None,
    role: str | None = None,
    axis: str | None = None,
    annotations: Mapping[str, P] | None = None,
    costs: CostTable | None = None,
    prefetch: int | None = None,
    optimise: bool | None = None,
    target: str | None = None,
    options: Mapping[str, object] | None = None,
    broadcast: bool = False,
    recompile: Callable[[], Savable | Sequence[Savable]] | None = None,
) -> Loaded:
    """Compiled programs from a folder that `rolemesh.save` wrote, over the weights of a model.

    Nothing is traced and no pass runs. Every rank must call it, and gets its own part.

    Args:
        path: The folder.
        model: A model like the one that was traced. Its tensors have the same names, shapes and
            dtypes; they may live as shards already.
        mesh: The mesh that is expected; a DeviceMesh's groups are used. By default the saved one.
        role: The role that is expected.
        axis: The same of the mesh axis that the role uses.
        annotations: The same of the layouts by name.
        costs: The same of the prices.
        prefetch: The same of the layers ahead that broadcasts start.
        optimise: The same of whether passes ran that only make programs cheaper.
        target: The same of the target.
        options: The same of the target's options.
        broadcast: Only rank 0 has the folder, and hands it to the others.
        recompile: Traces, shards and compiles the programs. It is called, with a warning, if the
            artefact is missing, damaged or made for something else; what it returns is saved.

    Raises:
        RolemeshError: On every rank, without `recompile`: RM042 if the artefact is missing or
            damaged, RM043 if it was made for something else, with the fields that differ. What
            compiling raises: RM005 or RM006 if the process group does not fit the mesh.
    """
    expected = _Expected(mesh, role, axis, annotations, costs, prefetch, optimise, target, options)
    join_world()
    meeting = Meeting()
    try:
        with collection_paused():  # it makes many objects, and no garbage
            lowered = _restored(Path(path), model, expected, meeting, broadcast=broadcast)
            return Loaded(tuple(entry.compile() for entry in lowered))
    except RolemeshError as error:
        if recompile is None or error.code not in ("RM042", "RM043"):
            raise
        warnings.warn(f"{error}\n  the programs are compiled again", ArtefactWarning, stacklevel=2)
    made = recompile()
    given = [made] if isinstance(made, Savable) else list(made)
    compiled = tuple(map(_compiled, given))
    if meeting.rank == 0 or not broadcast:
        _save_again(compiled, path)
    return Loaded(compiled)


def _compiled(item: Savable) -> Compiled:
    if isinstance(item, Compiled):
        return item
    return item.compile() if isinstance(item, Lowered) else item.lowered.compile()


def _save_again(compiled: Sequence[Compiled], path: str | os.PathLike[str]) -> None:
    try:
        save(compiled, path)
    except RolemeshError as error:
        warnings.warn(f"{error}\n  the next process compiles again", ArtefactWarning, stacklevel=3)


@dataclass(frozen=True)
class _Expected:
    """Options that a caller gave: those that are not None."""

    mesh: MeshLike | None = None
    role: str | None = None
    axis: str | None = None
    annotations: Mapping[str, P] | None = None
    costs: CostTable | None = None
    prefetch: int | None = None
    optimise: bool | None = None
    target: str | None = None
    options: Mapping[str, object] | None = None
    ranks: int | None = None

    def differences(self, key: Mapping[str, Any]) -> list[Difference]:
        """What a key has otherwise."""
        saved = options_from(key["options"])
        names = ("role", "axis", "annotations", "costs", "prefetch", "optimise")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.mesh is not None:
            given["mesh"] = as_mesh(self.mesh)
        found = [*differences(key["options"], options_json(replace(saved, **given)), "options")]
        if self.ranks is not None and self.ranks != saved.mesh.size:
            found.append(Difference("ranks", str(saved.mesh.size), str(self.ranks)))
        if self.target is not None:
            found += differences(key["target"], self.target, "target")
        if self.options is not None:
            chosen = target_named(self.target or key["target"])
            wanted = target_options_json(chosen.parse(self.options))
            found += differences(key["target_options"], wanted, "target_options")
        return found


def open_artefact(path: str | os.PathLike[str], model: nn.Module) -> tuple[Lowered, ...]:
    """The programs of an artefact, to be compiled for this rank, or run in lock-step.

    Args:
        path: The folder.
        model: A model like the one that was traced.

    Raises:
        RolemeshError: RM042 or RM043; see `load`.
    """
    return _programs(read_folder(Path(path)), model, _Expected())


def _restored(
    path: Path, model: nn.Module, expected: _Expected, meeting: Meeting, *, broadcast: bool
) -> tuple[Lowered, ...]:
    """The programs, if all ranks can have the same."""
    problem: RolemeshError | None = None
    found: tuple[Lowered, ...] = ()
    said = ""
    try:
        read = functools.partial(read_files, path)
        contents = meeting.from_first(read) if broadcast else read()
        if not contents:
            raise damaged(path, "rank 0 could not read it")
        folder = Folder.of(path, contents)
        ranks = meeting.size if dist.is_initialized() else None
        found = _programs(folder, model, replace(expected, ranks=ranks))
        said = folder.digest
    except RolemeshError as error:
        if error.code not in ("RM042", "RM043"):
            raise
        problem = error
    everyone = meeting.said(said)
    if problem is not None:
        raise problem
    for rank, text in enumerate(everyone):
        if text != said:
            why = f"rank {rank} has another artefact" if text else f"rank {rank} cannot use it"
            raise damaged(path, why)
    return found


def _programs(folder: Folder, model: nn.Module, expected: _Expected) -> tuple[Lowered, ...]:
    """The programs of an artefact, once everything was compared.

    Raises:
        RolemeshError: RM042 or RM043.
    """
    try:
        return _decoded(folder, model, expected)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        why = f"its content makes no sense: {type(error).__name__}: {error}"
        raise damaged(folder.path, why) from error


def _decoded(folder: Folder, model: nn.Module, expected: _Expected) -> tuple[Lowered, ...]:
    key = cast(dict[str, Any], folder.index["key"])
    saved: dict[str, Json] = {name: key[name] for name in ("versions", "settings")}
    _require_none([*differences(saved, here(key["target"]))], folder)  # others may write other keys
    found = expected.differences(key)
    names = cast(list[str], folder.index["programs"])
    called = {name: folder.json(f"{name}/{CALLING}") for name in names}
    conventions = {name: decode_convention(data) for name, data in called.items()}
    found += model_differences([*conventions.values()], model)
    _require_none(found, folder)
    partitioned = {name: folder.json(f"{name}/{PARTITIONED}") for name in names}
    captured = {name: _captured(folder, name, partitioned[name]) for name in names}
    devices = dict.fromkeys(d for convention in conventions.values() for d in convention.devices)
    weights, found = weights_of([*captured.values()], model, devices)
    _require_none(found, folder)
    options = options_from(key["options"])
    target = target_named(key["target"])
    chosen = target_options_from(target, key["target_options"])
    mesh = expected.mesh if expected.mesh is not None else options.mesh
    programs = []
    for name in names:
        graphs = graphs_in(folder.path, name) if _keeps_graphs(chosen) else None
        stages = Stages(None, program_from(partitioned[name]), graphs=graphs)
        constants = tensors_from(
            folder.files.get(f"{name}/{CONSTANTS}", b""), called[name]["constants"]
        )
        graph = Captured(captured[name], constants, reference_executor, (), ())
        entry = SavedEntry(model, weights, graph, conventions[name])
        read = functools.partial(_whole, folder, name)
        traced = _Trace(entry, conventions[name], read)
        place = kept_for(folder.files[f"{name}/{PARTITIONED}"])
        sharded = Saved(traced, options, stages, mesh, None, place)
        programs.append(Lowered(sharded, target, chosen))
    return tuple(programs)


def _keeps_graphs(options: object) -> bool:
    return isinstance(options, GeOptions) and options.cache is None


def _require_none(found: Sequence[Difference], folder: Folder) -> None:
    if found:
        raise misfit(str(folder.path), list(dict.fromkeys(found)))


def _captured(folder: Folder, name: str, partitioned: dict[str, Any]) -> Program:
    """A captured Program; of plain sizes, its signature: no other sizes are made of it.

    That is the signature of the partitioned Program too, whose inputs and outputs are the same.
    """
    signature = signature_from(partitioned)
    return signature if signature.scope is None else _whole(folder, name)


def _whole(folder: Folder, name: str) -> Program:
    return program_from(folder.json(f"{name}/{CAPTURED}"))


class _Trace(Traced):
    """A trace of another process, whose Program is read when it is asked for."""

    def __init__(self, entry: SavedEntry, convention: Convention, read: Callable[[], Program]):
        vars(self).update(entry=entry, convention=convention, read=read)

    @cached_property
    def program(self) -> Program:
        """The captured Program."""
        found: Program = vars(self)["read"]()
        return found
