"""Bucket: collectives that are independent of each other share one, and nothing else moves."""

from __future__ import annotations

import operator

import pytest
import torch
from tests.conftest import Golden
from tests.passes.programs import Builder, check_values, traffic

from rolemesh.compiler.ir.dialect import ALL_GATHER, is_bundle
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.ledger import collectives
from rolemesh.compiler.ir.program import InputKind, Program
from rolemesh.compiler.ir.spec import P
from rolemesh.passes.bucket import Bucket

aten = torch.ops.aten


def caches(b: Builder, rows: int, *dtypes: torch.dtype) -> Program:
    """Tokens written to several caches, each computed from the one before."""
    b.module = "model.layers.0.self_attn"
    x = b.input("x", (rows, 6), P("tp"))
    at = b.input("positions", (rows,), dtype=torch.int64)
    news = []
    for number, dtype in enumerate(dtypes):
        b.module = f"model.layers.0.self_attn.{number}"
        cache = b.input(
            f"cache{number}", (9, 6), mutated=True, kind=InputKind.BUFFER, dtype=dtype
        )  # fmt: skip
        x = b.op(aten.silu.default, x)
        value = b.op(aten._to_copy.default, x, dtype=dtype)
        news.append(b.op(aten.index_copy.default, cache, 0, at, value))
    names = {i: f"cache{i}" for i in range(len(dtypes))}
    return b.program(*news, mutates=names, name="caches")


def test_text(golden: Golden) -> None:
    """Three gathers become one; what reads the first two values comes after it."""
    b = Builder(tp=2)
    x = b.input("x", (5, 6), P("tp"))
    at = b.input("positions", (5,), dtype=torch.int64)
    cache = b.input("cache", (9, 6), mutated=True, kind=InputKind.BUFFER)
    b.module = "layers.0.attention"
    keys = b.op(aten.index_copy.default, cache, 0, at, b.op(aten.silu.default, x))
    y = b.op(aten.mm.default, x, b.weight("up.weight", (6, 4)))
    turned = b.op(aten.transpose.int, b.op(aten.exp.default, y), 0, 1)
    sums = b.op(aten.cumsum.default, turned, 1)
    late = b.op(aten.cumsum.default, b.op(aten.tanh.default, x), 0)
    scores = b.op(aten.mm.default, keys, b.op(aten.t.default, late))
    program = b.program(keys, sums, scores, mutates={0: "cache"}, name="bucket")
    before = check_values(program)
    after = check_values(program, Bucket())
    golden("bucket", f"{before}\n{after}")
    assert traffic(after) == {"all_gather": 1}


@pytest.mark.parametrize("rows", [8, 5, 1])
@pytest.mark.parametrize("ranks", [2, 3])
def test_gathers_share_one_of_as_many_bytes(rows: int, ranks: int) -> None:
    program = caches(Builder(tp=ranks), rows, *[torch.float32] * 3)
    before, after = check_values(program), check_values(program, Bucket())
    assert traffic(before) == {"all_gather": 3}
    assert traffic(after) == {"all_gather": 1}
    assert total(before) == total(after)


def total(program: Program) -> int:
    return sum(record.bytes_received for record in collectives(program))


def test_a_wire_has_one_dtype() -> None:
    b = Builder(tp=2)
    dtypes = [torch.float32, torch.float64] * 2
    values = [b.input(f"x{i}", (5, 4), P("tp"), dtype=d) for i, d in enumerate(dtypes)]
    outs = [b.op(aten.cumsum.default, value, 0) for value in values]
    first, second = collectives(check_values(b.program(*outs), Bucket()))
    assert {first.dtype, second.dtype} == set(dtypes)


def test_booleans_and_gathers_of_other_dims() -> None:
    b = Builder(tp=2)
    x, y = b.input("x", (5, 4), P("tp")), b.input("y", (4, 3), P(None, "tp"))
    marks = [b.op(aten.gt.Scalar, value, 0) for value in (x, y)]
    outs = [
        b.op(aten.logical_not.default, b.op(aten.flip.default, m, [d])) for d, m in enumerate(marks)
    ]
    after = check_values(b.program(*outs), Bucket())
    assert traffic(after) == {"all_gather": 1}
    (bundle,) = (node for node in after.ops if is_bundle(node))
    assert bundle.target is ALL_GATHER
    assert [shard.dim for shard in bundle.kwargs["shard"]] == [0, 1]


@pytest.mark.parametrize("rows", [16, 15])
@pytest.mark.parametrize(("op", "pin"), [("all_reduce", P()), ("all_to_all", P("tp"))])
def test_reductions_and_exchanges(op: str, pin: P, rows: int) -> None:
    b = Builder(tp=2)
    outs = []
    for name, width in (("x", 64), ("y", 48)):
        value = b.input(name, (rows, width), P(None, "tp"))
        if op != "all_to_all":
            value = b.op(aten.mm.default, value, b.weight(f"{name}.weight", (width, 9), P("tp")))
        outs.append(value)
    program = b.program(*outs, pinned=dict.fromkeys(range(2), pin))
    assert traffic(check_values(program)) == {op: 2}
    before, after = check_values(program), check_values(program, Bucket())
    assert traffic(after) == {op: 1}
    assert total(before) == total(after)


@pytest.mark.parametrize("rows", [8, 7])
def test_sums_that_are_scattered(rows: int) -> None:
    """Two products beside each other, each from tokens to tokens."""
    b = Builder(tp=2)
    x = b.input("x", (rows, 16), P("tp"))
    outs = []
    for name in ("gate", "mixer"):
        y = b.op(aten.mm.default, x, b.weight(f"{name}.up", (16, 64), P(None, "tp")))
        y = b.op(aten.relu.default, y)
        y = b.op(aten.mm.default, y, b.weight(f"{name}.down", (64, 16), P("tp")))
        outs.append(b.op(aten.add.Tensor, x, y))
    program = b.program(*outs, pinned=dict.fromkeys(range(2), P("tp")))
    before, after = check_values(program), check_values(program, Bucket())
    assert traffic(before) == {"all_gather": 1, "reduce_scatter": 2}
    assert traffic(after) == {"all_gather": 1, "reduce_scatter": 1}
    assert total(before) == total(after)


def test_reductions_of_one_operation_only() -> None:
    b = Builder(tp=2)
    x = b.input("x", (6, 4), P("tp"))
    outs = [b.op(aten.sum.dim_IntList, x, [0]), b.op(aten.amax.default, x, [0])]
    assert traffic(check_values(b.program(*outs), Bucket())) == {"all_reduce": 2}


def test_two_axes_at_once() -> None:
    b = Builder(dp=2, tp=2)
    joint = P(("dp", "tp"))
    x, y = b.input("x", (7, 4), joint), b.input("y", (6, 3), joint)
    program = b.program(*(b.op(aten.cumsum.default, v, 0) for v in (x, y)))
    before, after = check_values(program), check_values(program, Bucket())
    assert total(before) == total(after)
    assert len(collectives(after)) < len(collectives(before))


def test_what_depends_on_a_bundle_is_not_in_it() -> None:
    b = Builder(tp=2)
    x = b.input("x", (6, 4), P("tp"))
    y = b.op(aten.cumsum.default, x, 0)
    z = b.op(aten.cumsum.default, b.op(aten.mul.Tensor, x, b.op(aten.amax.default, y, [0])), 0)
    program = check_values(b.program(z), Bucket())
    assert traffic(program) == {"all_gather": 2}


def test_a_limit() -> None:
    program = caches(Builder(tp=2), 8, *[torch.float32] * 3)
    one = 4 * 6 * 4
    assert traffic(check_values(program, Bucket(limit=2 * one))) == {"all_gather": 2}
    assert traffic(check_values(program, Bucket(limit=0))) == {"all_gather": 3}
    with pytest.raises(RolemeshError) as raised:
        Bucket(limit=-1)
    assert "the limit of a bundle is -1" in raised.value.what


def test_weights_stay_alone() -> None:
    b = Builder(tp=2)
    weights = [b.weight(f"w{i}", (8, 4), P("tp")) for i in range(2)]
    program = b.program(*(b.op(aten.cumsum.default, w, 0) for w in weights))
    assert traffic(check_values(program, Bucket())) == {"all_gather": 2}


def test_names_and_reasons_stay() -> None:
    program = caches(Builder(tp=2), 5, *[torch.float32] * 2)
    before, after = check_values(program), check_values(program, Bucket())
    names = [record.node for record in collectives(before)]
    picks = {n.name: n for n in after.ops if n.target is operator.getitem}
    assert list(picks) == names
    for node in before.ops:
        if node.name in names:
            assert picks[node.name].meta["origin"] == node.meta["origin"]
    (record,) = collectives(after)
    assert record.module == "model.layers.0.self_attn"
    assert record.cause.count("index_copy") == 2
