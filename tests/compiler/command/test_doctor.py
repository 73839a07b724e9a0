"""`rolemesh doctor`: what it finds, and what it says is missing."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rolemesh import __version__
from rolemesh.compiler.cli import main as cli
from rolemesh.compiler.command import doctor
from rolemesh.compiler.command.doctor import Finding, Findings, examine


def _found(findings: Findings) -> dict[str, Finding]:
    return {entry.name: entry for entry in findings.entries}


def test_this_machine_is_usable(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert torch.__version__ in text
    assert text.rstrip().endswith("ready for use on CPU")
    # paths have the length of the folder they lie in
    lines = [line.replace(sys.prefix, "") for line in text.splitlines()]
    assert all(len(line) <= 120 for line in lines)


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report) == {"schema_version", "ok", "findings"}
    assert report["ok"] is True
    for entry in report["findings"]:
        assert set(entry) == {"name", "value", "ok", "needed", "fix", "broken"}


def test_says_where_rolemesh_is() -> None:
    version, place = _found(examine())["rolemesh"].value.split(", ")
    assert version == __version__
    assert (Path(place) / "compiler" / "command" / "doctor.py").is_file()


def test_names_what_it_looks_at() -> None:
    assert list(_found(examine())) == [
        "rolemesh",
        "python",
        "torch",
        "torch.compile backend",
        "process groups: gloo",
        "process groups: nccl",
        "transformers",
        "C++ compiler",
        "torchrun",
        "CANN",
        "torch_npu",
        "torchair",
        "process groups: hccl",
    ]


@pytest.mark.parametrize("version", ["", "2.12.1"])
def test_wrong_torch_is_not_usable(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], version: str
) -> None:
    real = importlib.metadata.version

    def fake(package: str) -> str:
        if package != "torch":
            return real(package)
        if not version:
            raise importlib.metadata.PackageNotFoundError
        return version

    monkeypatch.setattr(importlib.metadata, "version", fake)
    assert cli.main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "MISSING  torch" in text
    assert 'fix: pip install "torch==2.13.*"' in text
    assert text.rstrip().endswith("NOT usable: 1 needed things missing or broken")


def test_gloo_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("getaddrinfo: no address\nmore")

    monkeypatch.setattr(torch.distributed, "ProcessGroupGloo", fail)
    findings = examine()
    gloo = _found(findings)["process groups: gloo"]
    assert not findings.ok
    assert gloo.value == "fails: getaddrinfo: no address"
    assert gloo.mark == "BROKEN"
    assert "GLOO_SOCKET_IFNAME" in gloo.fix


def test_without_transformers_and_compiler_it_is_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor._version
    monkeypatch.setattr(
        doctor, "_version", lambda package: "" if package == "transformers" else real(package)
    )
    monkeypatch.setattr("shutil.which", lambda name: None)
    findings = examine()
    assert findings.ok
    found = _found(findings)
    assert found["transformers"].fix == "pip install rolemesh[transformers]"
    assert "g++" in found["C++ compiler"].fix


def test_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert _found(examine())["torchrun"].value == "this is rank 2 of 4"


def test_offline_torchair() -> None:
    found = _found(examine())
    torchair = found["torchair"]
    versions = [importlib.metadata.version(name) for name in ("torch", "protobuf")]
    assert torchair.mark == "ok"
    assert torchair.value.startswith(f"offline, of torch_npu {versions[0].partition('+')[0]}")
    assert f"protobuf {versions[1]}" in torchair.value
    assert found["torch_npu"].mark == "absent"
    assert found["process groups: hccl"].value == "needs CANN and torch_npu"


def test_no_torchair(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    findings = examine()
    torchair = _found(findings)["torchair"]
    assert findings.ok  # only the target ge needs it
    assert torchair.mark == "absent"
    assert torchair.value.endswith("share/rolemesh/torch_npu does not exist")
    assert torchair.fix.startswith(f"{sys.executable} -m pip install --no-deps --target {tmp_path}")


def test_cann_without_torch_npu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ASCEND_TOOLKIT_HOME", str(tmp_path))
    found = _found(examine())
    assert found["CANN"] == Finding("CANN", str(tmp_path))
    assert found["torch_npu"].mark == "BROKEN"
    assert found["torch_npu"].value == "not installed, though CANN is"
    assert found["torch_npu"].fix == f"{sys.executable} -m pip install 'rolemesh[npu]'"


def test_cann_folder_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ASCEND_TOOLKIT_HOME", raising=False)
    monkeypatch.setenv("ASCEND_HOME_PATH", "/nowhere/ascend")
    cann = _found(examine())["CANN"]
    assert cann.mark == "BROKEN"
    assert cann.value == "/nowhere/ascend is no folder"
    assert "set_env.sh" in cann.fix


@pytest.fixture
def torch_npu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A package torch_npu, first on the path of this process and of those that it starts."""
    package = tmp_path / "path" / "torch_npu"
    package.mkdir(parents=True)
    (package / "version.py").write_text(f"__version__ = '{torch.__version__.partition('+')[0]}'\n")
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    return package


def test_torch_npu_that_works(torch_npu: Path) -> None:
    (torch_npu / "__init__.py").write_text(
        "import torch\nfrom types import SimpleNamespace\n__version__ = '2.13.0'\n"
        "torch.npu = SimpleNamespace(device_count=lambda: 8)\nprint('noise')\n"
    )
    (torch_npu / "npu").mkdir()
    (torch_npu / "npu" / "utils.py").write_text("def get_cann_version(): return '9.0.0'\n")
    (torch_npu.parent / "torchair.py").write_text("def get_compiler(): ...\n")
    found = _found(examine())
    assert found["torch_npu"] == Finding("torch_npu", "2.13.0, CANN 9.0.0, 8 NPUs")
    assert found["torchair"] == Finding("torchair", "that of torch_npu; GE graphs run on the NPU")
    assert found["process groups: hccl"].ok
    assert "torch_npu" not in sys.modules


def test_torch_npu_that_fails(
    torch_npu: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ASCEND_TOOLKIT_HOME", "/opt/cann")
    (torch_npu / "__init__.py").write_text("raise ImportError('libhccl.so: cannot open')")
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = [number for number, line in enumerate(lines) if " torch_npu " in line]
    assert lines[line].startswith("BROKEN   torch_npu")
    assert lines[line].endswith("fails on import: ImportError: libhccl.so: cannot open")
    assert lines[line + 1].strip() == (
        "fix: on an NPU host: source /opt/cann/set_env.sh; "
        f"elsewhere: {sys.executable} -m pip uninstall torch-npu"
    )
    assert lines[line + 2].endswith("that of torch_npu, which is broken")


def test_torch_npu_that_hangs(torch_npu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_IMPORT_SECONDS", 0.2)
    found = _found(examine())
    assert found["torch_npu"].mark == "BROKEN"
    assert found["torch_npu"].value.endswith("hangs on import for 0.2 seconds")


def test_torch_npu_for_another_torch(torch_npu: Path) -> None:
    (torch_npu / "version.py").write_text("__version__ = '2.4.0'\n")
    (torch_npu / "__init__.py").write_text("raise SystemExit(9)")  # not even tried
    found = _found(examine())
    assert found["torch_npu"].value == f"torch_npu 2.4.0 does not go with torch {torch.__version__}"
    assert "pip install 'rolemesh[npu]'" in found["torch_npu"].fix


def test_torch_that_fails_because_of_torch_npu(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(
        "raise RuntimeError('Failed to load the backend extension: torch_npu. You can\\n disable')"
    )
    script = "from rolemesh.compiler.cli.main import main; raise SystemExit(main(['doctor']))"
    run = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 1, run.stderr
    lines = run.stdout.splitlines()
    (line,) = [number for number, line in enumerate(lines) if line.startswith("BROKEN   torch ")]
    assert "fails on import: Failed to load the backend extension: torch_npu" in lines[line]
    assert "pip uninstall torch-npu" in lines[line + 1]
    assert lines[-1] == "NOT usable: 1 needed things missing or broken"


def test_torch_npu_is_not_imported() -> None:
    script = "from rolemesh.compiler.command.doctor import examine; import sys; examine();"
    script += "assert 'torch_npu' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
