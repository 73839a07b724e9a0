"""Attention in the forms that models have, and scores that the fused op cannot compute."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.lowering.ge.fusions.forms import both_forms, f, flat, fused, graph_text, hits
from tests.lowering.ge.lowered import dynamic_examples
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
FUSED = {"fused_infer_attention_score": 1}


def repeated(x: Tensor, groups: int) -> Tensor:
    """Heads repeated for the query heads of their group, as transformers does it."""
    batch, heads, tokens, width = x.shape
    if groups == 1:
        return x
    wide = x[:, :, None].expand(batch, heads, groups, tokens, width)
    return wide.reshape(batch, heads * groups, tokens, width)


def additive(seen: Tensor, lowest: float, dtype: torch.dtype) -> Tensor:
    zero, low = (torch.scalar_tensor(x, dtype=dtype) for x in (0.0, lowest))
    return torch.where(seen, zero, low)


def by_op(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    mask = None if seen is None else additive(seen, -math.inf, q.dtype)
    return sdpa(q, repeated(k, groups), repeated(v, groups), mask, scale=scale)


def by_model(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    scores = q @ repeated(k, groups).transpose(2, 3) * scale
    if seen is not None:
        scores = scores + additive(seen, torch.finfo(q.dtype).min, q.dtype)
    weights = torch.softmax(scores, -1, dtype=F32).to(q.dtype)
    return weights @ repeated(v, groups)


def in_low_precision(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    scores = (q @ repeated(k, groups).mT) / (1 / scale)
    if seen is not None:
        low, zero = torch.full((), -math.inf, dtype=q.dtype), torch.zeros((), dtype=q.dtype)
        scores = torch.where(~seen, low, zero) + scores
    return scores.softmax(-1) @ repeated(v, groups)


def in_fp32(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float) -> Tensor:
    """What scaled_dot_product_attention is made of where no fused op applies."""
    root, groups = math.sqrt(scale), q.shape[1] // k.shape[1]
    k, v = repeated(k, groups), repeated(v, groups)
    scores = (q.float() * root) @ (k.float().transpose(-2, -1) * root)
    if seen is not None:
        scores = scores + additive(seen, -math.inf, F32)
    return (torch.ops.aten._safe_softmax(scores, -1) @ v.float()).to(q.dtype)


FORMS = [by_op, by_model, in_low_precision, in_fp32]


def operands(
    queries: int = 3, keys: int = 7, heads: int = 6, kv_heads: int = 6, width: int = 16
) -> tuple[Tensor, Tensor, Tensor]:
    k, v = (f(2, kv_heads, keys, width, dtype=BF16, seed=n) for n in (1, 2))
    return f(2, heads, queries, width, dtype=BF16), k, v


def causal(batch: int, queries: int, keys: int) -> Tensor:
    """The last queries of a sequence of `keys` tokens see what is not after them."""
    rows = torch.arange(keys - queries, keys)[:, None]
    seen = torch.arange(keys) <= rows
    seen = seen[None, None].repeat(batch, 1, 1, 1)
    seen[-1, ..., 1] = False
    return seen


def attend(form: Callable[..., Tensor], scale: float = 0.3) -> Callable[..., Tensor]:
    def attention(q: Tensor, k: Tensor, v: Tensor, *seen: Tensor) -> Tensor:
        return form(q, k, v, seen[0] if seen else None, scale)

    return attention


@pytest.mark.parametrize("kv_heads", [6, 3, 1])
@pytest.mark.parametrize(("queries", "keys"), [(3, 7), (1, 5)])
@pytest.mark.parametrize("masks", [0, 1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_all_forms(
    form: Callable[..., Tensor], masks: int, queries: int, keys: int, kv_heads: int
) -> None:
    given = operands(queries, keys, kv_heads=kv_heads)
    mask = [causal(masks, queries, keys)] if masks else []
    assert hits(attend(form), *given, *mask) == FUSED


@pytest.mark.parametrize("form", FORMS)
def test_keys_are_not_repeated(form: Callable[..., Tensor]) -> None:
    forms = both_forms(attend(form), *operands(kv_heads=2), causal(2, 3, 7))
    (node,) = (n for n in forms.after.graph.nodes if "npu_fused" in str(n.target))
    assert [n.meta["val"].shape[1] for n in node.args] == [6, 2, 2]
    assert (node.kwargs["num_heads"], node.kwargs["num_key_value_heads"]) == (6, 2)
    assert not any("clone" in str(n.target) for n in forms.after.graph.nodes)


@pytest.mark.parametrize("form", FORMS)
def test_half_precision(form: Callable[..., Tensor]) -> None:
    given = [x.half() for x in operands()]
    assert hits(attend(form), *given, causal(2, 3, 7)) == FUSED


@pytest.mark.parametrize("form", FORMS)
def test_single_precision_stays(form: Callable[..., Tensor]) -> None:
    assert hits(attend(form), *(x.float() for x in operands()), causal(2, 3, 7)) == {}


def test_one_key_head_by_a_plain_expand() -> None:
    def expanded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.expand(2, 6, 7, 16) for x in (k, v))
        return in_fp32(q, k, v, None, 0.3)

    given = operands(kv_heads=1)
    assert hits(expanded, *given) == FUSED
    text = graph_text(both_forms(expanded, *given).after.graph)
    assert "expand" not in text


@pytest.mark.parametrize("form", [by_model, in_fp32])
def test_operands_that_were_rounded(form: Callable[..., Tensor]) -> None:
    """The op takes what the products take, not what it was before it was rounded."""

    def rounded(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        q, k, v = ((x.float() * 1.5).to(x.dtype) for x in (q, k, v))
        return form(q, k, v, seen, 0.3)

    given = (*operands(), causal(2, 3, 7))
    assert hits(rounded, *given) == FUSED


def test_default_scale() -> None:
    assert hits(sdpa, *operands()) == FUSED
    widths = dynamic_examples(operands(), dict.fromkeys(range(3), (3,)), apart=True)
    assert not any(fused(flat(sdpa, widths)).made.values()), "the scale depends on a symbol"


def test_parts_of_a_packed_projection() -> None:
    def packed(x: Tensor, w: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (6, 16)).transpose(1, 2) for part in (x @ w).chunk(3, -1))
        return by_model(q, k, v, None, 0.3)

    assert hits(packed, f(2, 3, 8, dtype=BF16), f(8, 288, dtype=BF16)) == FUSED


def test_heads_that_are_tiled_stay_repeated() -> None:
    """Query head n reads key head n modulo M here; the op divides n by the size of a group."""

    def tiled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x[:, None].expand(2, 2, 3, 7, 16).reshape(2, 6, 7, 16) for x in (k, v))
        return by_op(q, k, v, None, 0.3)

    given = operands(kv_heads=3)
    assert hits(tiled, *given) == FUSED
    assert "num_key_value_heads=6" in graph_text(both_forms(tiled, *given).after.graph)


def test_products_of_three_dims_between_reshapes_stay() -> None:
    def three(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.bmm(q, k.mT).view(2, 6, 3, 7).softmax(-1)
        return torch.bmm(weights.view(12, 3, 7), v).view(2, 6, 3, 16)

    assert hits(three, *(x.flatten(0, 1) for x in operands())) == {}


def test_weights_that_multiply_values_one_by_one_stay() -> None:
    def elementwise(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k.mT).softmax(-1)
        return (weights.view(12, 16, 16) * v.view(12, 16, 16)).view(2, 6, 16, 16)

    assert hits(elementwise, *operands(16, 16)) == {}


def test_one_mask_of_all_layers_is_inverted_once() -> None:
    def layers(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        return by_op(by_op(q, k, v, seen, 0.3), k, v, seen, 0.3)

    given = (*operands(), causal(2, 3, 7))
    assert hits(layers, *given) == {"fused_infer_attention_score": 2}
    text = graph_text(both_forms(layers, *given).after.graph)
    assert text.count("= logical_not") == 1
    assert "where" not in text


def test_rows_that_see_nothing_are_zero_as_in_pytorch() -> None:
    seen = causal(2, 3, 7)
    seen[0, :, 1] = False
    for form in (by_op, in_fp32):
        assert hits(attend(form), *operands(), seen) == FUSED
    forms = both_forms(attend(by_op), *operands(), seen)
    assert forms.after(*operands(), seen)[0, :, 1].count_nonzero() == 0


def test_more_than_one_query_asks_for_zeros_in_rows_that_see_nothing() -> None:
    for queries, asked in ((3, True), (1, False)):
        forms = both_forms(attend(by_op), *operands(queries), causal(2, queries, 7))
        assert ("inner_precise=2" in graph_text(forms.after.graph)) is asked


def test_mask_that_excludes_in_the_other_order_is_not_inverted() -> None:
    forms = both_forms(attend(in_low_precision), *operands(), causal(2, 3, 7))
    assert "logical_not" not in graph_text(forms.after.graph)


def changed(**change: Any) -> Callable[..., Any]:
    """Attention of a model but for one thing."""
    options: dict[str, Any] = {
        "mask": lambda seen: additive(seen, torch.finfo(BF16).min, BF16),
        "masked": lambda scores, mask: scores * 0.3 + mask,
        "softmax": lambda scores: torch.softmax(scores, -1, dtype=F32).to(BF16),
        "turned": lambda k: k.transpose(2, 3),
        "end": lambda found, scores, weights: found,
    }
    options |= change

    def attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Any:
        scores = q @ options["turned"](k)
        weights = options["softmax"](options["masked"](scores, options["mask"](seen)))
        return options["end"](weights @ v, scores, weights)

    return attention


def test_the_unchanged_one_is_attention() -> None:
    assert hits(changed(), *operands(), causal(2, 3, 7)) == FUSED


@pytest.mark.parametrize(
    "change",
    [
        {"mask": lambda seen: additive(seen, -100.0, BF16)},
        {"mask": lambda seen: additive(seen, math.inf, BF16)},
        {"mask": lambda seen: additive(~seen, 1.0, BF16)},
        {"mask": lambda seen: torch.where(seen, seen.to(BF16), seen.to(BF16) * -1e38)},
        {"mask": lambda seen: seen.to(BF16)},
        {"mask": lambda seen: additive(seen.expand(2, 6, 3, 7), -math.inf, BF16)},
        {"mask": lambda seen: additive(seen[:, :, :1], -math.inf, BF16)},
        {"mask": lambda seen: additive(seen[..., :1], -math.inf, BF16)},
        {"mask": lambda seen: additive(seen[0], -math.inf, BF16)},
        {"masked": lambda scores, mask: scores + mask + scores},
        {"masked": lambda scores, mask: torch.add(scores, mask, alpha=2)},
        {"masked": lambda scores, mask: (scores + mask) + mask},
        {"masked": lambda scores, mask: scores.tanh() + mask},
        {"masked": lambda scores, mask: scores / 0.0 + mask},
        {"masked": lambda scores, mask: scores * scores + mask},
        {"masked": lambda scores, mask: (scores * 3).int().to(BF16) + mask},
        {"softmax": lambda scores: torch.softmax(scores, 2, dtype=F32).to(BF16)},
        {"softmax": lambda scores: torch.log_softmax(scores, -1)},
        {"softmax": lambda scores: scores.sigmoid()},
        {"softmax": lambda scores: scores.softmax(-1) * 0.5},
        {"turned": lambda k: k.flip(2).transpose(2, 3)},
        {"end": lambda found, scores, weights: (found, scores)},
        {"end": lambda found, scores, weights: (found, weights)},
    ],
)
def test_near_misses_stay(change: dict[str, Any]) -> None:
    found = both_forms(changed(**change), *operands(), causal(2, 3, 7)).made
    expected = 1 if change.get("turned") else 0  # other keys are attention all the same
    assert found["npu_fused_infer_attention_score"] == expected


def test_keys_that_are_not_transposed_stay() -> None:
    assert hits(changed(turned=lambda k: k), *operands(7, 7, width=7), causal(2, 7, 7)) == {}


def test_options_of_the_op_that_stay() -> None:
    q, k, v = operands(4, 4)
    assert hits(lambda q, k, v: sdpa(q, k, v, is_causal=True), q, k, v) == {}
    forms = both_forms(lambda q, k, v: sdpa(q, k, v, dropout_p=0.5), q, k, v)
    assert not any(forms.made.values())
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    both = both_forms(flash, q, k, v)
    assert not any(both.made.values()), "the log-sum-exp is a result"
    assert hits(lambda q, k, v: flash(q, k, v)[1], q, k, v) == {}
    forms = both_forms(lambda q, k, v: flash(q, k, v, 0.5)[0], q, k, v)
    assert not any(forms.made.values()), "dropout"


def test_an_additive_bias_stays() -> None:
    q, k, v = operands()
    bias = f(2, 1, 3, 7, dtype=BF16)
    assert hits(sdpa, q, k, v, bias) == {}


def test_values_of_another_width_stay() -> None:
    q, k, _ = operands()
    v = f(2, 6, 7, 32, dtype=BF16)
    assert hits(attend(by_model), q, k, v, causal(2, 3, 7)) == {}
    assert hits(attend(in_fp32), q, k, v, causal(2, 3, 7)) == {}


def test_three_dims_stay() -> None:
    q, k, v = (x[:, 0] for x in operands())
    assert hits(lambda q, k, v: (q @ k.mT).softmax(-1) @ v, q, k, v) == {}


@pytest.mark.parametrize(
    ("queries", "heads", "kv_heads", "width", "within"),
    [
        (3, 6, 6, 24, False),
        (1, 6, 6, 24, True),
        (1, 6, 6, 528, False),
        (3, 1, 1, 512, True),
        (3, 256, 256, 16, True),
        (3, 260, 260, 16, False),
        (3, 64, 1, 16, True),
        (3, 65, 1, 16, False),
    ],
)
def test_documented_sizes(
    queries: int, heads: int, kv_heads: int, width: int, within: bool
) -> None:
    given = operands(queries, 2, heads, kv_heads, width)
    assert hits(attend(by_model), *given) == (FUSED if within else {})
    assert hits(attend(by_model), *given, within_limits=False) == FUSED


def test_text(golden: Callable[[str, str], None]) -> None:
    forms = both_forms(attend(by_model), *operands(kv_heads=3), causal(2, 3, 7))
    before, after = graph_text(forms.before.graph), graph_text(forms.after.graph)
    golden("attention", f"{before}\n\n-- fused\n\n{after}")
