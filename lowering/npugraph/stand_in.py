"""What torchair's capture mode needs of torch_npu, where there is no NPU.

It adds to offline NPU mode (`lowering.ge.npu_device`) the names that capture uses. Graphs are
`capture.Recording`s; streams, events and limits of cores have no meaning on a CPU and do nothing.
Each recording owns its memory, so the states of a device's pool have no meaning either.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import sys
from collections.abc import Mapping
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec

import torch
from torch.utils._python_dispatch import _disable_current_modes

from rolemesh.lowering.npugraph.capture import Capturer

__all__ = ["install_capture"]


@functools.cache
def install_capture() -> Capturer:
    """Add the names to the `torch_npu` of offline NPU mode, once.

    Returns:
        What captures graphs.
    """
    capturer = Capturer()
    torch_npu = sys.modules["torch_npu"]
    core = module_from_spec(ModuleSpec("torch_npu._C", None))
    vars(core).update(
        {
            "_npu_getCheckpointState": lambda device, pool: None,
            "_npu_setCheckpointPoolState": lambda device, state, stale, alive: None,
            "_construct_storage_from_data_pointer": _storage_at,
            "_construct_NPU_Tensor_From_Storage_And_Metadata": _tensor_over,
        }
    )
    sys.modules[core.__name__] = core
    vars(torch_npu)["_C"] = core
    numbers = itertools.count()
    default = _Stream(next(numbers))
    vars(torch_npu.npu).update(
        {
            "NPUGraph": capturer.recording,
            "graph": capturer.capturing,
            "graph_pool_handle": capturer.pool,
            "Stream": lambda device=None, priority=0: _Stream(next(numbers)),
            "Event": _Event,
            "current_stream": lambda device=None: default,
            "get_stream_limit": lambda stream: {"cube_core_num": 0, "vector_core_num": 0},
            "set_stream_limit": lambda stream, cube, vector: None,
            "empty_cache": lambda: None,
        }
    )
    return capturer


class _Event:
    def record(self, stream: object = None) -> None:
        """Mark a place in a stream."""

    def wait(self, stream: object = None) -> None:
        """Wait for it."""


class _Stream:
    def __init__(self, stream_id: int) -> None:
        self.stream_id = stream_id


def _storage_at(address: int, device: torch.device, size: int) -> torch.UntypedStorage:
    """A storage over memory that someone else owns."""
    if size == 0:
        return torch.UntypedStorage(0)
    memory = (ctypes.c_char * size).from_address(address)
    with _disable_current_modes():
        return torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()


def _tensor_over(metadata: Mapping[str, object], storage: torch.UntypedStorage) -> torch.Tensor:
    dtype = metadata["dtype"]
    assert isinstance(dtype, torch.dtype)
    with _disable_current_modes():  # called while ops are recorded
        return torch.empty(0, dtype=dtype).set_(
            storage,  # type: ignore[call-overload]
            metadata["storage_offset"],
            metadata["size"],
            metadata["stride"],
        )
