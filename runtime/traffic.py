"""Recording the traffic of real collectives, to compare with what the compiler says.

Both count by the convention of `compiler.ir.traffic`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from rolemesh.compiler.ir.traffic import received_bytes
from rolemesh.lowering.routed_ops import received_bytes_of

__all__ = ["Record", "record_traffic"]


class Record(NamedTuple):
    """One collective that this rank took part in.

    Attributes:
        op: `all_gather`, `reduce_scatter`, `all_reduce`, `all_to_all`, `broadcast`, `dispatch` or
            `combine`.
        received: Bytes this rank received; 0 on the owner in a broadcast.
        ranks: Size of the group.
    """

    op: str
    received: float
    ranks: int


@contextmanager
def record_traffic() -> Iterator[list[Record]]:
    """Record every functional collective that this thread issues, compiled graphs included.

    Yields:
        A list that grows as collectives are issued.
    """
    mode = _Recorder()
    with mode:
        yield mode.records


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.records: list[Record] = []

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "_c10d_functional":
            op = _OPS.get(name.removesuffix("_out").removesuffix("_"))
            if op is not None:
                self.records.append(_record(op, func, args, kwargs or {}))
        elif namespace == "rolemesh" and name in ("dispatch", "combine"):
            given = _named(func, args, kwargs or {})
            parts = given["parts"]
            assert isinstance(parts, int)
            self.records.append(Record(name, received_bytes_of(func, given), parts))
        call: Callable[..., object] = func
        return call(*args, **(kwargs or {}))


_OPS: Mapping[str, str] = {
    "all_gather_into_tensor": "all_gather",
    "all_gather_into_tensor_coalesced": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "reduce_scatter_tensor_coalesced": "reduce_scatter",
    "all_reduce": "all_reduce",
    "all_reduce_coalesced": "all_reduce",
    "all_to_all_single": "all_to_all",
    "broadcast": "broadcast",
}


def _record(
    op: str, func: torch._ops.OpOverload, args: tuple[object, ...], kwargs: Mapping[str, object]
) -> Record:
    given = _named(func, args, kwargs)
    group = dist.distributed_c10d._resolve_process_group(given["group_name"])  # type: ignore[arg-type]
    wires = given.get("input", given.get("inputs"))
    tensors = wires if isinstance(wires, list | tuple) else [wires]
    size = sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))
    ranks = group.size()
    received = received_bytes(op, size, ranks)
    if op == "broadcast" and given["src"] == group.rank():
        received = 0
    if op == "all_to_all":  # a rank may have no block for itself
        sent, kept = given["input_split_sizes"], given["output_split_sizes"]
        assert isinstance(sent, list | tuple)
        assert isinstance(kept, list | tuple)
        received = size // sum(sent) * (sum(kept) - kept[group.rank()])
    return Record(op, received, ranks)


def _named(
    func: torch._ops.OpOverload, args: tuple[object, ...], kwargs: Mapping[str, object]
) -> dict[str, object]:
    names = [argument.name for argument in func._schema.arguments]
    return {**dict(zip(names, args, strict=False)), **kwargs}
