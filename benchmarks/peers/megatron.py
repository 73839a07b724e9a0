"""Tensor parallelism as an expert writes it by hand, after Megatron-LM and vLLM.

Query, key and value split by heads, gate and up by columns, each in a matmul of its own: packed as
on a GPU they take 5 % longer here. The output and down projections are split by rows, each followed
by one all_reduce; embedding and lm_head by vocabulary; every expert by columns and rows, which
balances any routing. Keys and values are written in place, attention is torch's flash kernel
with grouped heads, collectives are functional, so that inductor compiles the whole step as one
graph and reduces in place. Torch has no grouped matmul in fp32 that can be compiled, so routed
experts are an op of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from transformers import PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer

__all__ = [
    "Experts",
    "MegatronModel",
    "Mlp",
    "Part",
    "Step",
    "define_experts",
    "megatron_model",
    "norm",
    "rotate",
]


class Part(NamedTuple):
    """Which part of each weight a rank takes."""

    rank: int
    ranks: int

    def rows(self, weight: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """This rank's chunk of the output features."""
        return weight.chunk(self.ranks, dim)[self.rank].clone()

    def columns(self, weight: torch.Tensor) -> torch.Tensor:
        """This rank's chunk of the input features, which are last."""
        return weight.chunk(self.ranks, -1)[self.rank].contiguous()


class Step(NamedTuple):
    """What all layers of a call share.

    Attributes:
        places: Positions of the new tokens, `[tokens]`.
        mask: Which keys each sees, `[tokens, cache]`.
        cos: Of the rotary angles, `[tokens, width]`.
        sin: The same.
    """

    places: torch.Tensor
    mask: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor


class _Attention(Protocol):
    def __call__(self, x: torch.Tensor, step: Step, kept: StaticLayer) -> torch.Tensor: ...


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root mean square norm of the last dim."""
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of the last dim, whose halves are rotated together."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


class Attention(torch.nn.Module):
    """Attention over one rank's heads; its result is this rank's summand of the output."""

    def __init__(self, source: torch.nn.Module, part: Part) -> None:
        super().__init__()
        self.width, self.eps = source.head_dim, source.config.rms_norm_eps
        self.register_buffer("query", part.rows(source.q_proj.weight))
        self.register_buffer("key", part.rows(source.k_proj.weight))
        self.register_buffer("value", part.rows(source.v_proj.weight))
        self.register_buffer("out", part.columns(source.o_proj.weight))
        self.has_norms = hasattr(source, "q_norm")
        if self.has_norms:
            self.register_buffer("q_norm", source.q_norm.weight.clone())
            self.register_buffer("k_norm", source.k_norm.weight.clone())

    def forward(self, x: torch.Tensor, step: Step, kept: StaticLayer) -> torch.Tensor:
        """`[batch, tokens, hidden]` to the same, to be summed over ranks."""
        batch, tokens, _ = x.shape
        weights = (self.query, self.key, self.value)
        q, k, v = (F.linear(x, w).view(batch, tokens, -1, self.width) for w in weights)
        if self.has_norms:
            q, k = norm(q, self.q_norm, self.eps), norm(k, self.k_norm, self.eps)
        q, k = (rotate(y.transpose(1, 2), step.cos, step.sin) for y in (q, k))
        kept.keys.index_copy_(2, step.places, k)
        kept.values.index_copy_(2, step.places, v.transpose(1, 2))
        mixed = F.scaled_dot_product_attention(
            q, kept.keys, kept.values, attn_mask=step.mask, enable_gqa=True
        )
        return F.linear(mixed.transpose(1, 2).reshape(batch, tokens, -1), self.out)


class Mlp(torch.nn.Module):
    """A gated MLP over one rank's columns."""

    def __init__(self, source: torch.nn.Module, part: Part) -> None:
        super().__init__()
        self.register_buffer("gate", part.rows(source.gate_proj.weight))
        self.register_buffer("up", part.rows(source.up_proj.weight))
        self.register_buffer("down", part.columns(source.down_proj.weight))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[batch, tokens, hidden]` to the same, to be summed over ranks."""
        return F.linear(F.silu(F.linear(x, self.gate)) * F.linear(x, self.up), self.down)


class Experts(torch.nn.Module):
    """Routed experts, each over one rank's columns."""

    def __init__(
        self,
        source: torch.nn.Module,
        part: Part,
        route: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    ) -> None:
        """Take one rank's columns.

        Args:
            source: The whole experts.
            part: Which part to take.
            route: From `[tokens, hidden]` to weights and ids `[tokens, k]`.
        """
        super().__init__()
        self.route = route
        halves = source.gate_up_proj.chunk(2, 1)
        self.register_buffer("gate_up", torch.cat([part.rows(half, 1) for half in halves], 1))
        self.register_buffer("down", part.columns(source.down_proj))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[batch, tokens, hidden]` to the same, to be summed over ranks."""
        flat = x.flatten(0, 1)
        weights, ids = self.route(flat)
        return torch.ops.megatron.experts(flat, ids, weights, self.gate_up, self.down).view_as(x)


def _experts(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
) -> torch.Tensor:
    """Tokens sorted by expert, two matmuls for each expert that has any.

    Args:
        x: `[tokens, hidden]`.
        ids: `[tokens, k]`, each token's experts.
        weights: `[tokens, k]`.
        gate_up: `[experts, 2 columns, hidden]`.
        down: `[experts, hidden, columns]`.
    """
    count = ids.shape[1]
    ordered, order = ids.flatten().sort()
    ends = torch.searchsorted(ordered, torch.arange(1, gate_up.shape[0] + 1)).tolist()
    picked = x[order // count]
    inner = picked.new_empty(picked.shape[0], gate_up.shape[1])
    outer = torch.empty_like(picked)
    used = [(e, a, b) for e, (a, b) in enumerate(zip([0, *ends], ends, strict=False)) if a < b]
    for expert, start, end in used:
        torch.mm(picked[start:end], gate_up[expert].t(), out=inner[start:end])
    gate, up = inner.chunk(2, -1)
    gated = F.silu(gate).mul_(up)
    for expert, start, end in used:
        torch.mm(gated[start:end], down[expert].t(), out=outer[start:end])
    outer.mul_(weights.flatten()[order, None])
    # Back in the order of tokens and summed: cheaper than index_add, which is serial.
    places = torch.empty_like(order)
    places[order] = torch.arange(order.shape[0])
    return outer[places].view(-1, count, x.shape[1]).sum(1)


def define_experts() -> torch.library.Library:
    """Define the op `megatron::experts`, once a process; it goes with the first result: keep it."""
    library = torch.library.Library("megatron", "FRAGMENT")
    if not hasattr(torch.ops.megatron, "experts"):
        tensors = "Tensor x, Tensor ids, Tensor weights, Tensor gate_up, Tensor down"
        library.define(f"experts({tensors}) -> Tensor")
        library.impl("experts", _experts, "CPU")
        library.impl("experts", lambda x, *_: torch.empty_like(x), "Meta")
    return library


class MegatronModel(torch.nn.Module):
    """One rank's part of a decoder."""

    def __init__(
        self,
        source: PreTrainedModel,
        group: dist.ProcessGroup,
        layers: list[tuple[_Attention, torch.nn.Module]],
    ) -> None:
        """Take this rank's weights from the whole model.

        Args:
            source: The whole model, not changed.
            group: The ranks that share it.
            layers: This rank's attention and MLP of each layer.
        """
        super().__init__()
        part = Part(group.rank(), group.size())
        self.library = define_experts()
        self.group, self.eps = group, source.config.rms_norm_eps
        self.first = part.rank * (source.config.vocab_size // part.ranks)
        self.register_buffer("table", part.rows(source.model.embed_tokens.weight))
        self.register_buffer("head", part.rows(source.lm_head.weight))
        self.register_buffer("norm", source.model.norm.weight.clone())
        self.register_buffer("frequencies", source.model.rotary_emb.inv_freq.clone())
        self.attention = torch.nn.ModuleList(attention for attention, _ in layers)
        self.mlp = torch.nn.ModuleList(mlp for _, mlp in layers)
        for index, layer in enumerate(source.model.layers):
            self.register_buffer(f"norm_{index}_0", layer.input_layernorm.weight.clone())
            self.register_buffer(f"norm_{index}_1", layer.post_attention_layernorm.weight.clone())

    def _sum(self, x: torch.Tensor) -> torch.Tensor:
        return funcol.all_reduce(x, "sum", self.group)

    def _whole(self, logits: torch.Tensor) -> torch.Tensor:
        """From this rank's `[batch, columns]` to all, `[batch, 1, vocabulary]`."""
        chunks = funcol.all_gather_tensor(logits, 0, self.group).unflatten(0, (-1, len(logits)))
        return chunks.transpose(0, 1).reshape(len(logits), 1, -1)

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        local = ids - self.first
        inside = (local >= 0) & (local < self.table.shape[0])
        rows = F.embedding(local.clamp(0, self.table.shape[0] - 1), self.table)
        return self._sum(rows * inside[..., None])

    def forward(self, ids: torch.Tensor, cache: StaticCache, start: torch.Tensor) -> torch.Tensor:
        """One call.

        Args:
            ids: New tokens, `[batch, tokens]`.
            cache: What this rank keeps, written in place.
            start: Position of the first new token, one integer.

        Returns:
            The last token's logits, whole: `[batch, 1, vocabulary]`.
        """
        places = start + torch.arange(ids.shape[1])
        angles = places[:, None] * self.frequencies
        angles = torch.cat((angles, angles), -1)
        mask = torch.arange(cache.layers[0].keys.shape[2]) <= places[:, None]
        step = Step(places, mask, angles.cos(), angles.sin())
        x = self._embed(ids)
        for index, kept in enumerate(cache.layers):
            hidden = norm(x, getattr(self, f"norm_{index}_0"), self.eps)
            x = x + self._sum(self.attention[index](hidden, step, kept))
            hidden = norm(x, getattr(self, f"norm_{index}_1"), self.eps)
            x = x + self._sum(self.mlp[index](hidden))
        return self._whole(F.linear(norm(x[:, -1], self.norm, self.eps), self.head))


class _TopK(torch.nn.Module):
    """The router of qwen3_moe."""

    def __init__(self, source: torch.nn.Module) -> None:
        super().__init__()
        self.count, self.normalised = source.top_k, source.norm_topk_prob
        self.register_buffer("weight", source.weight.clone())

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """From `[tokens, hidden]` to weights and ids `[tokens, k]`."""
        weights, ids = F.linear(x, self.weight).softmax(-1).topk(self.count)
        return weights / weights.sum(-1, keepdim=True) if self.normalised else weights, ids


def megatron_model(source: PreTrainedModel, group: dist.ProcessGroup) -> MegatronModel:
    """One rank's part of a llama-like or qwen3_moe-like model."""
    part = Part(group.rank(), group.size())

    def mlp(module: torch.nn.Module) -> torch.nn.Module:
        if hasattr(module, "experts"):
            return Experts(module.experts, part, _TopK(module.gate))
        return Mlp(module, part)

    layers = [(Attention(layer.self_attn, part), mlp(layer.mlp)) for layer in source.model.layers]
    return MegatronModel(source, group, layers)
