"""Train a model on one mesh, serve it on another, and compare the tokens with those of one device.

    python examples/train_to_serve.py
    python examples/train_to_serve.py --model qwen3_moe --steps 60

1. Four ranks, `fsdp=2, tp=2`, train a small random model of transformers to continue the text in
   `train_to_serve.txt`, byte by byte, and write a checkpoint with torch.distributed.checkpoint.
2. The checkpoint is resharded to the layout of role `pd_mixed` on two ranks: a file for each rank.
3. Two ranks read their own files and generate.
4. torch reads the checkpoint on one device, which generates too.

Exits with 1 if the loss does not fall to half, or if a token differs.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, StaticCache

import rolemesh
from rolemesh.compiler.ir.manifest import Manifest
from rolemesh.compiler.models.tiny_models import tiny_config
from rolemesh.runtime.launch import run_processes

TEXT = Path(__file__).with_suffix(".txt").read_bytes()
TRAIN_MESH, SERVE_MESH = {"fsdp": 2, "tp": 2}, {"tp": 2}
BATCH, LENGTH = 8, 48
PROMPTS = (b"Every evening, when the sun", b"The wind is from the", b"One ship")
NEW_TOKENS = 16


def main() -> int:
    """Run the example.

    Returns:
        0 if the loss falls and every token equals the single device's, else 1.
    """
    parser = argparse.ArgumentParser(description="Train on four ranks, serve on two.")
    parser.add_argument("--model", default="llama", help="type of the model (default llama)")
    parser.add_argument("--steps", type=int, default=80, help="training steps (default 80)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trained, served = str(Path(folder, "trained")), str(Path(folder, "served"))
        arguments: tuple[object, ...] = (options.model, options.steps, trained)
        losses = run_processes(train, 4, arguments, fork=True, timeout=280)[0]
        assert isinstance(losses, list)
        print(f"trained {options.steps} steps on 4 ranks: loss {losses[0]:.2f} -> {losses[-1]:.2f}")
        done = rolemesh.reshard(trained, layout(options.model), served, progress=False)
        print(f"resharded {done.nbytes:,} bytes from 4 ranks to {len(done.files)}")
        arguments = (options.model, served)
        found = run_processes(serve, 2, arguments, fork=True, timeout=280)[0]
        assert isinstance(found, list)
        model = build(options.model).eval()
        state = model.state_dict()
        dcp.load(state, checkpoint_id=trained, no_dist=True)
        right = losses[-1] < losses[0] / 2
        for prompt, tokens in zip(PROMPTS, found, strict=True):
            alone = on_one_device(model, prompt, len(tokens))
            text = (prompt + bytes(tokens)).decode(errors="replace")
            print(f"  {text!r}" if alone == tokens else f"  {text!r} DIFFERS from {bytes(alone)!r}")
            right = right and alone == tokens
    print("every token equals the single device's" if right else "WRONG")
    return 0 if right else 1


def configuration(model_type: str) -> PreTrainedConfig:
    """A small model with a token for each byte."""
    return tiny_config(model_type, layers=1, vocab_size=256)


def build(model_type: str) -> nn.Module:
    """The model with the same random weights in every process."""
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(configuration(model_type))
    return model


def batch(step: int) -> Tensor:
    """Token ids of some places of the text, `[BATCH, LENGTH]`; the same on every rank."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(TEXT) - LENGTH, (BATCH,), generator=generator)
    return torch.tensor([list(TEXT[start : start + LENGTH]) for start in starts.tolist()])


def train(model_type: str, steps: int, folder: str) -> list[float]:
    """What one rank does to train; the loss of each step."""
    # It would say at each step that a norm over two axes takes two collectives.
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)
    model = build(model_type).train()
    step = torch.compile(model, backend="rolemesh", options={"role": "train", "mesh": TRAIN_MESH})
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for number in range(steps):
        ids = batch(number)
        loss = step(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    dcp.save(model.state_dict(), checkpoint_id=folder)
    return losses


def layout(model_type: str) -> Manifest:
    """Where the weights lie on the ranks that serve."""
    model = build(model_type).eval().requires_grad_(False)
    cache = StaticCache(config=model.config, max_cache_len=64)
    ids = torch.zeros(1, 8, dtype=torch.long)
    traced = rolemesh.trace(model, ids, past_key_values=cache, use_cache=True)
    sharded = rolemesh.shard(traced, SERVE_MESH, role="pd_mixed", phase="prefill")
    return rolemesh.manifest(sharded, model)


def serve(model_type: str, folder: str) -> list[list[int]]:
    """What one rank does to serve; the tokens for each prompt."""
    config = configuration(model_type)
    engine = rolemesh.Engine(config, "pd_mixed", SERVE_MESH, checkpoint=folder, max_len=64)
    found = engine.generate([list(prompt) for prompt in PROMPTS], NEW_TOKENS, eos=())
    return [list(tokens) for tokens in found]


@torch.no_grad()
def on_one_device(model: nn.Module, prompt: bytes, count: int) -> Sequence[int]:
    """Greedy tokens, by plain calls without a cache."""
    ids = torch.tensor([list(prompt)])
    for _ in range(count):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    found: list[int] = ids[0, len(prompt) :].tolist()
    return found


if __name__ == "__main__":
    sys.exit(main())
