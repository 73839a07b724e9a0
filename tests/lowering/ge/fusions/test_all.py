"""All fusions on the graphs of whole models: how often, and the same values on all ranks."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from tests.lowering.ge.fusions.forms import (
    Forms,
    f,
    flat,
    fused,
    graph_text,
    run_both_on_ranks,
    same_values,
)
from tests.lowering.ge.lowered import dynamic_examples
from tests.models import Prompt, Setup, reference, start, traced
from torch import Tensor, fx
from torch.nn.functional import silu

from rolemesh.compiler.api import Sharded, shard
from rolemesh.compiler.capture.entry import Captured
from rolemesh.lowering.bind import bind
from rolemesh.lowering.flatten import as_fake, flatten
from rolemesh.lowering.sizes import Examples
from rolemesh.runtime.groups import stand_in_groups
from rolemesh.runtime.lockstep import assemble_outputs, scatter_inputs

pytestmark = pytest.mark.xdist_group("fusions")

BF16, F32 = torch.bfloat16, torch.float32
LAYERS = {"deepseek_v32": 2, "llama": 1, "qwen3_moe": 1, "gpt_oss": 1}
EXPERTS = {"deepseek_v32": "batched_mm", "qwen3_moe": "batched_mm", "gpt_oss": "grouped_mm"}
PROMPT = Prompt(1, 16)
"""One sequence whose tokens ranks divide: packing for collectives moves nothing."""
STEPS = [("prefill", "prefill"), ("pd_mixed", "prefill"), ("decode", "decode")]
STEPS += [("pd_mixed", "decode")]


def setup(model: str, dtype: torch.dtype = BF16, attn: str = "sdpa") -> Setup:
    return Setup(model, attn, EXPERTS.get(model), dtype, LAYERS[model])


def sharded_step(
    model: Setup, role: str, phase: str, ranks: int = 4, prompt: Prompt = PROMPT
) -> Sharded:
    step = traced(model, prompt, 0 if phase == "decode" else None)
    return shard(step, {"tp": ranks}, role, phase=phase)


def rank_graph(sharded: Sharded, rank: int = 0) -> fx.GraphModule:
    program = sharded.program
    with stand_in_groups(program.the_mesh, rank) as groups:
        module = bind(program, rank, groups.names)
        return flatten(module, as_fake(Examples(program, rank).inputs))


def counts(forms: Forms) -> str:
    made = {name.removeprefix("npu_"): count for name, count in forms.made.items()}
    return " ".join(f"{name}={count}" for name, count in made.items() if count)


@pytest.mark.parametrize("model", sorted(LAYERS))
def test_hits_on_models(model: str, golden: Callable[[str, str], None]) -> None:
    lines = []
    for role, phase in STEPS:
        before = rank_graph(sharded_step(setup(model), role, phase))
        for within_limits in (True, False):
            limits = "documented sizes" if within_limits else "all sizes"
            found = counts(fused(before, within_limits=within_limits))
            lines.append(f"{role} {phase}, {limits}: {found}")
    golden(f"hits_{model}", "\n".join(lines))


def test_sparse_attention_over_latents_is_one_op() -> None:
    step = setup("deepseek_v32", attn="rolemesh")._replace(layers=1)
    forms = fused(rank_graph(sharded_step(step, "decode", "decode", 2)), within_limits=False)
    assert forms.made["npu_sparse_flash_attention"] == 1


def test_attention_that_models_write_is_found_as_often() -> None:
    made = []
    for attn in ("sdpa", "eager"):
        before = rank_graph(sharded_step(setup("llama", attn=attn), "pd_mixed", "prefill"))
        made.append(fused(before, within_limits=False).made)
    assert made[0] == made[1]
    assert made[0]["npu_fused_infer_attention_score"] == LAYERS["llama"]


def run_both(sharded: Sharded, prompt: Prompt, model: Setup, phase: str) -> dict[str, int]:
    """Run both forms on all ranks with NaN in all pads; compare the whole outputs."""
    program = sharded.program
    forms = [
        fused(rank_graph(sharded, rank), within_limits=False)
        for rank in range(program.the_mesh.size)
    ]
    assert all(form.made == forms[0].made for form in forms)
    if phase == "decode":
        state = reference(model, prompt, 0)[0]
        ids, cache = state.tokens, copy.deepcopy(state.cache)
    else:
        ids, cache = start(model, prompt)

    def run(captured: Captured, inputs: list[Tensor]) -> list[Tensor]:
        by_input = scatter_inputs(program, inputs, poison=True)
        by_rank = [list(locals_) for locals_ in zip(*by_input, strict=True)]
        results = run_both_on_ranks(forms, by_rank)
        whole = []
        for form in (0, 1):
            outputs = zip(*(result[form] for result in results), strict=True)
            whole.append(assemble_outputs(program, [list(locals_) for locals_ in outputs]))
        same_values(whole[0], whole[1])
        return whole[1]

    sharded.traced.entry.call(run, ids, past_key_values=cache, use_cache=True)
    return forms[0].made


@pytest.mark.parametrize(
    ("model", "phase"),
    [*((model, "prefill") for model in sorted(LAYERS)), ("llama", "decode")],
)
def test_one_rank_computes_the_same(model: str, phase: str) -> None:
    """On one rank there are no collectives; sizes are odd.

    Models that choose experts and keys compute in fp32: in bf16 one rounding may change a choice.
    """
    given, prompt = setup(model, BF16 if model == "llama" else F32), Prompt(3, 13)
    sharded = sharded_step(given, "pd_mixed", phase, 1, prompt)
    assert sum(run_both(sharded, prompt, given, phase).values()) >= 4


@pytest.mark.parametrize(
    ("role", "phase", "collectives"),
    [(*step, count) for step, count in zip(STEPS, (0, 4, 2, 2), strict=True)],
)
def test_four_ranks_compute_the_same(role: str, phase: str, collectives: int) -> None:
    given = setup("llama")
    made = run_both(sharded_step(given, role, phase), PROMPT, given, phase)
    assert sum(made[name] for name in made if "mm" in name or "matmul" in name) == collectives


def layer(
    x: Tensor, y: Tensor, w: Tensor, qkv: Tensor, cos: Tensor, sin: Tensor, seen: Tensor, gu: Tensor
) -> Tensor:
    """A decoder layer as a library would write it, with two attentions."""
    total = x + y
    wide = total.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    batch, tokens, _ = x.shape
    split = ((w * normed.to(x.dtype)) @ qkv).split(64, -1)
    q, k, v = (part.reshape(batch, tokens, 4, 16).transpose(1, 2) for part in split)
    q = q * cos + torch.cat((-q[..., 8:], q[..., :8]), -1) * sin
    mask = torch.where(seen, 0.0, torch.finfo(x.dtype).min).to(x.dtype)
    weights = (q @ k.transpose(2, 3) * 0.25 + mask).softmax(-1)
    q = torch.nn.functional.scaled_dot_product_attention(weights @ v, k, v, mask)
    gate, up = (q.transpose(1, 2).reshape(batch, tokens, 64) @ gu).chunk(2, -1)
    return total + silu(gate) * up


def layer_inputs(batch: int, tokens: int) -> list[Tensor]:
    seen = torch.ones(tokens, tokens, dtype=torch.bool).tril()[None, None]
    sizes = [(batch, tokens, 64)] * 2 + [(64,), (64, 192)] + [(1, 1, tokens, 16)] * 2
    given = [f(*size, dtype=BF16, seed=n) for n, size in enumerate(sizes)]
    return [*given, seen, f(64, 128, dtype=BF16)]


def test_dynamic_sizes_stay_dynamic() -> None:
    """The batch and the tokens are symbols: no fusion compares them in a way that fixes them."""
    dims = {0: (0, 1), 1: (0, 1), 4: (2,), 5: (2,), 6: (2, 3)}
    fakes = dynamic_examples(layer_inputs(2, 6), dims, apart=True)
    before = flat(layer, fakes)
    environment = fakes[0].fake_mode.shape_env
    known = [guard.expr for guard in environment.guards]
    forms = fused(before)
    assert [guard.expr for guard in environment.guards] == known
    assert counts(forms) == "add_rms_norm=1 rotary_mul=1 swiglu=1 fused_infer_attention_score=2"
    for batch, tokens in ((2, 6), (3, 17), (1, 2)):
        given = layer_inputs(batch, tokens)
        same_values(before(*given), forms.after(*given))


def test_a_second_run_finds_nothing() -> None:
    forms = fused(flat(layer, layer_inputs(2, 6)))
    assert sum(forms.made.values()) == 5
    again = fused(forms.after)
    assert not any(again.made.values())
    assert graph_text(again.after.graph) == graph_text(forms.after.graph)
