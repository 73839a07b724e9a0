"""The naming of `transformers` models, from the library's own tables of conversions.

`transformers` stores checkpoints in the form of the hub and converts them while it loads: modules
have other names there, experts are stored one by one and become one tensor, packed weights are cut.
Here its tables and its operations are applied, in the order of its own loader
(`transformers.core_model_loading.convert_and_load_state_dict_in_model`), so that no architecture
has code here. Types are found by converting tensors without bytes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rolemesh.compiler.ir.tensor import TensorType
from rolemesh.runtime.checkpoint.files import Entry
from rolemesh.runtime.checkpoint.naming import Conversion, Converted, Sources

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightConverter, WeightRenaming

__all__ = ["HubNaming"]


@dataclass
class _Group:
    """Tensors of a checkpoint that are converted together.

    Attributes:
        converter: How, a table entry that is copied before use; None if they are only renamed.
        members: The tensors, each with the pattern of the converter that its name matches.
    """

    converter: WeightConverter | None
    members: list[tuple[Entry, str]]


class HubNaming:
    """Relates the hub's names to those of one `transformers` model.

    Args:
        model: The model. Its tensors need no bytes.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def converted(self, entries: Mapping[str, Entry], wanted: Set[str]) -> Converted:
        """The conversions that `transformers` would do for this checkpoint."""
        groups, unknown = self._grouped(entries)
        conversions: list[Conversion] = []
        failed: dict[str, str] = {}
        for first, group in groups.items():
            if group.converter is None and len(group.members) > 1:
                names = ", ".join(entry.name for entry, _ in group.members)
                failed[first] = f"several tensors are this one: {names}"
                continue
            try:
                conversion = self._conversion(first, group)
            except (AttributeError, IndexError, KeyError, RuntimeError, ValueError) as error:
                failed[first] = str(error).partition("\n")[0]
                continue
            if wanted & conversion.results.keys():
                conversions.append(conversion)
        _, refused = self._adjusted(set(), set(unknown.values()))
        extra = tuple(name for name, renamed in unknown.items() if renamed in refused)
        return Converted(tuple(conversions), extra, failed)

    def stored_as(self, tensors: Mapping[str, TensorType]) -> Mapping[str, TensorType]:
        """What `transformers` would save for the tensors."""
        from transformers.core_model_loading import revert_weight_conversion

        empty = {
            name: torch.empty(kind.shape, dtype=kind.dtype, device="meta")
            for name, kind in tensors.items()
        }
        try:
            saved = revert_weight_conversion(self._model, empty)
        except (AttributeError, IndexError, KeyError, RuntimeError, ValueError):
            return tensors  # some are stored together with others that are not among these
        return {name: TensorType(tuple(v.shape), v.dtype) for name, v in saved.items()}

    def may_lack(self, name: str) -> bool:
        """Whether the model's class lets checkpoints leave the tensor out."""
        missing, _ = self._adjusted({name}, set())
        return not missing

    def _grouped(self, entries: Mapping[str, Entry]) -> tuple[dict[str, _Group], dict[str, str]]:
        """Groups by the first tensor they give; unknown names with what they were renamed to."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )

        transforms = get_model_conversion_mapping(self._model)
        renamings: list[WeightRenaming] = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        by_pattern = {p: converter for converter in converters for p in converter.source_patterns}
        prefix, expected = self._model.base_model_prefix, self._model.state_dict()
        groups: dict[str, _Group] = {}
        unknown: dict[str, str] = {}
        for name in sorted(entries, key=dot_natural_key):
            renamed, pattern = rename_source_key(name, renamings, converters, prefix, expected)
            if renamed not in expected and name in expected:
                renamed, pattern = rename_source_key(name, [], [], prefix, expected)
            if renamed not in expected:
                unknown[name] = renamed
                continue
            converter = None if pattern is None else by_pattern[pattern]
            group = groups.setdefault(renamed, _Group(converter, []))
            group.members.append((entries[name], pattern or name))
        return groups, unknown

    def _conversion(self, first: str, group: _Group) -> Conversion:
        sources = tuple(entry for entry, _ in group.members)
        converter = group.converter
        if converter is None:
            return Conversion(sources, {first: sources[0].type}, None)
        patterns = {entry.name: pattern for entry, pattern in group.members}

        def convert(sources: Sources) -> Mapping[str, torch.Tensor]:
            own = copy.deepcopy(converter)
            while sources:
                entry, tensor = sources.pop(0)
                own.add_tensor(first, entry.name, patterns[entry.name], tensor)
                del tensor  # the conversion frees what it no longer needs
            made = own.convert(first, model=self._model, config=self._model.config)
            return {name: v[0] if isinstance(v, list) else v for name, v in made.items()}

        made = convert(
            [(e, torch.empty(e.type.shape, dtype=e.type.dtype, device="meta")) for e in sources]
        )
        results = {name: TensorType(tuple(v.shape), v.dtype) for name, v in made.items()}
        return Conversion(sources, results, convert, _rows(group, converter, results))

    def _adjusted(self, missing: set[str], unexpected: set[str]) -> tuple[set[str], set[str]]:
        """What remains after the exceptions that the model's class makes."""
        from transformers.utils.loading_report import LoadStateDictInfo

        info = LoadStateDictInfo(missing, unexpected, set(), [], {}, set())
        self._model._adjust_missing_and_unexpected_keys(info)
        return info.missing_keys, info.unexpected_keys


def _rows(
    group: _Group, converter: WeightConverter, results: Mapping[str, TensorType]
) -> tuple[tuple[Entry, ...], ...]:
    """The sources of each row of the one result; empty if rows do not convert one by one.

    They do if tensors of one form are stacked on a new first dim, and then only joined along
    others.
    """
    from transformers.core_model_loading import Concatenate, MergeModulelist

    stack, *joins = converter.operations
    if type(stack) is not MergeModulelist or stack.dim != 0 or len(results) != 1:
        return ()
    if not all(type(join) is Concatenate and join.dim > 0 for join in joins):
        return ()
    lists: dict[str, list[Entry]] = {}
    for entry, pattern in group.members:
        lists.setdefault(pattern, []).append(entry)
    return tuple(zip(*lists.values(), strict=True))
