"""How many collectives the attention of a layer has, and what they move, as docs/roles.md says."""

from __future__ import annotations

from collections import Counter

import pytest

pytest.importorskip("transformers")

from tests.models import Prompt, Setup, sharded_once

from rolemesh.compiler.api import Sharded

SETUP, PROMPT = Setup("deepseek_v32", "sdpa", "grouped_mm"), Prompt(3, 25)
RANKS = 3
# Elements: cached per token, into the output projection, hidden, of the query projection.
C, K, D, Q, BYTES = 60, 256, 112, 18_432, 4
PADDED = -(-16 // RANKS) * K // 16  # of K on a rank: 16 heads in chunks of one size

pytestmark = pytest.mark.xdist_group("deepseek_v32-sdpa-grouped_mm-B3")


def attention(sharded: Sharded, layer: int) -> tuple[Counter[str], int]:
    """Collectives of one layer's attention by op, and the bytes a rank receives in them."""
    found = [r for r in sharded.collectives if f"layers.{layer}.self_attn" in r.module]
    return Counter(r.op for r in found), sum(r.bytes_received for r in found)


@pytest.mark.parametrize(
    ("role", "phase", "ops"),
    [
        ("prefill", "prefill", {"all_gather": 1, "broadcast": 2}),
        ("decode", "decode", {"all_reduce": 1}),
        ("pd_mixed", "decode", {"all_gather": 1, "all_to_all": 1, "reduce_scatter": 1}),
    ],
)
def test_attention_of_a_layer(role: str, phase: str, ops: dict[str, int]) -> None:
    sharded = sharded_once(SETUP, PROMPT, RANKS, role, None if phase == "prefill" else 0)
    length = PROMPT.tokens if phase == "prefill" else 1
    tokens = PROMPT.batch * -(-length // RANKS) * RANKS if phase == "prefill" else PROMPT.batch
    keys = (RANKS - 1) * tokens * C * BYTES // RANKS
    formulas = {
        "prefill": keys + (Q + K * D) * BYTES,
        "decode": 2 * (RANKS - 1) * tokens * D * BYTES // RANKS,
        "pd_mixed": keys + (RANKS - 1) * tokens * (PADDED + D) * BYTES // RANKS,
    }
    for layer in range(2):
        counts, received = attention(sharded, layer)
        assert counts == ops
        assert received <= formulas[role]


def test_decode_has_two_collectives_a_layer() -> None:
    sharded = sharded_once(SETUP, PROMPT, RANKS, "decode", 0)
    for layer in range(2):
        found = [r.op for r in sharded.collectives if f"layers.{layer}." in r.module]
        assert found == ["all_reduce"] * 2
