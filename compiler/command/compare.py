"""Comparing what two runs of a model leave behind: results, arguments and buffers.

Tensors are found by walking containers and the attributes of plain objects, so a cache of any class
is compared without knowing it, and without asking the compiler which inputs it thinks are mutated.

Invariants: two walks over equal objects give the same paths in the same order, on every rank; a
tensor that is reached twice is listed once, under the first path.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType

import torch

__all__ = ["EQUAL", "Difference", "difference", "largest", "named_tensors", "tensors_of"]


@dataclass(frozen=True)
class Difference:
    """How far values are from a reference.

    Attributes:
        max_abs: Largest absolute difference; infinite if shapes differ or only one side is NaN.
        equal: Whether it is within the tolerance.
        where: Path of the tensor with the largest difference.
    """

    max_abs: float = 0.0
    equal: bool = True
    where: str = ""


EQUAL = Difference()


def named_tensors(root: object) -> dict[str, torch.Tensor]:
    """Every tensor reachable from `root`, by path, for example `.layers[0].keys`.

    Modules, classes, functions and strings are not entered.
    """
    found: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    stack = [("", root)]
    while stack:
        path, value = stack.pop()
        if id(value) in seen:
            continue
        if isinstance(value, torch.Tensor):
            seen.add(id(value))
            found[path] = value
            continue
        children = list(_children(path, value))
        if children:
            seen.add(id(value))
            stack += reversed(children)
    return found


def tensors_of(
    root: object, besides: Iterable[torch.Tensor] = (), *, copy: Callable[..., torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Copies of the tensors of `root` that are not among `besides`.

    Args:
        root: Where to look.
        besides: Tensors to leave out, such as arguments that the model also returns.
        copy: Makes the copy of each.
    """
    known = {id(tensor) for tensor in besides}
    return {
        path: copy(tensor)
        for path, tensor in named_tensors(root).items()
        if id(tensor) not in known
    }


def _children(path: str, value: object) -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping):
        yield from ((f"{path}[{key!r}]", item) for key, item in value.items())
    elif isinstance(value, list | tuple):
        yield from ((f"{path}[{index}]", item) for index, item in enumerate(value))
    elif not isinstance(value, type | ModuleType | torch.nn.Module) and not inspect.isroutine(
        value
    ):
        attributes = getattr(value, "__dict__", {})
        yield from ((f"{path}.{name}", item) for name, item in attributes.items())


def difference(
    want: Mapping[str, torch.Tensor], got: Mapping[str, torch.Tensor], tolerance: float
) -> Difference:
    """Compare named tensors.

    Args:
        want: The reference.
        got: What to compare with it; a missing tensor differs, one too many does not.
        tolerance: What counts as equal for floating-point tensors; others must be equal. Of 4 bytes
            and more, the largest difference, relative to the largest finite magnitude in the
            reference tensor. Of fewer, the root mean square of the difference, relative to that of
            the reference tensor: where rounding makes a router or an indexer choose otherwise,
            whole rows differ, with one device as with several.
    """
    return largest(_one(name, tensor, got.get(name), tolerance) for name, tensor in want.items())


def largest(differences: Iterable[Difference]) -> Difference:
    """The largest difference; equal only if all are. One that is not equal goes first."""
    worst = EQUAL
    for entry in differences:
        if (not entry.equal, entry.max_abs) > (not worst.equal, worst.max_abs):
            worst = entry
    return worst


def _one(name: str, want: torch.Tensor, got: torch.Tensor | None, tolerance: float) -> Difference:
    if got is None or got.shape != want.shape or got.dtype != want.dtype:
        return Difference(math.inf, False, name)
    if not want.numel():
        return EQUAL
    a, b = want.to(torch.float64), got.to(torch.float64)
    same = (a == b) | (a.isnan() & b.isnan())
    error = torch.where(same, 0.0, (a - b).abs()).nan_to_num(nan=math.inf, posinf=math.inf)
    max_abs = float(error.max())
    if not want.is_floating_point():
        return Difference(max_abs, max_abs == 0.0, name)
    finite = a[a.isfinite()]
    if want.dtype.itemsize < 4:
        size, scale = _root_mean_square(error), _root_mean_square(finite)
    else:
        size, scale = max_abs, float(finite.abs().max()) if finite.numel() else 0.0
    return Difference(max_abs, size <= tolerance * (scale or 1.0), name)


def _root_mean_square(x: torch.Tensor) -> float:
    return float(x.square().mean().sqrt()) if x.numel() else 0.0
