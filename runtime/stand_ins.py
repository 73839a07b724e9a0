"""Stand-ins: the parameters that modules hold while Dynamo traces, in the place of DTensors.

A captured graph is one of whole tensors, whatever becomes of them later. Parameters are DTensors
from the first training step on, and a call that needs another graph (another shape, evaluation)
traces them again. So each time Dynamo starts to trace, the whole parameters of before come back,
which have shapes and no bytes, and the DTensors when it is done.

Invariants: outside of Dynamo's tracing, modules hold DTensors. A module that is gone takes its
stand-ins with it. `torch._dynamo.reset` forgets them.
"""

from __future__ import annotations

import torch
from torch import nn
from torch._dynamo.callback import CallbackArgs, callback_handler
from torch.distributed.tensor import DTensor
from torch.utils.weak import WeakIdKeyDictionary

from rolemesh.runtime.holder import Holder

__all__ = ["stand_in"]


class _StandIns:
    """Puts stand-ins in the place of DTensors, and DTensors back."""

    def __init__(self) -> None:
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()  # module to stand-ins by name
        self._away: list[tuple[nn.Module, str, nn.Parameter]] = []

    def add(self, holder: Holder, tensor: nn.Parameter) -> None:
        for module, key in holder.places:
            self._known.setdefault(module, {})[key] = tensor

    def enter(self, _: CallbackArgs) -> None:
        for module, tensors in self._known.items():
            for key, tensor in tensors.items():
                now = module._parameters.get(key)
                if now is not None and _is_sharded(now) and now.shape == tensor.shape:
                    tensor.requires_grad_(now.requires_grad)
                    self._away.append((module, key, now))
                    module._parameters[key] = tensor

    def leave(self, _: CallbackArgs) -> None:
        while self._away:
            module, key, tensor = self._away.pop()
            module._parameters[key] = tensor


def _is_sharded(parameter: torch.Tensor) -> bool:
    """Whether it is a DTensor; type checkers hold that no `Parameter` is."""
    return isinstance(parameter, DTensor)


def stand_in(holder: Holder, tensor: nn.Parameter) -> None:
    """Let a parameter stand in, whenever Dynamo traces, for the DTensor that took its place.

    Args:
        holder: Where the DTensor is kept.
        tensor: The parameter of before.
    """
    methods = (getattr(callback, "__self__", None) for callback in callback_handler.start_callbacks)
    known = next((one for one in methods if isinstance(one, _StandIns)), None)
    if known is None:
        known = _StandIns()
        callback_handler.register_start_callback(known.enter)
        callback_handler.register_end_callback(known.leave)
    known.add(holder, tensor)
