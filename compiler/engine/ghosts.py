"""A model without storage: parameters that have a shape, a dtype and a device, but no bytes.

`build_model` makes a model from its configuration without ever holding its initial weights.
Buffers, which models compute (rotary frequencies, for example) rather than load, are real.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["build_model", "ghost"]


def ghost(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of a shape without bytes, like those that `rolemesh.runtime.store` leaves behind."""
    tensor = torch.empty(tuple(shape), dtype=dtype, device=device)
    tensor.untyped_storage().resize_(0)
    # Writing to a ghost raises instead of crashing the process.
    torch._C._set_throw_on_mutable_data_ptr(tensor)
    return tensor


def build_model(
    config: PreTrainedConfig, dtype: torch.dtype | None, device: torch.device, *, ghosts: bool
) -> torch.nn.Module:
    """The causal language model of a configuration, in eval mode, with parameters to be loaded.

    At no time has more than one parameter that is given up again memory.

    Args:
        config: The configuration.
        dtype: Data type of the parameters; None for the configuration's own.
        device: Device of parameters and buffers.
        ghosts: Whether parameters are ghosts; otherwise they have memory, not yet written to.
    """
    from transformers import AutoModelForCausalLM

    make = ghost if ghosts else _uninitialised
    with _parameters_on_meta():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype or config.dtype)
    made: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:  # tied parameters stay one
                value = make(parameter.shape, parameter.dtype, device)
                made[id(parameter)] = torch.nn.Parameter(value, requires_grad=False)
            module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    return model.eval()


def _uninitialised(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device=device)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Give up the memory of every parameter as soon as a module gets it."""

    def to_meta(
        module: torch.nn.Module, name: str, parameter: torch.nn.Parameter
    ) -> torch.nn.Parameter | None:
        if parameter.is_meta:
            return None
        return torch.nn.Parameter(parameter.detach().to("meta"), requires_grad=False)

    # torch declares hooks that return nothing, and uses what they return.
    handle = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()
