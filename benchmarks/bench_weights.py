"""Weights left per rank, as a share of all weights, against tensor parallelism of transformers.

    python benchmarks/bench_weights.py

Prints the table of docs/roles.md. Models have the default configuration of their type, in bf16 on
the meta device: sizes without bytes. A share is what rank 0 holds of all parameters, over all of
them; a tied weight counts once, buffers do not count. Rank 0 holds the largest chunks.

* decode: the model's first layers, at least one of each kind, are traced for a decode step and
  sharded with role `decode`; layouts are read off the Program. Every parameter of the full model
  holds what its namesake in a layer of the same kind and of its shape holds.
* TP: the model itself, distributed by transformers as `from_pretrained` does it with
  `DistributedConfig(tp_size=4)`, before weights are loaded. DTensors tell the local sizes.
* TP + EP: the same with `ep_size=4`, so experts go by the model's expert plan.

A dash stands for a model that has no such plan in transformers.
"""

from __future__ import annotations

import argparse
import copy
import os
import re
from collections.abc import Iterator

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from torch.distributed.tensor import DTensor
from transformers import CONFIG_MAPPING, DistributedConfig, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_tie_weights

from rolemesh.compiler.api import shard
from rolemesh.compiler.capture.tracing import trace
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.program import InputKind, tensor_type
from rolemesh.compiler.models.cases import cache_argument, static_cache
from rolemesh.compiler.models.families import CAUSAL_LM
from rolemesh.runtime.groups import stand_in_groups

MODELS = (
    "gpt_oss",
    "deepseek_v3",
    "deepseek_v32",
    "qwen2_moe",
    "phi3",
    "gemma2",
    "gpt2",
    "qwen3_next",
    "bamba",
    "falcon_h1",
    "mamba2",
    "mamba",
)
# By default bamba has no attention layer, and without one transformers cannot tell its cache's
# length. Three layers are as many as Bamba-9B has.
FIELDS = {"bamba": {"attn_layer_indices": [9, 18, 27]}}
RANKS = 4
Weight = tuple[str, object, tuple[int, ...]]
"""A parameter's name with `*` for its layer, the layer's type if it has one, and its shape."""


def build(config: PreTrainedConfig) -> PreTrainedModel:
    """The model without bytes."""
    with torch.device("meta"):
        model = CAUSAL_LM.build(config, torch.bfloat16)
    assert isinstance(model, PreTrainedModel)
    return model.eval().requires_grad_(False)


def weights(model: PreTrainedModel) -> Iterator[tuple[str, int, Weight]]:
    """Name, layer (0 if it is in none) and kind of each parameter."""
    kinds = getattr(model.config, "layer_types", None)
    for name, parameter in model.named_parameters():
        number = re.search(r"\.(\d+)\.", name)
        layer = int(number[1]) if number else 0
        kind = kinds[layer] if kinds and number else None
        generic = re.sub(r"\.\d+\.", ".*.", name, count=1)
        yield name, layer, (generic, kind, tuple(parameter.shape))


def first_layers(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the first layers, as many as it takes to have every kind of weight."""
    first: dict[Weight, int] = {}
    for _, layer, weight in weights(model):
        first.setdefault(weight, layer)
    layers = max(first.values()) + 1
    config = copy.deepcopy(model.config)
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == config.num_hidden_layers:
            setattr(config, name, value[:layers])
    config.num_hidden_layers = layers
    return build(config)


def decode_share(config: PreTrainedConfig) -> tuple[int, float]:
    """Parameters of the model, and the share of them on rank 0 in role `decode`."""
    model = build(config)
    part = first_layers(model)
    with torch.device("meta"), torch.no_grad():
        state = {cache_argument(part, "decode"): static_cache(part, batch=1, max_len=16)}
        ids = torch.zeros(1, 1, dtype=torch.int64)
        part(ids, use_cache=True, **state)  # a step behind nothing reads no state
        traced = trace(part, ids, use_cache=True, **state)
    program = shard(traced, {"tp": RANKS}, "decode", phase="decode").program
    local: dict[str, int] = {}
    for node, entry in zip(program.placeholders, program.inputs, strict=True):
        if entry.kind is InputKind.PARAMETER:
            shape = program.layout(node).local_shape(tensor_type(node).shape, program.the_mesh)
            local[entry.name] = torch.Size(shape).numel()
    held = {weight: local[name] for name, _, weight in weights(part)}
    total = sum(parameter.numel() for parameter in model.parameters())
    return total, sum(held[weight] for _, _, weight in weights(model)) / total


def transformers_share(config: PreTrainedConfig, experts: bool) -> float | None:
    """Share of the parameters on rank 0 as transformers distributes them; None without a plan."""
    with no_tie_weights():  # as in from_pretrained, which ties after it has distributed
        model = build(config)
    if not model.tp_plan or (experts and not model.ep_plan):
        return None
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    with stand_in_groups(Mesh({"tp": RANKS}), 0):
        wanted = DistributedConfig(tp_size=RANKS, ep_size=RANKS if experts else 1)
        wanted, _, meshes = model.prepare_distribute_model(wanted)
        model = model.maybe_distribute_model(model, wanted, meshes)
        model.tie_weights()
        local = {
            name: (weight.to_local() if isinstance(weight, DTensor) else weight).numel()
            for name, weight in model.named_parameters()
        }
    return sum(local.values()) / sum(sizes[name] for name in local)


def main() -> None:
    """Compute and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("models", nargs="*", default=MODELS, help="transformers causal-LM types")
    print("| model | parameters | role `decode` | TP of transformers | TP + EP |")
    print("|---|---|---|---|---|")
    for name in parser.parse_args().models:
        config = CONFIG_MAPPING[name](**FIELDS.get(name, {}))
        total, share = decode_share(config)
        shares = (transformers_share(copy.deepcopy(config), experts) for experts in (False, True))
        cells = " | ".join("-" if share is None else f"{share:.3f}" for share in shares)
        print(f"| {name} | {total / 1e9:.1f} B | {share:.3f} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
