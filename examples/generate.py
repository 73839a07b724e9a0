"""Serve a checkpoint on the ranks of a mesh, and compare the tokens with those of one device.

    torchrun --nproc-per-node 4 examples/generate.py --tiny gpt_oss --prompt-tokens 5 17 2
    torchrun --nproc-per-node 4 examples/generate.py --model path/to/checkpoint --no-check

Each process builds the model without storage and loads its shards of the checkpoint only. Without
`--model`, rank 0 first saves a tiny random model of the type that `--tiny` names. Started without
torchrun (`python examples/generate.py --ranks 2`), all ranks run in this process in lock-step.
Exits with 1 if a token differs. Tokens that are drawn, with a temperature, are not compared.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM

from rolemesh import Engine
from rolemesh.compiler.models.tiny_models import tiny_config, tiny_model


def main() -> int:
    """Run the example.

    Returns:
        0 if every token equals the single device's, 1 if not.
    """
    options = parser().parse_args()
    under_torchrun = dist.is_torchelastic_launched()
    if under_torchrun:
        dist.init_process_group("gloo")
    first = not under_torchrun or dist.get_rank() == 0
    ranks = dist.get_world_size() if under_torchrun else options.ranks
    with tempfile.TemporaryDirectory() as folder:
        path = options.model or shared(save_tiny(options.tiny, folder) if first else "")
        engine, prompts = load(path, options, ranks)
        started = time.monotonic()
        found = engine.generate(prompts, options.new_tokens, eos=(), **sampling(options))
        seconds = time.monotonic() - started
        right = True
        if first:
            right = report(engine, path, prompts, found, seconds, options)
        if under_torchrun:
            dist.barrier()  # the folder stays until every rank has read it
    if under_torchrun:
        dist.destroy_process_group()
    return 0 if right else 1


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(description="Serve a checkpoint and check its tokens.")
    made.add_argument("--model", help="folder with config.json and safetensors files")
    made.add_argument("--tiny", default="llama", help="type of a tiny random model, if no --model")
    made.add_argument("--role", default="pd_mixed", help="the role (default pd_mixed)")
    made.add_argument("--target", default="eager", help="eager, inductor or ge (default eager)")
    made.add_argument("--ranks", type=int, default=2, help="ranks in lock-step, without torchrun")
    made.add_argument("--replicas", type=int, default=1, help="data-parallel replicas (default 1)")
    made.add_argument("--prompt-tokens", type=int, nargs="+", default=[5, 12, 1, 8], metavar="N")
    made.add_argument("--new-tokens", type=int, default=8, metavar="N")
    made.add_argument("--slots", type=int, default=4, help="requests at a time (default 4)")
    made.add_argument("--temperature", type=float, default=0.0, help="draw tokens (default 0: no)")
    made.add_argument("--seed", type=int, default=0, help="of prompts and sampling")
    made.add_argument("--no-check", action="store_true", help="do not load the model on one device")
    return made


def save_tiny(model_type: str, folder: str) -> str:
    """Save a tiny random model as a checkpoint."""
    model = tiny_model(tiny_config(model_type))
    model.save_pretrained(folder)
    return folder


def shared(path: str) -> str:
    """Rank 0's path, on every rank."""
    if not dist.is_initialized():
        return path
    box = [path]
    dist.broadcast_object_list(box)
    return box[0]


def load(path: str, options: argparse.Namespace, ranks: int) -> tuple[Engine, list[list[int]]]:
    """The engine, and random prompts for it."""
    config = AutoConfig.from_pretrained(path)
    mesh = {"tp": ranks // options.replicas}
    if options.replicas > 1:
        mesh = {"dp": options.replicas, **mesh}
    engine = Engine(
        config,
        options.role,
        mesh,
        options.target,
        checkpoint=path,
        slots=options.slots,
        max_len=max(options.prompt_tokens) + options.new_tokens,
    )
    dice = random.Random(options.seed)
    vocabulary = config.get_text_config().vocab_size
    prompts = [[dice.randrange(vocabulary) for _ in range(n)] for n in options.prompt_tokens]
    return engine, prompts


def sampling(options: argparse.Namespace) -> dict[str, float | int]:
    """The sampling options of `Engine.generate`."""
    return {"temperature": options.temperature, "seed": options.seed}


def report(
    engine: Engine,
    path: str,
    prompts: Sequence[Sequence[int]],
    found: Sequence[Sequence[int]],
    seconds: float,
    options: argparse.Namespace,
) -> bool:
    """Print what was generated, and whether it is what one device generates."""
    count = sum(len(tokens) for tokens in found)
    weights, caches = engine.bytes_on_this_rank
    stored = sum(file.stat().st_size for file in Path(path).glob("*.safetensors"))
    where = "rank 0" if dist.is_initialized() else "this process, which runs all ranks"
    print(f"role {engine.role.name}, mesh {engine.mesh}, {len(engine.compiled)} programs")
    print(f"the checkpoint has {stored:,} bytes; {where} holds {weights:,} of weights")
    print(f"and {caches:,} of caches")
    print(f"{count} tokens in {seconds:.1f} s, compiling included: {count / seconds:.1f} tokens/s")
    for prompt, tokens in zip(prompts, found, strict=True):
        print(f"  {len(prompt)} prompt tokens -> {' '.join(map(str, tokens))}")
    if options.no_check or options.temperature:
        return True
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
    right = True
    for prompt, tokens in zip(prompts, found, strict=True):
        alone = on_one_device(model, prompt, len(tokens))
        if alone != list(tokens):
            right = False
            print(f"  DIFFERENT: one device generates {' '.join(map(str, alone))}")
    if right:
        print("every token equals the single device's")
    return right


@torch.no_grad()
def on_one_device(model: torch.nn.Module, prompt: Sequence[int], count: int) -> list[int]:
    """Greedy tokens, by plain calls without a cache."""
    ids = torch.tensor([list(prompt)])
    for _ in range(count):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return ids[0, len(prompt) :].tolist()


if __name__ == "__main__":
    sys.exit(main())
