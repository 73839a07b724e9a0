"""The cache of a serving engine: a fixed number of request slots in tensors that never move.

A slot is a row of every cache tensor: `[slots + 1, heads, length, width]` for keys and values,
`[slots + 1, length, width]` for index keys, `[slots + 1, ...]` for the states of layers without a
token dim (convolution and recurrent states). Which request writes where is data, a `Batch` of index
tensors that comes with each call, so that one captured program serves every step.

`plan_cache` in `rolemesh.compiler.engine.view` asks the model itself, on fake tensors, which
tensors its layers keep. `SlotView` there is the cache as the model sees it during a call.

Invariants:

* The last row is scratch: pads write there, and nothing that a request sees is read from it.
* A row beyond a request's length is never attended to, since masks hide it
  (`rolemesh.compiler.engine.masks`), and it is finite: a slot is zeroed when a request gets it.
* Every tensor exists before a program is captured, and is an input that the program mutates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

__all__ = ["Batch", "CachePlan", "Tables", "TensorPlan"]

Tables = dict[str, torch.Tensor]
"""The cache tensors of one replica by name, for example `0.keys` for those of layer 0."""


class Batch(NamedTuple):
    """What one call of the model computes, as index tensors.

    Attributes:
        token_ids: `[batch, tokens]`; pads have any valid id.
        position_ids: `[batch, tokens]`, what the model's position embedding sees.
        places: `[batch, tokens]`, where in its slot each token's key is written; 0 for pads.
        rows: `[batch, tokens]`, the row that each token's key is written to; the scratch row for
            pads.
        slots: `[batch]`, the row that each request attends over; the scratch row for a pad. It is
            the one tensor without a token dim, and stands last.
    """

    token_ids: torch.Tensor
    position_ids: torch.Tensor
    places: torch.Tensor
    rows: torch.Tensor
    slots: torch.Tensor

    @property
    def size(self) -> tuple[int, int]:
        """Number of rows, and of tokens per row."""
        rows, tokens = self.token_ids.shape
        return rows, tokens


@dataclass(frozen=True)
class TensorPlan:
    """One cache tensor, before it is made.

    Attributes:
        shape: Its logical shape, with the row dim first.
        dtype: Its dtype.
        token_dim: The dim that holds a request's tokens; None for a state.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    token_dim: int | None


@dataclass(frozen=True)
class CachePlan:
    """The cache tensors of a model for a number of slots.

    Attributes:
        tensors: By name.
        slots: Number of requests that can be held; the tensors have one row more.
        max_len: Tokens that each can reach.
    """

    tensors: Mapping[str, TensorPlan]
    slots: int
    max_len: int

    @property
    def scratch(self) -> int:
        """The row that pads write to."""
        return self.slots

    @property
    def has_states(self) -> bool:
        """Whether a layer keeps a state that a pad token would change."""
        return any(plan.token_dim is None for plan in self.tensors.values())
