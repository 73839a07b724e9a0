"""The forms of fused attention that a captured graph calls: with given workspace and results.

In capture mode torchair replaces fused attention by its `.out` overload, whose memory and workspace
are taken before. torch_npu has these overloads; elsewhere they are defined here, next to the op.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch

from rolemesh.lowering.npu.define import define_npu_ops, npu_ops

__all__ = ["define_static_attention"]

_OPS = ("npu_fused_infer_attention_score", "npu_fused_infer_attention_score_v2")


def define_static_attention() -> None:
    """Define the overloads that do not exist yet; a second call does nothing."""
    define_npu_ops()
    _library()


@functools.cache
def _library() -> torch.library.Library:
    library = torch.library.Library("npu", "FRAGMENT")
    for name in _OPS:
        packet = getattr(torch.ops.npu, name)
        if "out" in packet.overloads():
            continue
        arguments, _, results = npu_ops()[name].schema.partition("(")[2].rpartition(") -> ")
        workspace = f"_{name}_get_max_workspace"
        library.define(f"{workspace}({arguments}) -> Tensor")
        library.define(
            f"{name}.out({arguments}, Tensor? workspace=None, Tensor[] out) -> {results}"
        )
        for dispatch in ("CPU", "Meta"):
            library.impl(workspace, _workspace, dispatch)
            library.impl(f"{name}.out", _into(packet.default), dispatch)
    return library


def _workspace(query: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
    """None is needed here."""
    return query.new_empty(0, dtype=torch.uint8)


def _into(op: Callable[..., Sequence[torch.Tensor]]) -> Callable[..., tuple[torch.Tensor, ...]]:
    """An op that puts its results where it is told."""

    def run(
        *args: object, workspace: torch.Tensor | None, out: Sequence[torch.Tensor], **kwargs: object
    ) -> tuple[torch.Tensor, ...]:
        for target, value in zip(out, op(*args, **kwargs), strict=True):
            target.copy_(value)
        return tuple(out)

    return run
