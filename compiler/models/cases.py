"""Cases: a single-device model together with the calls that its phases make.

A `Case` is what the command line, the examples and the tests compile: `load_case` reads one from
a MODEL argument; `language_model_case` makes one from any `transformers` causal LM, and
`encoder_case` from any encoder, `vision_case` from a vision-language model.

Invariants:

* The phases of a case run in the order of its mapping and share state, such as a key-value cache,
  by identity.
* Every cache tensor exists before the first phase runs. A tensor that the model allocates while it
  is captured would be an output of the captured graph instead of an input that it mutates.
* `transformers` is imported inside functions only.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.models.families import (
    CAUSAL_LM,
    ENCODER,
    VISION,
    suggestion,
)
from rolemesh.compiler.models.hf_argument import hugging_face_config
from rolemesh.compiler.models.images import (
    TYPE_ARGUMENTS,
    encode_images,
    has_data_dependent_tower,
    image_inputs,
    image_token_count,
)
from rolemesh.compiler.models.model_files import (
    MODEL_FORMS,
    check_file,
    load_module,
    user_code,
)
from rolemesh.compiler.models.tiny_models import tiny_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, StaticCache

__all__ = [
    "Case",
    "Phase",
    "cache_argument",
    "cache_tensors",
    "encoder_case",
    "language_model_case",
    "load_case",
    "static_cache",
    "vision_case",
]

Phase = tuple[tuple[object, ...], dict[str, object]]
"""The arguments of one call of the model: positional and keyword."""


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

    argument = cache_argument(model, "static_cache")
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
    state = {
        cache_argument(model, "static_cache"): static_cache(model, batch, max_len),
        "use_cache": True,
    }
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


def encoder_case(
    model: torch.nn.Module, *, tokens: int = 13, batch: int = 2, seed: int = 1
) -> Case:
    """One call of a `transformers` encoder, without a cache: the phase `prefill`.

    Args:
        model: The model; what it reads is its `main_input_name`. Ids are `[batch, tokens]`, never
            special tokens, and come with an attention mask if the model takes one: the last
            sequence ends in padding. Images are `[batch, channels, height, width]`.
        tokens: Length of a sequence of ids.
        batch: Number of sequences or images.
        seed: Seed of the input, which is random.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = next(model.parameters())
    takes = inspect.signature(model.forward).parameters
    options: dict[str, object] = {"use_cache": False} if "use_cache" in takes else {}
    if model.main_input_name == "pixel_values":
        config = _config(model)
        size = config.image_size
        pixels = torch.randn(batch, config.num_channels, size, size, generator=generator)
        return Case(model, {"prefill": ((pixels.to(weight),), options)})
    choices = torch.tensor(_ordinary_tokens(model.config))
    ids = choices[torch.randint(len(choices), (batch, tokens), generator=generator)]
    if "attention_mask" in takes:
        mask = torch.ones_like(ids)
        mask[-1, tokens - tokens // 4 :] = 0
        options["attention_mask"] = mask.to(weight.device)
    return Case(model, {"prefill": ((ids.to(weight.device),), options)})


def vision_case(
    model: torch.nn.Module,
    *,
    tokens: int = 13,
    batch: int = 2,
    max_len: int = 32,
    seed: int = 1,
) -> Case:
    """Prefill of an image and text, and decode of a token, over one static cache.

    Each sequence has one image, in the middle of its text. A tower that cannot be captured, because
    its sizes depend on data, is run ahead by `encode_images`, and the calls get what it made.

    Args:
        model: A `transformers` vision-language model.
        tokens: Tokens of text in the prompt; those of the image come on top.
        batch: Number of sequences.
        max_len: Capacity of the cache, in tokens of text a sequence.
        seed: Seed of the token ids and the pixels, which are random.

    Raises:
        RolemeshError: RM007, as in `static_cache`.
    """
    generator = torch.Generator().manual_seed(seed)
    images = image_inputs(model, batch, generator)
    each = image_token_count(model, images) // batch
    state = {
        cache_argument(model, "static_cache"): static_cache(model, batch, max_len + each),
        "use_cache": True,
    }
    device = next(model.parameters()).device
    choices = torch.tensor(_ordinary_tokens(model.config))
    text = choices[torch.randint(len(choices), (batch, tokens + 1), generator=generator)]
    first = tokens // 2
    mark = _config(model).image_token_id
    marks = torch.full((batch, each), mark)
    ids = torch.cat([text[:, :first], marks, text[:, first:tokens]], dim=1).to(device)
    prompt: dict[str, object] = {**images}
    for name in TYPE_ARGUMENTS:
        if name in inspect.signature(model.forward).parameters:
            prompt[name] = torch.eq(ids, mark).to(ids.dtype)
    token: dict[str, object] = {}
    if has_data_dependent_tower(model):
        prompt = encode_images(model, {"input_ids": ids, **prompt})
        del prompt["input_ids"]
        positions = prompt.get("position_ids")
        if isinstance(positions, torch.Tensor):
            token["position_ids"] = (
                positions.amax(dim=(0, 2), keepdim=True).expand(len(positions), -1, 1) + 1
            )
    return Case(
        model,
        {
            "prefill": ((ids,), {**prompt, **state}),
            "decode": ((text[:, tokens:].to(device),), {**token, **state}),
        },
        has_logits=True,
    )


def _config(model: torch.nn.Module) -> PreTrainedConfig:
    config: PreTrainedConfig = model.config
    return config


def cache_argument(model: torch.nn.Module, where: str) -> str:
    """The name of the argument of `model.forward` that takes the cache.

    Args:
        model: A `transformers` model.
        where: What needs it, for the error.

    Raises:
        RolemeshError: RM007 if there is none.
    """
    arguments = inspect.signature(model.forward).parameters
    for name in ("past_key_values", "cache_params"):
        if name in arguments:
            return name
    raise RolemeshError(
        "RM007",
        f"{type(model).__name__}.forward takes no cache",
        where=where,
        why=f"its arguments are {', '.join(arguments)}",
        fix="use a causal language model of transformers; to check another model, write a function "
        "that returns a Case and pass it as FILE.py:FUNCTION",
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
            * `hf:encoder/TYPE`: of an encoder, or of the encoder of an encoder-decoder type;
            * `hf:vision/TYPE`: of a vision-language type, called with an image a sequence;
            * any of these with `:config.json`: the same with the fields of a JSON file. A file
              with a `model_type` is a full configuration and is not shrunk;
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
    if spec.startswith("hf:"):
        family, config = hugging_face_config(spec, attn=attn, experts=experts, layers=layers)
        model = tiny_model(config, dtype=dtype, family=family)
        if family is ENCODER:
            return encoder_case(model, tokens=tokens, batch=batch)
        if family is VISION:
            return vision_case(model, tokens=tokens, batch=batch, max_len=max_len)
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
            why=MODEL_FORMS,
            fix=_form_hint(spec),
        )
    return _case_from_function(spec, Path(path), name, options)


def _form_hint(spec: str) -> str:
    if spec.rstrip(":").endswith(".py"):
        return f"name the function that returns the Case: {spec.rstrip(':')}:FUNCTION"
    try:
        types = CAUSAL_LM.types()
    except RolemeshError:
        types = ()
    if spec in types:
        return f"write hf:{spec}"
    return f"{suggestion(spec, types)}for example hf:llama"


def _case_from_function(spec: str, path: Path, name: str, options: Mapping[str, object]) -> Case:
    check_file(spec, path)
    module = load_module(path)
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
    with user_code(path):
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
