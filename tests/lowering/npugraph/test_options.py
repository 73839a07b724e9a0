"""Options of the target `npugraph_ex`."""

from __future__ import annotations

import pytest

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.lowering.npugraph.options import NpuGraphOptions


@pytest.mark.parametrize("name", ["frozen_parameters", "clone_outputs"])
def test_options_are_true_or_false(name: str) -> None:
    assert getattr(NpuGraphOptions(), name) is True
    assert getattr(NpuGraphOptions(**{name: False}), name) is False
    with pytest.raises(RolemeshError) as caught:
        NpuGraphOptions(**{name: "no"})  # type: ignore[arg-type]
    assert caught.value.code == "RM018"
    assert caught.value.what == f"option {name!r} of target 'npugraph_ex' is 'no'"
    assert caught.value.why == "it must be True or False"
