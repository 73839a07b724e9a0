"""Unmodified models with `attn_implementation="rolemesh"`, in every role on all ranks.

The single device runs the model with its eager attention. Pads are NaN and every local shape is
checked; 13 tokens do not divide by four ranks, and three prompts or tokens are fewer.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from tests.models import Prompt, Setup, assert_step, model_of, start, traced
from torch import Tensor, nn

from rolemesh.compiler.analysis import local_flops
from rolemesh.compiler.api import Sharded, shard
from rolemesh.compiler.command.check import check
from rolemesh.compiler.command.check_options import CheckOptions
from rolemesh.compiler.integrations.attention import attention, mask_function
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.program import tensor_type
from rolemesh.lowering.composite.define import define_composite_ops

pytestmark = pytest.mark.xdist_group("composite_attention")

PROMPT = Prompt(3, 13)
LAYERS = {"llama": 1, "gemma2": 2, "gpt_oss": 1, "deepseek_v32": 1}
"""Sliding windows and a soft cap in gemma2, sliding windows and sinks in gpt_oss, named keys in
deepseek_v32."""
OPS = {"deepseek_v32": "rolemesh.sparse_attention.default"}


def setup(model: str, attn: str = "rolemesh") -> Setup:
    experts = None if model in ("llama", "gemma2") else "batched_mm"
    return Setup(model, attn, experts, layers=LAYERS[model])


def attending(sharded: Sharded, model: str) -> list[torch.fx.Node]:
    name = OPS.get(model, "rolemesh.attention.default")
    return [node for node in sharded.program.ops if str(node.target) == name]


@pytest.mark.parametrize("role", ["prefill", "decode", "pd_mixed"])
@pytest.mark.parametrize("model", LAYERS)
def test_models_in_every_role(model: str, role: str) -> None:
    steps = {"prefill": (None,), "decode": (0,), "pd_mixed": (None, 0)}[role]
    for step in steps:
        phase = "prefill" if step is None else "decode"
        sharded = shard(traced(setup(model), PROMPT, step), {"tp": 4}, role, phase=phase)
        assert len(attending(sharded, model)) == LAYERS[model]
        assert_step(sharded, setup(model), setup(model, "eager"), PROMPT, step)


def test_fewer_tokens_than_ranks() -> None:
    prompt = Prompt(1, 3)
    sharded = shard(traced(setup("deepseek_v32"), prompt), {"tp": 4}, "prefill")
    one, plain = setup("deepseek_v32"), setup("deepseek_v32", "eager")
    assert_step(sharded, one, plain, prompt, None)


def test_projections_are_those_of_the_same_model_with_other_attention() -> None:
    """The op is an anchor of classification as others are."""
    found = []
    for attn in ("sdpa", "rolemesh"):
        one = setup("llama", attn)
        program = shard(traced(one, PROMPT, 0), {"tp": 4}, "decode").program
        places = zip(program.placeholders, program.inputs, strict=True)
        found.append({entry.name: program.layout(node) for node, entry in places})
    assert found[0] == found[1]


def test_flops_of_sparse_attention_are_those_of_the_named_keys() -> None:
    sharded = shard(traced(setup("deepseek_v32"), PROMPT), {"tp": 4}, "prefill")
    (node, *_) = attending(sharded, "deepseek_v32")
    assert node.args[1] is node.args[2]  # the cached latents, with a tail
    operands = [tensor_type(x).shape for x in node.args if isinstance(x, torch.fx.Node)]
    query, key, value, indices, *_, tail = operands
    named = indices[2]
    assert named < key[2]
    batch, heads, rows, width = query
    assert rows == PROMPT.tokens
    work = 2 * batch * heads * -(-rows // 4) * named * (width + tail[3] + value[3])
    assert local_flops(sharded.program, node) == work


@pytest.mark.parametrize(("model", "role"), [("deepseek_v32", "pd_mixed"), ("gpt_oss", "prefill")])
def test_check_on_ge(model: str, role: str) -> None:
    options = CheckOptions(
        f"hf:{model}",
        role,
        Mesh({"tp": 2}),
        target="ge",
        tolerance=1e-5,
        layers=1,
        attn="rolemesh",
        experts="batched_mm",
    )
    report = check(options)
    assert report.ok, report.as_text()


class Layer(nn.Module):
    """What the function reads of a layer."""

    is_causal = True


def operands(rows: int = 4, keys: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    define_composite_ops()
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, rows, 8), (2, 2, keys, 8), (2, 2, keys, 8))
    query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    return query, key, value


def eager(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, bias: Tensor | float = 0.0
) -> Tensor:
    key, value = (x.repeat_interleave(2, 1) for x in (key, value))
    scores = query @ key.mT * query.shape[-1] ** -0.5 + bias
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


def test_without_a_mask_a_causal_layer_sees_no_later_keys() -> None:
    args = operands()
    causal = torch.ones(4, 6, dtype=torch.bool).tril()
    found, weights = attention(Layer(), *args, None)
    assert weights is None
    torch.testing.assert_close(found, eager(*args, causal))
    found, _ = attention(Layer(), *args, None, is_causal=False)
    torch.testing.assert_close(found, eager(*args, None))
    one = operands(rows=1)
    torch.testing.assert_close(attention(Layer(), *one, None)[0], eager(*one, None))


def test_position_bias() -> None:
    args = operands()
    bias = torch.randn(1, 4, 4, 6, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(4, 6, dtype=torch.bool).tril()
    for given in (mask, torch.where(mask, 0.0, -torch.inf)):
        found, _ = attention(Layer(), *args, given, position_bias=bias)
        torch.testing.assert_close(found, eager(*args, mask, bias))
    found, _ = attention(Layer(), *args, None, is_causal=False, position_bias=bias)
    torch.testing.assert_close(found, eager(*args, None, bias))


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("dropout", {"dropout": 0.1}),
        ("softcap", {"softcap": 30.0, "indices": torch.zeros(2, 4, 1, dtype=torch.int32)}),
        ("block_indices", {"block_indices": torch.zeros(1)}),
        ("cache", {"cache": object()}),
    ],
)
def test_arguments_that_the_op_does_not_have(name: str, given: dict[str, object]) -> None:
    with pytest.raises(RolemeshError) as error:
        attention(Layer(), *operands(), None, **given)  # type: ignore[arg-type]
    assert str(error.value).startswith(
        f"[RM018] attention implementation 'rolemesh' has no argument {name!r}"
    )
    attention(Layer(), *operands(), None, **dict.fromkeys(given))  # type: ignore[arg-type]


def test_masks_are_left_out_for_one_query_only() -> None:
    asked: list[object] = []

    def explicit(*args: object, **kwargs: object) -> None:
        asked.append((args, kwargs))

    make = mask_function(explicit)
    make(2, q_length=1, kv_length=5)
    make(2, q_length=3, kv_length=5)
    make(2, q_length=1, kv_length=5, allow_is_causal_skip=False)
    skips = [True, False, False]
    rows = [1, 3, 1]
    assert asked == [
        ((2,), {"q_length": n, "kv_length": 5, "allow_is_causal_skip": skip})
        for n, skip in zip(rows, skips, strict=True)
    ]


def test_the_model_alone_is_the_eager_model() -> None:
    ids, _ = start(setup("gemma2"), PROMPT)
    with torch.no_grad():
        found, want = (model_of(setup("gemma2", a))(ids).logits for a in ("rolemesh", "eager"))
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)
