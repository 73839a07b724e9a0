"""Whether a checkpoint fits a model, decided before anything is read.

`make_plan` gives the conversions that fill a model's tensors, or one error with every tensor that
is missing, extra, misshapen or of another dtype, by name.

Tied weights are one tensor with several names. One of the names in the checkpoint is enough; of
several, the first is loaded and the others must be equal to it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.tensor import TensorType, dtype_name
from rolemesh.runtime.checkpoint.files import Checkpoint, listed
from rolemesh.runtime.checkpoint.naming import Conversion, Naming

__all__ = ["make_plan", "type_of"]


@dataclass
class _Problems:
    """Problems by kind; the kinds are those of the sentence that counts them."""

    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    shapes: list[str] = field(default_factory=list)
    dtypes: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def raise_any(self, checkpoint: Checkpoint) -> None:
        kinds = {
            "missing": self.missing,
            "extra": self.extra,
            "of another shape": self.shapes,
            "of another dtype": self.dtypes,
            "that cannot be converted": self.failures,
        }
        found = {kind: problems for kind, problems in kinds.items() if problems}
        if not found:
            return
        counts = ", ".join(f"{len(problems)} {kind}" for kind, problems in found.items())
        fixes = ["give the checkpoint of this model, and the configuration that it came with"]
        if self.dtypes:
            fixes.append("build the model in the checkpoint's dtype, or pass cast=True")
        raise RolemeshError(
            "RM033",
            what=f"the checkpoint {checkpoint.path} does not fit the model: tensors {counts}",
            where="\n".join(listed(problems) for problems in found.values()),
            why="a model is served with all of its weights, exactly as they were saved",
            fix="; ".join(fixes if found.keys() != {"of another dtype"} else fixes[1:]),
        )


def make_plan(
    checkpoint: Checkpoint, tensors: Mapping[str, torch.Tensor], naming: Naming, *, cast: bool
) -> tuple[Conversion, ...]:
    """The conversions that fill tensors, in the order of the checkpoint's files.

    Args:
        checkpoint: What there is.
        tensors: The model's tensors by name, a tied one under each of its names. Of a tensor that
            the naming lets checkpoints lack, its present value is kept if it has bytes.
        naming: Relates the names of both.
        cast: Whether floating-point tensors of another floating-point dtype fit.

    Raises:
        RolemeshError: RM033 with everything that does not fit.
    """
    converted = naming.converted(checkpoint.entries, tensors.keys())
    problems = _Problems(extra=[f"extra: {name}" for name in sorted(converted.extra)])
    given = {name: c for c in converted.conversions for name in c.results if name in tensors}
    missing = {
        names[0]: type_of(tensors[names[0]])
        for names in _tied(tensors)
        if not any(name in given for name in names)
        and not _keeps_value(naming, names, tensors[names[0]])
    }
    _report_missing(checkpoint, naming, missing, converted.failed, problems)
    plan = list({id(conversion): conversion for conversion in given.values()}.values())
    for conversion in plan:
        expected = {n: type_of(tensors[n]) for n in conversion.results if n in tensors}
        _check_shapes(checkpoint, naming, conversion, expected, problems)
        for kind in expected.values():
            _check_dtypes(conversion, kind.dtype, problems, cast=cast)
    problems.dtypes[:] = dict.fromkeys(problems.dtypes)
    problems.raise_any(checkpoint)
    return tuple(sorted(plan, key=lambda c: (c.sources[0].file, c.sources[0].start)))


def type_of(tensor: torch.Tensor) -> TensorType:
    """Shape and dtype of a tensor of a model."""
    return TensorType(tuple(tensor.shape), tensor.dtype)


def _tied(tensors: Mapping[str, torch.Tensor]) -> Iterator[list[str]]:
    """The names of each tensor."""
    names: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    yield from names.values()


def _keeps_value(naming: Naming, names: list[str], tensor: torch.Tensor) -> bool:
    if not any(naming.may_lack(name) for name in names) or tensor.is_meta:
        return False
    return tensor.untyped_storage().nbytes() >= math.prod(tensor.shape) * tensor.element_size()


def _report_missing(
    checkpoint: Checkpoint,
    naming: Naming,
    missing: Mapping[str, TensorType],
    failed: Mapping[str, str],
    problems: _Problems,
) -> None:
    """Report tensors that nothing gives: by the names of their sources, or why those are no use."""
    reported = _report_sources(checkpoint, naming.stored_as(missing), problems)
    for name in missing.keys() - reported:
        if not naming.stored_as({name: missing[name]}).keys() & reported:
            why = failed.get(name, "its sources are converted to other tensors")
            problems.failures.append(f"cannot convert: {name}: {why}")


def _report_sources(
    checkpoint: Checkpoint, sources: Mapping[str, TensorType], problems: _Problems
) -> set[str]:
    """Report which sources the checkpoint lacks or has in another shape, and return their names."""
    entries = checkpoint.entries
    missing = [name for name in sources if name not in entries]
    misshapen = [
        name
        for name, t in sources.items()
        if name in entries and entries[name].type.shape != t.shape
    ]
    problems.missing.extend(f"missing: {name}" for name in missing)
    problems.shapes.extend(_misshapen(n, entries[n].type, sources[n]) for n in misshapen)
    return {*missing, *misshapen}


def _check_shapes(
    checkpoint: Checkpoint,
    naming: Naming,
    conversion: Conversion,
    expected: Mapping[str, TensorType],
    problems: _Problems,
) -> None:
    wrong = [n for n, kind in expected.items() if conversion.results[n].shape != kind.shape]
    if not wrong:
        return
    if conversion.convert is None:
        source = conversion.sources[0]
        problems.shapes.append(_misshapen(source.name, source.type, expected[wrong[0]]))
        return
    sources = naming.stored_as(expected)
    if _report_sources(checkpoint, sources, problems):
        return
    surplus = [f"extra: {s.name}" for s in conversion.sources if s.name not in sources]
    problems.extra.extend(surplus)
    for name in [] if surplus else wrong:
        subject = f"{name}, made from {conversion.sources[0].name},"
        problems.shapes.append(_misshapen(subject, conversion.results[name], expected[name]))


def _misshapen(subject: str, found: TensorType, expected: TensorType) -> str:
    return f"shape: {subject} is {list(found.shape)}, the model has {list(expected.shape)}"


def _check_dtypes(
    conversion: Conversion, dtype: torch.dtype, problems: _Problems, *, cast: bool
) -> None:
    for source in conversion.sources:
        found = source.type.dtype
        castable = cast and found.is_floating_point and dtype.is_floating_point
        if found != dtype and not castable:
            problems.dtypes.append(
                f"dtype: {source.name} is {dtype_name(found)}, the model has {dtype_name(dtype)}"
            )
