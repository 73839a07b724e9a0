"""Which inputs, outputs and attributes a GE op has: Ascend IR, as CANN registers it.

Without CANN the definitions come from torchair itself, which carries each one as text beside the
function that builds the op. The ops that torchair builds without carrying their definition are in
`_MISSING`, in the same notation, after the arguments of their converters.

Invariants:

* Reading finds where each op's text lies; a text is taken apart when it is first asked for.
* Order is that of the definition: torchair binds positional arguments by it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

__all__ = ["IrDefinition", "IrDefinitions"]


@dataclass(frozen=True)
class IrDefinition:
    """The signature of a GE op.

    Attributes:
        name: The op type.
        inputs: For each input its name and kind: `required`, `optional` or `dynamic`.
        outputs: Likewise; an output is `required` or `dynamic`.
        attributes: For each attribute its name and type, such as `VT_INT`.
    """

    name: str
    inputs: tuple[tuple[str, str], ...]
    outputs: tuple[tuple[str, str], ...]
    attributes: tuple[tuple[str, str], ...]


class IrDefinitions(Mapping[str, IrDefinition]):
    """Definitions by op type."""

    def __init__(self, text: str) -> None:
        """Find the definitions in `text`; anything between them is skipped.

        Args:
            text: Any number of `REG_OP(Name).INPUT(...)...` texts, such as the source of
                `torchair._ge_concrete_graph.auto_generated_ge_raw_ops`.
        """
        self._texts = {
            found.group(1): found.group(2)
            for source in (_MISSING, text)
            for found in _DEFINITION.finditer(source)
        }
        self._parsed: dict[str, IrDefinition] = {}

    @classmethod
    def read(cls, torchair: Path) -> IrDefinitions:
        """The definitions that a torchair carries.

        Args:
            torchair: The folder of its package.

        Raises:
            OSError: If it cannot be read.
        """
        path = torchair / "_ge_concrete_graph" / "auto_generated_ge_raw_ops.py"
        return cls(path.read_text(encoding="utf-8"))

    def __getitem__(self, name: str) -> IrDefinition:
        parsed = self._parsed.get(name)
        if parsed is None:
            parsed = self._parsed[name] = _parse(name, self._texts[name])
        return parsed

    def __iter__(self) -> Iterator[str]:
        return iter(self._texts)

    def __len__(self) -> int:
        return len(self._texts)


def _parse(name: str, text: str) -> IrDefinition:
    inputs: list[tuple[str, str]] = []
    outputs: list[tuple[str, str]] = []
    attributes: list[tuple[str, str]] = []
    for prefix, word, field, kind in _FIELD.findall(text):
        if word == "INPUT":
            inputs.append((field, _KINDS[prefix]))
        elif word == "OUTPUT":
            outputs.append((field, _KINDS[prefix]))
        else:
            attributes.append((field, _TYPES.get(kind.lower(), "VT_UNKNOWN")))
    return IrDefinition(name, tuple(inputs), tuple(outputs), tuple(attributes))


_DEFINITION = re.compile(r'REG_OP\((\w+)\)(.*?)(?="""|REG_OP\(|\Z)', re.DOTALL)

# Some texts misspell ATTR, and one its type.
_FIELD = re.compile(
    r"\.(OPTIONAL_|DYNAMIC_|REQUIRED_|)(INPUT|OUTPUT|ATTR|ATRR)\(\s*(\w+)\s*(?:,\s*(\w+))?"
)

_KINDS: Mapping[str, str] = MappingProxyType(
    {"": "required", "REQUIRED_": "required", "OPTIONAL_": "optional", "DYNAMIC_": "dynamic"}
)

_TYPES: Mapping[str, str] = MappingProxyType(
    {
        "int": "VT_INT",
        "float": "VT_FLOAT",
        "string": "VT_STRING",
        "bool": "VT_BOOL",
        "type": "VT_DATA_TYPE",
        "tensor": "VT_TENSOR",
        "listint": "VT_LIST_INT",
        "listfloat": "VT_LIST_FLOAT",
        "liststring": "VT_LIST_STRING",
        "listbool": "VT_LIST_BOOL",
        "listtype": "VT_LIST_DATA_TYPE",
        "listlistint": "VT_LIST_LIST_INT",
        "listlistfloat": "VT_LIST_LIST_FLOAT",
    }
)
"""Type names of a definition's text, in lower case, to those of GE's protocol."""

_MISSING = """
REG_OP(LightningIndexer)
    .INPUT(query) .INPUT(key) .INPUT(weights)
    .OPTIONAL_INPUT(actual_seq_lengths_query) .OPTIONAL_INPUT(actual_seq_lengths_key)
    .OPTIONAL_INPUT(block_table)
    .OUTPUT(sparse_indices) .OUTPUT(sparse_values)
    .ATTR(layout_query, String) .ATTR(layout_key, String)
    .ATTR(sparse_count, Int) .ATTR(sparse_mode, Int)
    .ATTR(pre_tokens, Int) .ATTR(next_tokens, Int) .ATTR(return_values, Bool)
REG_OP(QuantLightningIndexer)
    .INPUT(query) .INPUT(key) .INPUT(weights)
    .INPUT(query_dequant_scale) .INPUT(key_dequant_scale)
    .OPTIONAL_INPUT(actual_seq_lengths_query) .OPTIONAL_INPUT(actual_seq_lengths_key)
    .OPTIONAL_INPUT(block_table)
    .OUTPUT(sparse_indices)
    .REQUIRED_ATTR(query_quant_mode, Int) .REQUIRED_ATTR(key_quant_mode, Int)
    .ATTR(layout_query, String) .ATTR(layout_key, String)
    .ATTR(sparse_count, Int) .ATTR(sparse_mode, Int)
    .ATTR(pre_tokens, Int) .ATTR(next_tokens, Int)
REG_OP(SparseFlashAttention)
    .INPUT(query) .INPUT(key) .INPUT(value) .INPUT(sparse_indices)
    .OPTIONAL_INPUT(block_table)
    .OPTIONAL_INPUT(actual_seq_lengths_query) .OPTIONAL_INPUT(actual_seq_lengths_kv)
    .OPTIONAL_INPUT(query_rope) .OPTIONAL_INPUT(key_rope) .OPTIONAL_INPUT(sinks)
    .OUTPUT(attention_out) .OUTPUT(softmax_max) .OUTPUT(softmax_sum)
    .REQUIRED_ATTR(scale_value, Float) .ATTR(sparse_block_size, Int)
    .ATTR(layout_query, String) .ATTR(layout_kv, String) .ATTR(sparse_mode, Int)
    .ATTR(pre_tokens, Int) .ATTR(next_tokens, Int)
    .ATTR(attention_mode, Int) .ATTR(return_softmax_lse, Bool)
REG_OP(KvQuantSparseFlashAttention)
    .INPUT(query) .INPUT(key) .INPUT(value) .INPUT(sparse_indices)
    .OPTIONAL_INPUT(key_dequant_scale) .OPTIONAL_INPUT(value_dequant_scale)
    .OPTIONAL_INPUT(block_table)
    .OPTIONAL_INPUT(actual_seq_lengths_query) .OPTIONAL_INPUT(actual_seq_lengths_kv)
    .OPTIONAL_INPUT(sinks)
    .OUTPUT(attention_out)
    .REQUIRED_ATTR(scale_value, Float)
    .REQUIRED_ATTR(key_quant_mode, Int) .REQUIRED_ATTR(value_quant_mode, Int)
    .ATTR(sparse_block_size, Int) .ATTR(layout_query, String) .ATTR(layout_kv, String)
    .ATTR(sparse_mode, Int) .ATTR(pre_tokens, Int) .ATTR(next_tokens, Int)
    .ATTR(attention_mode, Int) .ATTR(quant_scale_repo_mode, Int)
    .ATTR(tile_size, Int) .ATTR(rope_head_dim, Int)
"""
"""Definitions that torchair does not carry. Kinds and types only; defaults are the converters'."""
