"""Gears of dynamic dims: what GE is told, what runs, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from tests.lowering.ge.small_graphs import (
    SIGNATURE,
    Recorder,
    dynamic_fakes,
    step,
    step_graph,
    step_inputs,
)
from torch import Tensor

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.lowering.ge.engine import running_on
from rolemesh.lowering.ge.options import GeOptions
from rolemesh.lowering.ge.target import Converted, lower_ge
from rolemesh.runtime.ge.engine import ReferenceEngine

GEARS: Mapping[str, Mapping[int, Sequence[int]]] = {
    "x": {0: [2, 3, 6]},
    "positions": {0: [2, 3, 6]},
}


def lowered(
    gears: Mapping[str, Mapping[int, Sequence[int]]], cache: Path | None = None
) -> Converted:
    options = GeOptions(dim_gears=gears, cache=None if cache is None else str(cache))
    return lower_ge(step_graph(), dynamic_fakes(step_inputs()), SIGNATURE, options)


def check(run: Converted, inputs: list[Tensor]) -> None:
    want = step(inputs)
    for found, expected in zip(run(*inputs), want, strict=True):
        torch.testing.assert_close(found, expected)


def test_ge_is_told_the_gears_and_each_of_them_runs() -> None:
    engine, run = Recorder(), lowered(GEARS)
    with running_on(engine):
        for tokens in (3, 2, 6):
            check(run, step_inputs(tokens=tokens))
    (graph,) = engine.graphs  # compiled once for all gears
    shapes = [entry.partition(":")[2] for entry in graph.options["ge.inputShape"].split(";")]
    assert sorted(shapes) == ["-1", "-1,8", "7,5", "8,5"]
    gears = graph.options["ge.dynamicDims"].split(";")
    assert sorted(gears) == ["2,2", "3,3", "6,6"]
    assert graph.options["ge.dynamicNodeType"] == "1"
    assert graph.input_shapes == ((-1, 8), (8, 5), (7, 5), (-1,))


def test_without_gears_ge_is_told_none_and_any_size_runs() -> None:
    engine, run = Recorder(), lowered({})
    with running_on(engine):
        for tokens in (4, 1, 5):
            check(run, step_inputs(tokens=tokens))
    assert "ge.dynamicDims" not in engine.graphs[0].options


@pytest.mark.parametrize("again", [False, True])
def test_a_size_between_gears_is_refused(tmp_path: Path, again: bool) -> None:
    if again:
        lowered(GEARS, tmp_path)
    run = lowered(GEARS, tmp_path)
    with running_on(ReferenceEngine()), pytest.raises(RolemeshError) as caught:
        run(*step_inputs(tokens=4))
    error = caught.value
    assert error.code == "RM029"
    assert error.what == "sizes 4, 4 are no gear of the graph"
    assert error.where == "graph 'small.decode.rank0', dim 0 of x, dim 0 of positions"
    assert error.why == "it was compiled for the gears 2, 2; 3, 3; 6, 6"
    assert error.fix == "pad the inputs to the next gear, or add a gear to option dim_gears"


def test_sizes_of_two_gears_do_not_go_together() -> None:
    run = lowered(GEARS)
    inputs = [*step_inputs(tokens=2)[:3], step_inputs(tokens=3)[3]]
    with (
        running_on(ReferenceEngine()),
        pytest.raises(RolemeshError, match="sizes 2, 3 are no gear"),
    ):
        run(*inputs)


@pytest.mark.parametrize(
    ("gears", "why"),
    [
        ({"x": {0: [2, 3]}}, "dim 0 of positions is dynamic and has no gears"),
        ({**GEARS, "y": {0: [2, 3, 6]}}, "it has no input 'y'; its inputs are x, up.weight, past"),
        ({**GEARS, "up.weight": {0: [2, 3, 6]}}, "dim 0 of up.weight is not a dynamic dim of it"),
        ({**GEARS, "x": {0: [2, 3, 6], 2: [1, 2, 3]}}, "dim 2 of x is not a dynamic dim of it"),
        ({**GEARS, "x": {0: [2, 3]}}, "the lists of sizes have 2 and 3 entries"),
    ],
)
def test_gears_that_do_not_fit_the_graph_are_refused(
    gears: Mapping[str, Mapping[int, Sequence[int]]], why: str
) -> None:
    with pytest.raises(RolemeshError) as caught:
        lowered(gears)
    assert caught.value.code == "RM018"
    assert caught.value.what.startswith(
        "option 'dim_gears' of target 'ge' does not fit graph 'small"
    )
    assert caught.value.why.startswith(why)
