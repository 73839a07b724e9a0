"""Defines the fused ops in torch, unless the real torch_npu has defined them.

An op that is defined here has its reference as the kernel for CPU tensors and its shape function
for tensors without data. Under functionalization an op that writes to arguments becomes its
functional variant, as torch_npu's own do, so a captured graph holds an op that torchair converts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch

from rolemesh.lowering.npu import (
    activations,
    caches,
    grouped_matmul,
    infer_attention,
    matmul_collectives,
    mla_cache,
    moe,
    norms,
    rotary,
    sparse_attention,
)
from rolemesh.lowering.npu.table import NpuOp

__all__ = ["FAMILIES", "define_npu_ops", "npu_ops"]

FAMILIES = (
    norms,
    rotary,
    activations,
    infer_attention,
    sparse_attention,
    caches,
    mla_cache,
    moe,
    grouped_matmul,
    matmul_collectives,
)
"""Modules with tables of their own, no op in more than one of them."""


def npu_ops() -> dict[str, NpuOp]:
    """All fused ops with a reference, by name."""
    return {name: op for family in FAMILIES for name, op in family.OPS.ops.items()}


def define_npu_ops() -> None:
    """Define every op that does not exist yet as `torch.ops.npu.*`; a second call does nothing."""
    _library()


@functools.cache
def _library() -> torch.library.Library:
    """The definitions; they go away with this object."""
    library = torch.library.Library("npu", "FRAGMENT")
    missing = {name: op for name, op in npu_ops().items() if not _exists(name)}
    for name, op in missing.items():
        library.define(op.schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, _kernel(op), "CPU")
        torch.library.register_fake(f"npu::{name}", op.shape, lib=library)
    for name, op in missing.items():
        if op.functional:
            library.impl(name, _functionalized(op), "Functionalize")
    return library


def _exists(name: str) -> bool:
    base, _, overload = name.partition(".")
    packet = getattr(torch.ops.npu, base, None)
    return packet is not None and (overload or "default") in packet.overloads()


def _kernel(op: NpuOp) -> Callable[..., object]:
    """The reference with contiguous results, as shape functions promise them."""

    def kernel(*args: object, **kwargs: object) -> object:
        found = op.reference(*args, **kwargs)
        if isinstance(found, torch.Tensor):
            return found if op.aliases else found.contiguous()
        if not isinstance(found, tuple | list):
            return found
        return type(found)(x if i in op.aliases else x.contiguous() for i, x in enumerate(found))

    return kernel


def _functionalized(op: NpuOp) -> Callable[..., object]:
    """Calls the functional variant, and gives the arguments their new values."""
    schema = getattr(torch.ops.npu, op.name).default._schema
    names = [argument.name for argument in schema.arguments]
    results = len(schema.returns)

    def functionalized(*args: object, **kwargs: object) -> object:
        arguments = dict(zip(names, args, strict=False)) | kwargs
        plain = _unwrapped(arguments)
        with torch._C._ExcludeDispatchKeyGuard(
            torch._C.DispatchKeySet(torch._C.DispatchKey.Functionalize)
        ):
            found = getattr(torch.ops.npu, op.functional).default(**plain)
        values = list(found) if isinstance(found, tuple | list) else [found]
        own = results - len(op.aliases)
        for name, value in zip(op.writes, values[own:], strict=True):
            _update(arguments[name], value)
        fresh = (torch._to_functional_tensor(value) for value in values[:own])
        given = [
            arguments[op.aliases[place]] if place in op.aliases else next(fresh)
            for place in range(results)
        ]
        return tuple(given) if results > 1 else given[0] if given else None

    return functionalized


def _unwrapped(arguments: Mapping[str, object]) -> dict[str, object]:
    """Arguments with the tensors that functionalization has wrapped; all others as they are."""
    plain: dict[str, object] = {}
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and torch._is_functional_tensor(value):
            torch._sync(value)
            plain[name] = torch._from_functional_tensor(value)
        else:
            plain[name] = value
    return plain


def _update(target: object, value: torch.Tensor) -> None:
    assert isinstance(target, torch.Tensor)
    torch._functionalize_replace(target, value)
    torch._functionalize_commit_update(target)
    torch._sync(target)
