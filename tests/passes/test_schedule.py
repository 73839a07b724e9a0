"""Schedule: collectives start early and are waited for late; results and order stay."""

from __future__ import annotations

import pytest
import torch
from tests.conftest import Golden
from tests.passes.programs import Builder, check_values, node_named
from torch import fx

from rolemesh.compiler.ir.dialect import STARTS, WAIT, MeshOp, is_start
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.placement import Owner, Shard
from rolemesh.compiler.ir.program import InputKind, Program
from rolemesh.compiler.ir.spec import P
from rolemesh.passes.bucket import Bucket
from rolemesh.passes.schedule import Schedule
from rolemesh.passes.verify import Verify

aten = torch.ops.aten


def attention(b: Builder, rows: int = 7) -> Program:
    """Queries, then keys and values that are gathered, and scores: the order models have."""
    b.module = "layers.0.attention"
    x = b.input("x", (rows, 6), P("tp"))
    at = b.input("positions", (rows,), dtype=torch.int64)
    written = []
    q = b.op(aten.mm.default, x, b.weight("q_proj", (6, 5)))
    for name in ("k", "v"):
        cache = b.input(name, (9, 5), mutated=True, kind=InputKind.BUFFER)
        new = b.op(aten.mm.default, x, b.weight(f"{name}_proj", (6, 5)))
        written.append(b.op(aten.index_copy.default, cache, 0, at, new))
    keys, values = written
    scores = b.op(aten.mm.default, b.op(aten.relu.default, q), b.op(aten.t.default, keys))
    out = b.op(aten.mm.default, scores, values)
    return b.program(out, *written, mutates={1: "k", 2: "v"}, pinned={0: P("tp")}, name="attention")


def test_text(golden: Golden) -> None:
    before, after = (
        check_values(attention(Builder(tp=2)), Bucket(), *passes) for passes in ((), (Schedule(),))
    )
    golden("schedule", f"{before}\n{after}")


def names(program: Program, *targets: MeshOp) -> list[str]:
    return [node.name for node in program.ops if node.target in targets]


def between(program: Program, start: str, wait: str) -> list[fx.Node]:
    ops = list(program.ops)
    place = {node.name: index for index, node in enumerate(ops)}
    return ops[place[start] + 1 : place[wait]]


@pytest.mark.parametrize("axes", [{"tp": 2}, {"tp": 3}, {"dp": 2, "tp": 2}])
@pytest.mark.parametrize("passes", [(), (Bucket(),)])
def test_queries_are_computed_while_keys_are_gathered(
    axes: dict[str, int], passes: tuple[Bucket, ...]
) -> None:
    after = check_values(attention(Builder(**axes)), *passes, Schedule())
    starts, waits = names(after, *STARTS.values()), names(after, WAIT)
    assert len(starts) == len(waits) > 0
    behind = [node for s, w in zip(starts, waits, strict=True) for node in between(after, s, w)]
    assert any(node.name == "mm_default" for node in behind)  # of the queries


def test_a_start_is_read_by_its_wait_alone() -> None:
    after = check_values(attention(Builder(tp=2)), Schedule())
    for node in after.ops:
        if is_start(node):
            assert [user.target for user in node.users] == [WAIT]


def test_waits_keep_the_order_of_starts() -> None:
    after = check_values(attention(Builder(tp=2)), Schedule())
    waits = [node for node in after.ops if node.target is WAIT]
    assert [w.all_input_nodes[0].name for w in waits] == names(after, *STARTS.values())


def test_nothing_to_run_behind_leaves_the_graph() -> None:
    b = Builder(tp=2)
    x = b.input("x", (6, 4), P("tp"))
    program = check_values(b.program(b.op(aten.cumsum.default, b.op(aten.silu.default, x), 0)))
    assert Schedule().apply(program).graph is program.graph


def test_small_work_is_not_worth_a_wait() -> None:
    """A few numbers beside a value: less than it receives is written meanwhile."""
    b = Builder(tp=2)
    x, y = b.input("x", (60, 4), P("tp")), b.input("y", (3,))
    gathered = b.op(aten.cumsum.default, b.op(aten.silu.default, x), 0)
    program = check_values(b.program(b.op(aten.exp.default, y), gathered))
    assert Schedule().apply(program).graph is program.graph


OWNED = Layout((Owner(1), Shard(1, 1, 6)))


def test_a_value_that_one_rank_of_another_axis_owns_is_waited_for() -> None:
    """Its gather has work to run behind, and its broadcast comes after the wait."""
    b = Builder(dp=2, tp=2)
    x, weight = b.input("x", (3, 5)), b.weight("w", (4, 6), OWNED)
    product = b.op(aten.mm.default, x, b.input("y", (5, 7)))
    after = check_values(b.program(product, weight), Schedule())
    assert names(after, WAIT)
    Verify().apply(after)


def layers(b: Builder, count: int) -> Program:
    """Layers whose weights are gathered for their use."""
    x = b.input("x", (5, 8), P("tp"))
    for layer in range(count):
        b.module = f"layers.{layer}.mlp"
        weight = b.weight(f"layers.{layer}.mlp.weight", (8, 8), P("tp"))
        x = b.op(aten.relu.default, b.op(aten.mm.default, x, b.op(aten.cumsum.default, weight, 0)))
    return b.program(x, pinned={0: P("tp")}, name="layers")


@pytest.mark.parametrize("window", [0, 1, 2])
def test_weights_start_a_window_of_layers_ahead(window: int) -> None:
    count = 4
    after = check_values(layers(Builder(tp=2), count), Schedule(window))
    ops = [node.name for node in after.ops]
    starts = names(after, *STARTS.values())
    uses = [n.name for n in after.ops if n.target is aten.mm.default]
    for layer, start in enumerate(starts):
        if layer > max(window, 1):  # not before the weights of earlier layers were used
            assert ops.index(start) > ops.index(uses[layer - max(window, 1) - 1])
        assert ops.index(start) < ops.index(uses[max(layer - window, 0)])


def test_a_negative_window() -> None:
    with pytest.raises(RolemeshError) as raised:
        Schedule(-1)
    assert "the window of the schedule is -1" in raised.value.what


# ---- verify --------------------------------------------------------------------------------------


def refusal(program: Program) -> str:
    with pytest.raises(RolemeshError) as raised:
        Verify().apply(program)
    assert raised.value.code == "RM016"
    return str(raised.value)


def test_verify_wants_one_wait_for_each_start() -> None:
    after = check_values(attention(Builder(tp=2)), Schedule())
    (start, *_) = (node for node in after.ops if is_start(node))
    (wait,) = start.users
    wait.replace_all_uses_with(start)
    assert "%all_gather_start is read by" in refusal(after)


def test_verify_wants_waits_in_the_order_of_starts() -> None:
    after = check_values(attention(Builder(tp=2)), Schedule())
    first, second = names(after, WAIT)
    node_named(after, second).append(node_named(after, first))
    for user in list(node_named(after, first).users):
        node_named(after, first).append(user)
    graph = node_named(after, first).graph
    order = [n for n in graph.nodes if n.op == "call_function"]
    assert order.index(node_named(after, second)) < order.index(node_named(after, first))
    assert "which was started later" in refusal(after)
