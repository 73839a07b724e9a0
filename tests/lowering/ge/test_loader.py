"""Loading torchair: which one, what stays as it was, and what is said when there is none."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.lowering.ge import loader
from rolemesh.lowering.ge.loader import coded_errors, diagnose, load_torchair

VERSION = ".".join(torch.__version__.split(".")[:2])


def run(script: str, *paths: Path) -> str:
    """The output of a script in an interpreter of its own, with `paths` first on its path."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))},
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return done.stdout


def torch_npu_in(folder: Path, *, version: str = f"{VERSION}.0", init: str = "") -> Path:
    """A package torch_npu in a folder, as far as the loader looks at it."""
    package = folder / "torch_npu"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(init)
    (package / "version.py").write_text(f"__version__ = '{version}'\n")
    return package


@pytest.fixture
def prefix(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An environment with nothing in it."""
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    return tmp_path


@pytest.fixture
def offline(prefix: Path) -> Path:
    """An environment with the wheel unpacked, as far as `diagnose` looks at it."""
    package = torch_npu_in(loader.offline_folder())
    torchair = package / "dynamo" / "torchair"
    torchair.mkdir(parents=True)
    (torchair / "__init__.py").write_text("")
    return package


def test_this_environment_has_one() -> None:
    found = diagnose("cpu")
    assert not found.problem, found
    loaded = load_torchair("cpu")
    assert loaded.module is sys.modules["torchair"]
    assert (loaded.cann, loaded.device) == (False, "cpu")
    assert loaded.version == found.version == f"{VERSION}.0"
    assert loaded.folder == found.folder == loader.offline_folder() / "torch_npu"
    assert load_torchair() is load_torchair("cpu") is loaded


def test_make_installs_the_wheel_that_goes_with_the_pinned_torch(repository: Path) -> None:
    def find(pattern: str, file: str) -> str:
        found = re.search(pattern, (repository / file).read_text(encoding="utf-8"), re.MULTILINE)
        assert found is not None
        return found.group(1)

    wheel = find(r"^TORCH_NPU_VERSION := (\d+\.\d+)\.", "Makefile")
    pinned = find(r"^torch==(\d+\.\d+)\.", "requirements.txt")
    required = find(r"torch-npu==(\d+\.\d+)\.", "pyproject.toml")
    assert wheel == pinned == required


def test_torch_npu_looks_absent() -> None:
    from transformers.utils import is_torch_npu_available

    load_torchair("cpu")
    assert "torch_npu" not in sys.modules
    assert importlib.util.find_spec("torch_npu") is None
    assert not is_torch_npu_available()


def test_a_process_converts_for_one_device() -> None:
    load_torchair("cpu")
    with pytest.raises(RolemeshError) as caught:
        load_torchair("npu")
    assert str(caught.value) == (
        "[RM025] this process already converts for cpu, not for npu\n"
        "  where: loading torchair\n"
        "  why: torchair decides once for a process\n"
        "  fix: convert for the other device in another process"
    )


def test_unknown_device() -> None:
    with pytest.raises(RolemeshError, match="device 'cuda' of the target ge") as caught:
        load_torchair("cuda")
    assert caught.value.code == "RM018"


def test_looking_costs_nothing_and_loading_leaves_the_process_as_it_was() -> None:
    output = run(
        """
import logging, os, signal, sys, warnings
from rolemesh.lowering.ge.loader import diagnose, load_torchair
assert not diagnose().problem
assert not {"torch", "torchair", "torch_npu", "google"} & set(sys.modules)

def state():
    handlers = [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)]
    torchairs = [f for f in warnings.filters if "torchair" in str(f[3])]
    others = [f for f in warnings.filters if f not in torchairs]
    assert all(f[0] == "ignore" and f[1] and f[2] is UserWarning for f in torchairs)
    return handlers, logging.getLoggerClass(), others

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
with FakeTensorMode():
    before = state()
    load_torchair()
    assert state() == before
try:
    os.kill(os.getpid(), signal.SIGINT)
    signal.sigtimedwait([], 5)
except KeyboardInterrupt:
    print("interrupted")
"""
    )
    assert output == "interrupted\n"


def test_threads_may_load_first() -> None:
    output = run(
        """
import threading
from rolemesh.lowering.ge.loader import load_torchair
found = []
threads = [threading.Thread(target=lambda: found.append(load_torchair())) for _ in range(3)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(len({id(one) for one in found}), len(found))
"""
    )
    assert output == "1 3\n"


def test_torchair_logs_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    load_torchair("cpu").module.logger.error("something is wrong")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "something is wrong" in captured.err


def test_nothing_installed(prefix: Path) -> None:
    found = diagnose()
    folder = prefix / "share" / "rolemesh" / "torch_npu"
    assert (found.cann, found.version) == (False, "")
    assert found.problem == f"{folder} does not exist"
    assert found.fix == (
        f"{sys.executable} -m pip install --no-deps --target {folder} 'torch-npu=={VERSION}.*'"
    )


def test_a_wheel_that_is_whole(offline: Path) -> None:
    assert diagnose() == diagnose("npu") == loader.Diagnosis(False, f"{VERSION}.0", offline)


def test_a_wheel_without_torchair(offline: Path) -> None:
    (offline / "dynamo" / "torchair" / "__init__.py").unlink()
    found = diagnose()
    assert found.problem == f"{offline.parent} is not a whole torch_npu"
    assert found.fix.startswith(f"rm -r {offline.parent} && {sys.executable} -m pip install ")


def test_a_wheel_for_another_torch(offline: Path) -> None:
    (offline / "version.py").write_text("__version__ = '2.11.3'\n")
    found = diagnose()
    assert found.problem == f"torch_npu 2.11.3 does not go with torch {torch.__version__}"
    assert f"torch-npu=={VERSION}.*" in found.fix


@pytest.mark.parametrize("needed", ["protobuf", "packaging"])
def test_without_what_torchair_needs(
    offline: Path, monkeypatch: pytest.MonkeyPatch, needed: str
) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == needed:
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = diagnose()
    assert found.problem == f"torchair needs {needed}, which is not installed"
    assert found.fix == f"{sys.executable} -m pip install 'rolemesh[ge]'"


def test_a_folder_of_that_name_on_the_path(
    offline: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "here" / "torch_npu").mkdir(parents=True)
    monkeypatch.syspath_prepend(str(tmp_path / "here"))
    found = diagnose()
    assert found.problem == (
        f"the folder {tmp_path / 'here' / 'torch_npu'} passes for an installed torch_npu"
    )
    assert found.fix == "start the program in another folder"


def test_cann_without_torch_npu(
    offline: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cann" / "tbe").mkdir(parents=True)
    (tmp_path / "cann" / "tbe" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path / "cann"))
    found = diagnose()
    assert found.problem == "CANN is here, but torch_npu is not installed"
    assert found.fix.startswith(f"{sys.executable} -m pip install 'rolemesh[npu]'")
    assert diagnose("npu") == found
    assert not diagnose("cpu").problem  # asked for by name


def test_installed_torch_npu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = torch_npu_in(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert diagnose() == loader.Diagnosis(True, f"{VERSION}.0", package)
    refused = diagnose("cpu")
    assert refused.cann
    assert "with it torchair converts for the NPU only" in refused.problem
    (package / "version.py").write_text("__version__ = '2.9.0.post2'\n")
    old = diagnose()
    assert old.problem == f"torch_npu 2.9.0.post2 does not go with torch {torch.__version__}"
    assert old.fix == f"{sys.executable} -m pip install 'rolemesh[npu]'"


LOAD = """
import json, sys
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.lowering.ge.loader import load_torchair
{before}
path = list(sys.path)
try:
    loaded = load_torchair({device!r})
except RolemeshError as error:
    left = [name for name in sys.modules if name.split(".")[0] == "torchair"]
    print(json.dumps([error.code, error.what, error.why, error.fix, sys.path == path, left]))
else:
    native = "torchair.core._torchair" in sys.modules
    print(json.dumps([loaded.cann, loaded.device, loaded.version, native, loaded.module.__name__]))
"""


def _load(device: str, *paths: Path, before: str = "") -> list[object]:
    found = json.loads(run(LOAD.format(device=device, before=before), *paths))
    assert isinstance(found, list)
    return found


def test_cann_is_imported_and_nothing_else(tmp_path: Path) -> None:
    torch_npu_in(tmp_path)
    (tmp_path / "torchair.py").write_text("def get_compiler(config): ...\n")
    expected = [True, "npu", f"{VERSION}.0", False, "torchair"]
    assert _load("auto", tmp_path) == expected


def test_cann_that_fails_on_import(tmp_path: Path) -> None:
    torch_npu_in(tmp_path, init='raise ImportError("libhccl.so: cannot open shared object file")')
    code, what, why, fix, *_ = _load("npu", tmp_path)
    assert code == "RM025"
    assert what == f"torch_npu {VERSION}.0 is installed but cannot be imported"
    assert why == "ImportError: libhccl.so: cannot open shared object file"
    assert "source set_env.sh" in str(fix)
    assert "pip uninstall torch-npu" in str(fix)


def test_offline_torchair_that_fails_on_import(tmp_path: Path) -> None:
    package = torch_npu_in(tmp_path / "share" / "rolemesh" / "torch_npu")
    torchair = package / "dynamo" / "torchair"
    torchair.mkdir(parents=True)
    (torchair / "part.py").write_text("")
    (torchair / "__init__.py").write_text("import torchair.part\n1 / 0\n")
    before = f"sys.prefix = {str(tmp_path)!r}"
    code, what, why, fix, same_path, left = _load("auto", before=before)
    assert code == "RM025"
    assert what == f"torchair {VERSION}.0 cannot be imported"
    assert why == "ZeroDivisionError: division by zero"
    assert "rolemesh doctor" in str(fix)
    assert same_path is True
    assert left == []


def test_another_torchair_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "torchair.py").write_text("")
    code, what, why, *_ = _load("cpu", tmp_path, before="import torchair")
    assert code == "RM025"
    assert what == "another torchair is loaded already"
    assert why == f"it is {tmp_path / 'torchair.py'}"


def test_coded_errors() -> None:
    inner = RolemeshError("RM030", what="gone")

    def as_torchair_does() -> None:
        try:
            raise inner
        except RolemeshError as error:
            raise type(error)("text") from None  # a TypeError

    with pytest.raises(RolemeshError) as caught, coded_errors():
        as_torchair_does()
    assert caught.value is inner
    with pytest.raises(KeyError, match="other"), coded_errors():
        raise KeyError("other")
    with pytest.raises(RolemeshError) as caught, coded_errors():
        raise inner
    assert caught.value is inner


def test_loading_inside_a_fake_mode_gives_a_torchair_that_works() -> None:
    with FakeTensorMode():
        assert load_torchair("cpu").module.CompilerConfig().mode.value == "max-autotune"
