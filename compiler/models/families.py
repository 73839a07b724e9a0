"""Families of `transformers` models: which types each has, and how the library builds one.

The table says what the command line and the tests can build: causal language models, encoders and
vision-language models. No architecture is named here; the types are the library's own tables.

Invariant: `transformers` is imported inside functions only.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rolemesh.compiler.ir.errors import RolemeshError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = [
    "CAUSAL_LM",
    "ENCODER",
    "FAMILIES",
    "VISION",
    "Family",
    "require_transformers",
    "suggestion",
]


@dataclass(frozen=True)
class Family:
    """Models that are built and called alike.

    Attributes:
        key: What stands before the slash in `hf:KEY/TYPE`; empty for `hf:TYPE`.
        name: What one of its types is, for people.
        mapping: The library's table of the types, in `modeling_auto`.
        auto_class: The library's class that builds a model from a configuration.
        decodes: Whether its models generate, over a cache. Families of encoders that can also
            decode do so only when their configuration says `is_decoder`.
    """

    key: str
    name: str
    mapping: str
    auto_class: str
    decodes: bool

    def types(self) -> tuple[str, ...]:
        """Every model type of the family, sorted.

        Raises:
            RolemeshError: RM019, if `transformers` is missing.
        """
        require_transformers(f"{self.name} model types")
        from transformers.models.auto import modeling_auto

        return tuple(sorted(getattr(modeling_auto, self.mapping)))

    def check(self, model_type: str, where: str) -> None:
        """Raise RM019, with the closest names, unless the family has `model_type`."""
        from transformers import CONFIG_MAPPING

        known = self.types()
        if model_type in known:
            return
        hint = suggestion(model_type, known)
        raise RolemeshError(
            "RM019",
            f"unknown {self.name} type {model_type!r}",
            where=where,
            why=(
                f"transformers has this type, but no {self.name} model of it"
                if model_type in CONFIG_MAPPING
                else "transformers has no such type"
            ),
            fix=f"{hint}rolemesh.compiler.models.families.FAMILIES[{self.key!r}].types() "
            f"lists all {len(known)}",
        )

    def build(self, config: PreTrainedConfig, dtype: torch.dtype) -> torch.nn.Module:
        """A model with the library's initial weights; of an encoder-decoder type, its encoder.

        Args:
            config: Its configuration.
            dtype: Data type of the weights.
        """
        import transformers

        auto_class = getattr(transformers, self.auto_class)
        model: PreTrainedModel = auto_class.from_config(config, dtype=dtype)
        encodes = not self.decodes and config.is_encoder_decoder
        built: torch.nn.Module = model.get_encoder() if encodes else model
        return built


CAUSAL_LM = Family(
    "", "causal-LM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "AutoModelForCausalLM", True
)
ENCODER = Family("encoder", "encoder", "MODEL_MAPPING_NAMES", "AutoModel", False)
VISION = Family(
    "vision",
    "vision-language",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "AutoModelForImageTextToText",
    True,
)

FAMILIES: Mapping[str, Family] = {family.key: family for family in (CAUSAL_LM, ENCODER, VISION)}
"""By what stands before the slash in `hf:KEY/TYPE`."""


def require_transformers(where: str) -> None:
    """Check that `transformers` can be imported.

    Args:
        where: What asked for it, for the error.

    Raises:
        RolemeshError: RM019, if it cannot.
    """
    try:
        importlib.import_module("transformers")
    except ImportError as error:
        raise RolemeshError(
            "RM019",
            "this model needs the transformers library, which cannot be imported",
            where=where,
            why=str(error),
            fix="pip install rolemesh[transformers]",
        ) from error


def suggestion(word: str, known: Collection[str]) -> str:
    """`did you mean 'a' or 'b'? ` for the known words closest to `word`, or an empty string."""
    close = difflib.get_close_matches(word, sorted(known), n=3, cutoff=0.7)
    return f"did you mean {' or '.join(repr(match) for match in close)}? " if close else ""
