"""What is read from the environment, and how bad values are refused."""

from __future__ import annotations

import pytest

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.runtime.config import Config, Torchrun


def test_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Config.read({}) == Config(timeout=300.0)
    monkeypatch.setenv("ROLEMESH_TIMEOUT", "2.5")
    assert Config.read().delta.total_seconds() == 2.5


def test_cache() -> None:
    assert Config.read({"ROLEMESH_CACHE": ""}).cache
    assert not Config.read({"ROLEMESH_CACHE": "0", "ROLEMESH_TIMEOUT": "2"}).cache
    assert Config.read({"ROLEMESH_CACHE_DIR": "/there"}) == Config(cache_dir="/there")


@pytest.mark.parametrize("text", ["soon", "0", "-1", "inf", "nan"])
def test_bad_timeout(text: str) -> None:
    with pytest.raises(RolemeshError) as caught:
        Config.read({"ROLEMESH_TIMEOUT": text})
    assert str(caught.value) == (
        f"[RM018] ROLEMESH_TIMEOUT is {text!r}\n"
        "  where: the environment\n"
        "  why: it is a number of seconds above zero\n"
        "  fix: set for example ROLEMESH_TIMEOUT=300, or unset it"
    )


def test_torchrun() -> None:
    assert Torchrun.read({}) is None
    assert Torchrun.read({"RANK": "1"}) is None
    assert Torchrun.read({"RANK": "1", "WORLD_SIZE": "4"}) == Torchrun(1, 4, agent_store=False)
    agent = {"RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    assert Torchrun.read(agent) == Torchrun(0, 2, agent_store=True)
