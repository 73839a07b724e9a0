"""Programs, and tensors with them, as the content of one entry of the cache.

    <length of the JSON in 8 bytes, least first> <JSON> <safetensors, if there are tensors>

Invariant: nothing is unpickled, and no text is run as code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor

from rolemesh.compiler.ir.program import Program
from rolemesh.compiler.ir.serial import (
    decode_program,
    decode_signature,
    encode_head,
    encode_layouts,
    encode_node,
)
from rolemesh.compiler.ir.serial_values import Json
from rolemesh.lowering.composite.define import define_composite_ops
from rolemesh.passes.base import collection_paused

__all__ = [
    "decode_entry",
    "encode_entry",
    "program_from",
    "program_json",
    "signature_from",
    "tensor_bytes",
    "tensors_from",
]


def program_json(program: Program) -> dict[str, Json]:
    """A Program as JSON.

    Raises:
        TypeError: If an argument cannot be written.
    """
    nodes = [node for node in program.graph.nodes if node.op != "output"]
    return {
        "head": encode_head(program),
        "nodes": [encode_node(node) | encode_layouts(program, node) for node in nodes],
    }


def program_from(data: Mapping[str, Json]) -> Program:
    """The inverse of `program_json`.

    Raises:
        ValueError: If the data is no Program.
    """
    head, nodes = data["head"], data["nodes"]
    define_composite_ops()
    with collection_paused():  # it makes many objects, and no garbage
        return decode_program(cast(Any, head), cast(Any, nodes))


def signature_from(data: Mapping[str, Json]) -> Program:
    """What `program_from` gives, without its ops.

    Raises:
        ValueError: If the data is no Program.
    """
    return decode_signature(cast(Any, data["head"]), cast(Any, data["nodes"]))


def encode_entry(data: Mapping[str, Json], tensors: Sequence[Tensor] = ()) -> bytes:
    """JSON and tensors as bytes.

    Raises:
        TypeError: If something cannot be written.
    """
    devices: list[Json] = [str(tensor.device) for tensor in tensors]
    text = json.dumps([data, devices], separators=(",", ":")).encode()
    content = len(text).to_bytes(8, "little") + text
    if tensors:
        content += tensor_bytes(tensors)
    return content


def tensor_bytes(tensors: Sequence[Tensor]) -> bytes:
    """Tensors as safetensors, named by their numbers.

    Raises:
        TypeError: If safetensors cannot hold them.
    """
    from safetensors.torch import save

    plain = {str(i): t.detach().cpu().clone().contiguous() for i, t in enumerate(tensors)}
    try:
        return save(plain)
    except (ValueError, KeyError, RuntimeError) as error:
        raise TypeError(str(error)) from error


def decode_entry(content: bytes) -> tuple[dict[str, Json], tuple[Tensor, ...]]:
    """The inverse of `encode_entry`.

    Raises:
        ValueError: If the bytes are not of that form.
    """
    end = 8 + int.from_bytes(content[:8], "little")
    data, devices = json.loads(content[8:end])
    return data, tensors_from(content[end:], devices)


def tensors_from(content: bytes, devices: Sequence[str]) -> tuple[Tensor, ...]:
    """The inverse of `tensor_bytes`; of no devices, no tensors.

    Args:
        content: The bytes.
        devices: Where each tensor goes.
    """
    if not devices:
        return ()
    from safetensors.torch import load

    named = load(content)
    return tuple(named[str(index)].to(device) for index, device in enumerate(devices))
