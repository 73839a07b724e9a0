"""Training steps behind the front doors: `torch.compile`, and lock-step runs with gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, fx
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from rolemesh.compiler.api import Sharded, step_program
from rolemesh.compiler.capture.entry import Captured
from rolemesh.compiler.capture.joint import capture_joint
from rolemesh.compiler.capture.tracing import drop_training_guards
from rolemesh.compiler.dump.record import writer_for
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.program import InputKind, Program
from rolemesh.compiler.pipeline import ShardOptions, shard_program
from rolemesh.compiler.sized import SizedPrograms, Values
from rolemesh.lowering.targets import Target
from rolemesh.runtime.holder import Holder
from rolemesh.runtime.lockstep import Ledger, assemble_outputs, run_lockstep, scatter_inputs
from rolemesh.runtime.rank import Call
from rolemesh.runtime.step import StepProgram
from rolemesh.runtime.store import default_store

__all__ = ["Steps", "compile_step", "lockstep_gradients"]


class Steps:
    """Rank programs of one captured training step, compiled at first use.

    Args:
        shard: What decides the sharded Programs.
        mesh: The mesh as given.
        target: What rank programs are compiled to.
        target_options: The target's options.
        dump: Folder to write a run directory to.
    """

    def __init__(
        self,
        shard: ShardOptions,
        mesh: Mesh | DeviceMesh,
        target: Target,
        target_options: object,
        dump: str | None = None,
    ) -> None:
        self.shard = shard
        self.mesh = mesh
        self.target = target
        self.target_options = target_options
        self.dump = dump
        self.programs: SizedPrograms[StepProgram] | None = None

    def run(self, captured: Captured, inputs: list[Tensor]) -> list[Tensor]:
        """Run one step; the executor of the captured graph."""
        if self.programs is None:
            compile_program = functools.partial(self._compile, captured.holders)
            self.programs = SizedPrograms(captured.program, compile_program)
        for index, holder in captured.holders.items():
            if inputs[index] is not holder.tensor:
                raise _other_parameter(holder)
        values = captured.program.values(inputs)
        step = self.programs.at(values)
        for index, holder in captured.holders.items():
            inputs[index] = holder.tensor  # a DTensor by now
        return step.run(Call(inputs, default_store(), values, ()))

    def _compile(
        self, holders: Mapping[int, Holder], program: Program, values: Values
    ) -> StepProgram:
        stages = shard_program(program, self.shard, dump=writer_for(self.dump))
        return step_program(stages, self.target, self.target_options, self.mesh, holders, values)


def compile_step(
    steps: Steps, gm: fx.GraphModule, example_inputs: Sequence[object]
) -> Callable[..., object]:
    """Compile one Dynamo graph that trains.

    Args:
        steps: Its programs.
        gm: Dynamo's graph.
        example_inputs: Its inputs.

    Raises:
        RolemeshError: What `capture_joint` raises.
    """
    drop_training_guards()
    return capture_joint(gm, example_inputs, executor=steps.run)[1]


def _other_parameter(holder: Holder) -> RolemeshError:
    return RolemeshError(
        "RM020",
        f"{holder.name} is another parameter than when the step was compiled",
        where="a training step",
        why="a step knows where its model keeps its parameters",
        fix="compile each model by itself, and load weights into the parameters that are there",
    )


def _require_bytes(program: Program, inputs: Sequence[Tensor]) -> None:
    for entry, tensor in zip(program.inputs, inputs, strict=True):
        if isinstance(tensor, DTensor):
            raise RolemeshError(
                "RM024",
                f"{entry.name} is a DTensor",
                where="rolemesh.lockstep_gradients",
                why="it lives as shards of ranks since the model was compiled for role train",
                fix="call the compiled step, or trace a model of its own for lock-step runs",
            )


def lockstep_gradients(
    sharded: Sharded,
    *args: object,
    poison: bool = False,
    check: bool = False,
    ledger: Ledger | None = None,
    **kwargs: object,
) -> tuple[object, Mapping[str, torch.Tensor]]:
    """Run both halves of a training step on every rank in this process.

    The parameters stay as they are.

    Args:
        sharded: What `shard` returned, for role `train`.
        *args: Arguments of the model, whole.
        poison: Fill with NaN whatever a rank must not read, for tests.
        check: Compare every local shape with the Programs' layouts.
        ledger: Called with every exchange.
        **kwargs: Keyword arguments of the model.

    Returns:
        What the model returns, reassembled, and the gradient of the sum of its losses by each
        parameter, by name.

    Raises:
        RolemeshError: RM017 for another role, RM020 if the arguments differ from the traced ones,
            RM024 if parameters are DTensors by now.
    """
    found: dict[str, torch.Tensor] = {}

    def run(captured: Captured, inputs: list[Tensor]) -> list[Tensor]:
        program = captured.program
        _require_bytes(program, inputs)
        values = program.values(inputs)
        stages = sharded.stages
        if not sharded.program.fits(values):
            stages = sharded.shard_again(program.at(values))
        if stages.halves is None:
            raise RolemeshError(
                "RM017",
                "this program has no gradients",
                where=f"program {sharded.program.name}",
                why="it was traced and sharded for inference",
                fix="use rolemesh.trace_training and role 'train', or rolemesh.lockstep",
            )
        forward, backward = stages.halves.forward.at(values), stages.halves.backward.at(values)
        kinds = [entry.kind for entry in program.inputs]
        given = [
            tensor
            for tensor, kind in zip(inputs, kinds, strict=True)
            if kind is not InputKind.TANGENT
        ]
        tangents = [
            tensor for tensor, kind in zip(inputs, kinds, strict=True) if kind is InputKind.TANGENT
        ]
        locals_ = scatter_inputs(forward, given, poison=poison)
        outputs = run_lockstep(forward, locals_, poison=poison, check=check, ledger=ledger)
        known = [*locals_, *outputs]
        ranks = forward.the_mesh.size
        read = [known[i] if i >= 0 else [tangents[-1 - i]] * ranks for i in stages.halves.saved]
        gradients = run_lockstep(
            backward,
            cast(Sequence[Sequence[Tensor]], read),
            poison=poison,
            check=check,
            ledger=ledger,
        )
        whole = assemble_outputs(backward, gradients)
        of = [o.gradient_of for o in program.outputs if o.gradient_of is not None]
        for index, gradient in zip(of, whole, strict=True):
            assert gradient is not None
            found[program.inputs[index].name] = gradient
        results = assemble_outputs(forward, outputs)[: len(program.outputs) - len(of)]
        return cast(list[Tensor], [*results, *whole])

    return sharded.traced.entry.call(run, *args, **kwargs), found
