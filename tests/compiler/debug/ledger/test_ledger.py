"""The ledger of a run directory: the compiler's own numbers, the roles' formulas, and windows."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")

import sympy
import torch
from tests.compiler.debug.small_stages import collective, node, stage
from tests.compiler.recorded import record
from tests.conftest import Golden
from tests.passes.test_dispatch import Layer

from rolemesh.compiler.api import shard
from rolemesh.compiler.capture.tracing import trace
from rolemesh.compiler.command.check_options import CheckOptions
from rolemesh.compiler.debug.diff.differences import difference
from rolemesh.compiler.debug.ledger.formulas import total
from rolemesh.compiler.debug.ledger.ledger import Ledger, Work, ledger_of, totals
from rolemesh.compiler.debug.ledger.ledger_text import ledger_text
from rolemesh.compiler.debug.memory import memory_of
from rolemesh.compiler.debug.paint import Painter
from rolemesh.compiler.dump.reader import Stage, open_run
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.ledger import collectives
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.spec import P as Spec
from rolemesh.lowering.composite.define import define_composite_ops
from rolemesh.passes.cost import CostTable

pytestmark = pytest.mark.xdist_group("recorded")

DSA = "hf:deepseek_v32"


def ledger(role: str, phase: str) -> Ledger:
    return ledger_of(open_run(record(DSA, role)[0]).program(phase).stage())


@pytest.mark.parametrize("role", ["pd_mixed", "prefill", "decode"])
def test_the_entries_are_the_collectives_of_the_program(role: str) -> None:
    for phase, sharded in record(DSA, role)[1].items():
        found, cost = ledger(role, phase), sharded.cost_analysis()
        assert [
            (e.node, e.op, e.axes, e.dim, e.shape, e.dtype, e.received, e.module, e.cause)
            for e in found.entries
        ] == [
            (r.node, r.op, r.axes, r.dim, r.shape, str(r.dtype)[6:], r.bytes_received, r.module,
             r.cause)
            for r in sharded.collectives
        ]  # fmt: skip
        assert found.received == cost.bytes_received
        assert [entry.formula for entry in found.entries] == [
            str(entry.formula) for entry in cost.collectives
        ]
        assert found.sizes == {str(symbol): size for symbol, size in cost.sizes.items()}


def test_formulas_have_the_values_of_other_sizes() -> None:
    folder, sharded = record(DSA, "pd_mixed")
    recorded = open_run(folder).program("prefill").stage()
    assert [e.received for e in ledger_of(recorded, batch=2, tokens=13).entries] == [
        e.received for e in ledger_of(recorded).entries
    ]
    found = ledger_of(recorded, batch=5, tokens=21)
    cost = sharded["prefill"].cost_analysis()
    sizes = {symbol: found.sizes[str(symbol)] for symbol in cost.sizes}
    assert [e.received for e in found.entries] == [
        int(e.formula.subs(sizes)) for e in cost.collectives
    ]
    assert found.sizes == {"tp": 4, "B": 5, "T": 21}


def test_a_symbolic_number_of_tokens(tmp_path: Path) -> None:
    options = CheckOptions("hf:llama", "pd_mixed", Mesh({"tp": 4}), layers=1)
    case = options.load()
    (ids,), kwargs = case.phases["prefill"]
    assert isinstance(ids, torch.Tensor)
    torch._dynamo.mark_dynamic(ids, 1)
    with torch.no_grad():
        traced = trace(case.model, ids, **kwargs)
    sharded = shard(traced, options.mesh, "pd_mixed", phase="prefill", dump=str(tmp_path))
    stage = open_run(tmp_path).program().stage()
    found = ledger_of(stage)
    assert found.sizes == {"tp": 4, "B": 2, "T": 13}
    assert any("T" in map(str, entry.shape) for entry in found.entries)
    assert [e.received for e in found.entries] == [c.bytes_received for c in sharded.collectives]
    plain = sharded.program.at(dict.fromkeys(sharded.program.hints, 64))
    assert [e.received for e in ledger_of(stage, tokens=64).entries] == [
        c.bytes_received for c in collectives(plain)
    ]
    held = memory_of(stage)
    assert held is not None
    assert held.temporaries == int(sharded.memory_analysis().temporaries)
    assert not difference(stage, stage)


def test_bytes_that_depend_on_routes_are_expected_ones(tmp_path: Path) -> None:
    define_composite_ops()
    traced = trace(Layer().requires_grad_(False), torch.randn(3, 13, 8))
    split = {"x": Spec(None, "tp"), "up": Spec("tp"), "down": Spec("tp")}
    cheap = CostTable(routing=0.0)
    sharded = shard(traced, {"tp": 4}, annotations=split, costs=cheap, dump=str(tmp_path))
    found = ledger_of(open_run(tmp_path).program().stage())
    routed = {e.op: (e.received, e.most) for e in found.entries if e.most is not None}
    # Of 3 x 13 tokens in chunks of 4, three chunks come from others; 0.45 of it is expected.
    assert routed == {"dispatch": (518, 1152), "combine": (518, 1152)}
    assert found.received == sharded.cost_analysis().bytes_received
    text = ledger_text(found, "none", Painter(["tp"], False))
    assert text.count(" expected, at most 1,152: ") == 2
    assert "518 B expected, at most 1.2 KB  because" in sharded.as_text()


def test_formulas_that_lost_the_tokens_are_named() -> None:
    """What a lookup by computed ids gives follows no factor, so its size stays the traced one."""
    assert not ledger_of(open_run(record(DSA, "pd_mixed")[0]).program("prefill").stage()).without
    nodes = [
        node("ids", "input", shape=[2, 13]),
        node("w", "input", shape=[2, 13]),
        {
            **collective("all_reduce", "mesh.all_reduce", "ids", {"tp": 4}, [26]),
            "kinds": ["f32[26]"],
        },
        {**collective("other", "mesh.all_reduce", "w", {"tp": 4}, [26]), "kinds": ["f32[26]"]},
    ]
    for entry in nodes[2:]:
        entry["collective"] |= {"formula": "156", "dim": None, "dtype": "float32"}
    inputs = [
        {"node": "ids", "name": "ids", "kind": "user"},
        {"node": "w", "name": "w", "kind": "parameter"},
    ]
    made = stage(nodes, {"tp": 4}, inputs=inputs)
    made = Stage(made.program, 5, "partition", {**made.data, "sizes": {"B": 2, "T": 13}}, "")
    assert ledger_of(made, tokens=13).without == {}
    found = ledger_of(made, tokens=64)
    assert found.without == {"T": ("all_reduce",)}
    text = ledger_text(found, "op", Painter(["tp"], False))
    assert "1 formulas have no T (%all_reduce)" in text


def test_sizes_that_no_formula_has_are_refused() -> None:
    made = stage([], {"tp": 4})
    with pytest.raises(RolemeshError) as caught:
        ledger_of(made, tokens=8, batch=1)
    assert caught.value.code == "RM018"
    assert "have no B and no T" in caught.value.what


def test_a_stage_before_partitioning_is_refused() -> None:
    with pytest.raises(RolemeshError) as caught:
        ledger_of(open_run(record(DSA, "decode")[0]).program("decode").stage("seed"))
    assert caught.value.code == "RM018"
    assert str(caught.value.what) == "stage 'seed' has no collectives"


# ---- what docs/roles.md promises -----------------------------------------------------------------

B, T, P = (sympy.Symbol(name, positive=True, integer=True) for name in ("B", "T", "tp"))
C, K, D, Q, SIZE = 32 + 8 + 20, 16 * 16, 112, 384 * 48, 4
F, ALL = (P - 1) / P, B * T


def attention(found: Ledger, layer: int) -> dict[str, sympy.Expr]:
    """Total formulas of a layer's attention by op, for sizes that divide."""
    entries = [e for e in found.entries if e.module.startswith(f"model.layers.{layer}.self_attn")]
    by_op = {op: [e.formula for e in entries if e.op == op] for op in {e.op for e in entries}}
    names = {"B": B, "T": T, "tp": P, "ceiling": lambda size: size}
    return {op: sympy.sympify(total(formulas), names) for op, formulas in by_op.items()}


def same(found: dict[str, sympy.Expr], expected: dict[str, sympy.Expr]) -> bool:
    assert found.keys() == expected.keys()
    return all(sympy.simplify(found[op] - expected[op]) == 0 for op in expected)


@pytest.mark.parametrize("layer", [0, 1])
def test_prefill_moves_what_its_role_says(layer: int) -> None:
    keys, weights = F * ALL * C * SIZE, (Q + K * D) * SIZE
    found = attention(ledger("prefill", "prefill"), layer)
    assert same(found, {"all_gather": keys, "broadcast": sympy.Integer(weights)})


@pytest.mark.parametrize("layer", [0, 1])
def test_decode_moves_what_its_role_says(layer: int) -> None:
    found = attention(ledger("decode", "decode"), layer)
    assert same(found, {"all_reduce": (2 * F * ALL * D * SIZE).subs(T, 1)})


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_pd_mixed_moves_what_its_role_says(phase: str, layer: int) -> None:
    expected = {
        "all_gather": F * ALL * C * SIZE,
        "all_to_all": F * (ALL / P) * K * SIZE,
        "reduce_scatter": F * ALL * D * SIZE,
    }
    found = attention(ledger("pd_mixed", phase), layer)
    if phase == "decode":
        expected = {op: formula.subs(T, 1) for op, formula in expected.items()}
    assert same(found, expected)


def test_pd_mixed_gathers_the_weight_for_many_tokens(tmp_path: Path) -> None:
    options = CheckOptions(DSA, "pd_mixed", Mesh({"tp": 4}), layers=1, tokens=96)
    case = options.load()
    args, kwargs = case.phases["prefill"]
    with torch.no_grad():
        traced = trace(case.model, *args, **kwargs)
    shard(traced, options.mesh, "pd_mixed", phase="prefill", dump=str(tmp_path))
    found = ledger_of(open_run(tmp_path).program().stage())
    assert same(attention(found, 0), {"all_gather": F * (ALL * C + K * D) * SIZE})


# ---- windows -------------------------------------------------------------------------------------


def moving(name: str, op: str, operand: str, module: str) -> dict[str, object]:
    found = collective(name, op, operand, {"tp": 2}, [4], module, owner=0)
    found["collective"] |= {"dim": None, "dtype": "float32", "formula": "16"}
    return {**found, "kinds": ["f32[4]"]}


def test_the_window_is_what_runs_before_the_first_use() -> None:
    layers = [f"layers.{i}" for i in range(3)]
    nodes = [
        node("w", "input", shape=[4]),
        node("x", "input", shape=[4]),
        moving("started", "mesh.broadcast_start", "w", layers[2]),
        node("a", "aten.mm.default", ["x"], [4], module=layers[0], flops=100),
        moving("summed", "mesh.all_reduce", "a", layers[0]),
        node("free", "aten.mm.default", ["x"], [4], module=layers[1], flops=7),
        node("b", "aten.mm.default", ["summed", "free"], [4], module=layers[1], flops=1000),
        node("arrived", "mesh.wait", ["started"], [4], module=layers[2]),
        node("c", "aten.mm.default", ["b", "arrived"], [4], module=layers[2], flops=20),
    ]
    started, summed = ledger_of(stage(nodes, {"tp": 2})).entries
    assert started.window == Work(3, 1107, 2)  # a, free, b; not the collective between
    assert started.independent == Work(3, 1107, 2)  # c follows from it
    assert summed.window == Work(1, 7, 1)
    assert summed.independent == Work(1, 7, 1)  # a leads to it, b and c follow
    assert (started.owner, started.layer, summed.layer) == (0, 2, 0)


def test_a_result_that_is_only_returned_has_the_rest_as_its_window() -> None:
    nodes = [
        node("x", "input", shape=[4]),
        moving("summed", "mesh.all_reduce", "x", ""),
        node("a", "aten.neg.default", ["x"], [4]),
        node("b", "aten.neg.default", ["a"], [4]),
    ]
    (entry,) = ledger_of(stage(nodes, {"tp": 2})).entries
    assert entry.window == Work(2, 0, 0)


def test_prefetched_broadcasts_run_behind_the_layer_before() -> None:
    stage = open_run(record(DSA, "prefill")[0]).program().stage()
    nodes = list(stage.nodes.values())
    for entry in ledger_of(stage).entries:
        if entry.op == "broadcast":
            start = [*stage.nodes].index(entry.node)
            end = next(i for i, n in enumerate(nodes) if entry.node in n.operands)
            assert nodes[end].op == "mesh.wait"
            between = nodes[start:end]
            assert entry.window.flops == sum(n.data.get("flops", 0) for n in between)
            assert (entry.window.flops > 10**6) == (entry.layer == 1 or "o_proj" in entry.module)


# ---- text ----------------------------------------------------------------------------------------


def test_totals_add_up() -> None:
    found = ledger("pd_mixed", "prefill")
    for by in ("op", "axis", "layer", "module"):
        groups = totals(found.entries, by)
        assert sum(group.count for group in groups) == len(found.entries)
        assert sum(group.received for group in groups) == found.received
    assert [group.key for group in totals(found.entries, "layer")] == [
        "no layer", "layer 0", "layer 1",
    ]  # fmt: skip


def test_text(golden: Golden) -> None:
    stage = open_run(record("hf:llama", "pd_mixed")[0]).program("decode").stage()
    painter = Painter(["tp"], False)
    golden("ledger_llama_decode", ledger_text(ledger_of(stage), "module", painter))


def test_text_without_folding_has_each_collective_once() -> None:
    found = ledger("pd_mixed", "decode")
    lines = ledger_text(found, "none", Painter(["tp"], False)).splitlines()
    for entry in found.entries:
        assert sum(f"%{entry.node} = " in line for line in lines) == 1
