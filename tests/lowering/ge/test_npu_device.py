"""Offline NPU mode: what a device would get is produced, in a process of its own, without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest

from rolemesh.runtime.ge.communicator import group_ranks

# The mode is for good, so everything runs in one process, and the tests look at what it found.
SCRIPT = """
import importlib.util, json, sys, warnings
import torch
warnings.simplefilter("ignore")
import torch.distributed as dist
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.lowering.ge.engine import running_on
from rolemesh.lowering.ge.loader import diagnose, load_torchair

torchair = load_torchair("npu")
from torchair._ge_concrete_graph.ge_ir_pb2 import ModelDef
found = {}

class Engine:
    def load(self, graph):
        self.graph = graph
        self.model = ModelDef()
        self.model.ParseFromString(graph.model)
        return self

    def run(self, inputs, assigned):
        self.assigned = [None if value is None else value.data_ptr() for value in assigned]
        return [torch.zeros(1) for _ in self.graph.output_dtypes]

def convert(name, function, *tensors, symbolic=False, parameters=(), **settings):
    mode = FakeTensorMode(shape_env=ShapeEnv() if symbolic else None)
    fakes = [mode.from_tensor(t, static_shapes=not symbolic) for t in tensors]
    with mode:
        fakes = [torch.empty_like(t, device="npu") for t in fakes]
    arguments = list(tensors)
    if symbolic:
        fakes.append(mode.from_tensor(torch.ones(4), static_shapes=False).shape[0])
        arguments.append(4)
    module = make_fx(lambda *args: function(*args))(*fakes)
    module.graph.eliminate_dead_code()
    for index in parameters:
        fakes[index]._torchair_is_parameter = True
    config = torchair.module.CompilerConfig()
    for key, value in settings.items():
        setattr(config.experimental_config, key, value)
    engine = Engine()
    with torch.no_grad(), tracing(TracingContext(mode)):
        call = torchair.module.get_compiler(config)(module, fakes)
    with running_on(engine):
        call(*arguments)
    ops = [op for op in engine.model.graph[0].op]
    found[name] = {
        "placements": engine.graph.placements,
        "on_device": engine.graph.on_device,
        "options": dict(engine.graph.options),
        "ops": sorted(op.type for op in ops),
        "groups": [op.attr["group"].s.decode() for op in ops if "group" in op.attr],
        "assigned": engine.assigned,
        "tensors": [t.data_ptr() for t in tensors],
    }

bf16 = torch.bfloat16
a, b = torch.ones(3, 5, dtype=bf16), torch.ones(5, 7, dtype=bf16)
convert("product", lambda a, b: (a @ b,), a, b)
convert("dynamic", lambda a, b, n: (b.new_ones(n), b + 1), a, b, symbolic=True)
convert("frozen", lambda a, b: (a @ b,), a, b, parameters=[1], frozen_parameter=True)

def write(a, cache):
    a = a + 1
    cache.copy_(a)
    return (a * 2,)

convert("mutated", write, a, torch.zeros(3, 5, dtype=bf16))
convert("reference", write, a, torch.zeros(3, 5, dtype=bf16), enable_ref_data=True)

def norm(a, gamma):
    y, _, total = torch.ops.npu.npu_add_rms_norm(a, a, gamma)
    return y, y.float(), total

convert("pattern", norm, a, torch.ones(5, dtype=bf16))

dist.init_process_group("hccl", store=dist.HashStore(), rank=0, world_size=1)
group = dist.new_group([0])
reduce = torch.ops._c10d_functional.all_reduce
wait = torch.ops._c10d_functional.wait_tensor
for name, used in (("world", dist.group.WORLD), ("subgroup", group)):
    convert(name, lambda a, used=used: (wait(reduce(a, "sum", used.group_name)),), a)
ones = torch.ones(3)
backend = group._get_backend(torch.device("npu"))
backend.allreduce([ones]).wait()
dist.destroy_process_group()
try:
    backend.get_hccl_comm_name(0)
except RolemeshError as error:
    found["gone"] = error.code

def error_of(function):
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"

found["second"] = error_of(lambda: load_torchair("cpu"))
found["same"] = load_torchair() is load_torchair("npu") is torchair
found["loaded"] = [torchair.cann, torchair.device]
found["diagnosis"] = diagnose("npu").problem
found["spec"] = importlib.util.find_spec("torch_npu") is not None
found["data"] = error_of(lambda: torch.zeros(2, device="npu"))
found["unknown"] = error_of(lambda: torch.npu.NoSuchThing)
found["unknown op"] = error_of(lambda: sys.modules["torch_npu"].npu_no_such_op)
found["available"] = torch.npu.is_available()
torch.manual_seed(11)
found["seed"] = torch.npu.default_generators[0].initial_seed()
utils = sys.modules["torch_npu.npu.utils"]
versions = ("8.2.RC1", "8.5.0", "9.0.0", "9.2.0")
found["cann"] = [utils._is_gte_cann_version(version, module="CANN") for version in versions]
with FakeTensorMode():
    fakes = [torch.empty(2, device=device) for device in ("cpu", "npu")]
found["is_npu"] = [t.is_npu for t in (*fakes, ones, torch.nn.Parameter(ones), ones.to("meta"))]
compiled = torch.compile(lambda x: x.sin() + 1, backend="aot_eager")
found["cpu"] = torch.equal(compiled(ones), ones.sin() + 1)
print(json.dumps(found))
"""

Found = Mapping[str, Any]


@pytest.fixture(scope="module")
def found() -> Found:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
        check=False,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(result, dict)
    return result


def test_graphs_are_for_the_device(found: Found) -> None:
    product = found["product"]
    assert product["placements"] == [1, 1]
    assert product["on_device"] is True
    assert product["options"]["ge.exec.outputReuseMemIndexes"] == "0"


def test_sizes_stay_on_the_host(found: Found) -> None:
    dynamic = found["dynamic"]
    assert dynamic["placements"] == [1, 0]  # the other tensor is dead
    assert dynamic["on_device"] is True


def test_mutated_inputs_share_memory_with_outputs(found: Found) -> None:
    mutated = found["mutated"]
    cache = mutated["tensors"][1]
    assert cache in mutated["assigned"]
    output = mutated["assigned"].index(cache)
    assert mutated["options"]["ge.exec.outputReuseInputMemIndexes"] == f"1,{output}"
    assert mutated["options"]["ge.exec.outputReuseMemIndexes"] == str(1 - output)


def test_reference_data(found: Found) -> None:
    assert found["reference"]["ops"].count("RefData") == 1
    assert "RefData" not in found["product"]["ops"]


def test_frozen_parameters(found: Found) -> None:
    assert found["frozen"]["options"]["frozenInput"] == "0,1"
    assert found["product"]["options"]["frozenInput"] == "0,0"


def test_torchairs_own_patterns_apply(found: Found) -> None:
    ops = found["pattern"]["ops"]
    assert "AddRmsNormCast" in ops
    assert "Cast" not in ops


def test_groups_have_names_that_the_executor_resolves(found: Found) -> None:
    tags = set()
    for name in ("world", "subgroup"):
        assert "HcomAllReduce" in found[name]["ops"]
        (group,) = found[name]["groups"]
        tag, ranks = group_ranks(group)
        assert ranks == (0,)
        tags.add(tag)
    assert len(tags) == 2
    assert found["gone"] == "RM030"


def test_the_process_stays_in_this_mode(found: Found) -> None:
    assert found["loaded"] == [False, "npu"]
    assert found["same"] is True
    assert "RM025" in found["second"]
    assert "already converts for npu, not for cpu" in found["second"]
    assert found["diagnosis"] == ""  # the stand-in is not taken for an installed torch_npu
    assert found["spec"] is True


def test_no_data_lives_on_the_device(found: Found) -> None:
    assert found["available"] is False
    assert "npu" in found["data"]
    assert found["is_npu"] == [False, True, True, True, False]


def test_what_is_not_there_is_an_attribute_error(found: Found) -> None:
    assert found["unknown"].startswith("AttributeError")
    assert found["unknown op"].startswith("AttributeError")


def test_torch_goes_on_working(found: Found) -> None:
    assert found["seed"] == 11
    assert found["cpu"] is True


def test_the_cann_version_is_compared_as_a_version(found: Found) -> None:
    assert found["cann"] == [True, True, True, False]
