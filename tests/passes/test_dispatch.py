"""Dispatch: rows move to the ranks that have experts for them, where nothing else needs them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.conftest import Golden
from tests.passes.programs import Builder, check_values, node_named, partition, traffic
from torch import fx, nn

import rolemesh
from rolemesh.compiler.ir.dialect import DISPATCH
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.ledger import collectives
from rolemesh.compiler.ir.program import Program, tensor_type
from rolemesh.compiler.ir.spec import P
from rolemesh.lowering.composite.define import define_composite_ops
from rolemesh.lowering.composite.gate import SWIGLU
from rolemesh.passes.bucket import Bucket
from rolemesh.passes.cost import CostTable
from rolemesh.passes.dispatch import Dispatch
from rolemesh.passes.schedule import Schedule
from rolemesh.passes.verify import Verify
from rolemesh.runtime.lockstep import assemble_outputs, run_lockstep, scatter_inputs

aten = torch.ops.aten
FREE = Dispatch(CostTable(routing=0.0))
"""Small tokens move by their routes too."""

Used = Callable[[Builder, fx.Node, fx.Node], fx.Node]
"""What else a model does: from its tokens and its experts' result to what it gives."""


def residual(b: Builder, x: fx.Node, y: fx.Node) -> fx.Node:
    return b.op(aten.add.Tensor, x, y)


def model(
    b: Builder,
    used: Used = residual,
    tokens: int = 13,
    experts: int = 6,
    choices: int = 2,
    dtype: torch.dtype = torch.float32,
    axes: tuple[str, ...] = ("tp",),
    sizes: tuple[int, int] = (8, 10),
) -> Program:
    """Tokens through experts that the router names, and a residual sum."""
    define_composite_ops()
    b.module = "mlp"
    spec, (hidden, inner) = P(axes), sizes
    x = b.input("x", (tokens, hidden), spec, dtype=dtype)
    gate = b.input("gate", (hidden, experts), dtype=dtype)
    weights, ids = b.op(aten.topk.default, b.op(aten.mm.default, x, gate), choices)
    up = b.input("up", (experts, 2 * inner, hidden), P("tp"), dtype=dtype)
    down = b.input("down", (experts, hidden, inner), P("tp"), dtype=dtype)
    op = torch.ops.rolemesh.experts.default
    y = b.op(op, x, ids, weights, up, down, None, None, SWIGLU, False)
    return b.program(used(b, x, y), pinned={0: spec}, name="experts")


def test_text(golden: Golden) -> None:
    program = model(Builder(tp=4))
    before = check_values(program)
    after = check_values(program, FREE)
    golden("dispatch", f"{before}\n{after}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "ranks"), [(13, 4), (2, 3), (1, 4), (8, 8)])
def test_every_rank_gives_what_it_did(tokens: int, ranks: int, dtype: torch.dtype) -> None:
    """Bit for bit: tokens that do not divide, fewer than ranks, and ranks without experts."""
    plain = partition(model(Builder(tp=ranks), tokens=tokens, dtype=dtype))
    after = plain
    for step in (FREE, Bucket(), Schedule(), Verify()):
        after = step.apply(after)
    assert {"dispatch", "combine"} & set(traffic(after))
    torch.manual_seed(0)
    values = [torch.randn(t.shape).to(t.dtype) for t in map(tensor_type, plain.placeholders)]
    results = [
        run_lockstep(program, scatter_inputs(program, values, poison=True), poison=True, check=True)
        for program in (plain, after)
    ]
    want, have = (assemble_outputs(plain, found)[0] for found in results)
    assert want is not None
    assert have is not None
    assert torch.equal(want, have)


def test_tokens_that_another_axis_splits() -> None:
    program = model(Builder(dp=2, tp=3), tokens=12, axes=("dp", "tp"))
    after = check_values(program, FREE)
    assert traffic(after)["dispatch"] == traffic(after)["combine"] == 1


def shared(b: Builder, x: fx.Node, y: fx.Node) -> fx.Node:
    """Experts that all tokens share, split by features: their sum is pending too."""
    inner = b.op(aten.mm.default, x, b.weight("shared_up", (8, 400), P(None, "tp")))
    return b.op(
        aten.add.Tensor, y, b.op(aten.mm.default, inner, b.weight("out", (400, 8), P("tp")))
    )


def whole(b: Builder, x: fx.Node, y: fx.Node) -> fx.Node:
    """Something else needs all tokens: they are gathered once for both."""
    return b.op(aten.add.Tensor, y, b.op(aten.cumsum.default, x, 0))


@pytest.mark.parametrize(
    ("used", "dispatches", "combines"),
    [(residual, 1, 1), (shared, 0, 1), (whole, 0, 1)],
)
def test_rows_move_by_routes_if_experts_alone_read_and_give_them(
    used: Used, dispatches: int, combines: int
) -> None:
    found = traffic(check_values(model(Builder(tp=4), used), FREE))
    assert (found["dispatch"], found["combine"]) == (dispatches, combines)


@pytest.mark.parametrize(
    ("tokens", "ranks", "experts", "choices", "moves"),
    [
        (128, 8, 16, 2, 0),  # finding the routes costs more than the bytes that are saved
        (4096, 8, 16, 2, 2),
        (4096, 8, 16, 12, 0),  # nearly every rank has an expert for nearly every token
        (4096, 2, 16, 2, 0),
        (4096, 4, 16, 1, 2),
    ],
)
def test_the_cost_table_decides(
    tokens: int, ranks: int, experts: int, choices: int, moves: int
) -> None:
    program = partition(
        model(Builder(tp=ranks), residual, tokens, experts, choices, sizes=(2048, 4096))
    )
    after = Verify().apply(Dispatch().apply(program))
    assert traffic(after)["dispatch"] + traffic(after)["combine"] == moves


def test_bytes_are_expected_and_bounded() -> None:
    program = check_values(model(Builder(tp=4)), FREE)
    plain = check_values(model(Builder(tp=4)))
    routed = [entry for entry in collectives(program) if entry.is_expected]
    assert [entry.op for entry in routed] == ["dispatch", "combine"]
    share = (3 * (1 - 6 / 15) + 0) / 4  # three ranks have 2 of 6 experts: 1 - C(4, 2) / C(6, 2)
    most = [e.bytes_received for e in collectives(plain) if e.shape[-1] == 8]
    assert [entry.bytes_most for entry in routed] == most
    assert [entry.bytes_received for entry in routed] == [int(n * share) for n in most]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("read", "is read by other ops than experts"),
        ("ids", "has other routes than %experts"),
        ("size", "has other routes than %experts"),
        ("sum", "sums what is given by other ops than experts"),
    ],
)
def test_rows_that_something_else_needs_are_refused(broken: str, message: str) -> None:
    program = check_values(model(Builder(tp=4)), FREE)
    dispatch, combine = (node_named(program, name) for name in ("dispatch", "combine"))
    experts = combine.all_input_nodes[0]
    if broken == "read":
        with program.graph.inserting_after(experts):
            other = program.graph.call_function(aten.neg.default, (dispatch,))
        other.meta.update(dispatch.meta)
        program.layouts[other] = program.layouts[dispatch]  # type: ignore[index]
    elif broken == "ids":
        x, ids = dispatch.args
        with program.graph.inserting_before(dispatch):
            other = program.graph.call_function(aten.clone.default, (ids,))
        other.meta.update(ids.meta)  # type: ignore[union-attr]
        program.layouts[other] = program.layouts[ids]  # type: ignore[index]
        dispatch.args = (x, other)
    elif broken == "size":
        combine.kwargs = {**combine.kwargs, "size": 8}
    else:
        with program.graph.inserting_before(combine):
            other = program.graph.call_function(aten.neg.default, (experts,))
        other.meta.update(experts.meta)
        program.layouts[other] = program.layouts[experts]  # type: ignore[index]
        combine.args = (other, combine.args[1])
    with pytest.raises(RolemeshError, match=message):
        Verify().apply(program)


class Layer(nn.Module):
    """A layer of experts with a residual sum, for tokens in a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (
            nn.Parameter(torch.randn(shape)) for shape in ((8, 6), (6, 20, 8), (6, 8, 10))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, 8)
        weights, ids = (rows @ self.gate).softmax(-1).topk(2, -1)
        y = torch.ops.rolemesh.experts(
            rows, ids, weights, self.up, self.down, None, None, SWIGLU, False
        )
        return x + y.reshape(x.shape)


def test_one_program_serves_every_token_count() -> None:
    """Without passes that optimise none of its bytes depend on routes."""
    define_composite_ops()
    torch.manual_seed(3)
    layer, x = Layer().requires_grad_(False), torch.randn(3, 13, 8)
    torch._dynamo.mark_dynamic(x, 1)
    traced = rolemesh.trace(layer, x)
    given = {"x": P(None, "tp"), "up": P("tp"), "down": P("tp")}

    def shard(optimise: bool) -> rolemesh.Sharded:
        return rolemesh.shard(
            traced,
            {"tp": 4},
            annotations=given,
            costs=CostTable(routing=0.0),
            optimise=optimise,
        )

    sharded = shard(True)
    assert sharded.program.graph.find_nodes(op="call_function", target=DISPATCH)
    assert not any(entry.is_expected for entry in shard(False).collectives)
    for tokens in (13, 2, 16):
        x = torch.randn(3, tokens, 8)
        found = rolemesh.lockstep(sharded, x, poison=True, check=True)
        torch.testing.assert_close(found, layer(x))
