"""What a GE graph writes to, looks at and copies."""

from __future__ import annotations

import weakref

import torch
from tests.runtime.ge.graphs import Builder, executor, refusal

from rolemesh.runtime.ge.executor import Copy


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
