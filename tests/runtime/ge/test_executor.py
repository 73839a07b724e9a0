"""A GE graph runs as its ops and edges say, in every order that these allow."""

from __future__ import annotations

import random
import weakref
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.runtime.ge.graphs import Builder, executor, refusal, with_ops

from rolemesh.runtime.ge.graph import Node
from rolemesh.runtime.ge.ops.table import Attributes, OpTable


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
    model = build.typed(1, torch.int64)
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
