"""What `rolemesh.integrate` registers, and what it says of libraries that it cannot."""

from __future__ import annotations

import sys

import pytest
import torch

import rolemesh
from rolemesh.compiler import integrate as module


def test_unknown_library() -> None:
    with pytest.raises(rolemesh.RolemeshError) as error:
        rolemesh.integrate("transformer")
    assert str(error.value).splitlines() == [
        "[RM037] there are no composite ops for a library 'transformer'",
        "  where: integrate('transformer')",
        "  why: the libraries are transformers",
        "  fix: did you mean 'transformers'?",
    ]


def test_a_library_that_is_missing_or_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    module._transformers.cache_clear()
    monkeypatch.setitem(sys.modules, "transformers.masking_utils", None)
    with pytest.raises(rolemesh.RolemeshError) as error:
        rolemesh.integrate("transformers")
    monkeypatch.undo()
    assert error.value.code == "RM037"
    assert error.value.what == "transformers is missing or too old"
    assert error.value.fix == "pip install 'rolemesh[transformers]'"


def test_two_calls_are_one() -> None:
    utils = pytest.importorskip("transformers.modeling_utils")
    masks = pytest.importorskip("transformers.masking_utils").ALL_MASK_ATTENTION_FUNCTIONS
    moe = pytest.importorskip("transformers.integrations.moe").ALL_EXPERTS_FUNCTIONS
    tables = (utils.ALL_ATTENTION_FUNCTIONS, masks, moe)
    rolemesh.integrate("transformers")
    first = [table["rolemesh"] for table in tables]
    rolemesh.integrate("transformers")
    assert [table["rolemesh"] for table in tables] == first
    assert torch.ops.rolemesh.attention.default is not None
