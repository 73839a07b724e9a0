"""Passes broken on purpose, each in another way, and a small case to break them on."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from unittest import mock

import torch
from torch import fx

from rolemesh.compiler.command.check_options import CheckOptions
from rolemesh.compiler.debug.compare.stages import CAPTURE, PhaseRun, phase_runs, stages_of
from rolemesh.compiler.ir import dialect
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.placement import Shard
from rolemesh.compiler.ir.program import Origin, Program
from rolemesh.compiler.ir.rule import Choice, OpCall, Rule
from rolemesh.compiler.pipeline import ShardOptions
from rolemesh.passes import canonicalise, push_back
from rolemesh.passes.partition import Rewrite
from rolemesh.passes.prefetch import Prefetch
from rolemesh.passes.reshard import Step
from rolemesh.passes.rules.registry import Rules
from rolemesh.passes.verify import Verify

__all__ = [
    "captured",
    "drops_all_reduces",
    "forgets_layouts",
    "gathers_the_wrong_dim",
    "leaves_pads",
    "one_buffer_for_all",
    "refuses_all_reduces",
    "roots_for_inverses",
    "shard_again",
    "sums_are_maxima",
    "verify_refuses_silu",
    "without_silu",
]

aten = torch.ops.aten


@functools.cache
def captured() -> dict[str, PhaseRun]:
    """A llama of three layers with five prompts of seven tokens, by phase."""
    options = CheckOptions("hf:llama", "pd_mixed", Mesh({"tp": 4}), 7, 5, layers=3)
    return {run.phase: run for run in phase_runs(options, lambda _: None)}


def shard_again(phase: str, role: str, mesh: str = "tp=4") -> PhaseRun:
    """The same for a role and a mesh, with the passes as they are now."""
    run = captured()[phase]
    options = ShardOptions(Mesh.parse(mesh), role)
    programs, failure = stages_of(run.programs[CAPTURE], options, phase)
    return dataclasses.replace(run, options=options, programs=programs, failure=failure)


def roots_for_inverses() -> AbstractContextManager[object]:
    """Canonicalise makes the third rsqrt a sqrt."""
    right = canonicalise._Rewriter._rewrite

    def wrong(self: canonicalise._Rewriter, node: fx.Node) -> fx.Node:
        found = right(self, node)
        if node.name == "rsqrt_2":
            found.target = aten.sqrt.default
        return found

    return mock.patch.object(canonicalise._Rewriter, "_rewrite", wrong)


def sums_are_maxima() -> AbstractContextManager[object]:
    """The rule of mm says that partial products are to be combined by their maximum."""
    right = Rules.rule

    def wrong(self: Rules, call: OpCall, where: str = "") -> Rule:
        found = right(self, call, where)
        return (
            dataclasses.replace(found, reduction="max") if call.target is aten.mm.default else found
        )

    return mock.patch.object(Rules, "rule", wrong)


def forgets_layouts() -> AbstractContextManager[object]:
    """Push back makes an op compute a chunk and leaves its layout whole."""
    right = push_back._Axis._choose

    def wrong(self: push_back._Axis, node: fx.Node, choice: Choice, reason: str) -> None:
        before = self.layouts[node]
        right(self, node, choice, reason)
        self.layouts[node] = before

    return mock.patch.object(push_back._Axis, "_choose", wrong)


def _emitting(
    change: Callable[[fx.Node, fx.Node, Step], fx.Node],
) -> AbstractContextManager[object]:
    """Partition with a change to each collective that it inserts."""
    right = Rewrite._emit

    def wrong(self: Rewrite, old: fx.Node, value: fx.Node, step: Step, where: Origin) -> fx.Node:
        return change(value, right(self, old, value, step, where), step)

    return mock.patch.object(Rewrite, "_emit", wrong)


def drops_all_reduces() -> AbstractContextManager[object]:
    """Partition inserts no all_reduce."""
    return _emitting(lambda value, new, step: value if step.op is dialect.ALL_REDUCE else new)


def gathers_the_wrong_dim() -> AbstractContextManager[object]:
    """Partition gathers hidden states along the batch."""

    def change(value: fx.Node, new: fx.Node, step: Step) -> fx.Node:
        shape = new.meta["type"].shape
        if step.op is dialect.ALL_GATHER and len(shape) == 3:
            new.update_kwarg("shard", Shard(0, 1, 4 * shape[0]))
        return new

    return _emitting(change)


def refuses_all_reduces() -> AbstractContextManager[object]:
    """Partition raises where it would insert an all_reduce."""

    def change(value: fx.Node, new: fx.Node, step: Step) -> fx.Node:
        if step.op is dialect.ALL_REDUCE:
            raise KeyError("all_reduce")
        return new

    return _emitting(change)


def leaves_pads() -> AbstractContextManager[object]:
    """Partition lets pads count in sums."""
    return mock.patch.object(Rewrite, "_mask_pad", lambda self, value, *rest: value)


def one_buffer_for_all() -> AbstractContextManager[object]:
    """Prefetch receives the weights of all layers in one buffer."""
    right = Prefetch.apply

    def wrong(self: Prefetch, program: Program) -> Program:
        found = right(self, program)
        for node in found.graph.find_nodes(op="call_function", target=dialect.BROADCAST_START):
            node.update_kwarg("slot", str(node.kwargs["slot"]).partition("#")[0])
        return found

    return mock.patch.object(Prefetch, "apply", wrong)


def without_silu() -> AbstractContextManager[object]:
    """Looking up the rule of silu raises."""
    right = Rules.rule

    def wrong(self: Rules, call: OpCall, where: str = "") -> Rule:
        if call.target is aten.silu.default:
            raise ValueError("silu is not known")
        return right(self, call, where)

    return mock.patch.object(Rules, "rule", wrong)


def verify_refuses_silu() -> AbstractContextManager[object]:
    """The verifier takes any silu for a fault."""
    right = Verify.apply

    def wrong(self: Verify, program: Program) -> Program:
        for node in program.graph.find_nodes(op="call_function", target=aten.silu.default):
            raise RolemeshError("RM016", f"%{node.name} is refused", where="", why="", fix="")
        return right(self, program)

    return mock.patch.object(Verify, "apply", wrong)
