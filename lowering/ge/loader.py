"""The one place that loads torchair, and says which one there is.

torchair ships inside the wheel of torch_npu.

* With CANN it is the installed torch_npu's, and nothing is patched.
* Without, the same wheel lies unpacked outside site-packages, where neither torch nor transformers
  tries to load it, and torchair runs on `lowering.ge.native`.

Invariants:

* Importing this module, and `diagnose`, import neither torch nor anything of torch_npu.
* A process loads torchair once, for one device.
* Loading leaves signal handlers and logger classes as they were, and warnings but for a few that
  torchair gives at every conversion and that tell users nothing. Offline, `torch_npu` looks absent
  to everyone, unless the device is `npu`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import io
import logging
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

from rolemesh.compiler.ir.errors import RolemeshError

__all__ = ["Diagnosis", "Torchair", "coded_errors", "diagnose", "load_torchair", "offline_folder"]

_EXPECTED = (
    "When enable frozen_parameter",  # that parameters stay in place is the option's own promise
    ".*_get_pg_default_device",  # torch's note to torchair
    "Multiple backends are registered",  # likewise
)
_DEVICES = ("auto", "cpu", "npu")


@dataclass(frozen=True)
class Torchair:
    """A loaded torchair.

    Attributes:
        module: The package `torchair`.
        cann: Whether it is the one of an installed torch_npu, on CANN.
        version: Version of torch_npu.
        folder: The folder of torch_npu's package.
        device: What graphs are converted for, `cpu` or `npu`.
    """

    module: ModuleType
    cann: bool
    version: str
    folder: Path
    device: str


@dataclass(frozen=True)
class Diagnosis:
    """Which torchair a load would take, and what is wrong with it.

    Attributes:
        cann: Whether it is the one of an installed torch_npu, on CANN.
        version: Version of torch_npu; empty if there is none.
        folder: The folder of torch_npu's package.
        problem: Why it cannot be loaded; empty if nothing is known to be wrong.
        fix: What to do about it; a command where there is one.
    """

    cann: bool
    version: str
    folder: Path
    problem: str = ""
    fix: str = ""


@dataclass
class _Process:
    """What this process has loaded."""

    lock: threading.RLock = field(default_factory=threading.RLock)
    loaded: Torchair | None = None


@cache
def _process() -> _Process:
    return _Process()


def offline_folder() -> Path:
    """Where the wheel of torch_npu lies unpacked for use without CANN."""
    return Path(sys.prefix, "share", "rolemesh", "torch_npu")


def diagnose(device: str = "auto") -> Diagnosis:
    """Which torchair `load_torchair(device)` would take. Imports nothing of it.

    Args:
        device: As for `load_torchair`.
    """
    installed = _installed()
    if installed is not None:
        return _diagnose_installed(installed, device)
    package = offline_folder() / "torch_npu"
    if device != "cpu" and PathFinder.find_spec("tbe") is not None:
        return Diagnosis(
            cann=True,
            version="",
            folder=package,
            problem="CANN is here, but torch_npu is not installed",
            fix=f"{_pip()} 'rolemesh[npu]'; or ask for device cpu, which leaves the NPU alone",
        )
    return _diagnose_offline(package)


def load_torchair(device: str = "auto") -> Torchair:
    """The torchair of this process, imported on the first call, which takes about two seconds.

    Args:
        device: What to convert graphs for: `cpu`, `npu`, or `auto`: `npu` with CANN and `cpu`
            without, or what the process converts for already. `npu` without CANN is offline NPU
            mode (`lowering.ge.npu_device`).

    Raises:
        RolemeshError: RM018 for another device; RM025 if there is no torchair that can do this, or
            the process converts for another device.
    """
    if device not in _DEVICES:
        raise RolemeshError(
            "RM018",
            what=f"device {device!r} of the target ge",
            where="loading torchair",
            why=f"graphs are converted for one of {', '.join(_DEVICES)}",
            fix="pass one of those",
        )
    process = _process()
    with process.lock:
        if process.loaded is None:
            process.loaded = _load(device)
            for message in _EXPECTED:
                warnings.filterwarnings("ignore", message, UserWarning, r"torchair\.")
        elif device not in ("auto", process.loaded.device):
            raise _error(
                f"this process already converts for {process.loaded.device}, not for {device}",
                "torchair decides once for a process",
                "convert for the other device in another process",
            )
        return process.loaded


@contextmanager
def coded_errors() -> Iterator[None]:
    """Raise the RolemeshError that torchair has turned into another error, if there is one.

    torchair raises errors again as `type(error)(text)`, which loses the parts of ours. Whatever
    converts, compiles or runs a graph through torchair belongs into this block.

    Raises:
        RolemeshError: The one among an error's causes, if there is one.
    """
    try:
        yield
    except RolemeshError:
        raise
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, RolemeshError):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        raise cause from cause.__cause__


def _installed() -> Path | None:
    """The folder of an installed torch_npu, whether or not a stand-in is loaded."""
    spec = PathFinder.find_spec("torch_npu")
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def _diagnose_installed(package: Path, device: str) -> Diagnosis:
    version = _version_in(package)
    problem = _mismatch(version)
    fix = f"{_pip()} 'rolemesh[npu]'" if problem else ""
    if device == "cpu":
        problem = "torch_npu is installed, and with it torchair converts for the NPU only"
        fix = "ask for device auto or npu, or use an environment without torch_npu"
    return Diagnosis(True, version, package, problem, fix)


def _diagnose_offline(package: Path) -> Diagnosis:
    folder = offline_folder()
    fix = f"{_pip()} --no-deps --target {folder} 'torch-npu=={_minor(_torch())}.*'"
    version = _version_in(package)
    if not version or not (package / "dynamo" / "torchair" / "__init__.py").is_file():
        what = "is not a whole torch_npu" if folder.exists() else "does not exist"
        clear = f"rm -r {folder} && " if folder.exists() else ""
        return Diagnosis(False, version, package, f"{folder} {what}", f"{clear}{fix}")
    problem = _mismatch(version)
    if problem:
        return Diagnosis(False, version, package, problem, f"rm -r {folder} && {fix}")
    for needed in ("protobuf", "packaging"):
        if not _version(needed):
            problem = f"torchair needs {needed}, which is not installed"
            return Diagnosis(False, version, package, problem, f"{_pip()} 'rolemesh[ge]'")
    shadow = PathFinder.find_spec("torch_npu")
    if shadow is not None:
        place = next(iter(shadow.submodule_search_locations or ()), "the module search path")
        problem = f"the folder {place} passes for an installed torch_npu"
        return Diagnosis(False, version, package, problem, "start the program in another folder")
    return Diagnosis(False, version, package)


def _pip() -> str:
    return f"{sys.executable} -m pip install"


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _torch() -> str:
    return _version("torch")


def _version_in(package: Path) -> str:
    """What a folder of torch_npu says that its version is; empty if it says nothing."""
    try:
        text = (package / "version.py").read_text(encoding="utf-8")
    except OSError:
        return ""
    found = re.search(r"__version__ = ['\"]([^'\"]+)['\"]", text)
    return found.group(1) if found else ""


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _mismatch(version: str) -> str:
    torch = _torch()
    if _minor(version) == _minor(torch):
        return ""
    return f"torch_npu {version or 'of an unknown version'} does not go with torch {torch}"


def _error(what: str, why: str, fix: str) -> RolemeshError:
    return RolemeshError("RM025", what=what, where="loading torchair", why=why, fix=fix)


def _load(device: str) -> Torchair:
    found = diagnose(device)
    if found.problem:
        raise _error("torchair cannot be loaded", found.problem, found.fix)
    if found.cann:
        return Torchair(_import_with_cann(found), True, found.version, found.folder, "npu")
    chosen = "cpu" if device == "auto" else device
    if "torchair" in sys.modules:
        raise _error(
            "another torchair is loaded already",
            f"it is {getattr(sys.modules['torchair'], '__file__', None)}",
            "let rolemesh load torchair",
        )
    if chosen == "npu":
        from rolemesh.lowering.ge.npu_device import install

        install(found.folder, found.version)
    return Torchair(_import_offline(found), False, found.version, found.folder, chosen)


def _import_with_cann(found: Diagnosis) -> ModuleType:
    try:
        importlib.import_module("torch_npu")
        module = importlib.import_module("torchair")
        _ = module.get_compiler  # torch_npu loads torchair when it is first asked for a name
    except Exception as error:  # a broken CANN raises anything
        raise _error(
            f"torch_npu {found.version} is installed but cannot be imported",
            _summary(error),
            f"source set_env.sh of a CANN that goes with torch_npu {found.version}; where there is "
            f"no NPU: {sys.executable} -m pip uninstall torch-npu",
        ) from error
    return module


def _import_offline(found: Diagnosis) -> ModuleType:
    from torch.utils._python_dispatch import _disable_current_modes

    from rolemesh.lowering.ge.native import native_modules
    from rolemesh.lowering.npu.define import define_npu_ops

    define_npu_ops()
    parent = found.folder / "dynamo"
    modules = native_modules(parent / "torchair")
    sys.path.append(str(parent))
    sys.modules.update(modules)
    try:
        with _undisturbed(), _disable_current_modes():
            module = importlib.import_module("torchair")
            # torchair imports these when it meets the first op without a converter, with a warning
            # for each fused op that does not exist then.
            importlib.import_module("torchair._ge_concrete_graph.ge_converter.custom")
    except Exception as error:
        sys.path.remove(str(parent))
        for name in [*modules, *(name for name in sys.modules if name.startswith("torchair."))]:
            sys.modules.pop(name, None)
        raise _error(
            f"torchair {found.version} cannot be imported",
            _summary(error),
            f"install it again: rm -r {offline_folder()}, then do what rolemesh doctor says",
        ) from error
    for handler in logging.getLogger("torchair").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(_Stderr())
    return module


def _summary(error: Exception) -> str:
    """The kind and the first lines of an error."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return "\n".join([f"{type(error).__name__}: {lines[0] if lines else ''}", *lines[1:4]])


class _Stderr(io.TextIOBase):
    """What is `sys.stderr` when something is written; torchair's own log goes to stdout."""

    def write(self, text: str) -> int:
        return sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Undo what importing torchair does to the process: signals, warnings, the class of loggers."""
    kinds = (signal.SIGINT, signal.SIGTERM)
    handlers = {kind: signal.getsignal(kind) for kind in kinds}
    loggers = logging.getLoggerClass()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.setLoggerClass(loggers)
        if threading.current_thread() is threading.main_thread():
            for kind, handler in handlers.items():
                if handler is not None:  # None: set outside Python, and cannot be set from it
                    signal.signal(kind, handler)
