"""A GE graph runs as its ops and edges say, and what does not fit is an error that names the op."""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.runtime.ge.graphs import NUMBERS, TABLE, Builder, executor

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.runtime.ge.executor import Copy
from rolemesh.runtime.ge.graph import Node
from rolemesh.runtime.ge.ops.table import Attributes, OpTable


def refusal(call: Callable[[], object], code: str) -> RolemeshError:
    with pytest.raises(RolemeshError) as caught:
        call()
    assert caught.value.code == code
    return caught.value


def with_ops(*entries: Callable[[OpTable], object]) -> dict[str, object]:
    """The ops of the helper, and others that `entries` enter into a table."""
    table = OpTable()
    for entry in entries:
        entry(table)
    return {"ops": {**TABLE.ops, **table.ops}}


# --------------------------------------------------------------------------------------------------
# Values.


def test_inputs_constants_lists_and_several_outputs() -> None:
    build = Builder()
    x, y = build.data([2, 3]), build.data([2, 3], kind="RefData")
    dim = build.const(torch.tensor(0))
    build.op("Join", {"x1": y, "dim": dim, "x0": x})
    build.op("Halves", {"x": "Join:0"}, outputs=2)
    build.op("Scale", {"x": "Halves:1", "bias": x}, factor=3.0)
    model = build.results(("Scale:0", [2, 3]), ("Halves:0", [2, 3]), ("Join:0", [4, 3]))
    a, b = torch.randn(2, 3), torch.randn(2, 3)
    scaled, first, joined = executor(model).run([a, b])
    assert torch.equal(joined, torch.cat([a, b]))
    assert torch.equal(first, a)
    assert torch.equal(scaled, b * 3 + a)


def test_a_list_of_more_than_ten_inputs_is_in_the_order_of_its_numbers() -> None:
    build = Builder()
    edges = [build.data([1]) for _ in range(12)]
    named = {f"x{i}": edges[i] for i in sorted(range(12), key=str)}
    build.op("Join", {**named, "dim": build.const(torch.tensor(0))})
    model = build.results(("Join:0", [12]))
    (result,) = executor(model).run([torch.tensor([float(i)]) for i in range(12)])
    assert result.tolist() == list(range(12))


def test_unfed_optional_inputs_have_their_default() -> None:
    def enter(table: OpTable) -> None:
        @table.op("Shift")
        def shift(
            a: Attributes, x: torch.Tensor, *, by: object = 5, bias: torch.Tensor | None = None
        ) -> torch.Tensor:
            shifted: torch.Tensor = x + by  # type: ignore[operator]
            return shifted if bias is None else shifted * bias

    build = Builder()
    x = build.data([2])
    build.op("Shift", {"x": x, "by": "", "bias": x})
    build.op("Shift", {"bias": "", "by": x, "x": x})
    build.op("Shift", {"x": x})
    model = build.results(("Shift:0", [2]), ("Shift_1:0", [2]), ("Shift_2:0", [2]))
    results = executor(model, **with_ops(enter)).run([torch.tensor([1.0, 2.0])])
    assert [result.tolist() for result in results] == [[6.0, 14.0], [2.0, 4.0], [6.0, 7.0]]


def test_dynamic_dims_and_scalars_fed_as_one_element() -> None:
    build = Builder()
    x = build.data([-1, 3])
    size = build.data([], torch.int64)
    rows = build.data([-2])
    build.op("Neg", {"x": x})
    build.op("Neg", {"x": size})
    build.op("Neg", {"x": rows})
    build.results(("Neg:0", [-1, 3]), ("Neg_1:0", []), ("Neg_2:0", [-2]))
    model = _typed(build, 1, torch.int64)
    run = executor(model).run
    for count in (1, 4):
        first, second, third = run(
            [torch.ones(count, 3), torch.tensor([count]), torch.ones(2, count, 5)]
        )
        assert first.shape == (count, 3)
        assert second.shape == ()
        assert second == -count
        assert third.shape == (2, count, 5)
    assert run([torch.ones(1, 3), torch.tensor(7), torch.ones(())])[1] == -7


def _typed(build: Builder, index: int, dtype: torch.dtype) -> bytes:
    build.graph.op[-1].input_desc[index].dtype = NUMBERS[dtype]
    return build.serialized()


def test_frozen_parameters_are_read_where_they_are() -> None:
    weight = torch.randn(3, 5, dtype=torch.bfloat16)
    build = Builder()
    build.op("Neg", {"x": build.placeholder(weight, 27)})
    run = executor(build.results(("Neg:0", [3, 5]), dtype=torch.bfloat16)).run
    assert torch.equal(run([])[0], -weight)
    weight.fill_(2)
    assert run([])[0].unique().tolist() == [-2]


@pytest.mark.parametrize(("name", "value"), [("size", 3), ("addr", 0), ("origin_shape", None)])
def test_frozen_parameters_without_memory_are_refused(name: str, value: int | None) -> None:
    build = Builder()
    edge = build.placeholder(torch.randn(3, 5), 0)
    if value is None:
        build.graph.op[0].attr.pop(name)
    else:
        build.graph.op[0].attr[name].i = value
    error = refusal(lambda: executor(build.results((edge, [3, 5]))), "RM027")
    assert error.where == "ConstPlaceHolder 'ConstPlaceHolder'"


def test_the_observer_sees_what_ran_in_order() -> None:
    build = Builder()
    x = build.data([2])
    unused = build.data([2])
    build.op("Neg", {"x": unused})  # not needed
    build.op("Scale", {"x": x})
    seen: list[tuple[str, list[float]]] = []

    def observe(node: Node, results: tuple[torch.Tensor, ...]) -> None:
        seen.append((node.name, results[0].tolist()))

    executor(build.results(("Scale:0", [2])), observe=observe).run([torch.ones(2), torch.ones(2)])
    assert seen == [("arg0", [1.0, 1.0]), ("Scale", [2.0, 2.0])]


def test_values_are_freed_after_their_last_use() -> None:
    alive: list[int] = []
    made: list[weakref.ref[torch.Tensor]] = []

    def observe(node: Node, results: tuple[torch.Tensor, ...]) -> None:
        alive.append(sum(reference() is not None for reference in made))
        made.extend(weakref.ref(tensor) for tensor in results)

    build = Builder()
    edge = build.data([2])
    for _ in range(6):
        edge = build.op("Neg", {"x": edge})
    build.op("Halves", {"x": edge}, outputs=2)
    model = build.results(("Halves:0", [1]))
    executor(model, observe=observe).run([torch.ones(2)])
    # The input, and what the op before made.
    assert alive == [0, 1, 2, 2, 2, 2, 2, 2]


def test_nothing_is_differentiated() -> None:
    build = Builder()
    build.op("Neg", {"x": build.data([2])})
    (result,) = executor(build.results(("Neg:0", [2]))).run([torch.ones(2, requires_grad=True)])
    assert not result.requires_grad


# --------------------------------------------------------------------------------------------------
# Memory.


def test_results_have_memory_of_their_own() -> None:
    build = Builder()
    x = build.data([2, 3])
    constant = build.const(torch.ones(2, 3))
    build.op("Flat", {"x": x})
    build.op("Neg", {"x": x})
    build.op("Flat", {"x": "Neg:0"})
    build.op("Turn", {"x": "Neg:0"})
    model = build.results(
        (x, [2, 3]), (constant, [2, 3]), ("Flat:0", [6]), ("Neg:0", [2, 3]), ("Flat_1:0", [6]),
        ("Turn:0", [3, 2]), ("Neg:0", [2, 3]),
    )  # fmt: skip
    run = executor(model)
    given = torch.randn(2, 3)
    results = run.run([given])
    assert all(result.is_contiguous() for result in results)
    places = {result.untyped_storage().data_ptr() for result in [*results, given]}
    assert len(places) == len(results) + 1
    expected = [given, torch.ones(2, 3), given, -given, -given, -given.t(), -given]
    for result, value in zip(results, expected, strict=True):
        assert torch.equal(result.flatten(), value.flatten())
        result.zero_()
    assert torch.equal(run.run([given])[1], torch.ones(2, 3))
    # The result Neg itself is not copied.
    assert run.copies == [Copy("NetOutput", 24)] * 6


def test_ref_ops_write_to_inputs() -> None:
    build = Builder()
    x, y = build.data([2]), build.data([2])
    build.op("Increment", {"var": x})
    build.op("Assign", {"ref": y, "value": "Increment:0"})
    build.op("Scale", {"x": "Assign:0"})
    run = executor(build.results(("Scale:0", [2])))
    a, b = torch.tensor([1.0, 2.0]), torch.zeros(2)
    (result,) = run.run([a, b])
    assert a.tolist() == b.tolist() == [2.0, 3.0]
    assert result.tolist() == [4.0, 6.0]
    assert run.copies == [Copy("Assign", 8)]


def test_ref_ops_on_lists_write_to_every_tensor() -> None:
    build = Builder()
    x, y = build.data([2]), build.data([2])
    build.op("IncrementAll", {"var0": x, "var1": y}, outputs=2)
    model = build.results(("IncrementAll:1", [2]), ("IncrementAll:0", [2]))
    a, b = torch.zeros(2), torch.ones(2)
    results = executor(model).run([a, b], [b, None])
    assert results[0] is b
    assert a.tolist() == [1.0, 1.0]
    assert b.tolist() == [2.0, 2.0]
    assert results[1].tolist() == [1.0, 1.0]
    assert results[1].data_ptr() != a.data_ptr()


def test_assigned_results_are_written_in_place() -> None:
    build = Builder()
    x, y = build.data([3]), build.data([3])
    build.op("Neg", {"x": x})
    build.op("Increment", {"var": y})
    run = executor(build.results(("Neg:0", [3]), ("Increment:0", [3]), ("Neg:0", [3])))
    a, b = torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3)
    results = run.run([a, b], [a, b, None])
    assert results[0] is a
    assert results[1] is b
    assert a.tolist() == [-1.0, -2.0, -3.0]
    assert b.tolist() == [1.0, 1.0, 1.0]
    assert results[2].tolist() == [-1.0, -2.0, -3.0]
    # Increment's result already is that memory.
    assert run.copies == [Copy("NetOutput", 12)]


def test_results_assigned_to_each_others_inputs_are_swapped() -> None:
    build = Builder()
    x, y = build.data([2]), build.data([2])
    build.op("Flat", {"x": x})
    model = build.results((y, [2]), ("Flat:0", [2]), (x, [2]))
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    results = executor(model).run([a, b], [a, b, None])
    assert a.tolist() == [3.0, 4.0]
    assert b.tolist() == [1.0, 2.0]
    assert results[2].tolist() == [1.0, 2.0]


def test_a_view_keeps_the_value_that_a_ref_op_changes() -> None:
    build = Builder()
    x = build.data([2, 2])
    build.op("Flat", {"x": x})
    build.op("Flat", {"x": "Flat:0"})
    build.op("Increment", {"var": x}, after=["Flat_1"])
    build.op("Flat", {"x": "Increment:0"})
    build.op("Increment", {"var": "Increment:0"}, after=["Flat_2"])
    build.op("Neg", {"x": "Flat_1:0"}, after=["Increment_1"])
    run = executor(
        build.results(("Flat:0", [4]), ("Neg:0", [4]), ("Flat_2:0", [4]), ("Increment_1:0", [2, 2]))
    )
    given = torch.zeros(2, 2)
    old, negative, middle, new = run.run([given])
    assert old.unique().tolist() == negative.unique().tolist() == [0.0]
    assert middle.unique().tolist() == [1.0]
    assert new.unique().tolist() == given.unique().tolist() == [2.0]
    copied = [copy.node for copy in run.copies]
    assert copied == ["Flat", "Flat_1", "Flat_2", "NetOutput"]


def test_a_view_that_is_not_used_after_a_change_is_not_copied() -> None:
    build = Builder()
    x = build.data([2, 2])
    build.op("Flat", {"x": x})
    build.op("Neg", {"x": "Flat:0"})
    build.op("Increment", {"var": x}, after=["Neg"])
    run = executor(build.results(("Neg:0", [4]), ("Increment:0", [2, 2])))
    given = torch.zeros(2, 2)
    run.run([given], [None, given])
    assert run.copies == []


def test_a_write_to_a_view_does_not_reach_what_it_looks_at() -> None:
    build = Builder()
    x = build.data([2, 2])
    build.op("Flat", {"x": x})
    build.op("Flat", {"x": x})
    build.op("Increment", {"var": "Flat:0"}, after=["Flat_1"])
    build.op("Neg", {"x": "Flat_1:0"}, after=["Increment"])
    run = executor(build.results(("Increment:0", [4]), (x, [2, 2]), ("Neg:0", [4])))
    given = torch.zeros(2, 2)
    changed, same, negative = run.run([given])
    assert changed.unique().tolist() == [1.0]
    assert same.unique().tolist() == given.unique().tolist() == negative.unique().tolist() == [0.0]
    assert run.copies == [Copy("Flat", 16), Copy("NetOutput", 16)]


def test_moves_are_counted() -> None:
    build = Builder()
    x = build.data([5], torch.bfloat16)
    build.op("TensorMove", {"x": x})
    build.op("Increment", {"var": "TensorMove:0"})
    build.op("Assign", {"ref": x, "value": "Increment:0"})
    run = executor(build.results(("Assign:0", [5]), dtype=torch.bfloat16))
    given = torch.zeros(5, dtype=torch.bfloat16)
    run.run([given], [given])
    assert run.copies == [Copy("TensorMove", 10), Copy("Assign", 10)]
    run.run([given], [given])
    assert len(run.copies) == 2
    assert given.unique().tolist() == [2.0]


def test_an_assign_of_a_tensor_to_itself_is_no_copy() -> None:
    build = Builder()
    x = build.data([5])
    build.op("Increment", {"var": x})
    build.op("Assign", {"ref": x, "value": "Increment:0"})
    run = executor(build.results(("Assign:0", [5])))
    given = torch.zeros(5)
    run.run([given], [given])
    assert run.copies == []


def test_a_write_to_a_view_of_a_constant_leaves_it_as_it_is() -> None:
    build = Builder()
    build.op("Flat", {"x": build.const(torch.ones(2, 2))})
    build.op("Increment", {"var": "Flat:0"})
    run = executor(build.results(("Increment:0", [4])))
    for _ in range(2):
        assert run.run([])[0].tolist() == [2.0] * 4


def test_a_ref_op_does_not_read_a_view_of_what_it_writes() -> None:
    build = Builder()
    x = build.data([3, 3])
    build.op("Turn", {"x": x})
    build.op("Assign", {"ref": x, "value": "Turn:0"})
    run = executor(build.results(("Assign:0", [3, 3])))
    given = torch.arange(9.0).reshape(3, 3)
    run.run([given], [given])
    assert torch.equal(given, torch.arange(9.0).reshape(3, 3).t())
    assert run.copies == [Copy("Turn", 36), Copy("Assign", 36)]


def test_a_result_is_contiguous() -> None:
    build = Builder()
    build.op("Neg", {"x": build.data([2, 3])})
    build.op("Turn", {"x": "Neg:0"})
    run = executor(build.results(("Turn:0", [3, 2])))
    (result,) = run.run([torch.ones(2, 3)])
    assert result.is_contiguous()
    assert run.copies == [Copy("NetOutput", 24)]


def test_nothing_of_a_run_is_kept() -> None:
    build = Builder()
    build.op("Neg", {"x": build.data([2])})
    run = executor(build.results(("Neg:0", [2])))
    given = torch.ones(2)
    results = run.run([given])
    kept = [weakref.ref(given), weakref.ref(results[0])]
    del given, results
    assert [reference() for reference in kept] == [None, None]


def test_a_write_to_a_constant_is_refused() -> None:
    build = Builder()
    build.op("Increment", {"var": build.const(torch.ones(2))})
    error = refusal(lambda: executor(build.results(("Increment:0", [2]))), "RM027")
    assert error.what == "an op writes to the constant 'Const'"
    assert error.where == "Increment 'Increment'"


# --------------------------------------------------------------------------------------------------
# Order.


def test_ops_that_no_result_needs_do_not_run() -> None:
    def graph(after: Sequence[str]) -> bytes:
        build = Builder()
        x, y = build.data([2]), build.data([2])
        build.op("Increment", {"var": x})
        build.op("Neg", {"x": y})
        model = build.results(("Neg:0", [2]))
        build.graph.op[-1].input.extend(f"{name}:-1" for name in after)
        return build.serialized() if after else model

    for after, expected in (((), 0.0), (("Increment",), 1.0)):
        written = torch.zeros(2)
        executor(graph(after)).run([written, torch.ones(2)])
        assert written.unique().tolist() == [expected]


@pytest.mark.parametrize("ordered", [True, False])
def test_a_random_order_shows_a_missing_control_edge(ordered: bool) -> None:
    build = Builder()
    x = build.data([2])
    build.op("Scale", {"x": x})
    build.op("Increment", {"var": x}, after=["Scale"] if ordered else [])
    model = build.results(("Scale:0", [2]), ("Increment:0", [2]))
    seen = {executor(model, seed=seed).run([torch.ones(2)])[0][0].item() for seed in range(20)}
    assert seen == ({2.0} if ordered else {2.0, 4.0})
    assert executor(model).run([torch.ones(2)])[0].tolist() == [2.0, 2.0]


def collective_graph(count: int) -> bytes:
    build = Builder()
    x = build.data([2])
    edges = [build.op("Meet", {"x": x}, number=number) for number in range(count)]
    edges += [build.op("Neg", {"x": x}) for _ in range(count)]
    return build.results(*((edge, [2]) for edge in edges))


def test_a_random_order_is_fixed_by_its_seed_and_keeps_that_of_collectives() -> None:
    def enter(table: OpTable) -> None:
        @table.op("Meet", collective=True)
        def meet(a: Attributes, communicator: list[int], x: torch.Tensor) -> torch.Tensor:
            communicator.append(a.int("number"))
            return x.clone()

    def order(seed: int | None) -> tuple[str, ...]:
        met: list[int] = []
        ran: list[str] = []
        executor(
            model,
            communicator=met,
            seed=seed,
            observe=lambda node, results: ran.append(node.name),
            **with_ops(enter),
        ).run([torch.ones(2)])
        assert met == list(range(6))
        return tuple(ran)

    model = collective_graph(6)
    orders = {order(seed) for seed in range(10)}
    assert len(orders) == 10
    assert order(3) == order(3)
    assert len(set(map(frozenset, orders))) == 1
    assert order(None)[1:7] == ("Meet", "Meet_1", "Meet_2", "Meet_3", "Meet_4", "Meet_5")


def test_collectives_need_a_communicator() -> None:
    def enter(table: OpTable) -> None:
        @table.op("Meet", collective=True)
        def meet(a: Attributes, communicator: object, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

    error = refusal(lambda: executor(collective_graph(1), **with_ops(enter)), "RM030")
    assert error.what == "a graph with collectives has no communicator"
    assert error.where == "Meet 'Meet'"


def random_graph(seed: int) -> tuple[bytes, int]:
    """A random graph without hazards: ref ops change copies only, which nothing else uses."""
    draw = random.Random(seed)
    build = Builder()
    edges = [build.data([4]) for _ in range(draw.randint(1, 3))]
    inputs = len(edges)
    names: list[str] = []
    for _ in range(draw.randint(1, 25)):
        kind = draw.choice(["Neg", "Add", "Scale", "Flat", "Move", "Join"])
        a, b = draw.choice(edges), draw.choice(edges)
        after = draw.sample(names, min(len(names), draw.randint(0, 2)))
        if kind == "Add":
            edge = build.op("Add", {"x1": a, "x2": b}, after=after)
        elif kind == "Move":
            moved = build.op("TensorMove", {"x": a}, after=after)
            names.append(moved.split(":")[0])
            edge = build.op("Increment", {"var": moved})
        elif kind == "Join":
            dim = build.const(torch.tensor(0))
            joined = build.op("Join", {"x0": a, "x1": b, "dim": dim}, after=after)
            names.append(joined.split(":")[0])
            half = build.op("Halves", {"x": joined}, outputs=2)
            edge = half.replace(":0", f":{draw.randint(0, 1)}")
        else:
            edge = build.op(kind, {"x": a}, after=after)
        names.append(edge.split(":")[0])
        edges.append(edge)
    results = draw.sample(edges, min(len(edges), 5))
    return build.results(*((edge, [4]) for edge in results)), inputs


@settings(max_examples=80)
@given(seed=st.integers(0, 2**32), order=st.integers(0, 2**32))
def test_any_order_gives_the_same_results(seed: int, order: int) -> None:
    model, count = random_graph(seed)
    inputs = [torch.randn(4) for _ in range(count)]
    before = [tensor.clone() for tensor in inputs]
    expected = executor(model).run(inputs)
    shuffled = executor(model, seed=order, check=False).run(inputs)
    assert all(map(torch.equal, expected, shuffled))
    assert all(map(torch.equal, inputs, before))


# --------------------------------------------------------------------------------------------------
# Errors.


def two_inputs() -> Builder:
    build = Builder()
    x = build.data([2, -1])
    y = build.data([3], torch.bfloat16)
    build.op("Neg", {"x": x}, fx="neg-aten.neg.default")
    build.results(("Neg:0", [2, -1]), (y, [3]))
    _typed(build, 1, torch.bfloat16)
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
