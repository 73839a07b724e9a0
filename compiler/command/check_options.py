"""The options of a check, checked themselves, and how they make the case."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.models.cases import Case, load_case
from rolemesh.compiler.roles import role_named
from rolemesh.lowering.targets import target as target_named

__all__ = ["DTYPES", "LOCKSTEP", "TOLERANCES", "CheckOptions"]

LOCKSTEP = ("eager", "ge")
"""Targets whose ranks can all run in one process."""

DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Values of `--dtype`."""

TOLERANCES: Mapping[str, float] = {"fp32": 1e-3, "bf16": 5e-1}
"""Default tolerance by dtype; see `compare.difference`. That of bf16 finds gross errors only."""


@dataclass(frozen=True)
class CheckOptions:
    """What to check.

    Attributes:
        model: The MODEL argument; see `load_case`.
        role: The role.
        mesh: The mesh.
        tokens: Prompt length.
        batch: Number of sequences.
        decode_steps: Greedy tokens to decode, for language models.
        dtype: `fp32` or `bf16`.
        layers: Number of layers; None for the model's own.
        attn: Attention implementation.
        experts: Experts implementation; None for the library's choice.
        target: What ranks compile to. `eager` and `ge` run in lock-step.
        target_options: Options of the target, `NAME=VALUE` each.
        processes: Run the ranks as processes.
        tolerance: As in `compare.difference`; None for the dtype's.
        dump: Folder to write a run directory to; None for what ROLEMESH_DUMP says.
        optimise: Whether the passes run that change no result, only what it costs.
    """

    model: str
    role: str
    mesh: Mesh
    tokens: int = 13
    batch: int = 2
    decode_steps: int = 1
    dtype: str = "fp32"
    layers: int | None = None
    attn: str = "sdpa"
    experts: str | None = None
    target: str = "eager"
    target_options: tuple[str, ...] = ()
    processes: bool = False
    tolerance: float | None = None
    dump: str | None = None
    optimise: bool = True

    def __post_init__(self) -> None:
        role_named(self.role)
        target_named(self.target).parse(self.parsed_options)
        for name in ("tokens", "batch", "decode_steps"):
            if getattr(self, name) < 1:
                raise RolemeshError(
                    "RM018",
                    what=f"{name} is {getattr(self, name)}",
                    where="rolemesh check",
                    why="it counts from 1",
                    fix=f"give a positive number of {name.replace('_', ' ')}",
                )

    @property
    def real_ranks(self) -> bool:
        """Whether ranks are processes."""
        return self.processes or self.target not in LOCKSTEP

    @property
    def parsed_options(self) -> dict[str, object]:
        """The target's options by name, their values read as JSON where they are JSON.

        Raises:
            RolemeshError: RM018 for one that is not `NAME=VALUE`.
        """
        found: dict[str, object] = {}
        for text in self.target_options:
            name, equals, value = text.partition("=")
            if not name or not equals:
                raise RolemeshError(
                    "RM018",
                    what=f"{text!r} is no option of a target",
                    where="rolemesh check --target-option",
                    why="an option has a name and a value",
                    fix="write for example --target-option fuse=false",
                )
            found[name] = _value(value)
        return found

    @property
    def allowed(self) -> float:
        """The tolerance in force."""
        return TOLERANCES[self.dtype] if self.tolerance is None else self.tolerance

    def load(self) -> Case:
        """The case, the same in every process: a function that draws weights gets one seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return load_case(
                self.model,
                tokens=self.tokens,
                batch=self.batch,
                dtype=DTYPES[self.dtype],
                attn=self.attn,
                experts=self.experts,
                layers=self.layers,
                max_len=max(32, self.tokens + max(8, self.decode_steps)),
            )


def _value(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text
