"""Trace: a model and example arguments to a Program, without running anything.

`trace` lets Dynamo compile the model and calls it once with an executor that gives up, so no op
runs and no cache is written. What stays is Dynamo's compiled function, an `Entry`: it can be called
again with any executor, and Dynamo's own guards and bytecode bind arguments and rebuild the model's
output objects. The guards also say when the arguments are not like the traced ones.

Each trace has compilations of its own (Dynamo's `isolate_recompiles`), so that any number of
Programs of one model can live side by side.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed, TorchDynamoException
from torch._dynamo.guards import _get_closure_vars
from torch._dynamo.source import get_global_source_name
from torch._guards import Guard
from torch.utils._ordered_set import OrderedSet

from rolemesh.compiler.capture.convention import Convention, NotSavableError
from rolemesh.compiler.capture.entry import Captured, Executor, executing
from rolemesh.compiler.capture.graph import capture
from rolemesh.compiler.capture.joint import capture_joint
from rolemesh.compiler.capture.recording import Notes, record, take_notes
from rolemesh.compiler.capture.regions import Marks, concerns_marks, repeated_layers
from rolemesh.compiler.capture.sources import current_frame, readable
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.program import Program
from rolemesh.passes.base import collection_paused

__all__ = [
    "Callee",
    "Entry",
    "Traced",
    "compile_only",
    "drop_training_guards",
    "trace",
    "trace_training",
]

_log = logging.getLogger(__name__)

_DATA_DEPENDENT = re.compile(r"data-dep|dynamic shape operator|Tensor\.item\(\)", re.IGNORECASE)
_PLACE = re.compile(r'File "([^"]+)", line (\d+)')
_LABEL = re.compile(r"^(Explanation|Developer debug context): ?")
_ADVICE = ("Hint:", "For more details", "Set TORCH")
_ANY_NUMBER = 1 << 30


class _Stopped(BaseException):
    """Ends a call of the compiled function before anything runs."""


def _stop(captured: Captured, inputs: list[Tensor]) -> NoReturn:
    raise _Stopped


class Callee(Protocol):
    """Runs a captured graph behind the model's own arguments."""

    @property
    def captured(self) -> Captured:
        """The graph."""

    def call(self, executor: Executor, *args: object, **kwargs: object) -> object:
        """Call the traced model with `executor` in place of its ops; see `Entry.call`."""


@dataclass(frozen=True, eq=False)
class Entry:
    """A compiled function of Dynamo that any executor can run behind.

    Attributes:
        captured: The graph it runs.
        compiled: The compiled function.
        grad_enabled: Grad mode of the trace, which Dynamo guards on; None for a training step,
            which runs in either.
        inference: Whether inference mode was on in the trace; Dynamo guards on it too.
        notes: What was noted of the call while it was traced.
    """

    captured: Captured
    compiled: Callable[..., object]
    grad_enabled: bool | None
    inference: bool
    notes: Notes

    def call(self, executor: Executor, *args: object, **kwargs: object) -> object:
        """Call the traced model with `executor` in place of its ops.

        Args:
            executor: Computes the outputs of the Program from its inputs.
            *args: Arguments of the model.
            **kwargs: Keyword arguments of the model.

        Returns:
            What the model would return. Inputs that the model mutates have their new values.

        Raises:
            RolemeshError: RM020, if the arguments differ from the traced ones in anything that the
                Program depends on: shapes, dtypes, or plain values.
        """
        started = False
        # Entering inference_mode(False) enables gradients.
        grad = torch.is_grad_enabled() if self.grad_enabled is None else self.grad_enabled

        def run(captured: Captured, inputs: list[Tensor]) -> list[Tensor]:
            nonlocal started
            started = True
            return executor(captured, inputs)

        try:
            with (
                torch.inference_mode(self.inference),
                torch.set_grad_enabled(grad),
                executing(self.captured, run),
            ):
                return self.compiled(*args, **kwargs)
        except TorchDynamoException as error:
            if started:
                raise
            found = _inner(error)
            raise found if found is not None else _differs([_first_lines(error)]) from None


@dataclass(frozen=True, eq=False)
class Traced:
    """A traced model.

    Attributes:
        program: The captured Program.
        entry: Runs it.
        convention: How the model was called; if that cannot be said, why not.
    """

    program: Program
    entry: Callee
    convention: Convention | str

    def as_text(self) -> str:
        """The Program as text."""
        return str(self.program)


class _TracingBackend:
    """A Dynamo backend that captures one graph, and says why when asked for a second."""

    __name__ = "rolemesh.trace"

    def __init__(self, name: str, marks: Marks, joint: bool) -> None:
        self.name = name
        self.captured: Captured | None = None
        self.notes = Notes()
        self._marks: Marks | None = marks
        self._joint = joint

    def __call__(self, gm: fx.GraphModule, example_inputs: list[object]) -> Callable[..., object]:
        if self.captured is not None:
            raise _differs(_guard_failures())
        _drop_guards()
        if self._joint:
            drop_training_guards()
            self.captured, compiled = capture_joint(
                gm, example_inputs, name=self.name, executor=_stop
            )
            return compiled
        marks, self._marks = self._marks, None  # they go away with the trace
        self.captured, compiled = capture(
            gm, example_inputs, name=self.name, executor=_stop, marks=marks
        )
        self.notes = take_notes(self.captured, example_inputs)
        return compiled


def trace(model: Callable[..., object], *args: object, **kwargs: object) -> Traced:
    """Capture `model(*args, **kwargs)` as one Program. Nothing runs and nothing is mutated.

    Args:
        model: A module or a function of tensors.
        *args: Arguments of the model.
        **kwargs: Keyword arguments of the model.

    Raises:
        RolemeshError: RM011 for data-dependent sizes, RM012 for random ops, RM017 for gradients,
            RM023 if Dynamo cannot capture the call as one graph.
    """
    refused: set[nn.Module] = set()
    while True:
        with repeated_layers(model, args, kwargs, refused) as marks, collection_paused():
            found = None
            if not marks:
                found = _traced(model, marks, args, kwargs)
            try:
                found = found or _traced(model, marks, args, kwargs)
            except (TorchDynamoException, RuntimeError, TypeError) as error:
                # The model as it is says better what is wrong, or nothing is.
                first = str(error).strip().partition("\n")[0]
                _log.info("layers are traced one by one: %s", first)
        if found is not None:  # the model has its own attributes again
            return Traced(found.captured.program, found, _convention(model, args, kwargs, found))
        refused.update(marks.refused or marks.firsts)


def trace_training(model: Callable[..., object], *args: object, **kwargs: object) -> Traced:
    """Capture a training step as one Program: `model(*args, **kwargs)` and its gradients.

    Nothing runs and nothing is mutated. Gradients start from results without dims, such as a loss,
    also where `torch.no_grad` is in force.

    Args:
        model: A module or a function of tensors, some of which require gradients.
        *args: Arguments of the model.
        **kwargs: Keyword arguments of the model.

    Raises:
        RolemeshError: RM017 if there is no loss or nothing requires gradients; RM011, RM012 and
            RM023 as `trace`.
    """
    with torch.enable_grad(), collection_paused():
        entry = _traced(model, Marks(None), args, kwargs, joint=True)
    return Traced(entry.captured.program, entry, "it is a training step")


def _traced(
    model: Callable[..., object],
    marks: Marks,
    args: Sequence[object],
    kwargs: Mapping[str, object],
    *,
    joint: bool = False,
) -> Entry:
    name = getattr(model, "__name__", type(model).__name__)
    backend = _TracingBackend(name, marks, joint)
    compile_function: Callable[..., Callable[..., object]] = torch.compile
    compiled = compile_function(
        model,
        backend=backend,
        fullgraph=True,
        dynamic=False,
        isolate_recompiles=True,
    )
    try:
        # Layers that are called once stay regions: other calls take after them.
        with torch._dynamo.config.patch(inline_single_use_invoke_subgraph=False):
            stopped = compile_only(compiled, *args, **kwargs)
    except TorchDynamoException as error:
        found = _inner(error)
        if found is not None and not marks:
            raise found from None
        raise (error if marks else _not_captured(name, error)) from error
    if stopped:
        assert backend.captured is not None
        grad = None if joint else torch.is_grad_enabled()
        inference = torch.is_inference_mode_enabled()
        return Entry(backend.captured, compiled, grad, inference, backend.notes)
    raise RolemeshError(
        "RM023",
        f"calling {name} compiled nothing",
        why="Dynamo is disabled (TORCHDYNAMO_DISABLE, torch.compiler.set_stance), or the call "
        "computes no tensor",
        fix="enable torch.compile and pass a model that computes its result from tensors",
    )


def _convention(
    model: Callable[..., object], args: Sequence[object], kwargs: Mapping[str, object], entry: Entry
) -> Convention | str:
    try:
        return record(
            model, args, kwargs, entry.notes, lambda executor: entry.call(executor, *args, **kwargs)
        )
    except NotSavableError as error:
        return str(error)
    except RolemeshError as error:  # it cannot be called again, though it could be traced
        return error.what


def compile_only(compiled: Callable[..., object], *args: object, **kwargs: object) -> bool:
    """Let Dynamo compile what a call needs, and stop before any captured graph runs.

    Args:
        compiled: What `torch.compile` returned, with `isolate_recompiles` and a backend that runs
            graphs by `Captured.run`.
        *args: Arguments of the call.
        **kwargs: Keyword arguments of the call.

    Returns:
        Whether there was a graph to stop at; if not, Dynamo captured nothing and the call was made.
    """
    # The limit counts compilations of all models that share a code object, such as a decorator's,
    # however isolated. Dynamo looks at it before it calls a backend.
    patched = torch._dynamo.config.patch(accumulated_recompile_limit=_ANY_NUMBER)
    try:
        with patched, executing(None, _stop):
            compiled(*args, **kwargs)
    except _Stopped:
        return True
    return False


def _drop_guards() -> None:
    """Drop the guards on marks, and those on which entries a module's dict has.

    Such a dict is a registry. That of `transformers` holds all model classes, so it grows when
    another model is built, which changes nothing for this Program. For use in a backend: Dynamo
    would build all guards once more to let `guard_filter_fn` choose.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslator

    output = InstructionTranslator.current_tx().output
    scope = {"L": output.local_scope, "G": output.global_scope}
    guards = output.guards
    guards.inner = OrderedSet(
        guard
        for guard in guards
        if not concerns_marks(guard.name) and not _is_on_a_registry(guard, scope)
    )


def drop_training_guards() -> None:
    """Drop the guards on parameters, and those on grad mode. For use in a backend.

    Parameters become DTensors, which the captured graph knows nothing of. In their place comes a
    guard on the object that they are read from, the model: Dynamo would take the graph for any
    model of the same class. A graph that was traced with gradients serves calls without them too.
    The rest of the global state, which one guard watches together with grad mode, the captured step
    checks itself. One that was traced without gradients may lack the model's own `torch.no_grad`.
    """
    from torch._dynamo.guards import GuardBuilder
    from torch._dynamo.source import ChainedSource
    from torch._dynamo.symbolic_convert import InstructionTranslator

    guards = InstructionTranslator.current_tx().output.guards
    kept: OrderedSet[Guard] = OrderedSet()
    needless = ("GRAD_MODE", "GLOBAL_STATE") if torch.is_grad_enabled() else ()
    for guard in guards:
        if "._parameters[" in guard.name:
            source = guard.originating_source
            while isinstance(source, ChainedSource):
                source = source.base
            kept.add(source.make_guard(GuardBuilder.ID_MATCH))
        elif guard.create_fn_name() not in needless:
            kept.add(guard)
    guards.inner = kept


def _is_on_a_registry(guard: Guard, scope: dict[str, dict[str, Any]]) -> bool:
    if get_global_source_name(guard.originating_source) is None:
        return False
    if "dict.keys(" in guard.name:
        return True
    try:
        return isinstance(eval(guard.name, scope, _get_closure_vars()), dict)
    except Exception:  # noqa: BLE001 - a guard may be on what is not there
        return False


def _inner(error: TorchDynamoException) -> RolemeshError | None:
    """Our own error, if that is what Dynamo reports."""
    inner = error.inner_exception if isinstance(error, BackendCompilerFailed) else None
    return inner if isinstance(inner, RolemeshError) else None


def _not_captured(name: str, error: TorchDynamoException) -> RolemeshError:
    places = _PLACE.findall(str(error))
    where = f"{places[-1][0]}:{places[-1][1]}" if places else name
    reason = _first_lines(error)
    if _DATA_DEPENDENT.search(reason):
        return RolemeshError(
            "RM011",
            f"{name} has a size or a branch that depends on data",
            where=where,
            why=reason,
            fix="use a form with a fixed size, such as torch.where or a mask",
        )
    return RolemeshError(
        "RM023",
        f"{name} cannot be captured as one graph",
        where=where,
        why=reason,
        fix="change that line, or compile only the part of the model that is captured",
    )


def _first_lines(error: BaseException) -> str:
    """Dynamo's reason: without its advice and the user's stack, and at most four lines."""
    text = str(error).split("\nfrom user code")[0]
    lines = [_LABEL.sub("", line.strip()) for line in text.splitlines()]
    return "\n".join([line for line in lines if line and not line.startswith(_ADVICE)][:4])


def _differs(reasons: list[str]) -> RolemeshError:
    return RolemeshError(
        "RM020",
        "the arguments differ from those that were traced",
        where="\n".join(reasons),
        why="a Program has fixed shapes, dtypes and plain values",
        fix="call it with arguments like the traced ones, or trace again with these",
    )


def _guard_failures() -> list[str]:
    """Which guards of this compiled function the present call fails. For use in a backend."""
    from torch._C._dynamo.eval_frame import get_eval_frame_isolate_recompiles_id
    from torch._dynamo.eval_frame import _get_cache_entries_for_region
    from torch._dynamo.symbolic_convert import InstructionTranslator

    translator = InstructionTranslator.current_tx()
    region = get_eval_frame_isolate_recompiles_id()
    frame = current_frame()
    reasons = []
    for entry in _get_cache_entries_for_region(translator.f_code, region):
        found = entry.guard_manager.check_verbose(translator.f_locals)
        reasons += [
            readable(part.split("#")[0].strip(), frame) for part in found.verbose_code_parts
        ]
    return reasons or ["the compiled function is gone: torch._dynamo.reset() was called"]
