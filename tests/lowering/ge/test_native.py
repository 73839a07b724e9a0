"""The native boundary: graphs and tensors reach the engine; wrong calls fail as in torchair."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.lowering.ge.engine import LoadedGraph, running_on
from rolemesh.lowering.ge.loader import Torchair, coded_errors, load_torchair
from rolemesh.lowering.ge.native import SOC, NativeGraph, TorchDataType, native_modules


class Recorder:
    """An engine that keeps what it is given, and gives back what it is told to."""

    def __init__(self, *results: torch.Tensor) -> None:
        self.graphs: list[LoadedGraph] = []
        self.calls: list[tuple[list[torch.Tensor], list[torch.Tensor | None]]] = []
        self.results = list(results)

    def load(self, graph: LoadedGraph) -> Recorder:
        self.graphs.append(graph)
        return self

    def run(
        self, inputs: Sequence[torch.Tensor], assigned: Sequence[torch.Tensor | None]
    ) -> list[torch.Tensor]:
        self.calls.append((list(inputs), list(assigned)))
        return self.results


@pytest.fixture(scope="module")
def torchair() -> Torchair:
    return load_torchair("cpu")


@pytest.fixture
def modules(torchair: Torchair) -> dict[str, ModuleType]:
    """Native modules of their own, so that no test changes the loaded ones."""
    return native_modules(torchair.folder / "dynamo" / "torchair")


@pytest.fixture
def native(modules: dict[str, ModuleType]) -> ModuleType:
    return modules["torchair.core._torchair"]


@pytest.fixture
def graph(native: ModuleType) -> NativeGraph:
    """A loaded graph of two inputs and one output, not compiled, on an initialised engine."""
    native.InitializeGraphEngine({"ge.exec.deviceId": "0"})
    made: NativeGraph = native.TorchNpuGraphBase("graph_7")
    made.load(b"model", {"mode": "max-autotune"}, [0, 1], [27], 0)
    return made


def _convert(
    torchair: Torchair, function: Callable[..., object], *shapes: tuple[int, ...]
) -> Callable[..., Sequence[torch.Tensor]]:
    mode = FakeTensorMode()
    with mode:
        fakes = [torch.empty(shape, dtype=torch.bfloat16) for shape in shapes]
    module = make_fx(function)(*fakes)
    with torch.no_grad(), tracing(TracingContext(mode)):
        return torchair.module.get_compiler(torchair.module.CompilerConfig())(module, fakes)


def test_torchair_converts_compiles_and_runs_on_the_engine(torchair: Torchair) -> None:
    from torchair._ge_concrete_graph.ge_ir_pb2 import ModelDef

    call = _convert(torchair, lambda a, b: (torch.relu(a @ b),), (3, 5), (5, 7))
    a, b = torch.ones(3, 5, dtype=torch.bfloat16), torch.ones(5, 7, dtype=torch.bfloat16)
    engine = Recorder(torch.full((3, 7), 4.0))
    with running_on(engine):
        first = call(a, b)
        second = call(a, b)
    assert first[0] is second[0] is engine.results[0]
    assert len(engine.graphs) == 1  # compiled once
    assert len(engine.calls) == 2
    inputs, assigned = engine.calls[1]
    assert [value.data_ptr() for value in inputs] == [a.data_ptr(), b.data_ptr()]
    assert assigned == []
    graph = engine.graphs[0]
    model = ModelDef()
    model.ParseFromString(graph.model)
    assert [op.type for op in model.graph[0].op if op.type not in ("Data", "NetOutput")] == [
        "MatMul",
        "Relu",
    ]
    assert graph.name == model.graph[0].name
    assert graph.options["mode"] == "max-autotune"
    assert graph.placements == (0, 0)
    assert graph.output_dtypes == (27,)
    assert not graph.on_device
    assert graph.input_shapes == ((3, 5), (5, 7))
    assert graph.output_shapes == ((3, 7),)


def test_mutated_inputs_are_assigned(torchair: Torchair) -> None:
    def write(cache: torch.Tensor, step: torch.Tensor) -> tuple[torch.Tensor]:
        grown = cache + step
        cache.copy_(grown)
        return (grown * 2,)

    call = _convert(torchair, write, (3, 5), (5,))
    cache, step = torch.zeros(3, 5, dtype=torch.bfloat16), torch.ones(5, dtype=torch.bfloat16)
    engine = Recorder(torch.zeros(3, 5), cache)
    with running_on(engine):
        call(cache, step)
    ((_, assigned),) = engine.calls
    assert [value is None for value in assigned] == [True, False]
    assert assigned[1] is not None
    assert assigned[1].data_ptr() == cache.data_ptr()


def test_without_engine(torchair: Torchair) -> None:
    call = _convert(torchair, lambda a: (a + 1,), (2, 3))
    with pytest.raises(RolemeshError, match="no engine runs") as caught, coded_errors():
        call(torch.ones(2, 3, dtype=torch.bfloat16))
    assert caught.value.code == "RM025"


def test_errors_of_the_engine_keep_their_parts(torchair: Torchair) -> None:
    class Broken(Recorder):
        def run(self, inputs: object, assigned: object) -> list[torch.Tensor]:
            raise RolemeshError("RM031", what="Add failed", where="op add_1", why="w", fix="f")

    call = _convert(torchair, lambda a: (a + 1,), (2, 3))
    with running_on(Broken()), pytest.raises(RolemeshError) as caught, coded_errors():
        call(torch.ones(2, 3, dtype=torch.bfloat16))
    error = caught.value
    assert (error.code, error.what, error.where) == ("RM031", "Add failed", "op add_1")


def test_graph_in_steps(graph: NativeGraph) -> None:
    assert graph.summary() == "graph graph_7 for the host, not compiled, 2 inputs"
    graph.set_hint_shape([[2, -1], []], [[2, 3]])
    engine = Recorder(torch.ones(2, 3))
    with running_on(engine):
        graph.compile()
    assert engine.graphs == [
        LoadedGraph(
            name="graph_7",
            model=b"model",
            options={"mode": "max-autotune"},
            placements=(0, 1),
            output_dtypes=(27,),
            on_device=False,
            input_shapes=((2, -1), ()),
            output_shapes=((2, 3),),
        )
    ]
    values = [torch.zeros(2, 3), torch.zeros(())]
    graph.auto_tune((values, None))
    assert graph.run((values, [None], None)) == engine.results
    assert graph.summary() == "graph graph_7 for the host, compiled, 2 inputs"


def test_order_of_calls(native: ModuleType) -> None:
    graph = native.TorchNpuGraphBase("graph_9")
    assert graph.summary() == "graph graph_9, not loaded"
    with pytest.raises(RuntimeError, match="Set graph inputs and outputs shape must after load"):
        graph.set_hint_shape([], [])
    with pytest.raises(RuntimeError, match="graph_9, because session is not initialized"):
        graph.compile()
    with pytest.raises(RuntimeError, match="Device id is not specified when initializing GE"):
        native.InitializeGraphEngine({})
    native.InitializeGraphEngine({"ge.exec.deviceId": "0"})
    with pytest.raises(RuntimeError, match="graph_9, because graph have not been added"):
        graph.compile()
    with pytest.raises(RuntimeError, match="Executor is not initialized"):
        graph.run(([], [], None))
    with pytest.raises(RuntimeError, match="Executor type is unknown"):
        graph.load(b"", {}, [], [], 2)
    graph.load(b"", {}, [], [], 1)
    native.FinalizeGraphEngine()
    with running_on(Recorder()), pytest.raises(RuntimeError, match="session is not initialized"):
        graph.compile()


def test_loading_again_needs_compiling_again(graph: NativeGraph) -> None:
    with running_on(Recorder()):
        graph.compile()
    graph.load(b"other", {}, [], [], 0)
    with pytest.raises(RuntimeError, match="Executor is not initialized"):
        graph.run(([], [], None))


@pytest.mark.parametrize(
    ("inputs", "assigned", "message"),
    [
        (7, [], "not a list or tuple"),
        ([torch.ones(1), None], [], "element 1 is None"),
        ([2.5, torch.ones(1)], [], "element 0 is not a Tensor"),
        ([torch.ones(1), torch.ones(1)], {}, "not a list or tuple"),
        ([torch.ones(1), torch.ones(1)], [None, "x"], "element 1 is not a Tensor"),
    ],
)
def test_arguments_of_run(
    graph: NativeGraph, inputs: object, assigned: object, message: str
) -> None:
    with running_on(Recorder()):
        graph.compile()
    with pytest.raises(RuntimeError, match=f"^{message}$"):
        graph.run((inputs, assigned, None))


def test_number_of_inputs(graph: NativeGraph) -> None:
    with running_on(Recorder()):
        graph.compile()
    with pytest.raises(RolemeshError, match="a GE graph of 2 inputs got 1") as caught:
        graph.run(([torch.ones(1)], [], None))
    assert caught.value.code == "RM029"
    assert caught.value.where == "graph graph_7"


def test_inputs_of_tuning_are_checked(graph: NativeGraph) -> None:
    with pytest.raises(RuntimeError, match="element 0 is None"):
        graph.auto_tune(([None], None))


def test_sessions_are_separate(torchair: Torchair, native: ModuleType) -> None:
    native.InitializeGraphEngine({"ge.exec.deviceId": "3"})
    other = native_modules(torchair.folder / "dynamo" / "torchair")["torchair.core._torchair"]
    assert native.TorchNpuGraphBase.session.options == {"ge.exec.deviceId": "3"}
    assert other.TorchNpuGraphBase.session.options is None


def test_definitions(native: ModuleType) -> None:
    status, inputs, outputs, attributes = native.get_registered_ir_def("ConcatV2")
    assert status == "SUCCESS"
    assert inputs == [("x", "dynamic"), ("concat_dim", "required")]
    assert outputs == [("y", "required")]
    assert attributes == [("N", "VT_INT")]
    assert native.get_registered_ir_def("NoSuchOp") == ("ERROR", [], [], [])


def test_compatibility(native: ModuleType) -> None:
    check = native.check_cann_compat
    assert check("FusedInferAttentionScore", ("atten_mask", "query_rope"), ("sparse_mode",)) == ""
    assert check("RmsNorm", ("bias", "more"), ("epsilon", "mode")) == (
        "optype RmsNorm unsupported optional input [bias, more], optional attr [mode], "
        "please upgrade cann version."
    )
    assert check("NoSuchOp", (), ()) == (
        "OperatorFactory find optype NoSuchOp failed, maybe you need upgrade cann version."
    )


def test_exported_files_are_equal_and_whole(native: ModuleType, tmp_path: Path) -> None:
    from torchair._ge_concrete_graph.ge_ir_pb2 import ModelDef

    files = []
    for names in ("abcdefgh", "hgfedcba"):  # the same map, filled in another order
        model = ModelDef(name="m")
        for name in names:
            model.attr[name].i = ord(name)
        options = {"export_path_dir": str(tmp_path / names), "export_name": "graph.air"}
        native.export(model.SerializeToString(), options)
        native.export(model.SerializeToString(), options)
        assert [path.name for path in (tmp_path / names).iterdir()] == ["graph.air"]
        files.append((tmp_path / names / "graph.air").read_bytes())
    assert files[0] == files[1]
    parsed = ModelDef()
    parsed.ParseFromString(files[0])
    assert parsed.attr["c"].i == ord("c")


def test_export_refuses(native: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="Export_path is none when export graph"):
        native.export(b"", {"export_name": "x.air"})
    with pytest.raises(RuntimeError, match="Export_name is none when export graph"):
        native.export(b"", {"export_path_dir": str(tmp_path)})
    options = {"export_path_dir": str(tmp_path), "export_name": "x.air"}
    with pytest.raises(RolemeshError, match="a graph to export is no ModelDef") as caught:
        native.export(b"\xff\xff", options)
    assert caught.value.code == "RM027"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "x.air").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RuntimeError, match="should not be an symbolic link"):
        native.export(b"", options)


def test_tensors_by_address(native: ModuleType) -> None:
    memory = (ctypes.c_int16 * 6)(*range(6))
    status, (tensor,) = native.as_torch_tensors(
        [2, 3], int(TorchDataType.INT16), [ctypes.addressof(memory)]
    )
    assert status == 0
    assert tensor.tolist() == [[0, 1, 2], [3, 4, 5]]
    tensor[1, 2] = 9
    assert memory[5] == 9
    status, empty = native.as_torch_tensors([0, 4], int(TorchDataType.BF16), [0, 0])
    assert status == 0
    assert [(value.shape, value.dtype) for value in empty] == [((0, 4), torch.bfloat16)] * 2
    assert native.as_torch_tensors([2], 99, [0]) == (1, [])


def test_dtype_numbers_are_those_that_torchair_sends(torchair: Torchair) -> None:
    from torchair.llm_datadist import _tensor_utils

    for dtype, number in _tensor_utils._TORCH_DTYPE_TO_GE_TYPE.items():
        status, (tensor,) = _tensor_utils._torchair.as_torch_tensors([0], number, [0])
        assert status == 0
        assert tensor.dtype == dtype


def test_small_functions(
    modules: dict[str, ModuleType], native: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert native.GetSocName() == SOC
    assert native.CheckAclnnAvaliable("aclnnAdd") is False
    native.StupidRepeat("ab", 3)
    assert capsys.readouterr().err == "ababab"
    native.SetDebugLogPath("/tmp/log")
    native.AclopStartDumpArgs(1, "/tmp/dump")
    settings = native.TorchNpuGraphBase.session.settings
    assert settings == {"SetDebugLogPath": "/tmp/log", "AclopStartDumpArgs": "1 /tmp/dump"}
    tensor = torch.ones(2, 3)
    assert modules["torchair.core._npu_graph_executor"].GetNpuStorageSizes(tensor) == [2, 3]
    cast = modules["torchair.core._npu_utils"].NpuFormatCastViaCpu
    assert cast(tensor, 29) is tensor
    with pytest.raises(RuntimeError, match="must be greater than 0, but are 4 and 0"):
        cast(torch.ones(4, 0), 29, None, None)


def test_everything_that_torchair_uses_is_there(
    torchair: Torchair, modules: dict[str, ModuleType]
) -> None:
    folder = torchair.folder / "dynamo" / "torchair"
    source = "\n".join(path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.py")))
    for name, module in modules.items():
        short = name.rpartition(".")[2]
        aliases = "|".join({short, *re.findall(rf"import {short} as (\w+)", source)})
        used = set(re.findall(rf"(?<![\w.])(?:{aliases})\.([A-Za-z]\w*)", source)) - {"so"}
        assert used, name
        assert used <= set(vars(module)), name
