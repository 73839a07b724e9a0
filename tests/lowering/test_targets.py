"""The table of targets and the error for a name that is not in it."""

from __future__ import annotations

import pytest

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.lowering.eager import lower_eager
from rolemesh.lowering.ge.options import GeOptions
from rolemesh.lowering.targets import TARGETS, target


def test_targets_are_found_by_name() -> None:
    assert target("eager").lower is lower_eager
    assert {"eager", "inductor", "ge"} <= set(TARGETS)


def test_options_are_checked_by_their_target() -> None:
    assert target("ge").parse({"fuse": False}) == GeOptions(fuse=False)
    with pytest.raises(RolemeshError) as caught:
        target("ge").parse({"fused": False})
    error = caught.value
    assert error.code == "RM018"
    assert error.what == "target 'ge' has no option 'fused'"
    assert error.fix == "did you mean 'fuse'?"
    with pytest.raises(RolemeshError, match="its options are none"):
        target("eager").parse({"fuse": True})


def test_a_near_miss_is_suggested() -> None:
    with pytest.raises(RolemeshError) as caught:
        target("inducter")
    error = caught.value
    assert error.code == "RM003"
    assert error.what == "unknown target 'inducter'"
    assert error.why.startswith("the targets are eager, inductor")
    assert error.fix == "did you mean 'inductor'?"


def test_another_name_lists_the_targets() -> None:
    with pytest.raises(RolemeshError) as caught:
        target("cuda graphs")
    assert caught.value.fix == "use one of these targets"
