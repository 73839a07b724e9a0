"""Options of the pipeline: what they do, and what users read when they do not fit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rolemesh
from rolemesh import P, RolemeshError
from rolemesh.compiler.api import Traced
from rolemesh.compiler.pipeline import infer_phase
from rolemesh.compiler.roles import ROLES, role_named
from rolemesh.passes.cost import CostTable
from rolemesh.passes.rules import MissingRuleWarning

MESH = {"dp": 2, "tp": 4}


class TwoLinears(nn.Module):
    """`[6, 12] -> [6, 8]`; all dims differ."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(12, 20)
        self.down = nn.Linear(20, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


@pytest.fixture(scope="module")
def traced() -> Traced:
    return rolemesh.trace(TwoLinears().requires_grad_(False), torch.randn(6, 12))


def message_of(call: object, code: str) -> str:
    """The text of the error that `call()` raises."""
    assert callable(call)
    with pytest.raises(RolemeshError) as caught:
        call()
    assert caught.value.code == code
    text = str(caught.value)
    assert "where:" in text
    assert "why:" in text
    assert "fix:" in text
    return text


def test_unknown_role(traced: Traced) -> None:
    text = message_of(lambda: rolemesh.shard(traced, MESH, role="prefil"), "RM001")
    assert "[RM001] unknown role 'prefil'" in text
    assert "the roles are prefill, decode, pd_mixed" in text
    assert "did you mean 'prefill'?" in text


def test_unknown_axis(traced: Traced) -> None:
    text = message_of(lambda: rolemesh.shard(traced, MESH, axis="tq"), "RM002")
    assert "unknown mesh axis 'tq'" in text
    assert "the mesh has the axes dp, tp" in text


def test_unknown_axis_in_an_annotation(traced: Traced) -> None:
    call = lambda: rolemesh.shard(traced, MESH, annotations={"up.weight": P("ep")})  # noqa: E731
    assert "unknown mesh axis 'ep'" in message_of(call, "RM002")


def test_unknown_target(traced: Traced) -> None:
    sharded = rolemesh.shard(traced, MESH)
    text = message_of(lambda: rolemesh.lower(sharded, "inducter"), "RM003")
    assert "unknown target 'inducter'" in text
    assert "did you mean 'inductor'?" in text


def test_unknown_phase(traced: Traced) -> None:
    call = lambda: rolemesh.shard(traced, MESH, role="prefill", phase="decode")  # noqa: E731
    text = message_of(call, "RM004")
    assert "role 'prefill' has no phase 'decode'" in text
    assert "it runs prefill" in text


def test_role_that_needs_a_cache() -> None:
    model = nn.Sequential(nn.Embedding(11, 12), nn.Linear(12, 11)).requires_grad_(False)
    whole = rolemesh.trace(model, torch.arange(6).reshape(2, 3))
    text = message_of(lambda: rolemesh.shard(whole, MESH, role="decode"), "RM007")
    assert "role 'decode' decodes with a cache, but this call updates none" in text
    assert "past_key_values=StaticCache(...)" in text


def test_a_piece_without_attention_decodes_without_a_cache(traced: Traced) -> None:
    """Dynamo may capture an MLP by itself; it is sharded as one."""
    sharded = rolemesh.shard(traced, MESH, role="decode")
    shapes = {
        entry.name: sharded.program.layout(node).local_shape(entry_shape, sharded.program.the_mesh)
        for entry, node, entry_shape in zip(
            sharded.program.inputs,
            sharded.program.placeholders,
            [(20, 12), (20,), (6, 12), (8, 20), (8,)],
            strict=True,
        )
        if entry.name.endswith("weight")
    }
    assert shapes == {"up.weight": (5, 12), "down.weight": (8, 5)}


def test_pattern_that_matches_nothing(traced: Traced) -> None:
    call = lambda: rolemesh.shard(traced, MESH, annotations={"*.o_proj.weight": P()})  # noqa: E731
    text = message_of(call, "RM008")
    assert "the pattern '*.o_proj.weight' matches no input of the model" in text
    assert "names look like" in text


def test_dim_that_does_not_divide_into_the_units(traced: Traced) -> None:
    spec = P("tp", units={0: 3})
    call = lambda: rolemesh.shard(traced, MESH, annotations={"up.weight": spec})  # noqa: E731
    text = message_of(call, "RM009")
    assert "dim 0 of extent 20 does not divide into 3 units" in text
    assert "up.weight" in text


def test_bad_mesh(traced: Traced) -> None:
    assert "not valid" in message_of(lambda: rolemesh.shard(traced, {"tp": 0}), "RM015")
    call = lambda: rolemesh.shard(traced, "tp=4")  # type: ignore[arg-type]  # noqa: E731
    assert "is not a mesh" in message_of(call, "RM015")


def test_negative_prefetch_window(traced: Traced) -> None:
    call = lambda: rolemesh.shard(traced, MESH, prefetch=-1)  # noqa: E731
    assert "the prefetch window is -1" in message_of(call, "RM018")


def test_op_without_a_rule_runs_whole_with_a_warning() -> None:
    @torch.library.custom_op("rolemesh_tests::unknown_double", mutates_args=())
    def unknown_double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @unknown_double.register_fake
    def _(x: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(x)

    x = torch.randn(6, 12)
    traced = rolemesh.trace(lambda value: unknown_double(value) + 1, x)
    with pytest.warns(MissingRuleWarning) as caught:
        sharded = rolemesh.shard(traced, MESH, annotations={"*": P("tp")})
    text = str(caught[0].message)
    assert "[RM010] rolemesh_tests.unknown_double.default has no sharding rule" in text
    assert "where: unknown_double" in text
    assert "test_pipeline.py" in text
    assert "runs whole on every rank" in text
    assert "rolemesh.register_rule('rolemesh_tests::unknown_double'" in text
    assert torch.equal(rolemesh.lockstep(sharded, x), x * 2 + 1)


def test_registered_rule_shards_a_custom_op() -> None:
    @torch.library.custom_op("rolemesh_tests::batched_product", mutates_args=())
    def batched_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bmk,bkn->bmn", a, b)

    @batched_product.register_fake
    def _(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a.new_empty(a.shape[0], a.shape[1], b.shape[2])

    rolemesh.register_rule("rolemesh_tests::batched_product", "b m k, b k n -> b m n")
    a, b = torch.randn(3, 5, 8), torch.randn(3, 8, 7)
    traced = rolemesh.trace(lambda left, right: batched_product(left, right) + 0.0, a, b)
    specs = {"left": P(None, None, "tp"), "right": P(None, "tp", None)}
    sharded = rolemesh.shard(traced, {"tp": 4}, annotations=specs)
    assert [record.op for record in sharded.collectives] == ["all_reduce"]
    result = rolemesh.lockstep(sharded, a, b, poison=True, check=True)
    torch.testing.assert_close(result, a @ b)


def test_axis_defaults_to_tp_else_the_last(traced: Traced) -> None:
    assert rolemesh.shard(traced, {"tp": 4, "dp": 2}).options.role_axis == "tp"
    assert rolemesh.shard(traced, {"a": 4, "b": 2}).options.role_axis == "b"


def test_phase_is_inferred_from_the_tokens() -> None:
    class Embeds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(30, 8)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.table(ids)

    model = Embeds().requires_grad_(False)
    role = role_named("pd_mixed")
    for tokens, phase in ((5, "prefill"), (1, "decode")):
        program = rolemesh.trace(model, torch.zeros(3, tokens, dtype=torch.long)).program
        assert infer_phase(program, role) == phase
    assert infer_phase(program, role_named("prefill")) == "prefill"


def test_costs_decide_between_programs(traced: Traced) -> None:
    specs = {"x": P("tp"), "down.weight": P(None, "tp")}
    mesh = {"tp": 4}
    by_bytes = rolemesh.shard(traced, mesh, annotations=specs)
    assert {"all_to_all", "reduce_scatter"} < {record.op for record in by_bytes.collectives}
    slow = CostTable(all_to_all=100.0, reduce_scatter=100.0)
    gathering = rolemesh.shard(traced, mesh, annotations=specs, costs=slow)
    assert {record.op for record in gathering.collectives} == {"all_gather"}


def test_roles_are_data() -> None:
    assert list(ROLES) == ["prefill", "decode", "pd_mixed"]
    assert [list(role.phases) for role in ROLES.values()] == [
        ["prefill"],
        ["decode"],
        ["prefill", "decode"],
    ]
