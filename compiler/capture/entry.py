"""What runs when Dynamo's compiled function is called: a captured graph and its executor.

Dynamo's guards and bytecode bind the user's arguments and rebuild the model's outputs; the epilogue
of AOTAutograd writes new values of mutated inputs back. Between the two, `Captured.run` hands the
flat tensors to an *executor*. The one that the graph was captured with is the default; `executing`
replaces it for a while, so that one compiled function serves tracing (nothing runs), sharded
execution in one process, and the single-device reference.

An executor may return, for a mutated input, the very tensor object it was given: it has then
written the new value where that tensor's data really lives. The epilogue's copy of a tensor to
itself does nothing, also when the tensor's storage has been freed (resized to 0 bytes).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import sympy
import torch
from torch import Tensor, fx

from rolemesh.compiler.ir.dims import Dim, concrete
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.program import Program
from rolemesh.runtime.holder import Holder

__all__ = [
    "Captured",
    "Cut",
    "Executor",
    "Fixed",
    "Integer",
    "Size",
    "Slot",
    "Weight",
    "cut_rows",
    "executing",
    "is_overridden",
    "reference_executor",
    "run_graph",
]


class Fixed(NamedTuple):
    """An output of Dynamo's graph that is no tensor: None, or a size that was specialised."""

    value: object


class Size(NamedTuple):
    """An output of Dynamo's graph that is a symbolic size."""

    size: Dim


class Integer(NamedTuple):
    """An output of Dynamo's graph that is an integer, and a scalar tensor in the Program."""

    output: int


class Cut(NamedTuple):
    """An output of Dynamo's graph that is some rows of a tensor of the Program; see `cut_rows`.

    Attributes:
        unit: Length of a row in the first dim.
        outputs: The Program's outputs that are the other arguments.
    """

    unit: int
    outputs: tuple[int, ...]


Slot = int | Fixed | Size | Integer | Cut
"""An output of Dynamo's graph: the index of the Program's output, or what it is instead."""


class Weight:
    """A parameter or buffer of a repeated layer, read from the layer at each call.

    Args:
        name: Its qualified name in the model.
        registry: Where the layer keeps it: the `_parameters` of a module, say.
        key: Its name there.
    """

    def __init__(self, name: str, registry: Mapping[str, object], key: str) -> None:
        self.name = name
        self._registry = registry
        self._key = key
        self._last = self._get()

    def _get(self) -> Tensor:
        found = self._registry.get(self._key)
        if isinstance(found, Tensor):
            return found
        raise _changed(self.name, "it is gone")

    @property
    def tensor(self) -> Tensor:
        """The tensor as it is now.

        Raises:
            RolemeshError: RM020, if it is not of the shape and dtype that it had at first.
        """
        found = self._get()
        last = self._last
        if found is not last:
            if (found.shape, found.dtype) != (last.shape, last.dtype):
                raise _changed(
                    self.name,
                    f"it is {found.dtype} {list(found.shape)}, and was {last.dtype} "
                    f"{list(last.shape)}",
                )
            self._last = found
        return found


def _changed(name: str, how: str) -> RolemeshError:
    return RolemeshError(
        "RM020",
        "the model differs from the one that was traced",
        where=name,
        why=f"{how}; a Program has fixed shapes and dtypes",
        fix="trace the model again",
    )


@dataclass(frozen=True, eq=False)
class Captured:
    """One captured Dynamo graph.

    Attributes:
        program: The graph as captured; its inputs and outputs are tensors only.
        constants: Values of the CONSTANT inputs, which come last among the Program's inputs.
        executor: What runs it unless `executing` says otherwise.
        tensor_inputs: The Program's other inputs, in order: which of Dynamo's flat inputs each is,
            or the weight of a repeated layer, which Dynamo does not know.
        slots: For each of Dynamo's flat outputs, where its value is.
        holders: Of a training step, where each parameter is kept, by the Program's inputs.
    """

    program: Program
    constants: tuple[Tensor, ...]
    executor: Executor
    tensor_inputs: tuple[int | Weight, ...]
    slots: tuple[Slot, ...]
    holders: Mapping[int, Holder] = field(default_factory=dict)

    def run(self, flat: Sequence[object]) -> list[object]:
        """Run the executor in force on Dynamo's flat inputs.

        Args:
            flat: Every input of Dynamo's graph, sizes included.

        Returns:
            Every output of Dynamo's graph as AOTAutograd expects them: new values of mutated
            inputs first, then the model's results.

        Raises:
            ValueError: If the executor returns another number of values than the Program has
                outputs.
        """
        override = _EXECUTING.get()
        executor = self.executor
        if override is not None and override.captured in (None, self):
            executor = override.executor
        given = [
            flat[entry] if isinstance(entry, int) else entry.tensor for entry in self.tensor_inputs
        ]
        inputs: list[Any] = [torch.tensor(x) if isinstance(x, int) else x for x in given]
        inputs += self.constants
        values = self.program.values(inputs)
        results = executor(self, inputs)
        if len(results) != len(self.program.outputs):
            raise ValueError(
                f"executor of {self.program.name} returned {len(results)} values "
                f"for {len(self.program.outputs)} outputs"
            )
        return [
            results[slot] if isinstance(slot, int) else _output(slot, results, values)
            for slot in self.slots
        ]


Executor = Callable[[Captured, list[Tensor]], list[Tensor]]
"""Computes a Program's outputs, in order, from its inputs, in order. It does not write inputs."""


def cut_rows(unit: int, x: Tensor, end: Tensor, start: Tensor | None = None) -> Tensor:
    """Rows whose number depends on data: `x[start * unit : end * unit]`. It waits for the device.

    Args:
        unit: Length of a row in the first dim.
        x: All rows.
        end: Number of the first row after those to return, one integer.
        start: Number of the first one, one integer; None for 0.
    """
    return x[(0 if start is None else int(start)) * unit : int(end) * unit]


def _output(
    slot: Fixed | Size | Integer | Cut,
    results: Sequence[Tensor],
    values: Mapping[sympy.Symbol, int],
) -> object:
    if isinstance(slot, Size):
        return concrete(slot.size, values)
    if isinstance(slot, Fixed):
        return slot.value
    if isinstance(slot, Integer):
        return int(results[slot.output])
    return cut_rows(slot.unit, *[results[output] for output in slot.outputs])


class _Override(NamedTuple):
    captured: Captured | None
    executor: Executor


_EXECUTING: ContextVar[_Override | None] = ContextVar("rolemesh_executing", default=None)


@contextmanager
def executing(captured: Captured | None, executor: Executor) -> Iterator[None]:
    """Run `captured` with `executor` inside the `with` block, in this thread or task.

    Args:
        captured: The graph concerned; None for whichever graph is called.
        executor: What to run instead of the default.
    """
    token = _EXECUTING.set(_Override(captured, executor))
    try:
        yield
    finally:
        _EXECUTING.reset(token)


def is_overridden() -> bool:
    """Whether an executor takes the place of every graph's own: nothing of theirs will run."""
    override = _EXECUTING.get()
    return override is not None and override.captured is None


def reference_executor(captured: Captured, inputs: list[Tensor]) -> list[Tensor]:
    """Run the graph as captured, op by op, on one device."""
    program = captured.program
    return run_graph(program.at(program.values(inputs)).graph, inputs)


def run_graph(graph: fx.Graph, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Interpret a graph of ATen ops on whole tensors.

    Args:
        graph: A graph whose output is a flat tuple of tensors.
        inputs: One tensor per placeholder.
    """
    with torch.no_grad():
        return list(fx.Interpreter(torch.nn.Module(), graph=graph).run(*inputs))
