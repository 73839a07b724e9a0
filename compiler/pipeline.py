"""The pass pipeline: options and a traced Program in, one sharded Program out."""

from __future__ import annotations

import dataclasses
import difflib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import fx
from torch.distributed.device_mesh import DeviceMesh

from rolemesh.compiler.dump.record import ProgramRecord, RunWriter
from rolemesh.compiler.dump.torch_trace import trace_stage
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.program import Program, tensor_type
from rolemesh.compiler.ir.spec import P
from rolemesh.compiler.roles import Role, role_named
from rolemesh.lowering.ge.options import GeOptions
from rolemesh.passes.absorb import Absorb
from rolemesh.passes.base import Pass, collection_paused
from rolemesh.passes.bucket import Bucket
from rolemesh.passes.canonicalise import Canonicalise
from rolemesh.passes.classify import StorageClass, StoredTensor, classify, keeps
from rolemesh.passes.compose import Compose, uses_composite_ops
from rolemesh.passes.cost import CostTable
from rolemesh.passes.dispatch import Dispatch
from rolemesh.passes.gather_once import GatherOnce
from rolemesh.passes.halves import Halves, halves
from rolemesh.passes.leave_results import LeaveResults
from rolemesh.passes.partition import Partition
from rolemesh.passes.prefetch import Prefetch
from rolemesh.passes.propagate import Propagate
from rolemesh.passes.push_back import PushBack
from rolemesh.passes.schedule import Schedule
from rolemesh.passes.seed import AxisUse, Seed
from rolemesh.passes.sink import Sink
from rolemesh.passes.tokens import token_inputs
from rolemesh.passes.verify import Verify
from rolemesh.runtime.groups import mesh_of

__all__ = [
    "MeshLike",
    "ShardOptions",
    "Stages",
    "Through",
    "as_mesh",
    "check_options",
    "infer_phase",
    "optimising",
    "shard_program",
]


_O = TypeVar("_O")

Through = Callable[[Pass, Program], Program]
"""Applies a pass to a Program."""


_PER_VALUE: tuple[Pass, ...] = (GatherOnce(), Sink())


def optimising(costs: CostTable, *, composite: bool) -> tuple[Pass, ...]:
    """Passes over collectives that change no result, only what it costs.

    Args:
        costs: Prices.
        composite: Whether the model has composite ops, experts among them.
    """
    routes = (Dispatch(costs),) if composite else ()
    return *_PER_VALUE, *routes, Bucket()


def _apply(step: Pass, program: Program) -> Program:
    return step.apply(program)


@dataclass(frozen=True)
class ShardOptions:
    """What decides a sharded Program, besides the traced one.

    Attributes:
        mesh: The mesh.
        role: A role's name; None shards by annotations alone.
        axis: The mesh axis the role uses; by default `tp` if the mesh has it, else the last one.
        annotations: `P` by pattern over the names of parameters, buffers and inputs.
        costs: Prices of collectives and arithmetic.
        prefetch: Layers ahead that broadcasts start; None for the role's own window.
        optimise: Whether the passes run that change no result, only what it costs.
        memory_budget: In training, share of the activations that may be kept for the backward part;
            what is not kept is computed again.
    """

    mesh: Mesh
    role: str | None = None
    axis: str | None = None
    annotations: Mapping[str, P] = field(default_factory=dict)
    costs: CostTable = field(default_factory=CostTable)
    prefetch: int | None = None
    optimise: bool = True
    memory_budget: float = 1.0

    def __post_init__(self) -> None:
        if self.axis is not None:
            self.mesh.index(self.axis)
        if self.role is not None:
            role_named(self.role)
        if not 0 <= self.memory_budget <= 1:
            raise RolemeshError(
                "RM018",
                what=f"option memory_budget is {self.memory_budget}",
                where="options of torch.compile",
                why="it is the share of the activations that may be kept",
                fix="use a number from 0 to 1",
            )

    @property
    def preset(self) -> Role | None:
        """The role's data."""
        return None if self.role is None else role_named(self.role)

    @property
    def role_axis(self) -> str:
        """The mesh axis the role uses."""
        if self.axis is not None:
            return self.axis
        return "tp" if "tp" in self.mesh.names else self.mesh.names[-1]


MeshLike = Mesh | Mapping[str, int] | DeviceMesh
"""A mesh as users give it."""


def as_mesh(mesh: MeshLike) -> Mesh:
    """The Mesh that a user's mesh describes.

    Raises:
        RolemeshError: RM015 if it describes none.
    """
    if isinstance(mesh, DeviceMesh):
        return mesh_of(mesh)
    if isinstance(mesh, Mesh):
        return mesh
    if isinstance(mesh, Mapping):
        return Mesh(mesh)
    raise RolemeshError(
        "RM015",
        what=f"{mesh!r} is not a mesh",
        where="option mesh",
        why="a mesh is a dict of axis sizes, a rolemesh.Mesh or a DeviceMesh with named dims",
        fix='write for example {"tp": 4}',
    )


def check_options(options: Mapping[str, object], allowed: frozenset[str]) -> None:
    """Refuse options that do not exist.

    Raises:
        RolemeshError: RM018, with the closest option's name.
    """
    for name in options:
        if name not in allowed:
            close = difflib.get_close_matches(name, sorted(allowed), n=1)
            raise RolemeshError(
                "RM018",
                what=f"unknown option {name!r}",
                where="options of torch.compile",
                why=f"the options are {', '.join(sorted(allowed))}",
                fix=f"did you mean {close[0]!r}?" if close else "drop it",
            )


def infer_phase(program: Program, role: Role) -> str:
    """The phase a Program belongs to when the user does not say.

    A role with one phase has no choice. Otherwise one new token per request is decode, and more are
    prefill.
    """
    if len(role.phases) == 1:
        return next(iter(role.phases))
    lengths = {tensor_type(node).shape[1] for node in token_inputs(program)}
    return "decode" if lengths == {1} else "prefill"


@dataclass(frozen=True)
class Stages:
    """A Program on its way through the pipeline.

    Attributes:
        decided: With a layout per value and a decision per op; None if it was read from a file.
        partitioned: On local tensors, with collectives, verified.
        record: Where the stages were written, if they were.
        halves: Of a training step, what runs forward and what runs backward.
        graphs: Folder for GE graphs of the partitioned Program, unless options name one.
    """

    decided: Program | None
    partitioned: Program
    record: ProgramRecord | None = None
    halves: Halves | None = None
    graphs: Path | None = None

    @contextmanager
    def lowering(self, options: _O) -> Iterator[_O]:
        """Lower the Program inside the block, with these options of its target.

        If stages are written, what is given has the GE graphs written next to them.
        """
        if not isinstance(options, GeOptions):
            yield options
            return
        chosen: GeOptions = options
        if self.graphs is not None and options.cache is None:
            chosen = dataclasses.replace(options, cache=str(self.graphs), cache_required=False)
        with nullcontext(chosen) if self.record is None else self.record.lowering(chosen) as given:
            yield given  # type: ignore[misc] # GeOptions, as given


def shard_program(
    program: Program,
    options: ShardOptions,
    phase: str | None = None,
    stored: Mapping[int, Layout] | None = None,
    dump: RunWriter | None = None,
    through: Through = _apply,
) -> Stages:
    """Run the pipeline.

    Args:
        program: A traced Program.
        options: What to shard it for.
        phase: Phase of the role; inferred if None.
        stored: Layouts of inputs that live as shards already, by position.
        dump: Where to write the Program after every pass.
        through: Applies each pass; tools that watch the passes give their own.

    Returns:
        The decided and the partitioned, verified Program.

    Raises:
        RolemeshError: RM004 for an unknown phase, RM007 if the phase decodes without a cache, and
            what the passes raise.
    """
    role = options.preset
    captured, started = program, time.perf_counter()
    with collection_paused():
        program = through(Canonicalise(), program)
    seconds = time.perf_counter() - started
    axes: Mapping[str, AxisUse] = {}
    name = options.role or program.name
    if role is not None:
        phase = infer_phase(program, role) if phase is None else phase
        axes = role.uses(phase, options.mesh, options.role_axis)
        _require_trace(program, role)
        name = f"{role.name}.{phase}"
        if phase == "decode":
            _require_cache(program, role)
    program = dataclasses.replace(program, name=name, phase=phase or "")
    record = None if dump is None else dump.program(options.role, phase or "")
    window = options.prefetch if options.prefetch is not None else (role.prefetch if role else 1)
    seed = Seed(options.mesh, axes, options.annotations, stored or {})
    stays = {name: use.stays for name, use in axes.items()}
    try:
        with collection_paused():
            if record is not None:
                record.stage(captured, "capture")
                record.stage(program, Canonicalise.name, seconds)
            trace_stage(captured, name)
            trace_stage(program, name)
            absorb = (Absorb(options.costs),) if options.optimise else ()
            composite = uses_composite_ops(program)
            compose = (Compose(),) if options.optimise and composite else ()
            propagate = Propagate(options.costs, stays=stays)
            leave = (LeaveResults(),) if role is not None and role.trains else ()
            push_back = PushBack(options.costs, stays)
            decide = (*compose, seed, *absorb, propagate, *leave, push_back)
            decided = _run(decide, program, record, through)
            late = (Prefetch(window), *((Schedule(window),) if options.optimise else ()), Verify())
            if role is not None and role.trains:
                joint = _run((Partition(), *_PER_VALUE, Verify()), decided, record, through)
                parts = halves(joint, options.memory_budget)
                each = (*((Bucket(),) if options.optimise else ()), *late)
                forward = _run(each, parts.forward, record, through)
                backward = _run(each, parts.backward, record, through)
                return Stages(decided, joint, record, Halves(forward, backward))
            cheaper: tuple[Pass, ...] = ()
            if options.optimise:
                cheaper = optimising(options.costs, composite=composite)
            partitioned = _run((Partition(), *cheaper, *late), decided, record, through)
            return Stages(decided, partitioned, record)
    finally:
        if record is not None:
            record.finish()


def _run(
    passes: Sequence[Pass], program: Program, record: ProgramRecord | None, through: Through
) -> Program:
    for step in passes:
        started = time.perf_counter()
        program = through(step, program)
        if record is not None:
            record.stage(program, step.name, time.perf_counter() - started)
        trace_stage(program, program.name)
    return program


def _require_trace(program: Program, role: Role) -> None:
    """Refuse to train without gradients, or to serve with them."""
    if program.is_joint is role.trains:
        return
    raise RolemeshError(
        "RM017",
        what=f"role {role.name!r} was given a trace {'with' if program.is_joint else 'without'} "
        "gradients",
        where=f"program {program.name}",
        why="a training role runs forward and backward, others run forward only",
        fix="use rolemesh.trace_training for role 'train', and rolemesh.trace for others",
    )


def _require_cache(program: Program, role: Role) -> None:
    """Refuse to decode without a cache.

    A piece of a model that Dynamo captured in pieces needs none if it computes no attention of its
    own: an MLP, or the layers' embedding.
    """
    if any(
        keeps(node, entry) for node, entry in zip(program.placeholders, program.inputs, strict=True)
    ):
        return
    classes = classify(program)
    kinds = {stored.kind for stored in classes.values()}
    if StorageClass.QUERY in kinds or _from_ids_to_logits(program, classes):
        raise RolemeshError(
            "RM007",
            what=f"role {role.name!r} decodes with a cache, but this call updates none",
            where="the model's arguments",
            why="no input of the captured graph is a cache that the model writes to",
            fix="pass past_key_values=StaticCache(...) with its tensors allocated, use_cache=True",
        )


def _from_ids_to_logits(program: Program, classes: Mapping[fx.Node, StoredTensor]) -> bool:
    """Whether a Program is a language model from end to end: its head is as wide as its table."""
    tables = {
        tensor_type(node.all_input_nodes[0]).shape[0]
        for node in program.ops
        if node.target is torch.ops.aten.embedding.default
    }
    return any(
        stored.kind is StorageClass.LM_HEAD and tensor_type(node).shape[stored.out_dim] in tables
        for node, stored in classes.items()
    )
