"""What a target needs to know about a rank's graph besides the graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from rolemesh.compiler.ir.program import Input, InputKind, Output, Program

__all__ = ["Signature"]


@dataclass(frozen=True)
class Signature:
    """Inputs and outputs of one rank's graph.

    Attributes:
        name: Names the graph in files and messages, for example `pd_mixed.decode.rank0`.
        inputs: One entry per placeholder.
        outputs: One entry per output.
        symbols: Names of the integer inputs that come after them, which sizes depend on.
    """

    name: str
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    symbols: tuple[str, ...] = ()

    @classmethod
    def of(cls, program: Program, rank: int) -> Signature:
        """The signature of a Program's graph on one rank."""
        symbols = () if program.scope is None else tuple(map(str, program.scope.hints))
        return cls(f"{program.name}.rank{rank}", program.inputs, program.outputs, symbols)

    @cached_property
    def mutated(self) -> dict[int, int]:
        """By index of an output that is the new value of an input, the index of that input."""
        return {i: o.mutates for i, o in enumerate(self.outputs) if o.mutates is not None}

    @property
    def parameters(self) -> frozenset[int]:
        """Indices of inputs that never change: parameters the program does not update."""
        return frozenset(
            index
            for index, entry in enumerate(self.inputs)
            if entry.kind is InputKind.PARAMETER and not entry.mutated
        )

    def all_outputs(
        self,
        kept: Sequence[int],
        values: Sequence[torch.Tensor | None],
        arguments: Sequence[object],
    ) -> tuple[torch.Tensor | None, ...]:
        """Every output of a call that updates inputs in place.

        Args:
            kept: Indices of the outputs that the call returned, as `copy_back` has it.
            values: Those outputs. New values of inputs among them are copied there.
            arguments: What it got.
        """
        outputs: list[Any] = [None] * len(self.outputs)
        for index, value in zip(kept, values, strict=True):
            outputs[index] = value
        for index, position in self.mutated.items():
            target: Any = arguments[position]
            if outputs[index] is not None:
                target.copy_(outputs[index])
            outputs[index] = target
        return tuple(outputs)
