"""Offline NPU mode: torchair converts as for a device, and its graphs run on CPU tensors.

torchair knows an NPU by three things: that `torch_npu` is loaded, what the device of a fake tensor
is called, and which name HCCL gives a process group. This file provides all three, so conversion
takes its NPU branches: placements, the executor, formats, reference data, reuse of memory, frozen
parameters. No tensor with data ever lives on the device: a real CPU tensor stands for one there.

Invariants:

* Installing changes the process for good; `lowering.ge.loader` does it once, before torchair.
* `device_names` is the whole of `torch.npu`: what is not there is an AttributeError, as it would be
  with an older torch_npu.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import cache
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import torch
import torch.distributed as dist
from packaging.version import Version
from torch._C._distributed_c10d import _DistributedBackendOptions
from torch.distributed.distributed_c10d import _get_group_tag, _world

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.lowering.ge.native import SOC
from rolemesh.lowering.npu.define import define_npu_ops

__all__ = ["CANN_VERSION", "device_names", "install"]

CANN_VERSION = "9.0.0"
"""The CANN that torchair is told of: with it, it uses every op of the wheel's own CANN."""

_DTYPE_NUMBERS: Mapping[str, int] = MappingProxyType(
    {
        "int4": 285,
        "hifloat8": 290,
        "float8_e5m2": 291,
        "float8_e4m3fn": 292,
        "float8_e8m0fnu": 293,
        "float4_e2m1fn_x2": 296,
        "float4_e1m2fn_x2": 297,
    }
)
"""dtypes that torch_npu adds, with their numbers in its ops' arguments."""

_FORMAT_ND = 2


def install(package: Path, version: str) -> None:
    """Make this process look to torchair as if it had an NPU.

    Args:
        package: The folder of torch_npu's package. Nothing of it is imported.
        version: Its version.

    Raises:
        RolemeshError: RM025 if another backend took the place of custom devices.
    """
    _name_the_device()
    modules: Mapping[str, Mapping[str, object]] = {
        "torch_npu": {
            "__version__": version,
            "__file__": str(package / "__init__.py"),
            "__getattr__": lambda name: getattr(torch.ops.npu, name),
            "get_npu_format": lambda tensor: _FORMAT_ND,
            "get_storage_size": lambda tensor: tensor.numel(),
            **_DTYPE_NUMBERS,
        },
        "torch_npu.npu": device_names(),
        "torch_npu.npu.utils": {
            "_is_gte_cann_version": _is_at_least,
            "get_cann_version": lambda module="CANN": CANN_VERSION,
        },
        "torch_npu.distributed": {"_is_support_hccl_comm_name": lambda: True},
    }
    for name, members in modules.items():
        module = module_from_spec(ModuleSpec(name, None, is_package=True))
        vars(module).update(members)
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    torch._register_device_module("npu", sys.modules["torch_npu.npu"])
    torch.Tensor.is_npu = property(_stands_for_npu)  # type: ignore[attr-defined]
    _define_pattern_ops()
    _register_hccl()


def device_names() -> dict[str, object]:
    """The names of `torch.npu`, which is `torch_npu.npu`: one device that does nothing."""
    generator = torch.Generator()
    return {
        "is_available": lambda: False,  # no data can live there
        "is_initialized": lambda: True,
        "_is_in_bad_fork": lambda: False,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "get_device_name": lambda device=None: SOC,
        "default_generators": (generator,),
        "manual_seed_all": generator.manual_seed,
        "matmul": SimpleNamespace(allow_hf32=False),
        "conv": SimpleNamespace(allow_hf32=True),
        "_get_deterministic_level": lambda: 0,
    }


class _Hooks(torch._C._acc.PrivateUse1Hooks):
    def is_available(self) -> bool:
        return False

    def has_primary_context(self, device: int) -> bool:
        return False

    def is_built(self) -> bool:
        return True


class _Guard(torch._C._acc.DeviceGuard):
    def type_(self) -> torch._C._autograd.DeviceType:  # type: ignore[override]
        return torch._C._autograd.DeviceType.PrivateUse1


def _name_the_device() -> None:
    """Call torch's custom device `npu`, with the hooks that torch wants of a named device."""
    try:
        torch.utils.rename_privateuse1_backend("npu")
    except RuntimeError as error:
        raise RolemeshError(
            "RM025",
            what="this process cannot convert for an NPU",
            where="offline NPU mode",
            why=f"torch has one custom device, and it has a name: {error}",
            fix="convert in a process that loads no other backend",
        ) from error
    torch._C._acc.register_python_privateuseone_hook(_Hooks())
    torch._C._acc.register_python_privateuseone_device_guard(_Guard())


def _stands_for_npu(tensor: torch.Tensor) -> bool:
    """`Tensor.is_npu`: whether a tensor is on the NPU, or is real and stands for one there."""
    if tensor.device.type == "cpu":
        return type(tensor) in (torch.Tensor, torch.nn.Parameter)
    return tensor.device.type == "npu"


@cache
def _define_pattern_ops() -> torch.library.Library:
    """Define the ops of torchair's built-in patterns, which it traces before its first conversion.

    Of those that rolemesh has no reference for, only the shapes: the patterns make GE ops of them.
    """
    define_npu_ops()
    library = torch.library.Library("npu", "FRAGMENT")
    for schema, shape in _PATTERN_OPS.items():
        name = schema.partition("(")[0]
        if not hasattr(torch.ops.npu, name):
            library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
            torch.library.register_fake(f"npu::{name}", shape, lib=library)
    return library


def _dynamic_quant_shape(
    input: torch.Tensor,  # noqa: A002
    **options: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 values, and a scale for each token."""
    scales = input.new_empty(input.shape[:-1], dtype=torch.float32)
    return torch.empty_like(input, dtype=torch.int8), scales


def _add_rms_norm_cast_shape(
    x1: torch.Tensor, x2: torch.Tensor, gamma: torch.Tensor, epsilon: float = 1e-06
) -> tuple[torch.Tensor, ...]:
    """The norm in fp32 and as it is, its reciprocal root, and the sum."""
    ones = [1] * gamma.dim()
    root = x1.new_empty([*x1.shape[: x1.dim() - gamma.dim()], *ones], dtype=torch.float32)
    return x1.new_empty(x1.shape, dtype=torch.float32), x1.new_empty(x1.shape), root, x2.clone()


def _dtype_cast_shape(
    input: torch.Tensor,  # noqa: A002
    dtype: torch.dtype,
) -> torch.Tensor:
    return torch.empty_like(input, dtype=dtype)


_PATTERN_OPS: Mapping[str, Callable[..., object]] = MappingProxyType(
    {
        "_npu_dtype_cast(Tensor input, ScalarType dtype) -> Tensor": _dtype_cast_shape,
        "npu_dynamic_quant(Tensor input, *, Tensor? smooth_scales=None, Tensor? group_index=None, "
        "int? dst_type=None, str quant_mode='pertoken', float dst_type_max=0.0) "
        "-> (Tensor, Tensor)": _dynamic_quant_shape,
        "npu_add_rms_norm_cast(Tensor x1, Tensor x2, Tensor gamma, float epsilon=1e-06) "
        "-> (Tensor, Tensor, Tensor, Tensor)": _add_rms_norm_cast_shape,
    }
)
"""Schemas of torch_npu, letter by letter, with the shapes of their results."""


def _is_at_least(version: str, module: str = "CANN") -> bool:
    return Version(CANN_VERSION) >= Version(version)


def _register_hccl() -> None:
    """Let groups be made over `hccl`: gloo behind it, and the names that torchair asks HCCL for."""

    def make(options: _DistributedBackendOptions, extra: object) -> dist.ProcessGroupGloo:
        return dist.ProcessGroupGloo(
            options.store, options.group_rank, options.group_size, options.timeout
        )

    dist.Backend.register_backend("hccl", make, extended_api=True, devices=["npu"])
    # On the class: a group keeps the C++ object of a backend, not an instance of a subclass.
    dist.ProcessGroupGloo.get_hccl_comm_name = _group_name  # type: ignore[attr-defined]


def _group_name(backend: dist.ProcessGroupGloo, rank: int, init_comm: bool = True) -> str:
    """The name of a backend's group, of the form that graphs have without HCCL."""
    npu = torch.device("npu")
    for group in _world.pg_map:
        if npu in group._device_types and group._get_backend(npu) is backend:
            ranks = ",".join(map(str, dist.get_process_group_ranks(group)))
            return f"tag={_get_group_tag(group)};rank_list={ranks}"
    raise RolemeshError(
        "RM030",
        what="a process group of the NPU is gone",
        where="conversion of a collective",
        why="it was destroyed, or made by other means than torch.distributed",
        fix="convert while the process group exists",
    )
