"""Time of a training step against FSDP2 and DTensor's tensor parallelism under torch.compile.

    python benchmarks/bench_train.py
    python benchmarks/bench_train.py --only fsdp --ranks 2 --rounds 20 --target inductor

A llama-shaped model of transformers in fp32 over gloo, one thread a rank, AdamW. The peer of `fsdp`
is `fully_shard` on each layer and the model, that of `tp` is `parallelize_module` in Megatron's
way, with logits gathered for the loss. Both are compiled by inductor, as graphs that Dynamo can
make. All peers run in the same processes: first the loss is compared with that of one device, then
each round runs every peer once, in random order, after a barrier. The slowest rank's time counts. A
ratio is the median over rounds of rolemesh's time by the peer's in the same round; `CPU` is the
same of the processor time of all ranks.

Exits 1 if a step of rolemesh takes longer than its peer's.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ["OMP_NUM_THREADS"] = "1"  # a rank is a thread; its libraries read this as they load

import torch
import torch.distributed as dist
from peers.rounds import ratio
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)
from transformers import LlamaConfig, LlamaForCausalLM

from rolemesh.runtime.launch import run_processes

LIMIT = 1.0
LAYERS, BATCH, TOKENS, VOCABULARY = 4, 4, 256, 2048
KINDS = ("fsdp", "tp")
_CHECKED = 3

Step = Callable[[torch.Tensor], float]
"""One step on a batch of ids; returns the loss before it."""


def model() -> LlamaForCausalLM:
    """The model, equal on every rank."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=VOCABULARY,
    )
    return LlamaForCausalLM(config).train()


def stepping(built: torch.nn.Module, compiled: Callable[..., object]) -> Step:
    """A step with AdamW."""
    optimizer = torch.optim.AdamW(built.parameters(), lr=1e-3)

    def step(ids: torch.Tensor) -> float:
        loss = compiled(input_ids=ids, labels=ids, use_cache=False).loss  # type: ignore[attr-defined]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def alone(ranks: int, target: str) -> Step:
    """One device: the whole model on every rank."""
    built = model()
    return stepping(built, built)


def fsdp2(ranks: int, target: str) -> Step:
    """`fully_shard`, compiled. Each rank computes the loss of its own part of the batch."""
    built = model()
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("fsdp",))
    for layer in built.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(built, mesh=mesh)
    step = stepping(built, torch.compile(built))

    def on_a_part(ids: torch.Tensor) -> float:
        loss = torch.tensor(step(ids.chunk(ranks)[dist.get_rank()]))
        dist.all_reduce(loss)
        return float(loss) / ranks

    return on_a_part


def dtensor_tp(ranks: int, target: str) -> Step:
    """`parallelize_module` in Megatron's way, compiled."""
    built = model()
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("tp",))
    plan: dict[str, ParallelStyle] = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
        "lm_head": ColwiseParallel(output_layouts=Replicate()),
    }
    for index in range(LAYERS):
        layer = f"model.layers.{index}"
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
            plan[f"{layer}.{name}"] = ColwiseParallel()
        for name in ("mlp.gate_proj", "mlp.up_proj"):
            plan[f"{layer}.{name}"] = ColwiseParallel()
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            plan[f"{layer}.{name}"] = RowwiseParallel()
    parallelize_module(built, mesh, plan)
    return stepping(built, torch.compile(built))


def rolemesh(kind: str) -> Callable[[int, str], Step]:
    """Role `train` on one axis."""

    def made(ranks: int, target: str) -> Step:
        built = model()
        options = {"role": "train", "mesh": {kind: ranks}, "target": target}
        return stepping(built, torch.compile(built, backend="rolemesh", options=options))

    return made


PEERS: Mapping[str, Mapping[str, Callable[[int, str], Step]]] = {
    "fsdp": {"fully_shard": fsdp2, "rolemesh": rolemesh("fsdp")},
    "tp": {"parallelize_module": dtensor_tp, "rolemesh": rolemesh("tp")},
}


def measure(kind: str, rounds: int, target: str) -> dict[str, tuple[list[float], list[float]]]:
    """Run on every rank: seconds of the slowest rank and processor seconds of all, by peer."""
    ranks = dist.get_world_size()
    torch.manual_seed(1)
    batches = [torch.randint(VOCABULARY, (BATCH, TOKENS)) for _ in range(_CHECKED)]
    wanted = [alone(ranks, target)(ids) for ids in batches[:1]]
    made = {name: make(ranks, target) for name, make in PEERS[kind].items()}
    for name, step in made.items():
        found = [step(ids) for ids in batches]
        if abs(found[0] - wanted[0]) > 1e-3:
            raise ValueError(f"{name} has a loss of {found[0]}, one device of {wanted[0]}")
    seconds: dict[str, list[float]] = {name: [] for name in made}
    cpu: dict[str, list[float]] = {name: [] for name in made}
    order = random.Random(11)
    for index in range(rounds):
        for name in order.sample(list(made), len(made)):
            dist.barrier()
            began, worked = time.perf_counter(), time.process_time()
            made[name](batches[index % _CHECKED])
            seconds[name].append(time.perf_counter() - began)
            cpu[name].append(time.process_time() - worked)
    slowest, work = torch.tensor(list(seconds.values())), torch.tensor(list(cpu.values()))
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    dist.all_reduce(work)
    return {name: (slowest[i].tolist(), work[i].tolist()) for i, name in enumerate(made)}


def main() -> int:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", nargs="*", default=KINDS, choices=KINDS)
    parser.add_argument("--ranks", nargs="*", type=int, default=[2])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--target", default="inductor", choices=("eager", "inductor"))
    given = parser.parse_args()
    missed = []
    titles = ["axis", "ranks", "peer", "ms", "time", "CPU"]
    print("| " + " | ".join(titles) + " |\n" + "|---" * len(titles) + "|")
    for kind in given.only:
        for ranks in given.ranks:
            args = (kind, given.rounds, given.target)
            found, *_ = run_processes(f"{__file__}:measure", ranks, args, timeout=3600)
            assert isinstance(found, dict)
            (base, base_cpu), (mine, _) = next(iter(found.values())), found["rolemesh"]
            for name, (times, spent) in found.items():
                milliseconds = statistics.median(times) * 1e3
                time_ratio, cpu_ratio = ratio(times, base), ratio(spent, base_cpu)
                cells = (kind, ranks, name, f"{milliseconds:.1f}")
                print("| " + " | ".join(map(str, cells)), end="")
                print(f" | {time_ratio:.3f} | {cpu_ratio:.3f} |", flush=True)
            if ratio(mine, base) > LIMIT:
                missed.append(f"{kind} on {ranks} ranks: {ratio(mine, base):.3f}")
    for line in missed:
        print(f"above {LIMIT}: {line}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
