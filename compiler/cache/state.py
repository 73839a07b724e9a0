"""What decides a compiled program besides the model's graph and the options: versions and settings.

Invariant: what is read here is all that capture, passes and lowering look at outside of their
arguments. A new global setting that one of them reads belongs here.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import os
import sys
from pathlib import Path

import torch

from rolemesh.compiler.cache.text import NotCacheableError, digest, plain_text
from rolemesh.compiler.ir.serial_values import Json, encode_argument
from rolemesh.passes.rules.defaults import default_rules

__all__ = [
    "capture_state",
    "files_digest",
    "inductor_state",
    "package_digests",
    "source_digest",
    "torch_settings",
    "versions",
]

_UNUSED = (
    "trace",
    "worker_start_method",
    "compile_threads",
    "cutlass.cutlass_dir",
    "cuda.cutlass_dir",
    "xpu.cutlass_dir",
)
"""Settings of inductor that say how it works, not what it makes."""

_PACKAGES = ("compiler", "passes", "lowering", "runtime")


@functools.lru_cache(maxsize=1)
def source_digest() -> str:
    """SHA-256 of rolemesh's own source files, names and contents."""
    return digest(*package_digests().values())


@functools.lru_cache(maxsize=1)
def package_digests() -> dict[str, str]:
    """SHA-256 of each of rolemesh's own packages, by name."""
    found = {package: importlib.import_module(f"rolemesh.{package}") for package in _PACKAGES}
    return {name: files_digest(package.__path__[0]) for name, package in found.items()}


def files_digest(root: str) -> str:
    """SHA-256 of a folder's Python files, names and contents."""
    hasher = hashlib.sha256()
    for folder, folders, files in os.walk(root):
        folders.sort()
        for name in sorted(files):
            if name.endswith(".py"):
                path = Path(folder, name)
                hasher.update(f"{path.relative_to(root)}\n".encode())
                hasher.update(hashlib.sha256(path.read_bytes()).digest())
    return hasher.hexdigest()


@functools.lru_cache(maxsize=1)
def versions() -> str:
    """Python, torch, its plug-in for NPUs where that is loaded, and rolemesh's own source."""
    npu = sys.modules.get("torch_npu")
    return digest(
        sys.version,
        f"{torch.__version__} {torch.version.git_version}",
        str(getattr(npu, "__version__", "")),
        source_digest(),
    )


def capture_state() -> str:
    """Settings of torch that tracing looks at.

    Raises:
        NotCacheableError: For settings under which AOTAutograd wraps its graph in more than
            `rolemesh.compiler.cache.captured` keeps, or with sharding rules of the user's.
    """
    if torch._C._is_any_autocast_enabled():
        raise NotCacheableError("autocast is on")
    if torch._functorch.config.functionalize_rng_ops:
        raise NotCacheableError("functionalize_rng_ops is on")
    if default_rules().is_extended:
        raise NotCacheableError("sharding rules were registered, whose code no key has")
    return digest(
        versions(),
        plain_text((torch.is_grad_enabled(), torch.is_inference_mode_enabled())),
        plain_text(torch_settings()),
        _settings(torch._functorch.config),
    )


def torch_settings() -> dict[str, Json]:
    """Settings of torch that decide which ops a model is traced to, or what they compute."""
    cuda = torch.backends.cuda
    return {
        "default_dtype": encode_argument(torch.get_default_dtype()),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "deterministic_warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "flash_sdp": cuda.flash_sdp_enabled(),
        "mem_efficient_sdp": cuda.mem_efficient_sdp_enabled(),
        "math_sdp": cuda.math_sdp_enabled(),
        "cudnn_sdp": cuda.cudnn_sdp_enabled(),
        "mkldnn": torch.backends.mkldnn.enabled,
    }


def inductor_state() -> str:
    """Settings of torch and of this machine that inductor's code depends on.

    Raises:
        NotCacheableError: If a setting is an object that has no text, such as a custom pass.
    """
    import torch._inductor.config as inductor
    import torch._inductor.config_comms as collectives

    matmul = torch.backends.cuda.matmul
    return digest(
        _settings(inductor),
        _settings(collectives),
        plain_text(
            (
                torch.get_num_threads(),
                torch.backends.cpu.get_cpu_capability(),
                torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
                matmul.allow_fp16_reduced_precision_reduction,
                matmul.allow_bf16_reduced_precision_reduction,
            )
        ),
        _accelerator(),
    )


def _accelerator() -> str:
    if not torch.accelerator.is_available():
        return ""
    kind = torch.accelerator.current_accelerator()
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return f"{kind} {name}"


def _settings(module: object) -> str:
    """All settings of a module of torch's that code may depend on, custom passes among them."""
    found = module.get_config_copy()  # type: ignore[attr-defined]
    return plain_text({name: found[name] for name in found if not name.startswith(_UNUSED)})
