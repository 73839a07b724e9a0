"""Tiny random models of any architecture that `transformers` knows.

`tiny_config` shrinks a configuration class to sizes that run in milliseconds on one CPU core;
`tiny_model` builds the library's own, unmodified model from it with reproducible random weights.
The sizes are data in `rolemesh.compiler.models.tiny_overrides`; no architecture has code here.

Invariants:

* A tiny model keeps one layer of each kind that the full model has (dense and expert MLP, sliding
  and full attention, recurrent and attention), in the order of the full model.
* Weights depend on the configuration and the seed alone, not on the state of torch's generators.
* `transformers` is imported inside functions only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from rolemesh.compiler.integrate import IMPLEMENTATION, integrate
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.models.families import (
    CAUSAL_LM,
    Family,
    require_transformers,
    suggestion,
)
from rolemesh.compiler.models.tiny_overrides import (
    CURATED,
    FIELD_CAPS,
    HEAD_COUNT_FIELDS,
    KEY_VALUE_HEAD_FIELDS,
    LAYER_COUNT_FIELDS,
    OVERRIDES,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = [
    "config_errors",
    "set_implementations",
    "tiny_config",
    "tiny_model",
]

_MIN_LAYERS = 2
_MAX_LAYER_KINDS = 4
_WEIGHT_SPREAD = 0.9
_EMBEDDING_SPREAD = 0.3
_BIAS_SPREAD = 0.2
_SCALE_SPREAD = 0.1


def tiny_config(
    model_type: str,
    *,
    family: Family = CAUSAL_LM,
    layers: int | None = None,
    attn: str = "sdpa",
    experts: str | None = None,
    **overrides: object,
) -> PreTrainedConfig:
    """The configuration of a tiny model of type `model_type`.

    The types in `tiny_overrides.CURATED` have sizes written out by hand: `deepseek_v32` keeps 7
    layers (1 dense), 16 heads and 16 experts in 4 groups. Every other type has its default
    configuration shrunk field by field.

    Args:
        model_type: A `transformers` type of the family, for example `"llama"`.
        family: What is built from the configuration.
        layers: Number of layers; by default the curated number, or one for each kind of layer and
            at least 2.
        attn: Attention implementation. `"sdpa"` gives `"eager"` for the few architectures that
            have no SDPA attention; any other name is taken as it is.
        experts: Experts implementation (`"batched_mm"`, `"grouped_mm"`, `"eager"` or a registered
            one); by default the library's choice.
        **overrides: Configuration fields to set on top. A mapping sets fields of a
            sub-configuration.

    Raises:
        RolemeshError: RM019, if the type or the name of an override is unknown, or if
            `transformers` is missing.
    """
    where = f"model type {model_type!r}"
    require_transformers(where)
    from transformers import CONFIG_MAPPING

    family.check(model_type, where)
    with config_errors(where):
        default = CONFIG_MAPPING[model_type]()
    _check_fields(overrides, default, where)
    table = CURATED.get(model_type) or OVERRIDES.get(model_type, {})
    values = _merged(_resized(table, layers), overrides)
    with config_errors(where):
        if model_type in CURATED:
            config = type(default)(**values)
        else:
            config = _Shrinker(layers, family.decodes).shrink(default, values)
    set_implementations(config, attn, experts)
    return config


@contextmanager
def config_errors(where: str) -> Iterator[None]:
    """Turn what a configuration class raises for a bad value into RM019."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError, StrictDataclassError) as error:
        raise RolemeshError(
            "RM019",
            "transformers rejects this configuration",
            where=where,
            why=f"{type(error).__name__}: {error}",
            fix="correct the configuration fields or the number of layers",
        ) from error


def set_implementations(config: PreTrainedConfig, attn: str, experts: str | None) -> None:
    """Choose the attention and experts implementations of `config`, in place."""
    if IMPLEMENTATION in (attn, experts):
        integrate("transformers")
    # None lets the library choose, and it chooses SDPA wherever the architecture has it.
    config._attn_implementation = None if attn == "sdpa" else attn
    if experts is not None:
        config._experts_implementation = experts


def tiny_model(
    config_or_type: PreTrainedConfig | str,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    *,
    family: Family = CAUSAL_LM,
) -> torch.nn.Module:
    """Build a model with random weights, in eval mode and without gradients.

    Matrices get the spread that keeps activations near unit size, so that routers, top-k
    selections and greedy tokens vary from token to token. Biases, attention sinks and router
    correction biases are random too: left at zero they would hide a bias that is added twice.

    Args:
        config_or_type: A configuration, or a type for `tiny_config`.
        seed: Seed of all weights.
        dtype: Data type of the weights.
        family: What to build.

    Raises:
        RolemeshError: RM019, if the type is unknown or `transformers` is missing.
    """
    if isinstance(config_or_type, str):
        config_or_type = tiny_config(config_or_type, family=family)
    require_transformers("tiny_model")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = family.build(config_or_type, dtype)
    model.eval().requires_grad_(False)
    _randomise(model, torch.Generator().manual_seed(seed))
    return model


def _randomise(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Overwrite matrices and biases; add noise to the other vectors, whose values are scales."""
    embeddings = {
        id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)
    }
    tensors: dict[str, torch.Tensor] = dict(model.named_parameters())
    tensors |= {
        name: buffer
        for name, buffer in model.named_buffers()
        if buffer.is_floating_point() and buffer.ndim > 0 and name.endswith("_bias")
    }
    for name, tensor in tensors.items():
        noise = torch.randn(tensor.shape, generator=generator)
        if id(tensor) in embeddings:
            tensor.copy_(noise * _EMBEDDING_SPREAD)
        elif tensor.ndim >= 2:
            tensor.copy_(noise * (_WEIGHT_SPREAD / tensor.shape[-1] ** 0.5))
        elif name.endswith(("bias", "sinks")):
            tensor.copy_(noise * _BIAS_SPREAD)
        else:
            tensor.add_((noise * _SCALE_SPREAD).to(tensor.dtype))


def _check_fields(overrides: Mapping[str, object], config: PreTrainedConfig, where: str) -> None:
    """Reject a field that the configuration would silently store and never read."""
    known = {*_fields(config), *config.attribute_map, *vars(config)}
    known = {name for name in known if not name.startswith("_")}
    for name in overrides:
        if name not in known:
            hint = suggestion(name, known)
            raise RolemeshError(
                "RM019",
                f"unknown configuration field {name!r}",
                where=where,
                why=f"{type(config).__name__} does not have it, so it would change nothing",
                fix=f"{hint}if not, remove the field" if hint else "remove the field",
            )


def _resized(values: Mapping[str, object], layers: int | None) -> Mapping[str, object]:
    """`values` for another number of layers: lists with an entry per layer repeat."""
    before = values.get("num_hidden_layers")
    if layers is None or before is None:
        return values
    resized = dict(values, num_hidden_layers=layers)
    for name, value in values.items():
        if isinstance(value, list) and len(value) == before:
            resized[name] = [value[index % len(value)] for index in range(layers)]
    return resized


def _merged(base: Mapping[str, object], top: Mapping[str, object]) -> dict[str, object]:
    """`base` with the values of `top`; nested mappings merge field by field."""
    merged = dict(base)
    for name, value in top.items():
        below = merged.get(name)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            value = _merged(below, value)
        merged[name] = value
    return merged


def _fields(config: PreTrainedConfig) -> tuple[str, ...]:
    """The constructor arguments of the configuration's class."""
    return tuple(getattr(type(config), "__dataclass_fields__", ()))


class _Shrinker:
    """Rebuilds one default configuration, with its sub-configurations, at tiny sizes.

    One instance shrinks one configuration: special token ids that fall outside the tiny vocabulary
    get new ids, the same id for the same field name in every sub-configuration.
    """

    def __init__(self, layers: int | None, decodes: bool) -> None:
        self._layers = layers
        self._decodes = decodes
        self._token_ids: dict[str, int] = {}

    def shrink(self, config: PreTrainedConfig, overrides: Mapping[str, object]) -> PreTrainedConfig:
        """A new configuration of the same class; `overrides` win over the tables."""
        from transformers import PreTrainedConfig

        nested: dict[str, PreTrainedConfig] = {}
        values: dict[str, object] = {}
        for name in _fields(config):
            value = vars(config).get(name)
            if isinstance(value, PreTrainedConfig):
                below = overrides.get(name)
                nested[name] = self.shrink(value, below if isinstance(below, Mapping) else {})
            elif name == "rope_parameters" and isinstance(value, Mapping):
                values[name] = _shrink_rope(value, config)
            else:
                small = self._shrink_field(name, value, config)
                if small is not None:
                    values[name] = small
        values.update(self._per_layer(config))
        if self._decodes and "is_decoder" in _fields(config):
            # Encoder families that can decode use the cache and a causal mask only when told to.
            values["is_decoder"] = True
        values.update({name: value for name, value in overrides.items() if name not in nested})
        return type(config)(**values, **nested)

    def _shrink_field(
        self, name: str, value: object, config: PreTrainedConfig
    ) -> int | list[int] | None:
        if _is_token_id(name):
            return self._shrink_token_id(name, value)
        if not isinstance(value, int) or isinstance(value, bool):
            return None
        if name in KEY_VALUE_HEAD_FIELDS:
            as_queries = value == _first_count(config, HEAD_COUNT_FIELDS)
            name = "num_attention_heads" if as_queries else "num_key_value_heads"
        return min(value, FIELD_CAPS[name]) if name in FIELD_CAPS else None

    def _shrink_token_id(self, name: str, value: object) -> int | list[int] | None:
        vocabulary = FIELD_CAPS["vocab_size"]
        if isinstance(value, int) and value >= vocabulary:
            return self._token_ids.setdefault(name, vocabulary - 1 - len(self._token_ids))
        if isinstance(value, Sequence) and any(token >= vocabulary for token in value):
            return [self._token_ids.setdefault(name, vocabulary - 1 - len(self._token_ids))]
        return None

    def _per_layer(self, config: PreTrainedConfig) -> dict[str, object]:
        """Layer counts, and the lists with an entry per layer cut down to chosen layers."""
        total = _first_count(config, LAYER_COUNT_FIELDS)
        # A list 0, 1, 2, ... names layers instead of describing them; its class derives it again.
        lists = {
            name: value
            for name in _fields(config)
            if isinstance(value := vars(config).get(name), list | tuple)
            and value
            and (name == "layer_types" or len(value) == total)
            and list(value) != list(range(len(value)))
        }
        chosen = _choose_layers(list(lists.values()), self._layers)
        values: dict[str, object] = {
            name: [value[index % len(value)] for index in chosen] for name, value in lists.items()
        }
        for name in LAYER_COUNT_FIELDS:
            if isinstance(vars(config).get(name), int):
                values[name] = len(chosen)
        return values


def _choose_layers(lists: Sequence[Sequence[object]], layers: int | None) -> list[int]:
    """Indices of the full model's layers to keep: each kind once, then the earliest others.

    A layer's kind is the tuple of its entries that name something (`"full_attention"`,
    `"sparse"`) or switch something on or off.
    """
    total = min((len(values) for values in lists), default=layers or _MIN_LAYERS)
    named = [values for values in lists if all(isinstance(v, str) or v in (0, 1) for v in values)]
    first: dict[tuple[object, ...], int] = {}
    for index in range(total):
        first.setdefault(tuple(values[index] for values in named), index)
    wanted = layers or max(_MIN_LAYERS, min(len(first), _MAX_LAYER_KINDS))
    chosen = list(first.values())[:wanted]
    chosen += [index for index in range(wanted) if index not in chosen][: wanted - len(chosen)]
    return sorted(chosen)


def _shrink_rope(rope: Mapping[str, object], config: PreTrainedConfig) -> dict[str, object]:
    """Rotary parameters for the tiny head: sections and per-frequency factors change length."""
    small = dict(rope)
    for name, value in rope.items():
        if isinstance(value, Mapping):
            small[name] = _shrink_rope(value, config)
    partial = rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None)
    share = partial if isinstance(partial, float) else 1.0
    frequencies = int(FIELD_CAPS["head_dim"] * share) // 2
    for name in ("short_factor", "long_factor"):
        if name in rope:
            small[name] = [1.0] * frequencies
    sections = rope.get("mrope_section")
    if isinstance(sections, list | tuple):
        rest = [max(1, size * frequencies // sum(sections)) for size in sections[1:]]
        small["mrope_section"] = [frequencies - sum(rest), *rest]
    if "original_max_position_embeddings" in rope:
        small["original_max_position_embeddings"] = FIELD_CAPS["original_max_position_embeddings"]
    return small


def _first_count(config: PreTrainedConfig, names: Sequence[str]) -> int | None:
    counts: Iterator[object] = (vars(config).get(name) for name in names)
    return next((count for count in counts if isinstance(count, int)), None)


def _is_token_id(name: str) -> bool:
    return name.endswith(("token_id", "token_index"))
