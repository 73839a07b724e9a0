"""Driving a case step by step: prefill, then greedy decode, with any way to make the calls.

The single-device reference, the lock-step ranks and the real ranks all run the same plan, so that
they differ in nothing but who computes a call.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from rolemesh.compiler.command.compare import (
    EQUAL,
    Difference,
    difference,
    largest,
    named_tensors,
    tensors_of,
)
from rolemesh.compiler.command.report import Description
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.models.cases import Case, Phase
from rolemesh.compiler.roles import Role

__all__ = [
    "Record",
    "Step",
    "StepResult",
    "compare_step",
    "drive",
    "plan",
    "reference",
    "restore",
    "worst",
]

Call = Callable[["Step", tuple[object, ...], dict[str, object]], object]
"""Makes one call of the model."""


@dataclass(frozen=True)
class Step:
    """One call.

    Attributes:
        name: For people: `prefill`, `decode 1`, `decode 2`.
        key: Phase of the case, whose arguments it takes.
        phase: Phase of the role; empty if the role does not run it and one device does.
        greedy: Whether its tokens are those that the step before chose.
    """

    name: str
    key: str
    phase: str
    greedy: bool = False


@dataclass(frozen=True)
class Record:
    """What the single device left behind after a step.

    Attributes:
        outputs: Tensors of the result by path, without those of the arguments.
        state: Tensors of the arguments and the model's buffers by path.
        last: Logits at the last position, `[batch, vocabulary]`, if the case has logits.
    """

    outputs: Mapping[str, torch.Tensor]
    state: Mapping[str, torch.Tensor]
    last: torch.Tensor | None

    @property
    def tokens(self) -> torch.Tensor | None:
        """The greedy tokens, `[batch]`."""
        return None if self.last is None else self.last.argmax(-1)


@dataclass(frozen=True)
class StepResult:
    """How a step compares with the reference.

    Attributes:
        step: The step.
        outputs: Difference of the result.
        state: Difference of arguments and buffers.
        tokens: Which sequences chose another token, for people; empty if none did.
        chosen: The greedy token of each sequence; empty if the case has no logits.
    """

    step: Step
    outputs: Difference = EQUAL
    state: Difference = EQUAL
    tokens: str = ""
    chosen: tuple[int, ...] = ()

    def problems(self, who: str = "") -> list[str]:
        """What is not equal, one sentence each."""
        found = []
        place = f"{self.step.name}{who}"
        for kind, entry in (("result", self.outputs), ("state", self.state)):
            if not entry.equal:
                found.append(f"{place}: {kind}{entry.where} differs by {entry.max_abs:.3g}")
        if self.tokens:
            found.append(f"{place}: {self.tokens}")
        return found


@dataclass(frozen=True)
class RankResult:
    """What one rank, or all of them in lock-step, found.

    Attributes:
        results: One per step that was compared.
        compiled: By phase.
        problems: What else is not as it must be.
        state: State after the last step; only rank 0 sends it.
    """

    results: tuple[StepResult, ...]
    compiled: Mapping[str, Description]
    problems: tuple[str, ...] = ()
    state: Mapping[str, torch.Tensor] | None = None


def plan(case: Case, role: Role, decode_steps: int) -> tuple[Step, ...]:
    """The calls to make.

    Args:
        case: The case.
        role: The role; its phases run sharded, the others on one device.
        decode_steps: Number of calls of the phase `decode`, for a case with logits.

    Raises:
        RolemeshError: RM004 if the case has no phase that the role runs.
    """
    steps: list[Step] = []
    for key in case.phases:
        phase = _phase_of(key, role)
        times = decode_steps if key == "decode" and case.has_logits else 1
        for number in range(1, times + 1):
            name = key if times == 1 else f"{key} {number}"
            greedy = case.has_logits and bool(steps) and key.startswith("decode")
            steps.append(Step(name, key, phase, greedy))
    if not any(step.phase for step in steps):
        raise RolemeshError(
            "RM004",
            what=f"the case has no phase that role {role.name!r} runs",
            where=f"phases {', '.join(case.phases) or 'none'}",
            why=f"the role runs {', '.join(role.phases)}",
            fix="name the phases of the case as the role does, or check another role",
        )
    return tuple(steps)


def _phase_of(key: str, role: Role) -> str:
    """`decode` for `decode` and `decode_2`, if the role runs it."""
    stem, _, number = key.rpartition("_")
    name = stem if number.isdecimal() else key
    return name if name in role.phases else ""


def drive(
    case: Case, steps: Sequence[Step], call: Call, records: Sequence[Record] | None = None
) -> Iterator[tuple[Phase, object]]:
    """Make the calls of a plan, one each time the iterator is advanced.

    Args:
        case: The case; its arguments change.
        steps: The plan.
        call: Makes a call.
        records: The reference, whose tokens greedy steps take; by default those the calls choose.
            Equal runs choose the same. After a tie that was broken differently, the run goes on
            along the reference.

    Yields:
        The arguments and the result of each call.
    """
    chosen: torch.Tensor | None = None
    for index, step in enumerate(steps):
        args, kwargs = case.phases[step.key]
        if step.greedy and chosen is not None:
            args, kwargs = _with_tokens(args, kwargs, chosen)
        result = call(step, args, kwargs)
        yield (args, kwargs), result
        if case.has_logits:
            chosen = _last(result).argmax(-1) if records is None else records[index].tokens


def _with_tokens(
    args: tuple[object, ...], kwargs: dict[str, object], tokens: torch.Tensor
) -> Phase:
    if args:
        return (tokens[:, None], *args[1:]), kwargs
    return args, {**kwargs, "input_ids": tokens[:, None]}


def _last(result: object) -> torch.Tensor:
    logits: torch.Tensor = getattr(result, "logits")  # noqa: B009 - typed as object
    return logits[:, -1]


def reference(case: Case, steps: Sequence[Step]) -> list[Record]:
    """Run a plan on one device.

    Args:
        case: The case; its arguments are copied first, and buffers get their values back.
        steps: The plan.

    Raises:
        RolemeshError: RM019 if the model fails.
    """
    buffers = {name: buffer.clone() for name, buffer in case.model.named_buffers()}
    fresh = case.fresh()
    records = []

    def call(step: Step, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        try:
            return case.model(*args, **kwargs)
        except Exception as error:
            raise _model_fails(step, error) from error

    for arguments, result in drive(fresh, steps, call):
        state = _state(fresh, arguments)
        last = _last(result).clone() if case.has_logits else None
        outputs = tensors_of(result, state.values(), copy=torch.clone)
        records.append(
            Record(outputs, {name: tensor.clone() for name, tensor in state.items()}, last)
        )
    for name, buffer in case.model.named_buffers():
        buffer.copy_(buffers[name])
    return records


def _model_fails(step: Step, error: Exception) -> RolemeshError:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return RolemeshError(
        "RM019",
        what=f"the model fails on a single device, in {step.name}: {type(error).__name__}",
        where=f"{frame.filename}:{frame.lineno}",
        why=str(error),
        fix="make the plain model run first; for experts, try --experts batched_mm",
    )


def _state(case: Case, arguments: Phase) -> dict[str, torch.Tensor]:
    buffers = dict(case.model.named_buffers())
    return named_tensors({"args": arguments[0], "kwargs": arguments[1], "buffers": buffers})


def compare_step(
    case: Case,
    step: Step,
    arguments: Phase,
    result: object,
    record: Record,
    tolerance: float,
    whole: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.detach,
) -> tuple[StepResult, dict[str, torch.Tensor]]:
    """Compare one call with the reference.

    Args:
        case: The case that was called.
        step: The step.
        arguments: Its arguments, after the call.
        result: What the call returned.
        record: What the single device left behind.
        tolerance: As in `difference`.
        whole: Gives the full value of a tensor that may live as shards.

    Returns:
        The comparison, and the whole values of the state.
    """
    state = {name: whole(tensor) for name, tensor in _state(case, arguments).items()}
    produced = named_tensors(result)
    outputs = {name: whole(produced[name]) for name in record.outputs if name in produced}
    of_outputs = difference(record.outputs, outputs, tolerance)
    of_state = difference(record.state, state, tolerance)
    if record.last is None:
        return StepResult(step, of_outputs, of_state), state
    last = _last(result)
    problem = _token_problem(record.last, last, of_outputs.max_abs)
    chosen = tuple(last.argmax(-1).tolist())
    return StepResult(step, of_outputs, of_state, problem, chosen), state


def _token_problem(want: torch.Tensor, got: torch.Tensor, error: float) -> str:
    """Which sequences chose another token, unless the logits' error can explain it by a tie."""
    expected, chosen = want.argmax(-1, keepdim=True), got.argmax(-1, keepdim=True)
    gap = (want.gather(-1, expected) - want.gather(-1, chosen)).flatten().float()
    differ = (gap > 2 * error).nonzero().flatten().tolist()
    if not differ:
        return ""
    one = differ[0]
    return f"greedy token of sequence {one} is {int(chosen[one])}, not {int(expected[one])}" + (
        f" ({len(differ)} sequences differ)" if len(differ) > 1 else ""
    )


def restore(case: Case, arguments: Phase, state: Mapping[str, torch.Tensor]) -> None:
    """Give arguments and buffers the values of a state, as `compare_step` returns it."""
    for name, tensor in _state(case, arguments).items():
        tensor.copy_(state[name])


def worst(results: Sequence[StepResult]) -> tuple[Difference, Difference]:
    """The largest differences of results and of state."""
    return largest(r.outputs for r in results), largest(r.state for r in results)
