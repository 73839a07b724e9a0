"""Absorb: attention over cached latents applies the weight that expands them where that is less."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tests.conftest import Golden
from tests.models import Prompt, Setup, reference, run_sharded, start, traced
from torch import Tensor, nn

from rolemesh.compiler.api import Sharded, lockstep, shard
from rolemesh.compiler.capture.tracing import Traced, trace
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.program import Program, tensor_type
from rolemesh.compiler.pipeline import ShardOptions, shard_program
from rolemesh.compiler.roles import ROLES
from rolemesh.lowering.composite.define import define_composite_ops
from rolemesh.passes.absorb import Absorb
from rolemesh.passes.base import Pass
from rolemesh.passes.calls import flops
from rolemesh.passes.canonicalise import Canonicalise
from rolemesh.passes.cost import CostTable

aten = torch.ops.aten

BATCH, HEADS, KEYS = 2, 3, 37
LATENT, NOPE, ROPE = 12, 7, 4

Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Query `[B, H, T, D]`, key `[B, H, S, D]`, value `[B, H, S, V]`, mask `[B, 1, T, S]`: to
`[B, T, H, V]`."""


def written_out(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    scores = query @ key.transpose(2, 3) * 0.3
    weights = scores.masked_fill(~mask, -1e9).softmax(-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2)


def library(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, mask, scale=0.3).transpose(1, 2)


def composite(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return torch.ops.rolemesh.attention(query, key, value, mask, 0.3)


def sparse(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    named = mask[:, 0].int().topk(20).indices.to(torch.int32)
    return torch.ops.rolemesh.sparse_attention(query, key, value, named, mask, 0.3)


class Latents(nn.Module):
    """Attention over latents, which `up` expands to keys and values.

    `joined` says how keys are put together, `also` what else reads them.
    """

    def __init__(
        self,
        attention: Attention = written_out,
        width: int = 9,
        joined: str = "cat",
        also: str = "",
        groups: int = 1,
        latent: int = LATENT,
    ) -> None:
        super().__init__()
        self.attention, self.width, self.joined, self.also = attention, width, joined, also
        self.groups = groups
        self.up = nn.Linear(latent, HEADS * (NOPE + width), bias=also == "bias")

    def forward(self, query: Tensor, latents: Tensor, rotary: Tensor, mask: Tensor) -> Tensor:
        """`[B, H, T, NOPE + ROPE]`, `[B, S, L]`, `[B, 1, S, ROPE]`, `[B, 1, T, S]`."""
        batch, keys, _ = latents.shape
        expanded = self.up(latents).view(batch, keys, HEADS, -1).transpose(1, 2)
        key, value = expanded.split([NOPE, self.width], -1)
        rotary = rotary.expand(-1, HEADS, -1, -1)
        if self.joined == "cat":
            key = torch.cat([key, rotary], -1)
        else:
            whole = key.new_empty(*key.shape[:-1], NOPE + ROPE)
            whole[..., :NOPE].copy_(key)
            whole[..., NOPE:].copy_(rotary)
            key = whole
        if self.groups > 1:
            key, value = (
                x[:, :, None].expand(-1, -1, self.groups, -1, -1).flatten(1, 2)
                for x in (key, value)
            )
        found = self.attention(query, key, value, mask)
        return found + expanded.sum() if self.also == "sum" else found


def case(
    rows: int, dtype: torch.dtype = torch.float32, **options: object
) -> tuple[Latents, tuple[Tensor, ...]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rows)
        module = Latents(**options).to(dtype).requires_grad_(False)  # type: ignore[arg-type]
        heads = HEADS * module.groups
        args = (
            torch.randn(BATCH, heads, rows, NOPE + ROPE, dtype=dtype),
            torch.randn(BATCH, KEYS, module.up.in_features, dtype=dtype),
            torch.randn(BATCH, 1, KEYS, ROPE, dtype=dtype),
            torch.rand(BATCH, 1, rows, KEYS) > 0.3,
        )
    return module, args


def capture(module: nn.Module, args: tuple[Tensor, ...]) -> Traced:
    with torch.no_grad():
        return trace(module, *args)


def absorbed(program: Program) -> Program:
    return Absorb().apply(Canonicalise().apply(program))


def expansions(program: Program) -> int:
    """Products with a row for each key."""
    return sum(node.target is aten.mm.default for node in program.ops)


def joined_keys(program: Program) -> int:
    """Copies of cached features into one tensor."""
    joins = (aten.cat.default, aten.slice_scatter.default)
    return sum(n.target in joins and KEYS in tensor_type(n).shape for n in program.ops)


def operations(program: Program) -> int:
    return sum(flops(node) for node in program.ops)


def test_text(golden: Golden) -> None:
    traced = capture(*case(2, joined="copies"))
    before = Canonicalise().apply(traced.program)
    golden("absorb", f"{before}\n{Absorb().apply(before)}")


def test_text_of_composite_attention(golden: Golden) -> None:
    define_composite_ops()
    golden("absorb_composite", str(absorbed(capture(*case(2, attention=sparse)).program)))


@pytest.mark.parametrize(
    "options",
    [
        {"attention": written_out},
        {"attention": library},
        {"attention": library, "width": NOPE + ROPE},  # PyTorch's fused op
        {"attention": composite},
        {"attention": sparse},
        {"attention": written_out, "groups": 2},
        {"attention": composite, "groups": 2},
    ],
    ids=["written out", "library", "fused", "composite", "sparse", "groups", "composite groups"],
)
@pytest.mark.parametrize(("rows", "joined"), [(1, "copies"), (3, "cat")])
def test_every_form_gives_the_same(options: dict[str, object], joined: str, rows: int) -> None:
    define_composite_ops()
    module, args = case(rows, joined=joined, **options)
    traced = capture(module, args)
    before, after = Canonicalise().apply(traced.program), absorbed(traced.program)
    assert (expansions(before), expansions(after)) == (1, 0)
    assert joined_keys(before)
    assert not joined_keys(after)
    assert operations(after) < operations(before)
    want = module(*args)
    for ranks in (1, 2):
        sharded = shard(traced, {"tp": ranks})
        assert expansions(sharded.program) == 0
        torch.testing.assert_close(lockstep(sharded, *args), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", [library, composite, sparse])
def test_low_precision_is_as_near_to_the_exact_result(attention: Attention) -> None:
    """Keys are rounded once before, queries and results once after: errors of one size."""
    define_composite_ops()
    module, args = case(2, torch.bfloat16, attention=attention)
    exact = copy.deepcopy(module).float()(
        *(x.float() if x.is_floating_point() else x for x in args)
    )
    traced = capture(module, args)
    errors = [
        (lockstep(shard(traced, {"tp": 1}, optimise=optimise), *args) - exact).abs().mean().item()
        for optimise in (False, True)
    ]
    assert 0 < errors[1] < 2 * errors[0]


def test_operations_decide() -> None:
    """Per head: 37 x 12 x 16 + 37 T (11 + 9) against 12 T 16 + 37 T (16 + 12), so up to T = 14."""
    for rows, left in ((14, 0), (15, 1)):
        before = Canonicalise().apply(capture(*case(rows)).program)
        after = Absorb().apply(before)
        assert expansions(after) == left
        assert operations(after) <= operations(before)


def test_latents_as_wide_as_keys_stay_expanded_for_as_many_queries() -> None:
    before = Canonicalise().apply(capture(*case(KEYS, latent=40)).program)
    assert Absorb().apply(before).graph is before.graph


@pytest.mark.parametrize("also", ["sum", "bias"])
def test_an_expansion_that_is_needed_stays(also: str) -> None:
    before = Canonicalise().apply(capture(*case(1, also=also)).program)
    assert Absorb().apply(before).graph is before.graph


def test_queries_made_of_keys_stay() -> None:
    class Own(Latents):
        def forward(self, query: Tensor, latents: Tensor, rotary: Tensor, mask: Tensor) -> Tensor:
            query = query + self.up(latents).sum(-1).mean()
            return super().forward(query, latents, rotary, mask)

    _, args = case(1)
    before = Canonicalise().apply(capture(Own().requires_grad_(False), args).program)
    assert Absorb().apply(before).graph is before.graph


def test_symbolic_sizes_count_as_traced_and_nothing_is_assumed() -> None:
    for rows, left in ((3, 0), (20, 1)):
        module, args = case(rows)
        torch._dynamo.mark_dynamic(args[0], 2)
        torch._dynamo.mark_dynamic(args[3], 2)
        traced = capture(module, args)
        sharded = shard(traced, {"tp": 2})
        assert expansions(sharded.program) == left
        scope = traced.program.scope
        assert scope is not None
        assert not scope.assumptions
        for other in (2, 25):
            _, args = case(other)
            got = lockstep(sharded, *args)
            torch.testing.assert_close(got, module(*args), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------ real models

V3 = Setup("deepseek_v3", layers=1)
ALL_OF_A_CACHE = 40  # tokens, of 40 latents a head expands to 34 features


def work(traced: Traced, ranks: int, **options: object) -> tuple[int, int]:
    """Products that expand the cache, and operations of a rank by those of one device / ranks."""
    found = shard(traced, {"tp": ranks}, "prefill", **options)  # type: ignore[arg-type]
    one = shard(traced, {"tp": 1}, "prefill", optimise=False).cost_analysis().flops
    weights = [n for n in found.program.ops if n.target is aten.mm.default]
    expanding = [n for n in weights if n.meta["type"].shape == (ALL_OF_A_CACHE, 8 * 34)]
    return len(expanding), round(100 * found.cost_analysis().flops * ranks / one)


def test_what_a_rank_does_decides() -> None:
    """One device expands 40 rows for 25 queries; a rank of 4 would for 7, or does its 10 of them.

    Per head, with 40 latents and keys of 20 + 10, values of 14: 40 x 40 x 34 + 40 T (30 + 14)
    against 40 T 34 + 40 T (50 + 40), so up to T = 16.
    """
    traced_ = traced(V3, Prompt(1, 25))
    assert work(traced_, 1) == (1, 100)
    plain, better = work(traced_, 4, optimise=False), work(traced_, 4)
    assert (plain[0], better[0]) == (1, 0)
    assert better[1] < plain[1]
    # Where bytes are cheap, each rank expands a part.
    cheap = work(traced_, 4, costs=CostTable(flops_per_byte=1.0))
    assert cheap[0] == 1
    assert cheap[1] < better[1]


MODELS = (
    (V3, Prompt(3, 25), 3, {}),
    (V3._replace(attn="eager"), Prompt(3, 3), 4, {"costs": CostTable(flops_per_byte=1.0)}),
    (Setup("deepseek_v2", layers=1), Prompt(2, 3), 4, {}),
)


@pytest.mark.parametrize(("setup", "prompt", "ranks", "options"), MODELS)
def test_every_role_computes_what_one_device_computes(
    setup: Setup, prompt: Prompt, ranks: int, options: dict[str, CostTable]
) -> None:
    first, second = reference(setup, prompt, 1)

    def seen(step: Pass, program: Program) -> Program:
        after = step.apply(program)
        if isinstance(step, Absorb):
            assert after.layouts.keys() == set(after.placeholders)
            assert list(after.seeds.values()) == list(program.seeds.values())
        return after

    for role in ROLES:
        for phase in ROLES[role].phases:
            traced_ = traced(setup, prompt, None if phase == "prefill" else 0)
            chosen = ShardOptions(Mesh({"tp": ranks}), role, **options)  # type: ignore[arg-type]
            stages = shard_program(traced_.program, chosen, phase, through=seen)
            ids, cache = start(setup, prompt)
            want = first
            if phase != "prefill":
                ids, cache, want = first.tokens, copy.deepcopy(first.cache), second
            sharded = Sharded(traced_, chosen, stages, chosen.mesh)
            got = run_sharded(sharded, ids, cache)
            # fp32 sums in another order; the largest difference seen is 4e-6 on logits of 1 to 4.
            torch.testing.assert_close(got.logits, want.logits, rtol=1e-4, atol=1e-4)
            for name, tensor in want.tensors.items():
                torch.testing.assert_close(got.tensors[name], tensor, rtol=1e-4, atol=1e-4)
