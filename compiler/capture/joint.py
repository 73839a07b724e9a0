"""Capture of a training step: forward and backward of one Dynamo graph as one `Program`.

AOTAutograd traces the joint graph of a loss and its gradients. The Program that comes out is as
that of `rolemesh.compiler.capture.graph`, and besides

* each result that gradients start from, which is one without dims (a loss), has a TANGENT input:
  the gradient of the loss, 1 unless the user scales it;
* the gradient of each input that requires one is an output, with `gradient_of` set; these come
  last. A gradient has the shape and dtype of its input;
* other results are detached: they are there to be looked at.

Nothing of AOTAutograd is left at run time. What Dynamo calls is the captured graph and the copies
of new values into mutated inputs; whoever runs it hands its gradients to autograd.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, fx
from torch._C._dynamo.guards import GlobalStateGuard
from torch._functorch._aot_autograd.descriptors import (
    GradAOTOutput,
    PlainAOTInput,
    TangentAOTInput,
)
from torch._functorch.aot_autograd import aot_export_joint_with_descriptors
from torch.distributed.tensor import DTensor
from torch.fx.node import Argument

from rolemesh.compiler.capture.entry import Captured, Executor, reference_executor
from rolemesh.compiler.capture.epilogue import epilogue_of, with_epilogue
from rolemesh.compiler.capture.fixed_sizes import fix_sizes
from rolemesh.compiler.capture.graph import Builder, check_calling_convention
from rolemesh.compiler.capture.sources import (
    SourceName,
    current_frame,
    input_names,
    placeholder_sources,
)
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.program import InputKind
from rolemesh.runtime.holder import Holder, holders_of

__all__ = ["capture_joint"]


def capture_joint(
    gm: fx.GraphModule,
    example_inputs: Sequence[object],
    *,
    name: str = "program",
    executor: Executor = reference_executor,
) -> tuple[Captured, Callable[..., object]]:
    """Turn what Dynamo hands a backend into a joint Program and a callable to give back to Dynamo.

    Args:
        gm: Dynamo's graph.
        example_inputs: Its inputs; FakeTensors will do.
        name: Name of the Program.
        executor: What runs the captured graph by default.

    Returns:
        The captured graph, and the compiled function that Dynamo calls, which delegates to the
        executor in force at each call.

    Raises:
        RolemeshError: RM017 if there is no loss, or nothing that requires gradients; RM020 for
            DTensors; RM011, RM012 or RM023 for a graph that cannot be a Program.
    """
    names = input_names(placeholder_sources(gm.graph), example_inputs, current_frame())
    _require_whole(example_inputs)
    module, losses = _only_losses(gm)
    _require_gradients(losses, example_inputs)
    with contextlib.ExitStack() as stack:
        # Evaluation is captured like training: what it runs is the forward part.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        joint = aot_export_joint_with_descriptors(stack, module, tuple(example_inputs))
        traced, metadata = joint.graph_module, joint._aot_state.fw_metadata
    graph = traced.graph
    placeholders = graph.find_nodes(op="placeholder")
    primals = [node for node in placeholders if isinstance(node.meta["desc"], PlainAOTInput)]
    tangents = [node for node in placeholders if isinstance(node.meta["desc"], TangentAOTInput)]
    if len(primals) + len(tangents) != len(placeholders):
        raise _not_a_function(names, "its inputs are more than tensors and numbers")
    check_calling_convention(names, primals, metadata)
    # The tangents come last, as if Dynamo had given them.
    entries = (*names, *(SourceName(_tangent(i), InputKind.TANGENT) for i in range(len(tangents))))
    places = dict(zip((*primals, *tangents), range(len(entries)), strict=True))
    fix_sizes(graph)
    described = graph.output_node().meta["desc"]
    gradients = [_gradient_of(d) for d in described[metadata.num_mutated_inp_runtime_indices :]]
    results = len(metadata.output_info)
    captured = Builder(
        traced,
        entries,
        places,
        metadata.mutated_inp_runtime_indices,
        gradients[results:],
    ).captured(name, executor)
    captured = replace(captured, holders=_holders(captured, example_inputs))
    epilogue = epilogue_of(metadata, captured)
    if epilogue is None:
        raise _not_a_function(names, "a result shares memory with an input or another result")
    step = with_epilogue(captured, epilogue)
    ones = [torch.ones((), dtype=node.meta["val"].dtype) for node in tangents]
    unchanged = _global_state()

    def run(*flat: object) -> object:
        unchanged()
        with torch._C._DisableAutocast():  # its casts are in the graph
            return step(*flat, *ones)

    return captured, run


def _global_state() -> Callable[[], None]:
    """A check that what is set globally is as now: autocast, determinism and so on.

    Grad mode may differ: the step runs in either.
    """
    with torch.enable_grad():
        state = GlobalStateGuard()

    def check() -> None:
        with torch.enable_grad():
            if state.check():
                return
            reason = state.reason()
        raise RolemeshError(
            "RM020",
            "a global setting differs from when the step was captured",
            where=reason.strip(),
            why="it decides what the model computes",
            fix="use one setting for all steps",
        )

    return check


def _holders(captured: Captured, values: Sequence[object]) -> dict[int, Holder]:
    """Where each parameter of the Program is kept."""
    entries = zip(captured.program.inputs, captured.tensor_inputs, strict=False)
    found: dict[int, tuple[str, Tensor]] = {}
    for index, (entry, place) in enumerate(entries):
        if entry.kind is InputKind.PARAMETER and isinstance(place, int):
            value = values[place]
            assert isinstance(value, Tensor)
            found[index] = (entry.name, value)
    roots = [x for x in current_frame().variables.values() if isinstance(x, torch.nn.Module)]
    try:
        holders = holders_of(roots, list(found.values()))
    except KeyError as error:
        raise RolemeshError(
            "RM017",
            f"the parameter {error.args[0]} is in no module that the compiled function can see",
            where="a training step",
            why="parameters become DTensors in the modules that hold them",
            fix="compile the model itself, or a function that has it as an argument or a variable",
        ) from None
    return dict(zip(found, holders, strict=True))


def _tangent(index: int) -> str:
    return f"tangents[{index}]"


def _gradient_of(described: object) -> int | None:
    """The number of the input of which a value is the gradient."""
    if isinstance(described, GradAOTOutput) and isinstance(described.grad_of, PlainAOTInput):
        return described.grad_of.idx
    return None


def _only_losses(gm: fx.GraphModule) -> tuple[fx.GraphModule, list[fx.Node]]:
    """Dynamo's graph with all results detached but those without dims, and these."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    returned = graph.graph_copy(gm.graph, copies)
    for node, copy in copies.items():
        # Dynamo's own entries say where a placeholder comes from.
        vars(copy).update({k: v for k, v in vars(node).items() if k == "_dynamo_source"})
    losses: list[fx.Node] = []

    def kept(value: object) -> object:
        if not isinstance(value, fx.Node):
            return value
        example = value.meta.get("example_value")
        if isinstance(example, Tensor) and (example.requires_grad or _may_require(example)):
            if not example.ndim:
                losses.append(value)
                return value
            detached = graph.call_method("detach", (value,))
            detached.meta.update(value.meta)
            return detached
        return value

    graph.output(fx.map_arg(returned, cast(Callable[[fx.Node], Argument], kept)))
    return fx.GraphModule(gm, graph), losses


def _may_require(value: Tensor) -> bool:
    """Whether a value of a graph that Dynamo traced without gradients would require one."""
    return not torch.is_grad_enabled() and value.is_floating_point()


def _require_whole(values: Sequence[object]) -> None:
    if any(isinstance(value, DTensor) for value in values):
        raise RolemeshError(
            "RM020",
            "a training step was given DTensors",
            where=f"a graph of {len(values)} inputs",
            why="it is captured as a step of one device, and shards the parameters itself",
            fix="compile the model without fully_shard and the like",
        )


def _require_gradients(losses: Sequence[fx.Node], values: Sequence[object]) -> None:
    wanting = any(isinstance(value, Tensor) and value.requires_grad for value in values)
    if losses and wanting:
        return
    if not wanting:
        why = "no input of the graph requires gradients"
        fix = "call model.requires_grad_(True), or choose a role for inference"
    else:
        why = "no result is a number that requires gradients"
        fix = "return the loss, for example by passing labels to the model"
    raise RolemeshError(
        "RM017",
        "a training step has nothing to start gradients from",
        where=f"a graph of {len(values)} inputs",
        why=why,
        fix=fix,
    )


def _not_a_function(names: Sequence[SourceName], why: str) -> RolemeshError:
    return RolemeshError(
        "RM023",
        "this training step is not a function of its inputs",
        where=f"graph with inputs {', '.join(entry.name for entry in names[:4])}, ...",
        why=why,
        fix="keep such results out of the compiled part",
    )
