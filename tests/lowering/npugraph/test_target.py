"""The target `npugraph_ex`: torchair's capture mode, with the stand-in for capture under it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from tests.lowering.ge.small_graphs import (
    SIGNATURE,
    sharded_mlp,
    step_graph,
    step_inputs,
)
from torch import Tensor

from rolemesh.compiler.api import Lowered
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.lowering.ge.loader import load_torchair
from rolemesh.lowering.npugraph.options import NpuGraphOptions
from rolemesh.lowering.npugraph.target import lower_npugraph
from rolemesh.lowering.targets import Target
from rolemesh.runtime.launch import run_processes
from rolemesh.runtime.store import gather
from rolemesh.runtime.traffic import record_traffic

# Capture mode needs offline NPU mode, which is for good: everything runs in one other process, and
# the tests look at what it found.
SCRIPT = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch
from torch import fx, nn
from torch._dynamo.utils import counters
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.program import Input, InputKind, Output
from rolemesh.lowering.npugraph.options import NpuGraphOptions
from rolemesh.lowering.npugraph.static_attention import define_static_attention
from rolemesh.lowering.npugraph.target import lower_npugraph
from rolemesh.lowering.signature import Signature
from tests.lowering.ge.small_graphs import (
    SIGNATURE, dynamic_fakes, step, step_graph, step_inputs
)

def lowered(examples, **options):
    return lower_npugraph(step_graph(), examples, SIGNATURE, NpuGraphOptions(**options))

def equal(run, inputs):
    want = step(inputs)
    got = run(*inputs)
    for found, expected in zip(got, want, strict=True):
        torch.testing.assert_close(found, expected)
    return got[0] is inputs[2]

def graphs(run):
    return run.compiled.run_kernel.__globals__["acl_graph"].graphs_meta

def recaptures():
    return sum(n for name, n in counters["npugraph_ex"].items() if name.startswith("recapture"))

found = {}

run = lowered(step_inputs())
found["code"] = run.compiled.runner.codegen({}, enable_cache=False)

# A cache that stays where it is, and other inputs that do not.
for dtype in (torch.float32, torch.bfloat16):
    inputs, run = step_inputs(dtype), lowered(step_inputs(dtype))
    before = recaptures()
    same = [equal(run, [torch.randn_like(inputs[0]), *inputs[1:3], torch.randperm(7)[:3]])
            for _ in range(3)]
    found[f"steady {dtype}"] = [same, len(graphs(run)), recaptures() - before, len(run.buffers)]

# A cache that is another tensor in every call.
run, before = lowered(step_inputs()), recaptures()
keep = [step_inputs() for _ in range(5)]
same = [equal(run, inputs) for inputs in keep]
found["moving"] = [same, recaptures() - before, list(run.buffers)]

# Any number of tokens: a graph each, and the first ones again.
run = lowered(dynamic_fakes(step_inputs()))
for tokens in (3, 5, 2, 5, 3):
    equal(run, step_inputs(tokens=tokens))
found["dynamic"] = len(graphs(run))

# Who owns results.
cache = step_inputs()[2]
for clone in (True, False):
    run = lowered(step_inputs(), clone_outputs=clone)
    inputs = step_inputs()
    first = run(*inputs)[1]
    copy = first.clone()
    run(inputs[0] * 3, *inputs[1:])
    found[f"clone {clone}"] = torch.equal(first, copy)

# With two graphs in one pool, a result of one does not survive the other.
run = lowered(dynamic_fakes(step_inputs()), clone_outputs=False)
first = run(*step_inputs(tokens=3))[1]
run(*step_inputs(tokens=4))
found["pool"] = bool(first.isnan().all())

# Parameters: promised to stay, or looked at.
for frozen in (True, False):
    run, inputs = lowered(step_inputs(), frozen_parameters=frozen), step_inputs()
    equal(run, inputs)
    inputs[1] = inputs[1] + 1
    want = step(inputs)[1]
    found[f"frozen {frozen}"] = torch.allclose(run(*inputs)[1], want)

# Refused inputs.
def refusal(*inputs):
    try:
        lowered(step_inputs())(*inputs)
    except RolemeshError as error:
        return [error.code, error.what, error.why]

x, w, keys, at = step_inputs()
found["count"] = refusal(x, w, keys)
found["shape"] = refusal(x[:2], w, keys, at)
found["dtype"] = refusal(x.double(), w, keys, at)

# A slice of a cache is written where it is; fused attention gets its results' memory from torchair.
define_static_attention()
graph = fx.Graph()
q, k, rows = (graph.placeholder(name) for name in ("q", "keys", "rows"))
new = graph.call_function(torch.ops.aten.slice_scatter.default, (k, rows, 2, 1, 3))
attention = torch.ops.npu.npu_fused_infer_attention_score.default
done = graph.call_function(
    attention, (q, new, new), {"num_heads": 4, "input_layout": "BNSD", "scale": 0.25}
)
import operator
graph.output((new, graph.call_function(operator.getitem, (done, 0))))
signature = Signature(
    "attention",
    (Input("q", InputKind.USER), Input("keys", InputKind.USER, True), Input("r", InputKind.USER)),
    (Output(mutates=1), Output()),
)
tensors = [torch.randn(2, 4, n, 16, dtype=torch.bfloat16) for n in (3, 5, 2)]
run = lower_npugraph(fx.GraphModule(nn.Module(), graph), tensors, signature)
want_keys = tensors[1].slice_scatter(tensors[2], 2, 1, 3)
want = attention(
    tensors[0], want_keys, want_keys, num_heads=4, input_layout="BNSD", scale=0.25
)[0]
for _ in range(2):
    got = run(*tensors)
torch.testing.assert_close(got[0], want_keys)
torch.testing.assert_close(got[1], want)
found["attention"] = [str(n.target) for n in run.compiled.runner.fx_graph.graph.nodes]
json.dump(found, sys.stdout)
"""


@pytest.fixture(scope="module")
def found() -> Mapping[str, Any]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    loaded: Mapping[str, Any] = json.loads(done.stdout)
    return loaded


def test_the_code_knows_what_is_captured_by_address(found: Mapping[str, Any]) -> None:
    code = found["code"]
    assert "parameter_user_inputs=[1]" in code
    assert "mutated_user_inputs=['keys']" in code
    assert "npu_scatter_nd_update_" in code
    assert 'compile_configs["frozen_parameter"] = "1"' in code
    assert 'compile_configs["enable_output_clone"] = "1"' in code


@pytest.mark.parametrize("dtype", ["torch.float32", "torch.bfloat16"])
def test_a_graph_is_captured_once_and_writes_in_place(found: Mapping[str, Any], dtype: str) -> None:
    same, graphs, recaptured, buffers = found[f"steady {dtype}"]
    assert same == [True] * 3
    assert (graphs, recaptured, buffers) == (1, 0, 0)


def test_a_cache_that_moves_gets_memory_of_the_graph(found: Mapping[str, Any]) -> None:
    same, recaptured, buffers = found["moving"]
    assert same == [True] * 5
    assert recaptured == 1  # for the memory of the graph, and not once in every call
    assert buffers == [2]


def test_each_size_has_a_graph(found: Mapping[str, Any]) -> None:
    assert found["dynamic"] == 3


def test_results_last_only_as_clones(found: Mapping[str, Any]) -> None:
    assert found["clone True"] is True
    assert found["clone False"] is False
    assert found["pool"] is True


def test_only_frozen_parameters_are_not_looked_at(found: Mapping[str, Any]) -> None:
    assert found["frozen True"] is False
    assert found["frozen False"] is True


def test_other_inputs_are_refused(found: Mapping[str, Any]) -> None:
    assert found["count"] == ["RM029", "a captured graph got 3 inputs", "it takes 4"]
    assert found["shape"] == [
        "RM029",
        "a captured graph got x of torch.float32 [2, 8]",
        "it was captured for torch.float32 [3, 8]",
    ]
    assert found["dtype"][1] == "a captured graph got x of torch.float64 [3, 8]"


def test_fused_attention_and_cache_writes_work_in_given_memory(found: Mapping[str, Any]) -> None:
    targets = found["attention"]
    assert "npu.npu_scatter_nd_update_.default" in targets
    assert "npu.npu_fused_infer_attention_score.out" in targets
    assert "npu._npu_fused_infer_attention_score_get_max_workspace.default" in targets
    assert "npu.npu_fused_infer_attention_score.default" not in targets


def test_a_process_that_converts_for_the_cpu_cannot_capture() -> None:
    load_torchair("cpu")
    with pytest.raises(RolemeshError) as caught:
        lower_npugraph(step_graph(), step_inputs(), SIGNATURE)
    assert caught.value.code == "RM025"
    assert caught.value.what == "this process already converts for cpu, not for npu"


def mlp_rank() -> tuple[list[Tensor], list[int]]:
    """One rank: three calls of the model, its state, and how many collectives each call made."""
    warnings.simplefilter("ignore")
    sharded, model = sharded_mlp(2)
    target = Target("npugraph_ex", lower_npugraph, NpuGraphOptions)
    run = Lowered(sharded, target, NpuGraphOptions()).compile()
    program = run.programs.at({})
    captured, collectives = program.lowered, []

    def recorded(*args: Tensor) -> tuple[Tensor | None, ...]:
        with record_traffic() as records:
            outputs = captured(*args)
        collectives.append(len(records))
        return outputs

    program.lowered = recorded
    outputs = [run(torch.full((5, 6), value)) for value in (0.5, -2.0, 3.0)]
    return [*outputs, gather(model.seen)], collectives  # type: ignore[list-item]


@pytest.mark.processes
def test_collectives_are_captured_and_replayed() -> None:
    _, model = sharded_mlp(2)
    want = [model(torch.full((5, 6), value)) for value in (0.5, -2.0, 3.0)]
    for values, collectives in run_processes(f"{__file__}:mlp_rank", 2):  # type: ignore[misc]
        assert collectives == [1, 1, 1]  # capturing exchanges nothing
        for found, expected in zip(values, [*want, model.seen], strict=True):
            torch.testing.assert_close(found, expected)
