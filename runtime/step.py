"""One rank's training step: forward and backward Programs behind an autograd function.

Parameters come and go as DTensors, results with dims are DTensors where they were computed, losses
are plain numbers that every rank has. What the forward part saves lives until backward has run.

Invariant: all ranks make the same calls in the same order. Calls without gradients run the forward
part alone.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import sympy
import torch
from torch import fx
from torch.distributed.device_mesh import DeviceMesh

from rolemesh.compiler.ir.dims import concrete, evaluator, replaced
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.program import InputKind, Program, tensor_type
from rolemesh.compiler.ir.tensor import TensorType
from rolemesh.lowering.bind import bind
from rolemesh.lowering.chunks import scatter_one
from rolemesh.lowering.signature import Signature
from rolemesh.lowering.sizes import Examples
from rolemesh.lowering.targets import Runnable, Target
from rolemesh.passes.halves import Halves
from rolemesh.runtime.groups import MeshGroups
from rolemesh.runtime.holder import Holder
from rolemesh.runtime.parameters import Place, convert
from rolemesh.runtime.rank import Call, process_watch

__all__ = ["StepProgram"]

_Values = Mapping[sympy.Symbol, int]


class _Lowered:
    """One half, compiled for this rank.

    Args:
        program: The half.
        target: The target.
        options: Its options.
        groups: Process groups of the mesh.
        values: Values of symbols to compile by.
        given: Example inputs, whose strides to compile for; contiguous ones by default.
    """

    def __init__(
        self,
        program: Program,
        target: Target,
        options: object,
        groups: MeshGroups,
        values: _Values | None,
        given: Sequence[torch.Tensor] = (),
    ) -> None:
        self.examples = Examples(program, groups.rank, values)
        inputs = list(self.examples.inputs)
        if program.scope is None:  # else strides are formulas, and inputs are made contiguous
            for index, tensor in enumerate(given):
                inputs[index] = torch.empty_strided(
                    tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
                )
        self.strides = [x.stride() if isinstance(x, torch.Tensor) else () for x in inputs]
        self.plain = program.scope is None
        module = bind(program, groups.rank, groups.names)
        signature = Signature.of(program, groups.rank)
        self._run: Runnable = target.lower(module, inputs, signature, options)

    def run(
        self, inputs: Sequence[torch.Tensor], symbols: tuple[int, ...]
    ) -> tuple[torch.Tensor | None, ...]:
        """Run it on local tensors, in the strides that it was compiled for."""
        ready = [
            tensor if self._fits(tensor, stride) else tensor.contiguous()
            for tensor, stride in zip(inputs, self.strides, strict=False)
        ]
        return self._run(*ready, *symbols)

    def _fits(self, tensor: torch.Tensor, stride: tuple[int, ...]) -> bool:
        return tensor.stride() == stride if self.plain else tensor.is_contiguous()


class StepProgram:
    """A training step bound to this process's rank and compiled for a target.

    Args:
        joint: The joint Program, partitioned.
        parts: Its halves.
        target: The target.
        options: Its options, as `Target.parse` returns them.
        groups: Process groups of the mesh.
        device_mesh: The mesh of the parameters, over the same groups.
        values: Values of the symbols of its sizes to compile by, an example.

    Raises:
        RolemeshError: RM003 for a target that has no backward part.
    """

    def __init__(
        self,
        joint: Program,
        parts: Halves,
        target: Target,
        options: object,
        groups: MeshGroups,
        device_mesh: DeviceMesh,
        values: _Values | None = None,
    ) -> None:
        if target.name not in _TARGETS:
            raise RolemeshError(
                "RM003",
                what=f"target {target.name!r} does not train",
                where="role train",
                why="its graphs are made for inference",
                fix=f"use one of {', '.join(_TARGETS)}",
            )
        self.program = joint
        self.rank = groups.rank
        self.mesh = joint.the_mesh
        self.device_mesh = device_mesh
        self.watch = process_watch()
        self.forward = _Lowered(parts.forward, target, options, groups, values)
        self._backward: _Lowered | None = None
        self._lower_backward = functools.partial(
            _Lowered, parts.backward, target, options, groups, values
        )
        self.saved = parts.saved
        self.given = [
            i for i, entry in enumerate(joint.inputs) if entry.kind is not InputKind.TANGENT
        ]
        self.results = sum(output.gradient_of is None for output in joint.outputs)
        self.gradient_of = tuple(
            output.gradient_of for output in joint.outputs if output.gradient_of is not None
        )
        self.places: dict[int, Place] = {}
        for index, (node, entry) in enumerate(zip(joint.placeholders, joint.inputs, strict=True)):
            if entry.kind is InputKind.PARAMETER:
                self.places[index] = self._place(entry.name, joint.layout(node), tensor_type(node))
        for index in self.gradient_of:
            if index not in self.places:
                raise _not_a_parameter(joint.inputs[index].name)
        self.result_places: dict[int, Place] = {}
        for index, output in enumerate(joint.outputs[: self.results]):
            value = joint.results[index]
            assert isinstance(value, fx.Node)
            if output.mutates is None and tensor_type(value).shape and joint.scope is None:
                layout, kind = joint.output_layout(index), tensor_type(value)
                self.result_places[index] = self._place(f"result {index}", layout, kind)
        self._layouts = [joint.layout(node) for node in joint.placeholders]

    def _place(self, name: str, layout: Layout, kind: TensorType) -> Place:
        return Place(name, layout, kind.shape, kind.dtype, self.device_mesh, self.mesh)

    def convert(self, holders: Mapping[int, Holder]) -> None:
        """Put DTensors in the place of parameters.

        Args:
            holders: Where they are kept, by input.
        """
        convert([(holder, self.places[i]) for i, holder in holders.items()], self.rank)

    def serves(self, values: _Values) -> bool:
        """Whether it is right for these values of the symbols of its sizes."""
        halves = [half for half in (self.forward, self._backward) if half is not None]
        return self.program.fits(values) and all(half.examples.hold(values) for half in halves)

    def backward(self, inputs: Sequence[torch.Tensor]) -> _Lowered:
        """The backward half, lowered when it is first asked for.

        Args:
            inputs: Its inputs. Their strides are those that the forward half's ops gave them.
        """
        if self._backward is None:
            self._backward = self._lower_backward(inputs)
        return self._backward

    def run(self, call: Call) -> list[torch.Tensor]:
        """Run one step, or its forward part if gradients are disabled.

        Args:
            call: Global inputs, parameters as DTensors, and the values of symbols. Tangents are not
                read: autograd brings them.

        Returns:
            The joint Program's results; gradients go to autograd, and are not there.
        """
        inputs = call.inputs
        locals_ = [self._local(index, inputs[index], call.values) for index in self.given]
        one = _Call(self, locals_, call.values, torch.is_grad_enabled())
        results = _Step.apply(one, *(inputs[index] for index in self.gradient_of))  # type: ignore[no-untyped-call]
        return [*results, *(None for _ in self.gradient_of)]

    def _local(self, index: int, tensor: torch.Tensor, values: _Values) -> torch.Tensor:
        place = self.places.get(index)
        if place is not None:
            return place.local(tensor)
        layout = self._layouts[index]
        if layout.canonical(self.mesh).is_replicated:
            return tensor.detach().contiguous()
        if self.program.scope is not None:
            layout = Layout(concrete(layout.placements, values))
        return scatter_one(tensor.detach(), layout, self.mesh, self.rank)

    def result(self, index: int, local: torch.Tensor, values: _Values) -> torch.Tensor:
        """A result for the user: a number as it is, a tensor as a DTensor."""
        value = self.program.results[index]
        assert isinstance(value, fx.Node)
        output = self.program.outputs[index]
        if output.mutates is not None or not local.ndim:
            return local
        place = self.result_places.get(index)
        if place is None:  # its sizes are those of the call
            kind = replaced(tensor_type(value), evaluator(values))
            layout = Layout(concrete(self.program.output_layout(index).placements, values))
            place = self._place(f"result {index}", layout, kind)
        return place.dtensor(local)


_TARGETS = ("eager", "inductor")


class _Call(NamedTuple):
    """One call of a step.

    Attributes:
        step: The step.
        locals: This rank's part of every input.
        values: Values of the symbols of its sizes.
        saves: Whether gradients may be asked for.
    """

    step: StepProgram
    locals: Sequence[torch.Tensor]
    values: _Values
    saves: bool

    @property
    def symbols(self) -> tuple[int, ...]:
        """What the halves get of these."""
        return () if self.step.program.scope is None else tuple(self.values.values())


class _Step(torch.autograd.Function):
    """Runs the forward half, and hands the backward half's gradients to autograd."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *parameters: torch.Tensor) -> Any:
        step = call.step
        with step.watch.guard():
            outputs = step.forward.run(call.locals, call.symbols)
        ctx.call = call
        ctx.saved = None
        if call.saves:
            values = (*call.locals, *outputs)
            ctx.saved = [values[i] if i >= 0 else None for i in step.saved]
        results = []
        for index in range(step.results):
            local = outputs[index]
            assert local is not None
            results.append(step.result(index, local, call.values))
        ctx.mark_non_differentiable(*(x for x in results if x.ndim))
        ctx.set_materialize_grads(True)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *tangents: torch.Tensor) -> Any:
        call: _Call = ctx.call
        step = call.step
        if torch.is_grad_enabled():
            raise _once("gradients of gradients were asked for")
        if ctx.saved is None:
            raise _once("this step has run backward already")
        saved, ctx.saved = ctx.saved, None
        losses = [
            tangent
            for tangent, output, value in zip(
                tangents, step.program.outputs, step.program.results, strict=False
            )
            if output.mutates is None
            and isinstance(value, fx.Node)
            and not tensor_type(value).shape
        ]
        inputs = [
            losses[-1 - i] if value is None else value
            for value, i in zip(saved, step.saved, strict=True)
        ]
        del saved
        backward = step.backward(inputs)
        with step.watch.guard():
            gradients = backward.run(inputs, call.symbols)
        return None, *(
            step.places[index].dtensor(gradient)
            for index, gradient in zip(step.gradient_of, gradients, strict=True)
            if gradient is not None
        )


def _once(what: str) -> RolemeshError:
    return RolemeshError(
        "RM017",
        what=what,
        where="backward of a compiled training step",
        why="the program has one backward part, and what it reads is freed when it has run",
        fix="call backward once for each call of the model, without retain_graph and create_graph",
    )


def _not_a_parameter(name: str) -> RolemeshError:
    return RolemeshError(
        "RM017",
        what=f"{name} requires a gradient and is no parameter",
        where="role train",
        why="gradients go to parameters, which become DTensors",
        fix="detach it, or register it as a parameter of the model",
    )
