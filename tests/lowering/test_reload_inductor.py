"""Loading inductor's code by its key, where torch's cache does not have it."""

from __future__ import annotations

import pytest
import torch

from rolemesh.lowering.inductor import reload_inductor
from rolemesh.lowering.signature import Signature


def test_code_that_is_gone_is_not_loaded(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("empty")))
    saved: dict[str, object] = {"keys": [f"f{'a' * 51}"], "kept": [0], "steps": None}
    assert reload_inductor(saved, [torch.ones(2)], Signature("gone", (), ())) is None
