"""Runs a GE graph on CPU tensors.

Invariants: a tensor is freed after its last use; a result never lies in the memory of an input, a
constant or another result, unless the caller assigned it that memory; an input changes only where a
ref op writes to it, or a result is assigned to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.runtime.ge.checks import (
    as_described,
    check_assigned,
    check_count,
    check_result,
    failed,
    op_fault,
    shares_memory,
    unequal,
    unlike,
)
from rolemesh.runtime.ge.communicator import Communicator
from rolemesh.runtime.ge.graph import Graph, Node
from rolemesh.runtime.ge.ops.table import Op
from rolemesh.runtime.ge.steps import Plan, Step

__all__ = ["Copy", "Executor", "Observer"]

Observer = Callable[[Node, tuple[torch.Tensor, ...]], None]
"""Called with each Data op and each op that has run, and its results. Later ops may change them."""


class Copy(NamedTuple):
    """Bytes that a run copied without computing anything.

    Attributes:
        node: Name of the node: a TensorMove, an Assign, a view that had to be copied, or NetOutput.
        bytes: How many.
    """

    node: str
    bytes: int


class Executor:
    """A GE graph that is ready to run; an `Executable` of `lowering.ge.engine`.

    Args:
        graph: The graph.
        ops: What its op types compute.
        communicator: Makes the exchanges of collectives; needed if there are any.
        seed: Run ops in a random order that the graph allows, drawn with this seed; without one,
            in the order of the graph.
        check: Check each op's inputs and results. The graph's own inputs and results always are.
        observe: Called with each op that has run.

    Attributes:
        copies: What the last run copied without computing anything.

    Raises:
        RolemeshError: RM027 for a malformed graph, RM028 for ops that are not in `ops`, RM030 for
            collectives without a communicator.
    """

    def __init__(
        self,
        graph: Graph,
        ops: Mapping[str, Op],
        communicator: Communicator | None = None,
        *,
        seed: int | None = None,
        check: bool = True,
        observe: Observer | None = None,
    ) -> None:
        self.copies: list[Copy] = []
        self._graph = graph
        self._check = check
        self._observe = observe
        self._plan = Plan.of(graph, ops, communicator, seed)

    def run(
        self, inputs: Sequence[torch.Tensor], assigned: Sequence[torch.Tensor | None] = ()
    ) -> list[torch.Tensor]:
        """Run once.

        Args:
            inputs: One tensor per Data op, by its index. Ops that write to Data change them.
            assigned: For each result the tensor that takes it, or None; empty if there are none.

        Returns:
            One tensor per result; the assigned one where there is one.

        Raises:
            RolemeshError: RM029 for inputs that the graph does not take, RM027 for values that do
                not fit the graph, RM030 for a collective that fails, RM031 for an op that fails.
        """
        self.copies = []
        check_count(self._graph, inputs, assigned)
        with torch.no_grad():
            values = self._fed(inputs)
            for step in self._plan.steps:
                results = self._execute(step, values)
                for slot, tensor in zip(step.outputs, results, strict=True):
                    values[slot] = tensor
                if self._observe is not None:
                    self._observe(step.binding.node, results)
                for slot in step.dead:
                    values[slot] = None
            return self._finish(values, list(assigned) or [None] * len(self._plan.results))

    def _fed(self, inputs: Sequence[torch.Tensor]) -> list[object]:
        values = self._plan.initial.copy()
        for index, slot in enumerate(self._plan.data):
            tensor = as_described(self._graph, index, inputs[index])
            if slot is not None:
                values[slot] = tensor
                if self._observe is not None:
                    self._observe(self._graph.data[index], (tensor,))
        return values

    def _execute(self, step: Step, values: list[object]) -> tuple[torch.Tensor, ...]:
        arguments = [values[slot] for slot in step.slots]
        for position, slots in step.lists:
            arguments[position] = [values[slot] for slot in slots]
        if self._check and step.equal:
            dtypes = [values[slot].dtype for slot in step.equal]  # type: ignore[attr-defined]
            if dtypes.count(dtypes[0]) != len(dtypes):
                raise unequal(self._graph, step.binding, dtypes)
        try:
            result = step.call(*arguments)
        except RolemeshError:
            raise
        except Exception as error:
            raise failed(self._graph, step.binding, arguments, error) from error
        results = result if isinstance(result, tuple) else (result,)
        if self._check:
            self._check_results(step, arguments, results)
            for output, slot in step.written.items():
                if results[output] is not values[slot]:
                    what = f"output {output} is not the input that the op writes to"
                    raise op_fault(self._graph, step.binding.node, what)
        if step.copies and not shares_memory(results[0], arguments[-1:]):
            self._copied(step.binding.node, *results)
        if step.clones:
            results = tuple(tensor.clone() for tensor in results)
            self._copied(step.binding.node, *results)
        return results

    def _check_results(
        self, step: Step, arguments: Sequence[object], results: tuple[torch.Tensor, ...]
    ) -> None:
        """Check an op's results against the graph, and against what its function promises."""
        graph, node = self._graph, step.binding.node
        if len(results) != len(step.outputs):
            what = f"the op gave {len(results)} results instead of {len(step.outputs)}"
            raise op_fault(graph, node, what)
        for index, (tensor, (dtype, numel)) in enumerate(zip(results, step.expected, strict=True)):
            if not isinstance(tensor, torch.Tensor):
                raise op_fault(graph, node, f"output {index} is a {type(tensor).__name__}")
            if (dtype is not None and tensor.dtype is not dtype) or (
                numel is not None and tensor.numel() != numel
            ):
                raise unlike(graph, node, index, tensor)
            if step.binding.op.view or index in step.written:
                continue
            # What is neither a view nor an argument itself has memory of its own.
            suspect = tensor._is_view() or step.lists or any(tensor is x for x in arguments)
            if suspect and shares_memory(tensor, arguments):
                raise op_fault(graph, node, f"output {index} lies in the memory of an input")

    def _finish(
        self, values: Sequence[object], targets: Sequence[torch.Tensor | None]
    ) -> list[torch.Tensor]:
        """The results in memory of their own, or in the assigned memory."""
        results: list[torch.Tensor] = []
        for index, slot in enumerate(self._plan.results):
            tensor, target = values[slot], targets[index]
            assert isinstance(tensor, torch.Tensor)
            check_result(self._graph, index, tensor)
            others = [values[other] for other in self._plan.shared[index]]
            if target is None:
                twins = self._plan.twins[index]
                others += [results[twin] for twin in twins if targets[twin] is None]
                if not tensor.is_contiguous() or shares_memory(tensor, others):
                    tensor = tensor.clone(memory_format=torch.contiguous_format)
                    self._copied(self._graph.net_output, tensor)
            else:
                check_assigned(self._graph, index, target, tensor)
                if not _same_memory(tensor, target) and shares_memory(tensor, others):
                    tensor = tensor.clone()  # an earlier result may be assigned to that memory
            results.append(tensor)
        for index, target in enumerate(targets):
            if target is not None:
                if not _same_memory(results[index], target):
                    target.copy_(results[index])
                    self._copied(self._graph.net_output, target)
                results[index] = target
        return results

    def _copied(self, node: Node, *tensors: torch.Tensor) -> None:
        self.copies.append(Copy(node.name, sum(tensor.nbytes for tensor in tensors)))


def _same_memory(tensor: torch.Tensor, target: torch.Tensor) -> bool:
    return (
        tensor.data_ptr() == target.data_ptr()
        and tensor.shape == target.shape
        and tensor.stride() == target.stride()
    )
