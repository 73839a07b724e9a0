"""A model that Dynamo captures in pieces: each is sharded, over one storage, and results are right.

The breaks are where they hurt most: between a cache's update and the attention that reads it, in
the middle of an MLP, and between layers that share weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from tests.models import forget_compiled

from rolemesh.compiler.backend import observing
from rolemesh.compiler.ir.placement import Shard
from rolemesh.compiler.ir.program import Program
from rolemesh.compiler.models.cases import Case, cache_tensors, load_case
from rolemesh.runtime.launch import run_processes
from rolemesh.runtime.store import default_store, gather


class Broken(nn.Module):
    """An MLP with a break before its last projection."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.mlp.act_fn(self.mlp.gate_proj(x)) * self.mlp.up_proj(x)
        torch._dynamo.graph_break()
        return self.mlp.down_proj(hidden)


def breaking_attention(module: nn.Module, *args: object, **kwargs: object) -> object:
    """SDPA after a break: keys and values come from the cache that the piece before wrote."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    torch._dynamo.graph_break()
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, *args, **kwargs)


def broken_case() -> Case:
    """A llama of two layers: the first has both breaks, and the second shares its MLP."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    case = load_case("hf:llama", layers=2, batch=3)
    layers = case.model.model.layers
    ALL_ATTENTION_FUNCTIONS.register("breaking", breaking_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register("breaking", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    layers[0].self_attn.config = type(case.model.config)(**case.model.config.to_dict())
    layers[0].self_attn.config._attn_implementation = "breaking"
    layers[0].mlp = Broken(layers[0].mlp)
    layers[1].mlp = layers[0].mlp.mlp
    return case


class Ran(NamedTuple):
    """What one call left behind on a rank."""

    phases: list[str]
    error: float
    cache_error: float
    pointers: dict[int, int]


class Result(NamedTuple):
    """All calls of a rank, and how it stores the weights of the layers' projections."""

    calls: list[Ran]
    whole: list[str]
    split: set[str]


def rank(role: str) -> Result:
    """Compile the model without `fullgraph`, and compare each call with the model uncompiled."""
    forget_compiled()  # what the parent compiled counts towards Dynamo's limits
    plain, case = broken_case(), broken_case()
    compiled = torch.compile(
        case.model, backend="rolemesh", dynamic=False, options={"mesh": {"tp": 2}, "role": role}
    )
    calls = []
    for name in ("prefill", "decode"):
        programs: list[Program] = []

        def keep(
            program: Program,
            run: Callable[[], list[torch.Tensor]],
            programs: list[Program] = programs,
        ) -> list[torch.Tensor]:
            programs.append(program)
            return run()

        args, kwargs = case.phases[name]
        plain_args, plain_kwargs = plain.phases[name]
        with torch.no_grad():
            want = plain.model(*plain_args, **plain_kwargs).logits
            with observing(keep):
                got = compiled(*args, **kwargs).logits
        ours = cache_tensors(kwargs["past_key_values"]).values()
        theirs = cache_tensors(plain_kwargs["past_key_values"]).values()
        stored = {
            id(tensor): default_store().find(tensor)
            for tensor in (*case.model.model.layers.parameters(), *ours)
        }
        calls.append(
            Ran(
                [program.phase for program in programs],
                float((got - want).abs().max()),
                max(float((gather(a) - b).abs().max()) for a, b in zip(ours, theirs, strict=True)),
                {key: entry.local.data_ptr() for key, entry in stored.items() if entry},
            )
        )
    whole, split = [], set()
    for name, weight in case.model.model.layers.named_parameters():
        entry = default_store().find(weight)
        if entry is None or weight.untyped_storage().nbytes():
            whole.append(name)
        elif isinstance(entry.layout.placements[0], Shard):
            split.add(name)
    return Result(calls, whole, split)


@pytest.mark.processes
def test_pieces_are_sharded_over_one_storage() -> None:
    """Of the pieces that hold tokens, those of a token a sequence are decode."""
    for result in run_processes(rank, 2, ("pd_mixed",), fork=True):
        assert isinstance(result, Result)
        assert len(result.calls[0].phases) > 4
        assert set(result.calls[0].phases) == {"prefill"}
        assert result.calls[1].phases.count("decode") >= 2
        assert max(call.error for call in result.calls) < 1e-4
        assert max(call.cache_error for call in result.calls) < 1e-4
        assert result.whole == []
        # The second layer's MLP is that of the first, in other modules.
        projections = [f"0.mlp.mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
        outputs = [f"{layer}.self_attn.o_proj.weight" for layer in range(2)]
        assert result.split >= {*projections, *outputs}
        for call in result.calls:
            assert call.pointers == result.calls[0].pointers
