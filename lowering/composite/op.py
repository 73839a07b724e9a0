"""The form of a composite op.

A composite op is a functional op of the namespace `rolemesh`: model code calls it, a captured graph
holds it as one node, a sharding rule in `rolemesh.passes.rules` says how it shards, and a target
runs its kernel, replaces it by an op of its own, or traces its decomposition.

Three functions of the schema's parameters make one::

    def norm_shape(hidden, weight, eps): ...  # results without data; sizes may be symbols
    def norm_plain(hidden, weight, eps): ...  # ATen ops only, traceable, sizes may be symbols
    def norm_kernel(hidden, weight, eps): ...  # fast on a CPU; may read values


    OP = CompositeOp(
        "norm(Tensor hidden, Tensor weight, float eps) -> Tensor",
        shape=norm_shape,
        kernel=norm_kernel,
        decomposition=norm_plain,
        inlined=norm_plain,
        gradient=Gradient(("hidden", "weight"), norm_gradient),
    )

where `norm_gradient(grad, hidden, weight, eps)` gives the gradients of hidden and weight, in ATen
ops or by another composite op.

Results are new contiguous tensors, and arguments are never written to. An op works with tensors of
any strides, so that no compiler has to copy an argument for it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._ops import OpOverload

__all__ = ["CompositeOp", "Gradient", "register_shape"]


@dataclass(frozen=True)
class Gradient:
    """What autograd computes for an op with one result.

    Attributes:
        of: Names of the arguments that have gradients.
        compute: Takes the gradient of the result and the arguments of the op; gives a gradient for
            each of these, or None. It need not give more than what autograd asks for.
    """

    of: tuple[str, ...]
    compute: Callable[..., Sequence[Tensor | None]]


@dataclass(frozen=True)
class CompositeOp:
    """One op of `torch.ops.rolemesh`.

    Attributes:
        schema: Its schema, without the namespace.
        shape: Gives results without data, by `new_empty`; it adds no guard on sizes.
        kernel: Computes it on a CPU.
        decomposition: Computes it in ATen ops, on any device and in graphs of any target.
        inlined: What a compiler that can call kernels (inductor) traces in place of the op; for
            arguments with which a call of the kernel is faster it returns NotImplemented. None to
            call the kernel always.
        gradient: What autograd computes; None if it refuses.
    """

    schema: str
    shape: Callable[..., object]
    kernel: Callable[..., object]
    decomposition: Callable[..., object]
    inlined: Callable[..., object] | None
    gradient: Gradient | None = None

    def __post_init__(self) -> None:
        names = list(self.arguments)
        for function in (self.shape, self.kernel, self.decomposition, self.inlined):
            if function is not None and list(inspect.signature(function).parameters) != names:
                raise ValueError(
                    f"{function.__name__} does not take the arguments of {self.schema}"
                )
        if self.gradient is not None and not set(self.gradient.of) <= set(names):
            raise ValueError(f"{self.gradient.of} are not arguments of {self.schema}")

    @property
    def arguments(self) -> tuple[str, ...]:
        """Names of its arguments."""
        schema = torch._C.parse_schema(f"rolemesh::{self.schema}")
        return tuple(argument.name for argument in schema.arguments)

    @property
    def name(self) -> str:
        """Its name: `attention`."""
        return self.schema.partition("(")[0]

    @property
    def overload(self) -> OpOverload:
        """What a graph calls; it exists once the op is defined."""
        found: OpOverload = getattr(torch.ops.rolemesh, self.name).default
        return found


def register_shape(library: torch.library.Library, name: str, shape: Callable[..., object]) -> None:
    """Register the shape function of an op of `rolemesh`, as `torch.library.register_fake` does.

    That one looks for its caller's file among those of all imported modules, which takes longer
    than all the rest of loading a compiled program.

    Args:
        library: Defines the op, and holds the registration.
        name: The op's name.
        shape: Gives its results without data.
    """
    entry = torch._library.simple_registry.singleton.find(f"rolemesh::{name}")
    handle = entry.fake_impl.register(shape, shape.__code__.co_filename, lib=library)
    library._registration_handles.append(handle)
