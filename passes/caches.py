"""Which values are caches: what a program keeps between calls and every rank may have all of."""

from __future__ import annotations

from torch import fx

from rolemesh.compiler.ir.program import Program

__all__ = ["Caches"]


class Caches:
    """The caches of a Program: stored tensors that it updates, and their new values."""

    def __init__(self, program: Program) -> None:
        self._values = {
            value
            for value, output in zip(program.results, program.outputs, strict=True)
            if output.mutates is not None
        }
        self._values.update(
            node
            for node, entry in zip(program.placeholders, program.inputs, strict=True)
            if entry.mutated
        )

    def holds(self, value: fx.Node) -> bool:
        """Whether a value is a cache, or made of one and of nothing else."""
        while value not in self._values:
            if value.op != "call_function" or len(value.all_input_nodes) != 1:
                return False
            (value,) = value.all_input_nodes
        return True
