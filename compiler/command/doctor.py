"""What `rolemesh doctor` looks at: versions, process groups, compilers, and the NPU stack.

Nothing of the NPU stack is imported here: a torch_npu without CANN fails, or hangs, on import. One
that is installed is tried in another process.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from rolemesh import __version__
from rolemesh.lowering.ge.loader import Diagnosis, diagnose
from rolemesh.runtime.config import Ascend, Torchrun

__all__ = ["Finding", "Findings", "examine"]

_TORCH = "2.13"
_TRANSFORMERS = "5.23"
_WIDTH = 120
_IMPORT_SECONDS = 120

# Prints the versions of torch_npu and CANN and the number of devices, on a line of its own.
_PROBE = """
import json, os
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
import torch, torch_npu, torchair
from torch_npu.npu.utils import get_cann_version
torchair.get_compiler
print()
print(json.dumps([torch_npu.__version__, get_cann_version(), torch.npu.device_count()]))
"""


@dataclass(frozen=True)
class Finding:
    """One thing looked at.

    Attributes:
        name: What it is.
        value: What was found.
        ok: Whether it is as it should be.
        needed: Whether rolemesh cannot be used on CPU without it.
        fix: How to get it; empty if it is there.
        broken: Whether it is there but does not work.
    """

    name: str
    value: str
    ok: bool = True
    needed: bool = False
    fix: str = ""
    broken: bool = False

    @property
    def mark(self) -> str:
        """One word for the state."""
        if self.ok:
            return "ok"
        return "BROKEN" if self.broken else "MISSING" if self.needed else "absent"

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
        """`schema_version, ok, findings[{name, value, ok, needed, fix, broken}]`, for machines."""
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
            lines.append(f"{entry.mark:<7}  {entry.name:<{width}}  {entry.value}"[:_WIDTH].rstrip())
            if entry.fix:
                lines.append(f"{'':{width + 11}}fix: {entry.fix}")
        missing = sum(entry.needed and not entry.ok for entry in self.entries)
        end = "ready for use on CPU"
        if not self.ok:
            end = f"NOT usable: {missing} needed things missing or broken"
        return "\n".join([*lines, "", end])


def examine() -> Findings:
    """Look at everything."""
    entries = [Finding("rolemesh", f"{__version__}, {_place()}"), _python(), _torch()]
    if entries[-1].ok:
        entries += _with_torch()
    entries += [_transformers(), _compiler(), _torchrun(), *_npu()]
    return Findings(tuple(entries))


def _place() -> str:
    return str(Path(__file__).resolve().parents[2])


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
    except (ImportError, OSError, RuntimeError) as error:
        if "backend extension" in str(error):  # torch loads every installed backend
            fix = _mend(_toolkit())
        what = f"{version}, fails on import: {_first_line(error)}"
        return Finding("torch", what, False, True, fix, broken=True)
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
            f"fails: {_first_line(error)}",
            False,
            needed=True,
            fix="make this machine's host name resolve, or set GLOO_SOCKET_IFNAME=lo",
            broken=True,
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
    toolkit, found = _toolkit(), diagnose()
    there = toolkit is not None and Path(toolkit).is_dir()
    yield Finding(
        "CANN",
        str(toolkit) if there else f"{toolkit} is no folder" if toolkit else "not found",
        there,
        fix="" if there else "for Ascend NPUs only: install CANN and source its set_env.sh",
        broken=bool(toolkit) and not there,
    )
    installed = found.cann and bool(found.version)
    torch_npu = _try_torch_npu(found, toolkit) if installed else _no_torch_npu(there or found.cann)
    yield torch_npu
    yield _torchair(found, torch_npu)
    ready = installed and torch_npu.ok
    value = "comes with torch_npu; not tried" if ready else "needs CANN and torch_npu"
    yield Finding("process groups: hccl", value, ready)


def _no_torch_npu(cann: bool) -> Finding:
    value = "not installed, though CANN is" if cann else "not installed"
    command = f"{sys.executable} -m pip install 'rolemesh[npu]'"
    fix = command if cann else f"for Ascend NPUs only: {command}"
    return Finding("torch_npu", value, False, fix=fix, broken=cann)


def _try_torch_npu(found: Diagnosis, toolkit: str | None) -> Finding:
    """What an installed torch_npu does when it is imported."""
    if found.problem:
        return Finding("torch_npu", found.problem, False, fix=found.fix, broken=True)
    try:
        run = subprocess.run(
            [sys.executable, "-c", _PROBE],
            capture_output=True,
            check=False,
            text=True,
            timeout=_IMPORT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        problem = f"hangs on import for {_IMPORT_SECONDS} seconds"
    else:
        if run.returncode == 0:
            version, cann, devices = json.loads(run.stdout.splitlines()[-1])
            return Finding("torch_npu", f"{version}, CANN {cann}, {devices} NPUs")
        lines = run.stderr.strip().splitlines() or [f"exit code {run.returncode}"]
        problem = f"fails on import: {lines[-1]}"
    value = f"{found.version}, {problem}"
    return Finding("torch_npu", value, False, fix=_mend(toolkit), broken=True)


def _mend(toolkit: str | None) -> str:
    """What to do about a torch_npu that cannot be imported."""
    script = f"{toolkit}/set_env.sh" if toolkit else "the set_env.sh of CANN"
    remove = f"{sys.executable} -m pip uninstall torch-npu"
    return f"on an NPU host: source {script}; elsewhere: {remove}"


def _torchair(found: Diagnosis, torch_npu: Finding) -> Finding:
    """Which of the two torchairs the target ge takes."""
    name = "torchair"
    if found.cann and found.version:
        value = "that of torch_npu; GE graphs run on the NPU"
        if torch_npu.ok:
            return Finding(name, value)
        return Finding(name, "that of torch_npu, which is broken", False, fix="see torch_npu")
    if found.problem:
        broken = bool(found.version) or found.cann
        return Finding(name, found.problem, False, fix=found.fix, broken=broken)
    versions = f"torch_npu {found.version}, protobuf {_version('protobuf')}"
    return Finding(name, f"offline, of {versions}; GE graphs run on CPU")


def _toolkit() -> str | None:
    return Ascend.read().toolkit


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
