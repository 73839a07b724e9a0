"""What does not fit a GE graph is an error that names the op."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.runtime.ge.graphs import Builder, executor, refusal, with_ops

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.runtime.ge.ops.table import Attributes, OpTable


def two_inputs() -> Builder:
    build = Builder()
    x = build.data([2, -1])
    y = build.data([3], torch.bfloat16)
    build.op("Neg", {"x": x}, fx="neg-aten.neg.default")
    build.results(("Neg:0", [2, -1]), (y, [3]))
    build.typed(1, torch.bfloat16)
    return build


@pytest.mark.parametrize(
    ("inputs", "what", "why"),
    [
        (
            [torch.ones(2, 2)],
            "a GE graph got 1 inputs instead of 2",
            "its Data ops are 0 'arg0', 1 'arg1'",
        ),
        (
            [torch.ones(2, 2), torch.ones(3)],
            "input 1 is float32 [3]",
            "it takes bfloat16 [3], contiguous",
        ),
        (
            [torch.ones(2, 2), torch.ones(4, dtype=torch.bfloat16)],
            "input 1 is bfloat16 [4]",
            "it takes bfloat16 [3], contiguous",
        ),
        (
            [torch.ones(3, 2), torch.ones(3, dtype=torch.bfloat16)],
            "input 0 is float32 [3, 2]",
            "it takes float32 [2, ?], contiguous",
        ),
        (
            [torch.ones(2), torch.ones(3, dtype=torch.bfloat16)],
            "input 0 is float32 [2]",
            "it takes float32 [2, ?], contiguous",
        ),
        (
            [torch.ones(5, 2).t(), torch.ones(3, dtype=torch.bfloat16)],
            "input 0 is float32 [2, 5] with strides [1, 2]",
            "it takes float32 [2, ?], contiguous",
        ),
    ],
    ids=["count", "dtype", "size", "fixed dim", "rank", "strides"],
)
def test_inputs_that_a_graph_does_not_take(inputs: list[torch.Tensor], what: str, why: str) -> None:
    run = executor(two_inputs().serialized(), check=False)
    error = refusal(lambda: run.run(inputs), "RM029")
    assert error.what == what
    assert error.why == why
    assert "'graph'" in error.where


@pytest.mark.parametrize(
    ("assigned", "what"),
    [
        ([None], "a GE graph got 1 tensors to put results in instead of 2"),
        ([torch.ones(2, 3), None], "result 0 cannot be put in float32 [2, 3]"),
        ([torch.ones(2, 4).double(), None], "result 0 cannot be put in float64 [2, 4]"),
    ],
)
def test_assigned_tensors_that_cannot_take_a_result(
    assigned: list[torch.Tensor | None], what: str
) -> None:
    run = executor(two_inputs().serialized())
    inputs = [torch.ones(2, 4), torch.ones(3, dtype=torch.bfloat16)]
    assert refusal(lambda: run.run(inputs, assigned), "RM029").what == what


def test_unknown_ops_and_inputs_are_all_listed() -> None:
    build = Builder()
    x = build.data([2])
    build.op("Zeta", {"x": x}, fx="zeta-aten.zeta.default")
    build.op("Zeta", {"x": "Zeta:0"})
    build.op("Alpha", {"x": "Zeta_1:0"})
    build.op("Neg", {"x": "Alpha:0", "mask": x})
    build.op("Add", {"x1": "Neg:0", "x2": x, "scale": ""}, fx="add-aten.add.Tensor")
    build.op("Unused", {"x": x})
    error = refusal(lambda: executor(build.results(("Add:0", [2]))), "RM028")
    assert error.what == (
        "the reference executor has no semantics for: Alpha, Neg with input mask, Zeta"
    )
    assert error.where.split("\n") == [
        "Alpha 'Alpha', for fx node add (aten.add.Tensor)",
        "Neg 'Neg', for fx node add (aten.add.Tensor)",
        "Zeta 'Zeta', of fx node zeta (aten.zeta.default)",
    ]


@pytest.mark.parametrize(
    ("kind", "inputs", "what"),
    [
        ("Add", {"x1": "arg0:0"}, "input 'x2' is not fed"),
        ("Add", {"x1": "arg0:0", "x2": ""}, "input 'x2' is not fed"),
        ("Join", {"x0": "arg0:0", "x2": "arg0:0", "dim": "Const:0"}, "the list of inputs 'x' has"),
        ("Join", {"x0": "", "x1": "arg0:0", "dim": "Const:0"}, "the list of inputs 'x' has holes"),
        ("Join", {"x00": "arg0:0", "x1": "arg0:0", "dim": ""}, "input 'dim' is not fed"),
    ],
)
def test_inputs_that_are_missing(kind: str, inputs: dict[str, str], what: str) -> None:
    build = Builder()
    build.data([2])
    build.const(torch.tensor(0))
    edge = build.op(kind, inputs)
    error = refusal(lambda: executor(build.results((edge, [2]))), "RM027")
    assert error.what.startswith(what)
    assert error.where == f"{kind} {kind!r}"


@pytest.mark.parametrize(("kind", "names"), [("Add", ("x1", "x2")), ("Join", ("x0", "x1"))])
def test_data_types_are_not_promoted(kind: str, names: tuple[str, str]) -> None:
    build = Builder()
    x, y = build.data([2]), build.data([2], torch.bfloat16)
    dim = {"dim": build.const(torch.tensor(0))} if kind == "Join" else {}
    build.op(kind, {names[0]: x, names[1]: y, **dim})
    model = build.results((f"{kind}:0", [-1]))
    inputs = [torch.ones(2), torch.ones(2, dtype=torch.bfloat16)]
    error = refusal(lambda: executor(model).run(inputs), "RM027")
    assert error.what == "inputs of an op have different data types"
    assert error.why == f"{names[0]} is float32, {names[1]} is bfloat16; GE promotes no types"
    assert executor(model, check=False).run(inputs)[0].dtype is torch.float32


def test_the_text_of_a_failing_op() -> None:
    build = Builder()
    x, y = build.data([2, 3]), build.data([4])
    build.op("Add", {"x2": y, "x1": x})
    build.op("Neg", {"x": "Add:0"}, fx="neg-aten.neg.default")
    run = executor(build.results(("Neg:0", [-2])))
    error = refusal(lambda: run.run([torch.ones(2, 3), torch.ones(4)]), "RM031")
    assert isinstance(error.__cause__, RuntimeError)
    assert str(error) == (
        f"[RM031] RuntimeError: {error.__cause__}\n"
        "  where: Add 'Add', for fx node neg (aten.neg.default)\n"
        "  why: its inputs are x1 float32 [2, 3], x2 float32 [4]\n"
        "  fix: the op's inputs or attributes are wrong, or its semantics in "
        "rolemesh.runtime.ge.ops"
    )


def test_a_failing_op_names_its_lists_of_inputs() -> None:
    build = Builder()
    x, y = build.data([2]), build.data([2, 2])
    build.op("Join", {"x0": x, "x1": y, "dim": build.const(torch.tensor(0))})
    run = executor(build.results(("Join:0", [-2])))
    error = refusal(lambda: run.run([torch.ones(2), torch.ones(2, 2)]), "RM031")
    assert error.why == "its inputs are x0 float32 [2], x1 float32 [2, 2], dim int64 []"


def test_errors_of_ours_pass() -> None:
    def enter(table: OpTable) -> None:
        @table.op("Fails")
        def fails(a: Attributes, x: torch.Tensor) -> torch.Tensor:
            raise RolemeshError("RM030", what="a rank is gone")

    build = Builder()
    build.op("Fails", {"x": build.data([2])})
    run = executor(build.results(("Fails:0", [2])), **with_ops(enter))
    assert refusal(lambda: run.run([torch.ones(2)]), "RM030").what == "a rank is gone"


@pytest.mark.parametrize(
    ("meta", "dtype", "why"),
    [
        ("[5])", torch.float32, "the fx node's value is float32 with 5 elements"),
        ("[s0])", torch.float16, "the fx node's value is float16"),
    ],
)
def test_results_that_the_fx_node_does_not_have(meta: str, dtype: torch.dtype, why: str) -> None:
    build = Builder()
    x = build.data([2, 2])
    build.op("Neg", {"x": x}, fx="neg-aten.neg.default", meta=meta, dtype=dtype)
    run = executor(build.results(("Neg:0", [2, 2])))
    error = refusal(lambda: run.run([torch.ones(2, 2)]), "RM027")
    assert error.what == "output 0 is float32 [2, 2]"
    assert error.why == why
    assert error.where == "Neg 'Neg', of fx node neg (aten.neg.default)"


def test_descriptors_that_torchair_did_not_set_mean_nothing() -> None:
    build = Builder()
    x = build.data([2, 2], torch.bfloat16)
    build.op("Neg", {"x": x}, dtype=torch.float32)
    build.op("Neg", {"x": "Neg:0"}, meta="[4])", dtype=torch.bfloat16)  # another view of it
    model = build.results(("Neg_1:0", [2, 2]), dtype=torch.bfloat16)
    assert executor(model).run([torch.ones(2, 2, dtype=torch.bfloat16)])[0].shape == (2, 2)


@pytest.mark.parametrize(
    ("shape", "dtype", "why"),
    [
        ([2, 3], torch.float32, "NetOutput 'NetOutput' describes it as float32 [2, 3]"),
        ([-1], torch.float32, "NetOutput 'NetOutput' describes it as float32 [?]"),
        ([2, 2], torch.int32, "NetOutput 'NetOutput' describes it as int32 [2, 2]"),
    ],
)
def test_results_that_net_output_does_not_describe(
    shape: list[int], dtype: torch.dtype, why: str
) -> None:
    build = Builder()
    build.op("Neg", {"x": build.data([2, 2])})
    run = executor(build.results(("Neg:0", shape), dtype=dtype), check=False)
    error = refusal(lambda: run.run([torch.ones(2, 2)]), "RM027")
    assert error.what == "result 0 is float32 [2, 2]"
    assert error.where == "Neg 'Neg', output 0"
    assert error.why == why


@pytest.mark.parametrize(
    ("result", "options", "what"),
    [
        (lambda x: (x.clone(), x.clone()), {}, "the op gave 2 results instead of 1"),
        (lambda x: 3, {}, "output 0 is a int"),
        (lambda x: x, {}, "output 0 lies in the memory of an input"),
        (lambda x: x[1:], {}, "output 0 lies in the memory of an input"),
        (lambda x: x.clone(), {"writes": {0: "x"}}, "output 0 is not the input that the op writes"),
    ],
    ids=["count", "type", "itself", "part", "ref"],
)
def test_functions_that_do_not_keep_their_promises(
    result: Callable[[torch.Tensor], torch.Tensor], options: dict[str, object], what: str
) -> None:
    def enter(table: OpTable) -> None:
        @table.op("Odd", **options)  # type: ignore[arg-type]
        def odd(a: Attributes, x: torch.Tensor) -> torch.Tensor:
            return result(x)

    build = Builder()
    build.op("Odd", {"x": build.data([2])})
    run = executor(build.results(("Odd:0", [2])), **with_ops(enter))
    error = refusal(lambda: run.run([torch.ones(2)]), "RM031")
    assert error.what.startswith(what)
    assert error.fix == "correct the semantics of Odd"


def test_a_part_of_memory_of_its_own_is_no_view_of_an_input() -> None:
    def enter(table: OpTable) -> None:
        @table.op("Rest")
        def rest(a: Attributes, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x, x])[1:]

    build = Builder()
    build.op("Rest", {"x": build.data([2])})
    run = executor(build.results(("Rest:0", [3])), **with_ops(enter))
    assert run.run([torch.tensor([1.0, 2.0])])[0].tolist() == [2.0, 1.0, 2.0]
