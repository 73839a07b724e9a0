"""Cases: a single-device model together with the calls that its phases make.

A `Case` is what the command line, the examples and the tests compile: `load_case` reads one from
a MODEL argument, `language_model_case` makes one from any `transformers` causal LM.

Invariants:

* The phases of a case run in the order of its mapping and share state, such as a key-value cache,
  by identity.
* Every cache tensor exists before the first phase runs. A tensor that the model allocates while it
  is captured would be an output of the captured graph instead of an input that it mutates.
* `transformers` is imported inside functions only.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
import json
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.models.tiny_models import (
    causal_lm_types,
    check_causal_lm_type,
    config_errors,
    require_transformers,
    set_implementations,
    suggestion,
    tiny_config,
    tiny_model,
)

if TYPE_CHECKING:
    from types import ModuleType

    from transformers import PreTrainedConfig, StaticCache

__all__ = ["Case", "Phase", "cache_tensors", "language_model_case", "load_case", "static_cache"]

Phase = tuple[tuple[object, ...], dict[str, object]]
"""The arguments of one call of the model: positional and keyword."""

_FORMS = "MODEL is hf:TYPE, hf:TYPE:config.json or FILE.py:FUNCTION"


@dataclass(frozen=True)
class Case:
    """A single-device model and the calls to compile and to check it with.

    Attributes:
        model: The unmodified model.
        phases: Phase name (`"prefill"`, `"decode"`, ...) to the arguments of one call. The calls
            run in this order and share mutable state, such as a key-value cache, by identity, so
            running a case changes it: take a `fresh` copy first to run it again.
        has_logits: Whether every call returns an object whose `logits` are `[batch, tokens,
            vocabulary]`, so that greedy tokens can be compared.
    """

    model: torch.nn.Module
    phases: Mapping[str, Phase]
    has_logits: bool = False

    def fresh(self) -> Case:
        """A case over the same model with copies of all arguments.

        Arguments that the phases share stay shared among the copies.
        """
        return Case(self.model, copy.deepcopy(dict(self.phases)), self.has_logits)


def static_cache(model: torch.nn.Module, batch: int, max_len: int) -> StaticCache:
    """An empty static cache for `model` whose tensors are all allocated.

    Which tensors a layer keeps (keys and values, latents, indexer keys, convolution and recurrent
    states) and their shapes depend on the architecture. The model itself is asked: one call with
    one token a sequence allocates everything, then the cache is reset to length zero.

    Args:
        model: A `transformers` model, not wrapped by `torch.compile`.
        batch: Number of sequences.
        max_len: Number of tokens that each sequence can reach.

    Raises:
        RolemeshError: RM007, if the model takes no cache, does not run with a static one, or
            writes nothing to it; RM019, if an op of the model fails.
    """
    from transformers import StaticCache

    argument = _cache_argument(model)
    token = _ordinary_tokens(model.config)[0]
    device = next(model.parameters()).device
    probe = torch.full((batch, 1), token, device=device)
    try:
        cache = StaticCache(config=model.config, max_cache_len=max_len)
        with torch.no_grad():
            model(probe, use_cache=True, **{argument: cache})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RolemeshError(
            "RM007",
            f"{type(model).__name__} does not run with a static cache",
            where="static_cache",
            why=f"{type(error).__name__}: {error}",
            fix="write a function that returns a Case and pass it as FILE.py:FUNCTION",
        ) from error
    except RuntimeError as error:
        raise RolemeshError(
            "RM019",
            f"{type(model).__name__} itself fails on one token",
            where="static_cache",
            why=str(error).partition("\n")[0],
            fix="make the plain model run first; for experts, try --experts batched_mm",
        ) from error
    if not cache_tensors(cache):
        raise RolemeshError(
            "RM007",
            f"{type(model).__name__} writes nothing to the cache it is given",
            where="static_cache",
            why="decoding needs the keys and values of the tokens before",
            fix="use a decoder model, or set is_decoder in its configuration",
        )
    cache.reset()
    return cache


def cache_tensors(cache: StaticCache) -> dict[str, torch.Tensor]:
    """The tensors of a cache that hold states, by name, for example `layers.0.keys`.

    The lengths that a layer keeps in scalar tensors are left out.
    """
    return {
        f"layers.{index}.{name}": tensor
        for index, layer in enumerate(cache.layers)
        for name, tensor in _named_tensors(vars(layer))
        if tensor.ndim > 1
    }


def _named_tensors(attributes: Mapping[object, object]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in attributes.items():
        if isinstance(value, torch.Tensor):
            yield str(name), value
        elif isinstance(value, Mapping):
            for key, tensor in _named_tensors(value):
                yield f"{name}.{key}", tensor


def language_model_case(
    model: torch.nn.Module,
    *,
    tokens: int = 13,
    batch: int = 2,
    max_len: int = 32,
    decode_steps: int = 1,
    seed: int = 1,
) -> Case:
    """Prefill and decode of a `transformers` causal LM over one static cache.

    Args:
        model: The model.
        tokens: Prompt length; the ids are `[batch, tokens]`.
        batch: Number of sequences.
        max_len: Capacity of the cache, in tokens a sequence.
        decode_steps: Number of calls with ids `[batch, 1]` after the prompt. They are the phases
            `decode`, `decode_2`, `decode_3` and so on.
        seed: Seed of the token ids, which are random and never a special token.

    Raises:
        ValueError: If `tokens + decode_steps` exceeds `max_len`.
        RolemeshError: RM007, as in `static_cache`.
    """
    if tokens + decode_steps > max_len:
        raise ValueError(f"{tokens} + {decode_steps} tokens do not fit in a cache of {max_len}")
    state = {_cache_argument(model): static_cache(model, batch, max_len), "use_cache": True}
    choices = torch.tensor(_ordinary_tokens(model.config))
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device

    def phase(length: int) -> Phase:
        picks = torch.randint(len(choices), (batch, length), generator=generator)
        return (choices[picks].to(device),), dict(state)

    phases = {"prefill": phase(tokens)}
    for step in range(1, decode_steps + 1):
        phases["decode" if step == 1 else f"decode_{step}"] = phase(1)
    return Case(model, phases, has_logits=True)


def _cache_argument(model: torch.nn.Module) -> str:
    """The name of the argument of `model.forward` that takes the cache."""
    arguments = inspect.signature(model.forward).parameters
    for name in ("past_key_values", "cache_params"):
        if name in arguments:
            return name
    raise RolemeshError(
        "RM007",
        f"{type(model).__name__}.forward takes no cache",
        where="static_cache",
        why=f"its arguments are {', '.join(arguments)}",
        fix="write a function that returns a Case and pass it as FILE.py:FUNCTION",
    )


def _ordinary_tokens(config: PreTrainedConfig) -> list[int]:
    """The token ids that stand for text, not for padding, an image or the end of the text."""
    text = config.get_text_config(decoder=True)
    special: set[object] = set()
    for part in (config, text):
        for name, value in vars(part).items():
            if name.endswith(("token_id", "token_index")):
                special.update(value if isinstance(value, list | tuple) else [value])
    return [token for token in range(text.vocab_size) if token not in special]


def load_case(
    spec: str,
    *,
    tokens: int = 13,
    batch: int = 2,
    dtype: torch.dtype = torch.float32,
    attn: str = "sdpa",
    experts: str | None = None,
    layers: int | None = None,
    max_len: int | None = None,
) -> Case:
    """Read a MODEL argument.

    Args:
        spec: One of

            * `hf:TYPE`: a tiny random model of a `transformers` causal-LM type;
            * `hf:TYPE:config.json`: the same with the fields of a JSON file. A file with a
              `model_type` is a full configuration and is not shrunk;
            * `FILE.py:FUNCTION`: a function that returns a `Case`. It is called with those of the
              options below that are among its parameters.
        tokens: Prompt length.
        batch: Number of sequences.
        dtype: Data type of the weights.
        attn: Attention implementation, as in `tiny_config`.
        experts: Experts implementation, as in `tiny_config`.
        layers: Number of layers.
        max_len: Capacity of the cache, in tokens a sequence; by default enough for 8 more tokens
            than the prompt.

    Raises:
        RolemeshError: RM019, if `spec` names no case; RM007, if the model has no cache.
    """
    if max_len is None:
        max_len = max(32, tokens + 8)
    kind, _, rest = spec.partition(":")
    if kind == "hf":
        config = _hugging_face_config(spec, rest, attn=attn, experts=experts, layers=layers)
        model = tiny_model(config, dtype=dtype)
        return language_model_case(model, tokens=tokens, batch=batch, max_len=max_len)
    options: dict[str, object] = {
        "tokens": tokens,
        "batch": batch,
        "dtype": dtype,
        "attn": attn,
        "experts": experts,
        "layers": layers,
        "max_len": max_len,
    }
    path, _, name = spec.rpartition(":")
    if not path.endswith(".py") or not name.isidentifier():
        raise RolemeshError(
            "RM019",
            f"cannot read the MODEL argument {spec!r}",
            why=_FORMS,
            fix=_form_hint(spec),
        )
    return _case_from_function(spec, Path(path), name, options)


def _form_hint(spec: str) -> str:
    if spec.rstrip(":").endswith(".py"):
        return f"name the function that returns the Case: {spec.rstrip(':')}:FUNCTION"
    try:
        types = causal_lm_types()
    except RolemeshError:
        types = ()
    if spec in types:
        return f"write hf:{spec}"
    return f"{suggestion(spec, types)}for example hf:llama"


def _hugging_face_config(
    spec: str, rest: str, *, attn: str, experts: str | None, layers: int | None
) -> PreTrainedConfig:
    model_type, _, path = rest.partition(":")
    if not path:
        return tiny_config(model_type, layers=layers, attn=attn, experts=experts)
    fields = _read_json(spec, Path(path))
    named_type = fields.pop("model_type", None)
    if named_type is None:
        return tiny_config(model_type, layers=layers, attn=attn, experts=experts, **fields)
    if named_type != model_type:
        raise RolemeshError(
            "RM019",
            f"{path} is a configuration of type {named_type!r}, not {model_type!r}",
            where=f"MODEL {spec}",
            fix=f"write hf:{named_type}:{path}",
        )
    return _full_config(spec, model_type, fields, attn=attn, experts=experts, layers=layers)


def _full_config(
    spec: str,
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

    check_causal_lm_type(model_type, where)
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


def _read_json(spec: str, path: Path) -> dict[str, object]:
    _check_file(spec, path)
    where = f"MODEL {spec}"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RolemeshError(
            "RM019",
            f"{path} is not valid JSON",
            where=where,
            why=str(error),
            fix="correct the file",
        ) from error
    if not isinstance(fields, dict):
        raise RolemeshError(
            "RM019",
            f"{path} holds a JSON {type(fields).__name__}, not an object",
            where=where,
            why="a configuration is an object of field names and values",
            fix='write for example {"hidden_size": 64}',
        )
    return fields


def _check_file(spec: str, path: Path) -> None:
    if path.is_file():
        return
    folder = path.parent
    siblings = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    hint = suggestion(path.name, siblings)
    raise RolemeshError(
        "RM019",
        f"there is no file {str(path)!r}",
        where=f"MODEL {spec}",
        why=_FORMS,
        fix=f"{hint}give the path of a file that exists",
    )


def _case_from_function(spec: str, path: Path, name: str, options: Mapping[str, object]) -> Case:
    _check_file(spec, path)
    module = _load_module(path)
    function: Callable[..., object] | None = getattr(module, name, None)
    if not callable(function):
        own = [
            other
            for other, value in vars(module).items()
            if inspect.isfunction(value) and value.__module__ == module.__name__
        ]
        raise RolemeshError(
            "RM019",
            f"{path} has no function {name!r}",
            where=f"MODEL {spec}",
            why=f"its functions are {', '.join(own) or 'none'}",
            fix=f"{suggestion(name, own)}name a function that returns a Case",
        )
    accepted = inspect.signature(function).parameters
    with _user_code(path):
        case = function(**{key: value for key, value in options.items() if key in accepted})
    if not isinstance(case, Case):
        raise RolemeshError(
            "RM019",
            f"{name}() returned {type(case).__name__}, not a Case",
            where=f"MODEL {spec}",
            why="a case is a model and the calls of its phases",
            fix="return rolemesh.compiler.models.cases.Case(model, phases)",
        )
    return case


def _load_module(path: Path) -> ModuleType:
    name = f"rolemesh_case_{path.stem}"
    specification = importlib.util.spec_from_file_location(name, path)
    if specification is None or specification.loader is None:
        raise ImportError(f"no loader for {path}")
    module = importlib.util.module_from_spec(specification)
    # Dataclasses and pickling look the module of a class up by name.
    sys.modules[name] = module
    with _user_code(path):
        specification.loader.exec_module(module)
    return module


@contextmanager
def _user_code(path: Path) -> Iterator[None]:
    """Turn what the user's file raises into RM019, with the line of that file."""
    try:
        yield
    except RolemeshError:
        raise
    except Exception as error:
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if Path(frame.filename) == path.absolute() or frame.filename == str(path)
        ]
        raise RolemeshError(
            "RM019",
            f"{path} raised {type(error).__name__}",
            where=f"{path}:{lines[-1]}" if lines else str(path),
            why=str(error),
            fix="correct the file",
        ) from error
