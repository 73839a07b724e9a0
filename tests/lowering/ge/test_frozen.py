"""Frozen parameters: a device is promised that parameters stay where they are, and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping

import pytest
from tests.lowering.ge.small_graphs import SIGNATURE, Recorder, step_graph, step_inputs

from rolemesh.lowering.ge.engine import running_on
from rolemesh.lowering.ge.target import lower_ge

# Only a device has frozen inputs, and offline NPU mode is for good: it has a process of its own.
SCRIPT = """
import json, sys, tempfile
from dataclasses import replace
import torch
from rolemesh.compiler.ir.program import Input, InputKind, Output
from rolemesh.lowering.ge.engine import running_on
from rolemesh.lowering.ge.options import GeOptions
from rolemesh.lowering.ge.target import lower_ge
from tests.lowering.ge.small_graphs import SIGNATURE, Recorder, step, step_graph, step_inputs

def flags(signature, **options):
    inputs, engine = step_inputs(torch.bfloat16), Recorder()
    want = step(inputs)
    run = lower_ge(step_graph(), inputs, signature, GeOptions(device="npu", **options))
    with running_on(engine):
        for _ in range(2):
            got = run(*inputs)
    for found, expected in zip(got, want, strict=True):
        torch.testing.assert_close(found, expected)
    graph = engine.graphs[0]
    return [graph.options["frozenInput"], graph.placements, graph.on_device]

parameters = [
    Input(entry.name, InputKind.PARAMETER, entry.mutated) for entry in SIGNATURE.inputs[:3]
]
cache = tempfile.mkdtemp(dir=sys.argv[1])
json.dump(
    {
        "made": flags(SIGNATURE, cache=cache),
        "kept": flags(SIGNATURE, cache=cache),
        "default": flags(SIGNATURE),
        "off": flags(SIGNATURE, frozen_parameters=False),
        "updated": flags(replace(SIGNATURE, inputs=(*parameters, SIGNATURE.inputs[3]))),
    },
    sys.stdout,
)
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, list[object]]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, str(tmp_path_factory.mktemp("cache"))],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    loaded: Mapping[str, list[object]] = json.loads(done.stdout)
    return loaded


def test_parameters_are_frozen_by_default(found: Mapping[str, list[object]]) -> None:
    assert found["default"] == ["0,1,0,0", [1, 1, 1, 1], True]


def test_nothing_is_frozen_without_the_option(found: Mapping[str, list[object]]) -> None:
    assert found["off"][0] == "0,0,0,0"


def test_a_parameter_that_the_graph_updates_is_not_frozen(
    found: Mapping[str, list[object]],
) -> None:
    assert found["updated"][0] == "1,1,0,0"


def test_a_graph_from_the_cache_has_the_same_flags(found: Mapping[str, list[object]]) -> None:
    assert found["made"] == found["kept"] == found["default"]


def test_inputs_on_the_host_are_never_frozen() -> None:
    engine, inputs = Recorder(), step_inputs()
    run = lower_ge(step_graph(), inputs, SIGNATURE)
    with running_on(engine):
        run(*inputs)
    assert engine.graphs[0].options["frozenInput"] == "0,0,0,0"
