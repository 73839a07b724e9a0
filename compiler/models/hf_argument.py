"""The `hf:` form of a MODEL argument: a family, a type and perhaps a configuration file.

Invariant: `transformers` is imported inside functions only.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.models.families import (
    FAMILIES,
    Family,
    require_transformers,
    suggestion,
)
from rolemesh.compiler.models.model_files import MODEL_FORMS, read_json
from rolemesh.compiler.models.tiny_models import (
    config_errors,
    set_implementations,
    tiny_config,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["hugging_face_config"]


def hugging_face_config(
    spec: str, *, attn: str, experts: str | None, layers: int | None
) -> tuple[Family, PreTrainedConfig]:
    """Read `hf:TYPE` or `hf:FAMILY/TYPE`, each with or without `:config.json`.

    Args:
        spec: The MODEL argument.
        attn: Attention implementation, as in `tiny_config`.
        experts: Experts implementation, as in `tiny_config`.
        layers: Number of layers.

    Raises:
        RolemeshError: RM019, if it names no model.
    """
    named, _, path = spec.removeprefix("hf:").partition(":")
    key, _, model_type = named.rpartition("/")
    family = _family(spec, key)
    fields = read_json(spec, Path(path)) if path else {}
    named_type = fields.pop("model_type", None)
    if named_type is None:
        config = tiny_config(
            model_type, family=family, layers=layers, attn=attn, experts=experts, **fields
        )
        return family, config
    if named_type != model_type:
        raise RolemeshError(
            "RM019",
            f"{path} is a configuration of type {named_type!r}, not {model_type!r}",
            where=f"MODEL {spec}",
            fix=f"write {spec.replace(model_type, str(named_type), 1)}",
        )
    config = _full_config(
        spec, family, model_type, fields, attn=attn, experts=experts, layers=layers
    )
    return family, config


def _family(spec: str, key: str) -> Family:
    """The family that stands before the slash."""
    if key not in FAMILIES:
        raise RolemeshError(
            "RM019",
            f"there are no models of kind {key!r}",
            where=f"MODEL {spec}",
            why=MODEL_FORMS,
            fix=f"{suggestion(key, FAMILIES)}write for example hf:encoder/bert",
        )
    return FAMILIES[key]


def _full_config(
    spec: str,
    family: Family,
    model_type: str,
    fields: dict[str, object],
    *,
    attn: str,
    experts: str | None,
    layers: int | None,
) -> PreTrainedConfig:
    """The configuration of a real model, with its first `layers` layers if given."""
    where = f"MODEL {spec}"
    require_transformers(where)
    from transformers import CONFIG_MAPPING

    family.check(model_type, where)
    if layers is not None:
        total = fields.get("num_hidden_layers")
        for name, value in fields.items():
            if isinstance(value, list) and len(value) == total:
                fields[name] = value[:layers]
        fields["num_hidden_layers"] = layers
    with config_errors(where):
        config = CONFIG_MAPPING[model_type].from_dict(fields)
    set_implementations(config, attn, experts)
    return config
