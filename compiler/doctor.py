"""What `rolemesh doctor` looks at: versions, process groups, compilers, and the NPU stack.

Nothing of the NPU stack is imported: a torch_npu without CANN fails, or hangs, on import.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from rolemesh import __version__
from rolemesh.runtime.config import Ascend, Torchrun

__all__ = ["Finding", "Findings", "examine"]

_TORCH = "2.13"
_TRANSFORMERS = "5.23"
_WIDTH = 120


@dataclass(frozen=True)
class Finding:
    """One thing looked at.

    Attributes:
        name: What it is.
        value: What was found.
        ok: Whether it is as it should be.
        needed: Whether rolemesh cannot be used on CPU without it.
        fix: How to get it; empty if it is there.
    """

    name: str
    value: str
    ok: bool = True
    needed: bool = False
    fix: str = ""

    def as_json(self) -> dict[str, object]:
        """The finding for machines."""
        return dict(vars(self))


@dataclass(frozen=True)
class Findings:
    """Everything found.

    Attributes:
        entries: In the order to show.
    """

    entries: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether everything that use on CPU needs is there."""
        return all(entry.ok for entry in self.entries if entry.needed)

    def as_json(self) -> dict[str, object]:
        """`schema_version, ok, findings[{name, value, ok, needed, fix}]`, for machines."""
        return {
            "schema_version": 1,
            "ok": self.ok,
            "findings": [entry.as_json() for entry in self.entries],
        }

    def as_text(self) -> str:
        """The findings for people, one a line, each problem with its fix below."""
        width = max(len(entry.name) for entry in self.entries)
        lines = []
        for entry in self.entries:
            mark = "ok     " if entry.ok else "MISSING" if entry.needed else "absent "
            lines.append(f"{mark}  {entry.name:<{width}}  {entry.value}"[:_WIDTH].rstrip())
            if entry.fix:
                lines.append(f"{'':{width + 11}}fix: {entry.fix}")
        missing = sum(entry.needed and not entry.ok for entry in self.entries)
        end = "ready for use on CPU" if self.ok else f"NOT usable: {missing} needed things missing"
        return "\n".join([*lines, "", end])


def examine() -> Findings:
    """Look at everything."""
    entries = [Finding("rolemesh", f"{__version__}, {_place()}"), _python(), _torch()]
    if entries[-1].ok:
        entries += _with_torch()
    entries += [_transformers(), _compiler(), _torchrun(), *_npu()]
    return Findings(tuple(entries))


def _place() -> str:
    return str(Path(__file__).resolve().parent.parent)


def _python() -> Finding:
    version = platform.python_version()
    ok = sys.version_info >= (3, 11)
    return Finding("python", version, ok, needed=True, fix="" if ok else "use Python 3.11 or newer")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _torch() -> Finding:
    version = _version("torch")
    fix = f'pip install "torch=={_TORCH}.*"'
    if not version:
        return Finding("torch", "not installed", False, needed=True, fix=fix)
    if not version.startswith(f"{_TORCH}."):
        return Finding("torch", f"{version}, not {_TORCH}", False, needed=True, fix=fix)
    try:
        import torch
    except (ImportError, OSError) as error:
        return Finding("torch", f"{version}, fails on import: {error}", False, True, fix)
    return Finding("torch", f"{version}, {torch.get_num_threads()} threads", needed=True)


def _with_torch() -> Iterator[Finding]:
    import torch.distributed as dist
    from torch._dynamo import list_backends

    registered = "rolemesh" in list_backends(exclude_tags=())
    yield Finding(
        "torch.compile backend",
        "registered" if registered else "not registered",
        registered,
        needed=True,
        fix="" if registered else "install the package: pip install -e . or pip install rolemesh",
    )
    if not dist.is_available():
        yield Finding(
            "torch.distributed",
            "not in this build of torch",
            False,
            needed=True,
            fix="install a build of torch with distributed support",
        )
        return
    yield _gloo()
    nccl = dist.is_nccl_available()
    yield Finding(
        "process groups: nccl",
        "available" if nccl else "not in this build of torch; only needed on GPUs",
        nccl,
    )


def _gloo() -> Finding:
    import torch.distributed as dist

    name = "process groups: gloo"
    if not dist.is_gloo_available():
        fix = "install a build of torch with gloo"
        return Finding(name, "not in this build of torch", False, needed=True, fix=fix)
    make: Callable[..., object] = dist.ProcessGroupGloo
    try:
        make(dist.HashStore(), 0, 1, timedelta(seconds=5))
    except RuntimeError as error:
        return Finding(
            name,
            f"fails: {str(error).splitlines()[0]}",
            False,
            needed=True,
            fix="make this machine's host name resolve, or set GLOO_SOCKET_IFNAME=lo",
        )
    return Finding(name, "works", needed=True)


def _transformers() -> Finding:
    version = _version("transformers")
    fix = "pip install rolemesh[transformers]"
    if not version:
        return Finding("transformers", "not installed; needed for hf: models", False, fix=fix)
    if not version.startswith(f"{_TRANSFORMERS}."):
        return Finding("transformers", f"{version}, tested with {_TRANSFORMERS}", False, fix=fix)
    return Finding("transformers", version)


def _compiler() -> Finding:
    name = "C++ compiler"
    found = next((path for path in map(shutil.which, ("g++", "clang++")) if path), None)
    if found:
        return Finding(name, found)
    fix = "install g++, for example: apt-get install g++"
    return Finding(name, "none; the target inductor needs one", False, fix=fix)


def _torchrun() -> Finding:
    name = "torchrun"
    state = Torchrun.read()
    if state is not None:
        return Finding(name, f"this is rank {state.rank} of {state.world_size}")
    beside = Path(sys.executable).with_name("torchrun")
    path = str(beside) if beside.exists() else shutil.which("torchrun")
    if path:
        return Finding(name, f"{path}; this process was not started by it")
    return Finding(name, "not found", False, fix="use python -m torch.distributed.run instead")


def _npu() -> Iterator[Finding]:
    ascend = Ascend.read()
    toolkit = ascend.toolkit
    there = toolkit is not None and Path(toolkit).is_dir()
    yield Finding(
        "CANN",
        str(toolkit) if there else f"{toolkit} is no folder" if toolkit else "not found",
        there,
        fix="" if there else "for Ascend NPUs only: install CANN and source its set_env.sh",
    )
    installed = importlib.util.find_spec("torch_npu") is not None
    version = _version("torch_npu") or "version unknown"
    yield Finding(
        "torch_npu",
        f"{version}, not imported" if installed else "not installed",
        installed,
        fix="" if installed else "for Ascend NPUs only: pip install rolemesh[npu]",
    )
    ready = installed and there
    yield Finding(
        "process groups: hccl",
        "comes with torch_npu; not tried" if ready else "needs CANN and torch_npu",
        ready,
    )
