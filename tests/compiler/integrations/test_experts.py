"""Unmodified models with `experts_implementation="rolemesh"`, in every role on all ranks.

The single device computes its experts with `batched_mm`. Pads are NaN and every local shape is
checked; 13 tokens do not divide by four ranks, and three decoded ones are fewer.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from tests.models import Prompt, Setup, assert_step, model_of, traced
from torch import Tensor, nn

from rolemesh.compiler.analysis import local_flops
from rolemesh.compiler.api import Sharded, shard
from rolemesh.compiler.integrations.experts import experts_function
from rolemesh.compiler.ir.dialect import EXPERTS
from rolemesh.compiler.ir.placement import Partial, Shard
from rolemesh.compiler.ir.program import tensor_type
from rolemesh.compiler.ir.spec import P
from rolemesh.passes.cost import CostTable

pytestmark = pytest.mark.xdist_group("composite_experts")

PROMPT = Prompt(3, 13)
RANKS = 4
MODELS = {
    "qwen3_moe": ("sdpa", 1),
    "mixtral": ("sdpa", 1),
    "deepseek_v32": ("sdpa", 2),
    "gpt_oss": ("eager", 1),
}
"""Attention and layers; the last one has experts."""


def setup(model: str, experts: str = "rolemesh") -> Setup:
    attn, layers = MODELS[model]
    return Setup(model, attn, experts, layers=layers)


def layouts(sharded: Sharded) -> list[object]:
    """How the results of the experts lie."""
    program = sharded.program
    nodes = program.graph.find_nodes(op="call_function", target=EXPERTS)
    return [program.layout(node).placements[0] for node in nodes]


@pytest.mark.parametrize("role", ["prefill", "decode", "pd_mixed"])
@pytest.mark.parametrize("model", MODELS)
def test_models_in_every_role(model: str, role: str) -> None:
    steps = {"prefill": (None,), "decode": (0,), "pd_mixed": (None, 0)}[role]
    for step in steps:
        found = traced(setup(model), PROMPT, step)
        phase = "prefill" if step is None else "decode"
        sharded = shard(found, {"tp": RANKS}, role, phase=phase)
        assert set(layouts(sharded)) == {Partial()}
        assert_step(sharded, setup(model), setup(model, "batched_mm"), PROMPT, step)


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("model", ["qwen3_moe", "mixtral", "deepseek_v32"])
def test_tokens_that_move_by_their_routes(model: str, ranks: int) -> None:
    """As cheap as bytes are, for more experts of a token than ranks, and for fewer."""
    found, cheap = traced(setup(model), PROMPT), CostTable(routing=0.0, routed=0.5)
    sharded = shard(found, {"tp": ranks}, "pd_mixed", phase="prefill", costs=cheap)
    moves = [entry.op for entry in sharded.collectives if ".mlp" in entry.module]
    assert moves[-2:] == ["dispatch", "combine"]
    assert_step(sharded, setup(model), setup(model, "batched_mm"), PROMPT, None)


def test_weights_of_experts_are_split_by_expert_biases_too() -> None:
    sharded = shard(traced(setup("gpt_oss"), PROMPT), {"tp": RANKS}, "prefill")
    program = sharded.program
    found = {
        entry.name.rpartition(".")[2]: program.layout(node).placements[0]
        for node, entry in zip(program.placeholders, program.inputs, strict=True)
        if "mlp.experts" in entry.name
    }
    names = ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")
    assert found == {name: Shard(0, 1, 16) for name in names}


@pytest.mark.parametrize(
    ("role", "step", "moved"),
    [
        ("decode", 0, ["all_reduce"]),
        ("pd_mixed", None, ["all_gather", "all_gather", "reduce_scatter"]),
    ],
)
def test_inner_features_split_where_the_weights_are_annotated_so(
    role: str, step: int | None, moved: list[str]
) -> None:
    """A part of every expert on every rank, of its gate and its up: no weight moves."""
    annotations = {
        "*experts.gate_up_proj": P(None, "tp", parts={1: 2}),
        "*experts.down_proj": P(None, None, "tp"),
    }
    one, plain = setup("qwen3_moe"), setup("qwen3_moe", "batched_mm")
    phase = "prefill" if step is None else "decode"
    found = traced(one, PROMPT, step)
    sharded = shard(found, {"tp": RANKS}, role, phase=phase, annotations=annotations)
    (node,) = (n for n in sharded.program.ops if "rolemesh.experts" in str(n.target))
    assert sharded.program.layout(node).placements[0] == Partial()
    assert [entry.op for entry in sharded.collectives if ".mlp" in entry.module] == moved
    assert_step(sharded, one, plain, PROMPT, step)


def test_tokens_that_are_split_meet_whole_experts_without_traffic() -> None:
    """Without a role the experts stay whole."""
    found = traced(setup("qwen3_moe"), PROMPT)
    sharded = shard(found, {"tp": RANKS}, annotations={"input_ids": P(None, "tp")})
    (node,) = (n for n in sharded.program.ops if "rolemesh.experts" in str(n.target))
    assert isinstance(sharded.program.layout(node).placements[0], Shard)


def test_flops_are_those_of_the_routes() -> None:
    """Of one layer's experts: as many routes for each rank, two projections each."""
    program = shard(traced(setup("qwen3_moe"), PROMPT), {"tp": RANKS}, "prefill").program
    (node,) = program.graph.find_nodes(op="call_function", target=EXPERTS)
    ids, up, down = (tensor_type(node.all_input_nodes[place]).shape for place in (1, 3, 4))
    assert ids[0] == PROMPT.batch * PROMPT.tokens
    assert up[0] % RANKS == 0
    whole = 2 * ids[0] * ids[1] * (up[1] * up[2] + down[1] * down[2])
    assert local_flops(program, node) == whole // RANKS


class Experts(nn.Module):
    """What a module of experts has, with a gate of its own."""

    has_gate, has_bias, is_transposed = True, False, False
    has_post_expert_norm = False

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(5, 8, 6))
        self.down_proj = nn.Parameter(torch.randn(5, 6, 4))

    def _apply_gate(self, rows: Tensor) -> Tensor:
        return rows.cumsum(-1)[..., :4]


def test_what_the_op_cannot_express_runs_as_the_library_does_it() -> None:
    def otherwise(module: nn.Module, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return torch.full_like(hidden, 17.0)

    function = experts_function(otherwise)
    given = (torch.randn(3, 6), torch.tensor([[0], [4], [2]]), torch.ones(3, 1))
    assert torch.equal(function(Experts(), *given), torch.full((3, 6), 17.0))


def test_the_library_is_not_changed_for_other_implementations() -> None:
    assert model_of(setup("qwen3_moe", "batched_mm")).config._experts_implementation == "batched_mm"
