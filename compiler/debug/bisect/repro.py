"""A fault by itself: a few ops as one device and as a stage runs them, and the values they take.

It is written as one JSON file: Programs in the form of `compiler.ir.serial`, tensors as base64 of
their bytes.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rolemesh.compiler.debug.compare.placed import Gap, place, tensor_gap
from rolemesh.compiler.debug.compare.reference import (
    known_memory,
    results_of,
    run_single,
    value_name,
)
from rolemesh.compiler.debug.compare.reports import largest_gap, rank_gap
from rolemesh.compiler.dump.files import SCHEMA_VERSION
from rolemesh.compiler.ir.program import Program
from rolemesh.compiler.ir.serial import decode_program, encode_head, encode_layouts, encode_node
from rolemesh.compiler.ir.serial_values import Json
from rolemesh.lowering.composite.define import define_composite_ops
from rolemesh.runtime.lockstep import run_lockstep

__all__ = [
    "KIND",
    "Repro",
    "decode_stage",
    "encode_stage",
    "load_repro",
    "measure",
]

KIND = "rolemesh.repro"

Named = Callable[[str], torch.Tensor]
"""The whole value of a name."""


@dataclass(frozen=True, eq=False)
class Repro:
    """Two Programs that must give the same, and do not.

    Attributes:
        stage: The pass that made the second one.
        target: The node whose results both give.
        before: Runs on one device.
        after: Runs on all ranks if it is sharded, else on one device.
        inputs: What their inputs are, whole, by `value_name`; and values that layouts name.
        tolerance: As in `rolemesh.compiler.command.compare.difference`.
        poison: Whether to fill with NaN what a rank must not read.
    """

    stage: str
    target: str
    before: Program
    after: Program
    inputs: Mapping[str, torch.Tensor]
    tolerance: float
    poison: bool

    def measure(self) -> Gap:
        """How far the second Program is from the first; what running it raises is raised."""
        tensors = [self.inputs[value_name(node)] for node in self.before.placeholders]
        values = run_single(self.before, tensors)
        wanted = [value for v in self.before.results for value in results_of(values[str(v)])]
        return measure(self.after, self.inputs.__getitem__, wanted, self.tolerance, self.poison)

    def write(self, path: Path) -> None:
        """Write the data file."""
        inputs: dict[str, Json] = {name: _encode(value) for name, value in self.inputs.items()}
        data: dict[str, Json] = {
            "schema_version": SCHEMA_VERSION,
            "kind": KIND,
            "stage": self.stage,
            "target": self.target,
            "tolerance": self.tolerance,
            "poison": self.poison,
            "before": encode_stage(self.before),
            "after": encode_stage(self.after),
            "inputs": inputs,
        }
        path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def measure(
    after: Program,
    named: Named,
    wanted: Sequence[torch.Tensor],
    tolerance: float,
    poison: bool,
) -> Gap:
    """How far the outputs of a part of a stage are from what they must be.

    Args:
        after: The part; sharded or not.
        named: Its inputs, whole, by `value_name`, and values that layouts name.
        wanted: What the outputs must be, whole.
        tolerance: As in `rolemesh.compiler.command.compare.difference`.
        poison: Fill with NaN what a rank must not read.
    """
    tensors = [named(value_name(node)) for node in after.placeholders]
    if not after.layouts:
        values = run_single(after, tensors)
        got = [value for v in after.results for value in results_of(values[str(v)])]
        pairs = zip(wanted, got, strict=True)
        return largest_gap([tensor_gap(want, value, tolerance) for want, value in pairs])
    mesh = after.the_mesh
    locals_ = [
        place(tensor, after.layout(node), mesh, named, poison=poison)
        for tensor, node in zip(tensors, after.placeholders, strict=True)
    ]
    with known_memory():
        outputs = run_lockstep(after, locals_, poison=poison)
    layouts = [after.layout(node) for node in after.results]  # type: ignore[arg-type] # nodes only
    by_rank = [list(values) for values in zip(*outputs, strict=True)]
    return rank_gap(wanted, by_rank, layouts, after, named, tolerance)


def load_repro(data: Mapping[str, Any]) -> Repro:
    """What `Repro.write` wrote.

    Raises:
        ValueError: If it is nothing of the kind; KeyError or TypeError likewise.
    """
    return Repro(
        data["stage"],
        data["target"],
        decode_stage(data["before"]),
        decode_stage(data["after"]),
        {name: _decode(value) for name, value in data["inputs"].items()},
        data["tolerance"],
        data["poison"],
    )


def encode_stage(program: Program) -> dict[str, Json]:
    """A Program as JSON."""
    nodes: list[Json] = [
        {**encode_node(node), **encode_layouts(program, node)}
        for node in program.graph.nodes
        if node.op != "output"
    ]
    return {"program": encode_head(program), "nodes": nodes}


def decode_stage(data: Mapping[str, Any]) -> Program:
    """The Program that `encode_stage` wrote, or the file of a stage in a run directory has.

    Raises:
        ValueError: If it is none.
    """
    define_composite_ops()  # another process may have recorded it
    return decode_program(data["program"], data["nodes"])


def _encode(value: torch.Tensor) -> Json:
    flat = value.contiguous().reshape(-1).view(torch.uint8)
    text = base64.b64encode(flat.numpy().tobytes()).decode()
    dtype = str(value.dtype).removeprefix("torch.")
    return {"dtype": dtype, "shape": list(value.shape), "base64": text}


def _decode(data: Mapping[str, Any]) -> torch.Tensor:
    dtype = getattr(torch, data["dtype"])
    content = bytearray(base64.b64decode(data["base64"]))
    flat = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
    return flat.reshape(data["shape"])
