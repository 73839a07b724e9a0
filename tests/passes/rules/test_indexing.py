"""Reads and writes at integer positions: their rules as a table, checked on all their choices."""

from __future__ import annotations

import pytest
import torch
from tests.passes.rules.harness import check_choice, check_op, make_call
from tests.passes.rules.rule_line import rule_line

from rolemesh.compiler.ir.dialect import TAKE
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.placement import Shard
from rolemesh.compiler.ir.rule import Kind, Lookup, Split
from rolemesh.passes.rules import indexing
from rolemesh.passes.rules.registry import LocalCall, Rules

aten = torch.ops.aten
RULES = Rules((indexing.RULES,), (indexing.LOCAL,))


def f(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def b(*shape: int) -> torch.Tensor:
    return f(*shape, dtype=torch.bfloat16)


def ids(limit: int, *shape: int, low: int = 0) -> torch.Tensor:
    return torch.randint(low, limit, shape, generator=torch.Generator().manual_seed(sum(shape)))


def distinct(limit: int, count: int) -> torch.Tensor:
    return torch.randperm(limit, generator=torch.Generator().manual_seed(count))[:count]


def rows_of(limit: int, count: int, width: int) -> torch.Tensor:
    """Ids `[count, width]` that do not repeat within a column."""
    return torch.stack([distinct(limit, count).roll(shift) for shift in range(width)], 1)


READS: list[tuple[object, ...]] = [
    (
        aten.embedding.default,
        (f(11, 6), ids(11, 3, 5)),
        "a+ b, c d -> c d b | linear 10 | select a by ids 1",
    ),
    (
        aten.embedding.default,
        (b(12, 5), ids(12, 7)),
        "a+ b, c -> c b | linear 10 | select a by ids 1",
    ),
    (
        aten.embedding_dense_backward.default,
        (f(3, 5, 6), ids(11, 3, 5), 11, -1, False),
        "a+ b+ c, a+ b+ -> d c | linear 10",
    ),
    (
        aten.embedding_dense_backward.default,
        (b(4, 6), ids(12, 4), 12, 2, False),
        "a+ b, a+ -> c b | linear 10",
    ),
    (
        aten.embedding_dense_backward.default,
        (f(5, 6), ids(3, 5), 11, -1, True),
        "a! b, a! -> c! b | linear 10",
    ),
    (
        aten.index_select.default,
        (f(5, 9, 4), 1, ids(9, 7)),
        "a b+ c, d -> a d c | linear 10 | select b by ids 1 to dim 1",
    ),
    (
        aten.index_select.default,
        (b(10, 6), -2, ids(10, 7)),
        "a+ b, c -> c b | linear 10 | select a by ids 1 to dim 0",
    ),
    (aten.index_select.default, (f(5, 9), 1, torch.tensor(6)), "a b!, . -> a c | linear 10"),
    (aten.index_select.default, (f(5, 9) > 0, 1, ids(9, 7)), "a b!, c -> a c"),
    (
        aten.index.Tensor,
        (f(10, 6), [ids(10, 7)]),
        "a+ b, c -> c b | linear 10 | select a by ids 1 to dim 0",
    ),
    (
        aten.index.Tensor,
        (f(4, 9, 6), [None, ids(9, 7, low=-9)]),
        "a b+ c, d -> a d c | linear 10 | select b by ids 1 to dim 1",
    ),
    (
        aten.index.Tensor,
        (b(9, 6), [ids(9, 2, 5)]),
        "a+ b, c d -> c d b | linear 10 | select a by ids 1",
    ),
    (
        aten.index.Tensor,
        (f(9, 6), [torch.tensor(-4)]),
        "a+ b, . -> b | linear 10 | select a by ids 1",
    ),
    (
        aten.index.Tensor,
        (ids(50, 9, 6), [ids(9, 7)]),
        "a+ b, c -> c b | linear 10 | select a by ids 1 to dim 0",
    ),
    (aten.index.Tensor, (f(9, 6) > 0, [ids(9, 7)]), "a! b, c -> c b"),
    (
        aten.index.Tensor,
        (f(4, 9, 6, 5), [None, ids(9, 7, 1), ids(6, 1, 3)]),
        "a b! c! d, e 1, 1 f -> a e f d | linear 100",
    ),
    (
        aten.index.Tensor,
        (f(4, 9, 6, 5), [ids(4, 7), None, ids(6, 2, 7)]),
        "a! b c! d, e, f e -> f e b d | linear 100",
    ),
    (
        aten.index.Tensor,
        (f(4, 9, 6), [None, ids(9, 1), ids(6, 1)]),
        "a b! c!, d, d -> a d | linear 100",
    ),
    (
        aten._unsafe_index.Tensor,
        (f(9, 6), [None, ids(6, 4)]),
        "a b+, c -> a c | linear 10 | select b by ids 1 to dim 1",
    ),
    (
        aten.gather.default,
        (f(6, 9), 1, ids(9, 6, 4)),
        "a b+, a c -> a c | linear 10 | select b by ids 1",
    ),
    (
        aten.gather.default,
        (b(7, 9, 5), 0, ids(7, 4, 9, 3)),
        "a+ b c!, d b e! -> d b e! | linear 10 | select a by ids 1",
    ),
    (
        aten.gather.default,
        (f(1, 9), -1, ids(9, 1, 4)),
        "a b+, a c -> a c | linear 10 | select b by ids 1",
    ),
    (
        aten.take_along_dim.default,
        (f(6, 9, 1), ids(9, 1, 4, 5), 1),
        "a b! 1, 1 c d -> a c d | linear 10",
    ),
    (aten.take_along_dim.default, (f(3, 4), ids(12, 5)), "a! b!, c! -> d!"),
    (aten.take.default, (f(3, 4), ids(12, 5, 2)), "a! b!, c d -> c d | linear 10"),
    (aten.one_hot.default, (ids(6, 3, 5), 6), "a b -> a b c!"),
    (aten.bucketize.Tensor, (f(7, 5), torch.linspace(-1, 1, 6)), "a b, c! -> a b"),
    (aten.one_hot.default, (ids(6, 3, 5),), "a! b! -> a! b! c!"),
]

WRITES: list[tuple[object, ...]] = [
    (aten.scatter.value, (f(6, 9), 1, ids(9, 6, 4), 2.5), "a b!, a c! -> a b!"),
    (aten.scatter.value, (f(6, 9), 1, ids(9, 5, 4), 2.5), "a! b!, c! d! -> a! b!"),
    (
        aten.scatter.src,
        (b(10, 5), 0, rows_of(10, 7, 5), b(7, 5)),
        "a! b, c! b, d! b -> a! b",
    ),
    (
        aten.scatter.src,
        (f(10, 5), 0, rows_of(10, 7, 5), f(8, 6)),
        "a! b!, c! d!, e! f! -> a! b!",
    ),
    (
        aten.scatter.reduce,
        (f(10, 5), 0, ids(10, 7, 5), f(7, 5)),
        {"reduce": "add"},
        "a! b, c! b, d! b -> a! b | linear 101",
    ),
    (
        aten.scatter.reduce,
        (f(10, 5), 0, ids(10, 7, 5), f(7, 5)),
        {"reduce": "multiply"},
        "a! b, c! b, d! b -> a! b",
    ),
    (
        aten.scatter.value_reduce,
        (f(10, 5), 0, ids(10, 7, 5), 2.0),
        {"reduce": "add"},
        "a! b, c! b -> a! b",
    ),
    (
        aten.scatter_add.default,
        (f(6, 9), -1, ids(9, 6, 4), f(6, 4)),
        "a b!, a c!, a d! -> a b! | linear 101",
    ),
    (
        aten.scatter_reduce.two,
        (f(6, 9), 1, ids(9, 6, 4), f(6, 4), "sum"),
        {"include_self": False},
        "a b!, a c!, a d! -> a b! | linear 101",
    ),
    (
        aten.scatter_reduce.two,
        (f(6, 9), 1, ids(9, 6, 4), f(6, 4), "amax"),
        "a b!, a c!, a d! -> a b!",
    ),
    (
        aten.index_add.default,
        (f(10, 6), 0, ids(10, 7), f(7, 6)),
        {"alpha": 2},
        "a! b, c!, c! b -> a! b | linear 101",
    ),
    (
        aten.index_add.default,
        (f(6, 10), -1, torch.tensor(3), f(6, 1)),
        "a b!, ., a c! -> a b! | linear 101",
    ),
    (
        aten.index_copy.default,
        (b(4, 10, 6), 1, distinct(10, 7), b(4, 7, 6)),
        "a b! c, d!, a d! c -> a b! c",
    ),
    (
        aten.index_reduce.default,
        (f(10, 6), 0, ids(10, 7), f(7, 6), "amax"),
        "a! b, c!, c! b -> a! b",
    ),
    (aten.index_fill.int_Scalar, (f(10, 6), 0, ids(10, 7), 2.5), "a! b, c! -> a! b"),
    (
        aten.index_fill.int_Tensor,
        (f(6, 10), 1, ids(10, 7), torch.tensor(2.5)),
        "a b!, c!, . -> a b!",
    ),
    (
        aten.index_put.default,
        (f(4, 10, 6), [None, distinct(10, 7)], f(4, 7, 6)),
        "a b! c, d!, a d! c -> a b! c",
    ),
    (
        aten.index_put.default,
        (f(4, 10, 6), [None, ids(10, 7)], f(7, 1), True),
        "a b! c, d!, d! 1 -> a b! c | linear 101",
    ),
    (
        aten.index_put.default,
        (b(10, 5, 6), [distinct(10, 7)], b(1, 6)),
        "a! b c, d!, 1 c -> a! b c",
    ),
    (
        aten._unsafe_index_put.default,
        (f(10, 9, 6), [ids(10, 7, 1), None, ids(6, 1, 3)], f(7, 3, 9), True),
        "a! b c!, d! 1, 1 e!, d! e! b -> a! b c! | linear 1001",
    ),
    (aten.index_put.default, (f(6, 9), [f(6, 9) > 0], f()), "a b, a b, . -> a b"),
    (
        aten.index_put.default,
        (f(6, 9, 5), [None, f(9, 5) > 0], f(1), True),
        "a b c, b c, 1 -> a b c",
    ),
    (
        aten.index_put.default,
        (f(6, 9), [torch.arange(6) % 3 == 0], f(2, 9)),
        "a! b!, c!, d! e! -> f! g!",
    ),
]


@pytest.mark.parametrize("case", READS + WRITES)
def test_rule(case: tuple[object, ...]) -> None:
    target, args, *rest = case
    kwargs = rest[0] if len(rest) == 2 else None
    assert isinstance(target, torch._ops.OpOverload)
    check_op(RULES, target, args, kwargs, expect=rest[-1])  # type: ignore[arg-type]


def test_masked_read_is_whole() -> None:
    """Its shape depends on data; some other pass refuses it, and no rule may make it local."""
    call, _ = make_call(aten.index.Tensor, (f(6, 9), [f(6, 9) > 0]))
    assert rule_line(RULES.rule(call)) == "a! b!, c! d! -> e!"


def test_scalars_are_whole() -> None:
    at = torch.tensor(0)
    for target, args in (
        (aten.index_select.default, (f(), 0, at)),
        (aten.gather.default, (f(), 0, at)),
        (aten.scatter.value, (f(), 0, at, 1.0)),
        (aten.index_fill.int_Scalar, (f(), 0, at, 1.0)),
    ):
        call, _ = make_call(target, args)
        assert set(RULES.rule(call).kinds) <= {Kind.REPLICATE}, target


@pytest.mark.parametrize("rows", [12, 11])
def test_table_on_two_axes(rows: int) -> None:
    """Both axes look up in one table: ranks are numbered jointly, by even and uneven chunks."""
    mesh = Mesh({"dp": 2, "tp": 3})
    lookup = Lookup(0, 1, rows, "picks")
    check_choice(
        RULES, aten.embedding.default, (f(rows, 5), ids(rows, 4, 7)), None, (lookup,) * 2, mesh
    )
    check_choice(RULES, aten.index.Tensor, (f(rows, 5), [ids(rows, 7)]), None, (lookup,) * 2, mesh)
    split_rows = Split(2, 1, 7)
    check_choice(
        RULES, aten.index.Tensor, (f(rows, 5), [ids(rows, 7)]), None, (split_rows, lookup), mesh
    )


def localized(choices: tuple[Lookup, ...], layout: Layout, mesh: Mesh) -> dict[str, object]:
    call, _ = make_call(aten.embedding.default, (f(12, 5), ids(12, 7)))
    rule = RULES.rule(call)
    whole = Layout.replicated(mesh)
    local = LocalCall(call, rule, choices, mesh, ("table", "ids"), {}, (layout, whole), (whole,))
    target, args, kwargs = RULES.localize(local)
    assert target is TAKE
    assert args == ("table", "ids")
    return kwargs


def test_take_arguments() -> None:
    one = Mesh({"tp": 4})
    lookup = Lookup(0, 1, 12, "picks")
    assert localized((lookup,), Layout((Shard(0, 1, 12),)), one) == {
        "dim": 0,
        "size": 12,
        "axes": ("tp",),
        "fill_zero": True,
    }


def test_take_numbers_ranks_by_digit() -> None:
    """`P(("tp", "dp"), None)`: tp holds the major digit though dp comes first in the mesh."""
    mesh = Mesh({"dp": 2, "tp": 3})
    layout = Layout((Shard(0, 3, 4), Shard(0, 1, 12)))
    found = localized((Lookup(0, 3, 4, "k"), Lookup(0, 1, 12, "k")), layout, mesh)
    assert found["axes"] == ("tp", "dp")
