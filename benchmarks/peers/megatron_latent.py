"""DeepSeek-V3.2 in tensor parallelism as an expert writes it by hand.

Query, latent up-projections and output projection split by heads; the latent down-projections, the
indexer and the cache, which have no heads to split, on every rank, as in vLLM. Attention works on
the latents themselves: the key up-projection is applied to queries and the value up-projection to
results, and each query meets the keys that the indexer picks and no others.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from peers.megatron import Experts, MegatronModel, Mlp, Part, Step, norm, rotate
from transformers import PreTrainedModel
from transformers.cache_utils import StaticIndexedLayer

__all__ = ["latent_model"]

_BLOCK = 256
"""Queries whose picked keys are in memory at a time."""


def _rotate_pairs(x: torch.Tensor, step: Step) -> torch.Tensor:
    """Rotary embedding of `[batch, tokens, heads, width]`; neighbours are rotated together."""
    half = x.shape[-1] // 2
    cos, sin = step.cos[:, None, :half], step.sin[:, None, :half]
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.cat((even * cos - odd * sin, odd * cos + even * sin), -1)


class _Indexer(torch.nn.Module):
    """Picks keys for each query; the same on every rank."""

    def __init__(self, source: torch.nn.Module) -> None:
        super().__init__()
        self.heads, self.width = source.n_heads, source.head_dim
        self.rotary, self.count = source.qk_rope_head_dim, source.index_topk
        self.register_buffer("query", source.wq_b.weight.clone())
        self.register_buffer("key", source.wk.weight.clone())
        self.register_buffer("scale", source.k_norm.weight.clone())
        self.register_buffer("bias", source.k_norm.bias.clone())
        self.register_buffer("weights", source.weights_proj.weight.clone())

    def _rotated(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        turned = rotate(x[..., : self.rotary], cos, sin)
        return torch.cat((turned, x[..., self.rotary :]), -1)

    def forward(
        self, x: torch.Tensor, query: torch.Tensor, step: Step, kept: StaticIndexedLayer
    ) -> torch.Tensor:
        """Places of the keys to attend to, `[batch, tokens, count]`."""
        batch, tokens, _ = x.shape
        q = F.linear(query, self.query).view(batch, tokens, self.heads, self.width)
        q = self._rotated(q, step.cos[:, None], step.sin[:, None])
        k = F.layer_norm(F.linear(x, self.key), (self.width,), self.scale, self.bias, 1e-6)
        kept.indexer_keys.index_copy_(1, step.places, self._rotated(k, step.cos, step.sin))
        scores = torch.bmm(q.flatten(1, 2), kept.indexer_keys.mT) * self.width**-0.5
        scores = scores.relu().view(batch, tokens, self.heads, -1)
        weights = F.linear(x, self.weights) * self.heads**-0.5
        scores = (weights[..., None] * scores).sum(2).masked_fill(~step.mask, float("-inf"))
        return scores.topk(self.count).indices


class _LatentAttention(torch.nn.Module):
    """Attention over one rank's heads; its result is this rank's summand of the output."""

    def __init__(self, source: torch.nn.Module, part: Part) -> None:
        super().__init__()
        config = source.config
        self.eps, self.scale = config.rms_norm_eps, source.scaling
        self.nope, self.rope = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.rank, self.heads = config.kv_lora_rank, config.num_attention_heads // part.ranks
        self.register_buffer("query_down", source.q_a_proj.weight.clone())
        self.register_buffer("query_norm", source.q_a_layernorm.weight.clone())
        self.register_buffer("query_up", part.rows(source.q_b_proj.weight))
        self.register_buffer("down", source.kv_a_proj_with_mqa.weight.clone())
        self.register_buffer("norm", source.kv_a_layernorm.weight.clone())
        up = part.rows(source.kv_b_proj.weight).view(self.heads, -1, self.rank)
        self.register_buffer("key_up", up[:, : self.nope].clone())
        self.register_buffer("value_up", up[:, self.nope :].clone())
        self.register_buffer("out", part.columns(source.o_proj.weight))
        self.indexer = _Indexer(source.indexer)

    def forward(self, x: torch.Tensor, step: Step, kept: StaticIndexedLayer) -> torch.Tensor:
        """`[batch, tokens, hidden]` to the same, to be summed over ranks."""
        batch, tokens, _ = x.shape
        low = norm(F.linear(x, self.query_down), self.query_norm, self.eps)
        q = F.linear(low, self.query_up).view(batch, tokens, self.heads, self.nope + self.rope)
        plain, rotary = q.split((self.nope, self.rope), -1)
        q = torch.cat((self._to_latents(plain), _rotate_pairs(rotary, step)), -1)
        latent, key = F.linear(x, self.down).split((self.rank, self.rope), -1)
        latent = norm(latent, self.norm, self.eps)
        kept.keys.index_copy_(2, step.places, latent[:, None])
        key = _rotate_pairs(key[:, :, None], step).transpose(1, 2)
        kept.values.index_copy_(2, step.places, key)
        picked = self.indexer(x, low, step, kept)
        mixed = torch.cat(
            [
                self._attend(
                    q[:, i : i + _BLOCK],
                    picked[:, i : i + _BLOCK],
                    step.places[i : i + _BLOCK],
                    kept,
                )
                for i in range(0, tokens, _BLOCK)
            ],
            1,
        )
        values = torch.bmm(self._by_head(mixed), self.value_up.mT)
        values = values.view(self.heads, batch, tokens, -1).permute(1, 2, 0, 3)
        return F.linear(values.reshape(batch, tokens, -1), self.out)

    @staticmethod
    def _by_head(x: torch.Tensor) -> torch.Tensor:
        """`[batch, tokens, heads, width]` to `[heads, batch * tokens, width]`."""
        return x.permute(2, 0, 1, 3).flatten(1, 2)

    def _to_latents(self, q: torch.Tensor) -> torch.Tensor:
        batch, tokens = q.shape[:2]
        found = torch.bmm(self._by_head(q), self.key_up)
        return found.view(self.heads, batch, tokens, self.rank).permute(1, 2, 0, 3)

    def _attend(
        self,
        q: torch.Tensor,
        picked: torch.Tensor,
        places: torch.Tensor,
        kept: StaticIndexedLayer,
    ) -> torch.Tensor:
        """Queries `[batch, tokens, heads, rank + rope]` over the picked latents."""
        batch, length = picked.shape[0], kept.keys.shape[2]
        rows = (picked + length * torch.arange(batch)[:, None, None]).flatten()
        shape = (-1, picked.shape[2], self.rank)
        latents = kept.keys.view(-1, self.rank).index_select(0, rows).view(shape)
        keys = kept.values.view(-1, self.rope).index_select(0, rows).view(*shape[:2], self.rope)
        flat = q.flatten(0, 1)
        scores = torch.bmm(flat[..., : self.rank], latents.mT)
        scores = (scores + torch.bmm(flat[..., self.rank :], keys.mT)) * self.scale
        hidden = (picked > places[:, None]).flatten(0, 1)[:, None]
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        return torch.bmm(weights, latents).view(*q.shape[:3], self.rank)


class _GroupedTopK(torch.nn.Module):
    """The router: experts from the best groups."""

    def __init__(self, source: torch.nn.Module) -> None:
        super().__init__()
        self.count, self.groups, self.kept = source.top_k, source.num_group, source.topk_group
        self.factor, self.normalised = source.routed_scaling_factor, source.norm_topk_prob
        self.register_buffer("weight", source.weight.clone())
        self.register_buffer("correction", source.e_score_correction_bias.clone())

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """From `[tokens, hidden]` to weights and ids `[tokens, k]`."""
        scores = F.linear(x, self.weight).sigmoid()
        choice = (scores + self.correction).unflatten(1, (self.groups, -1))
        best = choice.topk(2).values.sum(-1).topk(self.kept, sorted=False).indices
        wanted = torch.zeros(x.shape[0], self.groups, dtype=torch.bool).scatter(1, best, True)
        choice = choice.masked_fill(~wanted[..., None], float("-inf")).flatten(1)
        ids = choice.topk(self.count, sorted=False).indices
        weights = scores.gather(1, ids)
        if self.normalised:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * self.factor, ids


class _Mixture(torch.nn.Module):
    """Routed and shared experts; one sum over ranks serves both."""

    def __init__(self, source: torch.nn.Module, part: Part) -> None:
        super().__init__()
        self.routed = Experts(source.experts, part, _GroupedTopK(source.gate))
        self.shared = Mlp(source.shared_experts, part)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[batch, tokens, hidden]` to the same, to be summed over ranks."""
        return self.routed(x) + self.shared(x)


def latent_model(source: PreTrainedModel, group: dist.ProcessGroup) -> MegatronModel:
    """One rank's part of a DeepSeek-V3.2-like model."""
    part = Part(group.rank(), group.size())
    layers = [
        (
            _LatentAttention(layer.self_attn, part),
            (_Mixture if hasattr(layer.mlp, "experts") else Mlp)(layer.mlp, part),
        )
        for layer in source.model.layers
    ]
    return MegatronModel(source, group, layers)
