"""`rolemesh doctor`: what it finds, and what it says is missing."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys

import pytest
import torch

from rolemesh.compiler import cli, doctor
from rolemesh.compiler.doctor import Finding, Findings, examine


def _found(findings: Findings) -> dict[str, Finding]:
    return {entry.name: entry for entry in findings.entries}


def test_this_machine_is_usable(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert torch.__version__ in text
    assert text.rstrip().endswith("ready for use on CPU")
    assert all(len(line) <= 120 for line in text.splitlines())


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report) == {"schema_version", "ok", "findings"}
    assert report["ok"] is True
    for entry in report["findings"]:
        assert set(entry) == {"name", "value", "ok", "needed", "fix"}


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
    assert text.rstrip().endswith("NOT usable: 1 needed things missing")


def test_gloo_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("getaddrinfo: no address\nmore")

    monkeypatch.setattr(torch.distributed, "ProcessGroupGloo", fail)
    findings = examine()
    gloo = _found(findings)["process groups: gloo"]
    assert not findings.ok
    assert gloo.value == "fails: getaddrinfo: no address"
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


def test_torchrun_and_cann(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("ASCEND_TOOLKIT_HOME", str(tmp_path))
    found = _found(examine())
    assert found["torchrun"].value == "this is rank 2 of 4"
    assert found["CANN"] == Finding("CANN", str(tmp_path))
    assert not found["torch_npu"].ok
    assert "pip install rolemesh[npu]" in found["torch_npu"].fix


def test_cann_folder_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ASCEND_TOOLKIT_HOME", raising=False)
    monkeypatch.setenv("ASCEND_HOME_PATH", "/nowhere/ascend")
    cann = _found(examine())["CANN"]
    assert not cann.ok
    assert cann.value == "/nowhere/ascend is no folder"
    assert "set_env.sh" in cann.fix


def test_torch_npu_is_not_imported() -> None:
    script = "from rolemesh.compiler.doctor import examine; import sys; examine();"
    script += "assert 'torch_npu' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
