"""The `transformers` cache that one call of the model sees.

The model writes keys and values through `update` and gets back the rows that its requests attend
over. States of layers without a token dim are read from the tables once, changed in place or
replaced by the model, and written back by `commit`.

This module imports `transformers` when it is imported; import it inside functions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx
from torch._dynamo.exc import TorchDynamoException
from transformers import StaticCache
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DummyLayer,
    LinearAttentionCacheLayerMixin,
)

from rolemesh.compiler.engine.cache import Batch, CachePlan, Tables, TensorPlan
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.models.cases import cache_argument

__all__ = ["SlotView", "cache_layers", "plan_cache"]


class SlotView(Cache):  # type: ignore[misc]  # mypy skips transformers: its classes are Any
    """The cache during one call.

    Args:
        layers: The library's layers without tensors, which say what kind each is.
        tables: The cache tensors.
        batch: The call.
        max_len: Tokens a slot can hold.
        fresh: Whether every request is at its start, so that it has no previous state.
    """

    def __init__(
        self,
        layers: list[CacheLayerMixin | LinearAttentionCacheLayerMixin | DummyLayer],
        tables: Tables,
        batch: Batch,
        max_len: int,
        fresh: bool,
    ) -> None:
        super().__init__(layers=layers)
        self.tables = tables
        self.batch = batch
        self.max_len = max_len
        self.fresh = fresh
        self.states: dict[str, torch.Tensor] = {}

    # ------------------------------------------------------------------------------ tokens

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: object,
        **kwargs: object,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write `[batch, heads, tokens, width]` keys and values, and return all of the slots'."""
        keys = self._write(f"{layer_idx}.keys", key_states.transpose(1, 2))
        return keys, self._write(f"{layer_idx}.values", value_states.transpose(1, 2))

    def update_indexer(self, indexer_key_states: torch.Tensor, layer_idx: int) -> torch.Tensor:
        """Write `[batch, tokens, width]` index keys, and return all of the slots'."""
        return self._write(f"{layer_idx}.index_keys", indexer_key_states)

    def _write(self, name: str, values: torch.Tensor) -> torch.Tensor:
        table = self.tables[name]
        if table.ndim == 4:
            table[self.batch.rows, :, self.batch.places] = values
        else:
            table[self.batch.rows, self.batch.places] = values
        return table.index_select(0, self.batch.slots)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Every layer gives whole slots."""
        return self.max_len, 0

    def get_query_offset(self, layer_idx: int = 0) -> torch.Tensor:
        """The places of the tokens, `[batch, tokens]`, for the mask builders of slots."""
        return self.batch.places

    def get_seq_length(self, layer_idx: int = 0) -> torch.Tensor:
        """There is no one length, but one per row, `[batch, 1]`.

        Few models ask although they are given position ids. Those that do anything else than add
        it to positions do not pass the rehearsal.
        """
        return self.batch.places[:, :1]

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Tokens a slot can hold."""
        return self.max_len

    # ------------------------------------------------------------------------------ states

    def has_previous_state(
        self, layer_idx: int | None = None, state_idx: int | None = None
    ) -> bool:
        """Whether requests have been seen before."""
        return not self.fresh

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """The slots' convolution state; None for fresh requests."""
        return None if self.fresh else self._state(f"{layer_idx}.conv.{state_idx}")

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """The slots' recurrent state; None for fresh requests."""
        return None if self.fresh else self._state(f"{layer_idx}.recurrent.{state_idx}")

    def update_conv_state(
        self,
        conv_states: torch.Tensor,
        layer_idx: int,
        state_idx: int = 0,
        **kwargs: object,
    ) -> torch.Tensor:
        """Append to the convolution state, and return it with what was there before."""
        name = f"{layer_idx}.conv.{state_idx}"
        width = self.tables[name].shape[-1]
        if self.fresh:
            missing = max(width - conv_states.shape[-1], 0)
            whole = torch.nn.functional.pad(conv_states, (missing, 0))
        else:
            whole = torch.cat([self._state(name), conv_states], dim=-1)
        self.states[name] = whole[..., -width:]
        return whole

    def update_recurrent_state(
        self,
        recurrent_states: torch.Tensor,
        layer_idx: int,
        state_idx: int = 0,
        **kwargs: object,
    ) -> torch.Tensor:
        """Replace the recurrent state."""
        self.states[f"{layer_idx}.recurrent.{state_idx}"] = recurrent_states
        return recurrent_states

    def _state(self, name: str) -> torch.Tensor:
        if name not in self.states:
            self.states[name] = self.tables[name].index_select(0, self.batch.slots)
        return self.states[name]

    def commit(self) -> None:
        """Write the states back."""
        for name, state in self.states.items():
            table = self.tables[name]
            table.index_copy_(0, self.batch.slots, state.to(table.dtype))


class _Probe(Cache):  # type: ignore[misc]  # as above
    """Notes what a model writes to its cache, and gives it back."""

    def __init__(self, layers: list[object]) -> None:
        super().__init__(layers=layers)
        self.seen: dict[str, torch.Tensor] = {}

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *_: object,
        **__: object,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.seen[f"{layer_idx}.keys"] = key_states
        self.seen[f"{layer_idx}.values"] = value_states
        return key_states, value_states

    def update_indexer(self, indexer_key_states: torch.Tensor, layer_idx: int) -> torch.Tensor:
        self.seen[f"{layer_idx}.index_keys"] = indexer_key_states
        return indexer_key_states

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def has_previous_state(
        self, layer_idx: int | None = None, state_idx: int | None = None
    ) -> bool:
        return False

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> None:
        return None

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> None:
        return None

    def update_conv_state(
        self,
        conv_states: torch.Tensor,
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **_: object,
    ) -> torch.Tensor:
        width = conv_states.shape[-1] if conv_kernel_size is None else conv_kernel_size
        state = conv_states.new_zeros((*conv_states.shape[:-1], width))
        self.seen[f"{layer_idx}.conv.{state_idx}"] = state
        missing = max(width - conv_states.shape[-1], 0)
        return torch.nn.functional.pad(conv_states, (missing, 0))

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **_: object
    ) -> torch.Tensor:
        self.seen[f"{layer_idx}.recurrent.{state_idx}"] = recurrent_states
        return recurrent_states


def plan_cache(
    model: torch.nn.Module, slots: int, max_len: int, *, compiled: bool = True
) -> CachePlan:
    """The cache tensors that a model needs.

    Which tensors a layer keeps and their shapes depend on the architecture, so the model itself is
    asked, by a call with one token.

    Args:
        model: A `transformers` causal language model; its parameters need no storage.
        slots: Number of requests held at a time.
        max_len: Tokens that each can reach.
        compiled: Whether Dynamo goes through the call, as it will when programs are captured, so
            that nothing is computed and parameters need no bytes.

    Raises:
        RolemeshError: RM007 if the model takes no cache or cannot run with one of ours.
    """
    probe: Callable[..., dict[str, torch.Tensor]] = _ProbeModel(model, max_len)
    token = torch.zeros((1, 1), dtype=torch.long, device=next(model.parameters()).device)
    wrap: Callable[..., Callable[..., dict[str, torch.Tensor]]] = torch.compile
    if compiled:
        probe = wrap(
            probe, backend=_shapes_only, fullgraph=True, dynamic=False, isolate_recompiles=True
        )
    try:
        with torch.no_grad():
            written = probe(token)
    except TorchDynamoException as error:
        raise RolemeshError(
            "RM007",
            f"{type(model).__name__} does not run with a cache of slots",
            where="rolemesh.Engine",
            why="\n".join(str(error).splitlines()[:4]),
            fix="serve another architecture; docs/engine.md says what a model must do",
        ) from error
    if not written:
        raise RolemeshError(
            "RM007",
            f"{type(model).__name__} writes nothing to the cache it is given",
            where="rolemesh.Engine",
            why="decoding needs the keys and values of the tokens before",
            fix="use a decoder model, or set is_decoder in its configuration",
        )
    tensors = {
        name: _plan(name, tensor, slots + 1, max_len) for name, tensor in sorted(written.items())
    }
    return CachePlan(tensors, slots, max_len)


class _ProbeModel(torch.nn.Module):
    """A model as a function from tokens to what it writes to its cache."""

    def __init__(self, model: torch.nn.Module, max_len: int) -> None:
        super().__init__()
        self.model = model
        self.cache_argument = cache_argument(model, "rolemesh.Engine")
        self.layers = cache_layers(model, max_len)

    def forward(self, token_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        probe = _Probe(self.layers)
        self.model(token_ids, use_cache=True, **{self.cache_argument: probe})
        return probe.seen


def _shapes_only(gm: fx.GraphModule, inputs: list[object]) -> Callable[..., list[torch.Tensor]]:
    """A Dynamo backend whose functions return tensors without bytes and compute nothing."""
    (output,) = [node for node in gm.graph.nodes if node.op == "output"]
    values = [node.meta["example_value"] for node in output.args[0]]

    def run(*_: object) -> list[torch.Tensor]:
        return [torch.empty(v.shape, dtype=v.dtype, device="meta") for v in values]

    return run


def _plan(name: str, seen: torch.Tensor, rows: int, max_len: int) -> TensorPlan:
    kind = name.split(".")[1]
    if kind in ("conv", "recurrent"):
        return TensorPlan((rows, *seen.shape[1:]), seen.dtype, None)
    token_dim = 1 if kind == "index_keys" else 2
    shape = (rows, *seen.shape[1:token_dim], max_len, *seen.shape[token_dim + 1 :])
    return TensorPlan(shape, seen.dtype, token_dim)


def cache_layers(model: torch.nn.Module, max_len: int) -> list[object]:
    """The library's cache layers of a model, without tensors.

    Raises:
        RolemeshError: RM007 if a layer is of a kind that slots do not hold.
    """
    try:
        return list(StaticCache(config=model.config, max_cache_len=max_len).layers)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RolemeshError(
            "RM007",
            f"{type(model).__name__} has cache layers of an unknown kind",
            where="rolemesh.Engine",
            why=f"{type(error).__name__}: {error}",
            fix="serve another architecture",
        ) from error
