"""The form of a fused op: what the table refuses, and what it derives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.lowering.npu.table import NpuOpTable, refuse

PURE = "twice(Tensor x, float by=2.0) -> Tensor"
WRITES = "add_(Tensor(a!) x, Tensor y, Tensor(b!) z) -> (Tensor, Tensor(a!))"
VARIANT = "add(Tensor x, Tensor y, Tensor z) -> (Tensor, Tensor, Tensor)"


def twice(x: Tensor, by: float = 2.0) -> Tensor:
    return x * by


def add_(x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    before = x - z
    x += y
    z *= 3
    return before, x


def test_an_op_without_writes() -> None:
    table = NpuOpTable()
    assert table.op(PURE, ge="Twice", shape=twice)(twice) is twice
    (op,) = table.ops.values()
    assert (op.name, op.ge, op.writes, op.functional) == ("twice", "Twice", (), "")


def test_an_overload_is_part_of_the_name() -> None:
    table = NpuOpTable()
    table.op("twice.float(Tensor x, float by=2.0) -> Tensor", ge="Twice", shape=twice)(twice)
    assert [*table.ops] == ["twice.float"]


def test_an_op_with_writes_brings_its_functional_variant() -> None:
    table = NpuOpTable()
    table.op(WRITES, ge="Add", shape=add_, functional=VARIANT)(add_)
    op, variant = table.ops["add_"], table.ops["add"]
    assert (op.functional, op.writes, op.aliases) == ("add", ("x", "z"), {1: "x"})
    assert (variant.functional, variant.writes, variant.aliases) == ("", (), {})
    x, y, z = torch.ones(2), torch.full((2,), 5.0), torch.full((2,), 7.0)
    found = variant.reference(x, y, z=z)
    assert isinstance(found, tuple)
    assert [result.tolist() for result in found] == [[-6, -6], [6, 6], [21, 21]]
    assert (x.tolist(), z.tolist()) == ([1, 1], [7, 7])


def test_a_single_written_argument_is_a_single_result() -> None:
    def fill_(x: Tensor) -> None:
        x.fill_(3)

    table = NpuOpTable()
    table.op(
        "fill_(Tensor(a!) x) -> ()", ge="Fill", shape=fill_, functional="fill(Tensor x) -> Tensor"
    )(fill_)
    found = table.ops["fill"].reference(torch.zeros(2))
    assert isinstance(found, Tensor)
    assert found.tolist() == [3, 3]


def test_writes_that_the_schema_hides() -> None:
    table = NpuOpTable()
    table.op(WRITES, ge="Add", shape=add_, functional=VARIANT)(add_)

    def hidden(x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        before, _ = add_(x, y, z)
        return x, z, before

    table.op(
        "hidden(Tensor x, Tensor y, Tensor z) -> (Tensor, Tensor, Tensor)",
        ge="Add",
        shape=hidden,
        functional="add",
        aliases={0: "x", 1: "z"},
    )(hidden)
    op = table.ops["hidden"]
    assert (op.functional, op.writes, op.aliases) == ("add", ("x", "z"), {0: "x", 1: "z"})


@pytest.mark.parametrize(
    ("schema", "functional", "message"),
    [
        ("twice(Tensor y, float by=2.0) -> Tensor", "", "twice does not take the arguments"),
        ("twice(Tensor(a!) x, float by=2.0) -> Tensor", "", "a functional variant goes with"),
        (PURE, "once(Tensor x, float by=2.0) -> Tensor", "a functional variant goes with"),
        ("twice(Tensor(a!) x, float by=2.0) -> Tensor", "once(Tensor x) -> (Tensor, Tensor)",
         "is no functional variant"),
    ],
)  # fmt: skip
def test_what_the_table_refuses(schema: str, functional: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NpuOpTable().op(schema, ge="Twice", shape=twice, functional=functional)(twice)


def test_an_op_twice() -> None:
    table = NpuOpTable()
    table.op(PURE, ge="Twice", shape=twice)(twice)
    with pytest.raises(ValueError, match="twice is in the table twice"):
        table.op(PURE, ge="Twice", shape=twice)(twice)


def test_a_refusal_names_the_option() -> None:
    with pytest.raises(RolemeshError) as caught:
        refuse("npu_thing", "in mode X", first=None, second=False, third=torch.ones(1), fourth=2)
    assert caught.value.code == "RM028"
    assert str(caught.value) == (
        "[RM028] npu_thing has no reference semantics for third=a tensor in mode X\n"
        "  where: torch.ops.npu.npu_thing\n"
        "  why: rolemesh computes this op itself where there is no NPU, without this option\n"
        "  fix: leave the option out, or run on an NPU with torch_npu"
    )


def test_options_that_were_not_asked_for() -> None:
    refuse("npu_thing", first=None, second=False)
