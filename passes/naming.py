"""Short names of values and ops in reasons, for people."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from rolemesh.compiler.ir.program import Program

__all__ = ["op_label", "op_name", "stored_names", "value_label"]

aten = torch.ops.aten
_SAME_DATA = frozenset(
    {
        aten.t.default,
        aten.transpose.int,
        aten.permute.default,
        aten.reshape.default,
        aten.unsqueeze.default,
        aten._to_copy.default,
    }
)


def stored_names(program: Program) -> dict[fx.Node, str]:
    """Names of stored inputs: the last two parts of a weight's, the whole path of a cache."""
    return {
        node: ".".join(entry.name.split(".")[-2:]) if not entry.mutated else entry.name
        for node, entry in zip(program.placeholders, program.inputs, strict=True)
        if entry.is_state
    }


def value_label(node: fx.Node, names: Mapping[fx.Node, str]) -> str:
    """The stored tensor that a value is a view of, or the value's own name."""
    source = node
    while source.target in _SAME_DATA and source not in names:
        (source,) = source.all_input_nodes[:1]
    return names.get(source, f"%{node.name}")


def op_name(node: fx.Node) -> str:
    """The op without namespace and overload."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.rpartition("::")[2]
    return str(target)


def op_label(node: fx.Node, names: Mapping[fx.Node, str]) -> str:
    """An op with the stored tensor it works on, or with its own name: `mm(o_proj.weight)`."""
    for operand in node.all_input_nodes:
        label = value_label(operand, names)
        if not label.startswith("%"):
            return f"{op_name(node)}({label})"
    return f"{op_name(node)}(%{node.name})"
