"""Sink: collectives move what is read of their results, and in the smallest dtype on the way."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.conftest import Golden
from tests.models import PipelineStage
from tests.passes.programs import Builder, check_values, node_named, traffic, with_layout
from torch import Tensor, fx, nn

from rolemesh.compiler.api import lockstep, shard, trace
from rolemesh.compiler.ir.dialect import ALL_GATHER
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.ledger import collectives
from rolemesh.compiler.ir.placement import REPLICATE, Shard
from rolemesh.compiler.ir.program import Program
from rolemesh.compiler.ir.spec import P
from rolemesh.passes.sink import Sink
from rolemesh.passes.verify import Verify
from rolemesh.runtime.lockstep import run_lockstep, scatter_inputs

aten = torch.ops.aten


def total(program: Program) -> int:
    return sum(record.bytes_received for record in collectives(program))


def last_row(b: Builder, rows: int = 5) -> Program:
    """A product of the last row alone, as a language model asked for its last logits makes it."""
    b.module = "lm_head"
    x = b.input("x", (3, rows, 6), P(None, "tp"))
    row = b.op(aten.slice.Tensor, b.op(aten.silu.default, x), 1, -1, 2**63 - 1)
    flat = b.op(aten.reshape.default, row, [3, 6])
    return b.program(b.op(aten.mm.default, flat, b.weight("head", (6, 7))), name="last")


def test_text(golden: Golden) -> None:
    before, after = (check_values(last_row(Builder(tp=2)), *passes) for passes in ((), (Sink(),)))
    golden("sink", f"{before}\n{after}")


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("rows", [24, 7, 5, 3])
def test_the_last_row_of_chunks_that_may_not_divide(rows: int, ranks: int) -> None:
    program = last_row(Builder(tp=ranks), rows)
    after = check_values(program, Sink())
    kept = 3 * 6 * 4
    assert total(after) <= 2 * (ranks - 1) * kept / ranks
    assert traffic(after) == {"all_reduce": 1}


PICKS: dict[str, Callable[[Builder, fx.Node], list[fx.Node]]] = {
    "a row": lambda b, x: [b.op(aten.select.int, x, 0, 4)],
    "a row from behind": lambda b, x: [b.op(aten.select.int, x, -2, -1)],
    "rows of two ranks": lambda b, x: [b.op(aten.slice.Tensor, x, 0, 5, 7)],
    "two readers": lambda b, x: [
        b.op(aten.slice.Tensor, x, 0, 1, 2),
        b.op(aten.select.int, x, 0, 11),
    ],
}


@pytest.mark.parametrize("name", PICKS)
def test_positions(name: str) -> None:
    b = Builder(tp=2)
    x = b.op(aten.silu.default, b.input("x", (12, 5), P("tp")))
    program = b.program(*PICKS[name](b, x))
    after = check_values(program, Sink())
    assert set(traffic(after)) == {"all_reduce"}
    assert total(after) < total(check_values(program))


def test_positions_of_a_value_that_is_read_whole() -> None:
    b = Builder(tp=2)
    x = b.op(aten.silu.default, b.input("x", (12, 5), P("tp")))
    program = b.program(b.op(aten.select.int, x, 0, 4), b.op(aten.cumsum.default, x, 0))
    assert traffic(check_values(program, Sink())) == {"all_gather": 1}


def test_many_positions_stay_gathered() -> None:
    b = Builder(tp=2)
    x = b.op(aten.silu.default, b.input("x", (12, 5), P("tp")))
    program = b.program(b.op(aten.slice.Tensor, x, 0, 1, 11))
    assert traffic(check_values(program, Sink())) == {"all_gather": 1}


def test_what_two_axes_split() -> None:
    """A chunk that another axis cuts further is not in the order of ranks of one axis."""
    b = Builder(dp=2, tp=2)
    x = b.op(aten.silu.default, b.input("x", (8, 6), P("dp", "tp")))
    y = b.op(aten.silu.default, b.input("y", (8, 5), P(("dp", "tp"))))
    program = b.program(*(b.op(aten.select.int, v, 0, 5) for v in (x, y)))
    after = check_values(program, Sink())
    assert total(after) < total(check_values(program))


Tail = Callable[[Builder, fx.Node], list[fx.Node]]


def gathered(tail: Tail, dtype: torch.dtype = torch.float32) -> Program:
    """A Program whose only collective gathers rows, and what reads them.

    Written out, for `partition` rarely gathers what is then cut or cast.
    """
    b = Builder(tp=2)
    x = b.input("x", (9, 8), P("tp"), dtype=dtype)
    whole = b.op(aten.alias.default, x)
    program = b.program(*tail(b, whole))
    layouts = {node: (Layout.replicated(b.mesh),) for node in program.graph.nodes}
    layouts |= program.layouts
    whole.target, whole.kwargs = ALL_GATHER, {"shard": Shard(0, 1, 9), "axes": ("tp",)}
    return Verify().apply(program.after("made", layouts=layouts))


def run(program: Program) -> list[list[Tensor | None]]:
    torch.manual_seed(0)
    values = [torch.randn(9, 8).to(program.placeholders[0].meta["type"].dtype)]
    return run_lockstep(program, scatter_inputs(program, values, poison=True), check=True)


def check_sunk(program: Program) -> Program:
    after = Verify().apply(Sink().apply(program))
    for want, got in zip(run(program), run(after), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(want, got, strict=True))  # type: ignore[arg-type]
    return after


def test_parts_of_another_dim() -> None:
    program = gathered(
        lambda b, x: [b.op(aten.slice.Tensor, x, 1, 2, 5), b.op(aten.select.int, x, 1, -1)]
    )
    after = check_sunk(program)
    assert total(after) * 8 == total(program) * 4
    assert traffic(after) == {"all_gather": 2}


def test_parts_that_are_all_of_it_stay() -> None:
    halves = ((0, 4), (4, 8))
    program = gathered(lambda b, x: [b.op(aten.slice.Tensor, x, 1, *half) for half in halves])
    assert traffic(check_sunk(program)) == {"all_gather": 1}


@pytest.mark.parametrize("small", [torch.bfloat16, torch.float16])
def test_a_cast_to_a_smaller_dtype_moves_before(small: torch.dtype) -> None:
    program = gathered(lambda b, x: [b.op(aten._to_copy.default, x, dtype=small)])
    assert [record.dtype for record in collectives(check_sunk(program))] == [small]


def test_a_part_of_a_cast() -> None:
    """One round moves the cast, the next one the part."""
    program = gathered(
        lambda b, x: [
            b.op(aten.slice.Tensor, b.op(aten._to_copy.default, x, dtype=torch.bfloat16), 1, 0, 3)
        ]
    )
    assert total(check_sunk(program)) * 16 == total(program) * 3


def test_two_casts_are_not_smaller_than_what_is_cast() -> None:
    kinds = (torch.bfloat16, torch.float16)
    program = gathered(lambda b, x: [b.op(aten._to_copy.default, x, dtype=d) for d in kinds])
    assert [record.dtype for record in collectives(check_sunk(program))] == [torch.float32]


def test_a_cast_to_a_larger_dtype_moves_behind() -> None:
    b = Builder(tp=2)
    x = b.input("x", (5, 8), P("tp"), dtype=torch.bfloat16)
    wide = b.op(aten._to_copy.default, b.op(aten.neg.default, x), dtype=torch.float32)
    program = b.program(b.op(aten.cumsum.default, wide, 0), wide, pinned={1: P("tp")})
    after = check_values(program, Sink())
    assert [record.dtype for record in collectives(after)] == [torch.bfloat16]


def test_verify_knows_what_is_kept() -> None:
    after = Sink().apply(check_values(last_row(Builder(tp=2))))
    with pytest.raises(RolemeshError) as raised:
        Verify().apply(with_layout(after, "slice_tensor", REPLICATE))
    assert raised.value.code == "RM016"
    keep = node_named(after, "slice_tensor")
    keep.kwargs = {**keep.kwargs, "start": 5}
    with pytest.raises(RolemeshError) as raised:
        Verify().apply(after)
    assert "keeps 5 to 6 of 5" in raised.value.what


class LastLogits(nn.Module):
    """A language model that is asked for its last logits alone."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = PipelineStage()

    def forward(self, ids: Tensor) -> Tensor:
        """Logits `[batch, 1, vocabulary]`."""
        x = self.stage.embed(ids)
        for layer in self.stage.layers.values():
            x = layer(x)
        return self.stage.head(x[:, -1:])


@pytest.mark.xdist_group("sink")
@pytest.mark.parametrize("role", ["prefill", "pd_mixed"])
@pytest.mark.parametrize("batch", [1, 3])
def test_last_logits_of_any_number_of_tokens(role: str, batch: int) -> None:
    """The head works on one position, and a rank receives one row of what it works on."""
    torch.manual_seed(0)
    model = LastLogits()
    ids = torch.randint(PipelineStage.VOCABULARY, (batch, 11))
    torch._dynamo.mark_dynamic(ids, 1)
    sharded = shard(trace(model, ids), {"tp": 4}, role, phase="prefill")
    plain = shard(sharded.traced, {"tp": 4}, role, phase="prefill", optimise=False)
    row = batch * PipelineStage.WIDTH * 4
    assert [r.bytes_received for r in sharded.collectives if r.op == "all_reduce"] == [3 * row // 2]
    for tokens in (11, 8, 3, 2, 21):
        ids = torch.randint(PipelineStage.VOCABULARY, (batch, tokens))
        got = lockstep(sharded, ids, poison=True, check=True)
        assert torch.equal(got, lockstep(plain, ids, poison=True, check=True))
        torch.testing.assert_close(got, model(ids), rtol=1e-5, atol=1e-5)
