"""Graph capture without an NPU: ops are recorded with their memory, and replayed in place.

It behaves as the capture of a device does, so that what goes wrong there goes wrong here:

* Capturing computes nothing, changes nothing and exchanges nothing; new tensors hold NaN.
* A replay works on the very memory that was captured: an input that is not copied there is not
  seen, and a result that is not copied away is overwritten.
* Graphs of one pool share its memory: replaying one spoils what the others have left there.
* What a captured op does besides running on tensors, such as Python code between ops, is not
  repeated.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple
from weakref import WeakSet

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = ["Capturer", "Pool", "Recording"]

Pool = tuple[int, int]
"""Names a pool of memory."""


class _Step(NamedTuple):
    """One captured op; `results` are the tensors that take its results, if it makes new ones."""

    op: torch._ops.OpOverload
    args: Sequence[object]
    kwargs: Mapping[str, object]
    results: tuple[torch.Tensor, ...]

    def run(self) -> None:
        found = tree_leaves(self.op(*self.args, **self.kwargs))
        for result, value in zip(self.results, found if self.results else (), strict=True):
            # A collective returns before it is done; its wait would be for another tensor here.
            done = _WAIT(value) if self.op.namespace == "_c10d_functional" else value
            result.copy_(done)


class Recording:
    """A captured graph; what `torch.npu.NPUGraph` is.

    Args:
        neighbours: By pool, the recordings in it.
    """

    def __init__(self, neighbours: defaultdict[Pool, WeakSet[Recording]]) -> None:
        self.steps: list[_Step] = []
        self.memory: list[torch.Tensor] = []
        self.pool: Pool | None = None
        self._neighbours = neighbours

    @contextmanager
    def capture(self, pool: Pool | None = None) -> Iterator[None]:
        """Record the ops that are called inside the block."""
        if pool is not None:
            self.pool = pool
            self._neighbours[pool].add(self)
        with torch.no_grad(), _Recorder(self):
            yield

    def replay(self) -> None:
        """Run the recorded ops again, on the memory that they were captured with."""
        if self.pool is not None:
            for other in self._neighbours[self.pool]:
                if other is not self:
                    other.spoil()
        with torch.no_grad():
            for step in self.steps:
                step.run()

    def spoil(self) -> None:
        """Overwrite the memory that was allocated while this was captured."""
        for tensor in self.memory:
            _spoil(tensor)

    def reset(self) -> None:
        """Forget everything; the memory goes back to the pool."""
        self.steps, self.memory = [], []


class Capturer:
    """One device's capture of graphs: what `torch.npu` has for it."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._neighbours: defaultdict[Pool, WeakSet[Recording]] = defaultdict(WeakSet)

    def pool(self) -> Pool:
        """A new pool of memory."""
        return (0, next(self._numbers))

    def recording(self) -> Recording:
        """A new recording."""
        return Recording(self._neighbours)

    @contextmanager
    def capturing(
        self,
        recording: Recording,
        pool: Pool | None = None,
        stream: object = None,
        capture_error_mode: str = "global",
    ) -> Iterator[None]:
        """Capture ops into a recording; streams have no meaning here."""
        with recording.capture(pool):
            yield


class _Recorder(TorchDispatchMode):
    """Records ops instead of running them."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recording = recording
        self._fakes = FakeTensorMode()

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        given = {key: _host(value) for key, value in (kwargs or {}).items()}
        if func.is_view:  # reads no data, and stays valid
            return func(*args, **given)
        if func._schema.is_mutable:
            self._recording.steps.append(_Step(func, args, given, ()))
            return _written(func, args, given)
        results = self._allocate(func, args, given)
        if func not in _ALLOCATIONS:
            leaves = tuple(tree_leaves(results))
            self._recording.steps.append(_Step(func, args, given, leaves))
        return results

    def _allocate(
        self, func: torch._ops.OpOverload, args: Sequence[object], kwargs: Mapping[str, object]
    ) -> object:
        """Memory for what an op would return."""
        with _disable_current_modes(), self._fakes as mode:
            fake_args, fake_kwargs = tree_map_only(torch.Tensor, mode.from_tensor, (args, kwargs))
            found = func(*fake_args, **fake_kwargs)
        return tree_map_only(torch.Tensor, self._like, found)

    def _like(self, fake: torch.Tensor) -> torch.Tensor:
        made = torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype)
        _spoil(made)
        self._recording.memory.append(made)
        return made


def _host(value: object) -> object:
    """An argument, with the CPU in the place of the device that it stands for."""
    return torch.device("cpu") if isinstance(value, torch.device) else value


def _written(
    func: torch._ops.OpOverload, args: Sequence[object], kwargs: Mapping[str, object]
) -> object:
    """What an op that writes to arguments returns: those arguments."""
    names = [argument.name for argument in func._schema.arguments]
    bound = {**dict(zip(names, args, strict=False)), **kwargs}
    by_letter = {
        letter: bound.get(argument.name)
        for argument in func._schema.arguments
        if argument.alias_info is not None
        for letter in argument.alias_info.before_set
    }
    found = []
    for result in func._schema.returns:
        info = result.alias_info
        if info is None:
            raise RuntimeError(f"{func} cannot be captured: it writes to arguments and makes new")
        found.append(by_letter[next(iter(info.before_set))])
    return tuple(found) if len(found) > 1 else found[0] if found else None


def _spoil(tensor: torch.Tensor) -> None:
    if tensor.is_floating_point() or tensor.is_complex():
        tensor.fill_(float("nan"))
    elif tensor.dtype is torch.bool:
        tensor.fill_(True)
    else:
        tensor.fill_(torch.iinfo(tensor.dtype).max)


_aten = torch.ops.aten
_WAIT = torch.ops._c10d_functional.wait_tensor.default

_ALLOCATIONS: frozenset[Callable[..., object]] = frozenset(
    {
        _aten.empty.memory_format,
        _aten.empty_like.default,
        _aten.empty_strided.default,
        _aten.new_empty.default,
        _aten.new_empty_strided.default,
    }
)
"""Ops that only take memory; replaying them does nothing."""
