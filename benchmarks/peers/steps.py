"""The peers: for each a compiled step over this rank's part of one model, and what it holds.

All are compiled by inductor with fixed sizes, and as one graph, but for that of transformers:
Dynamo may have to split it where it cannot capture the wrappers around its layers.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from peers.dtensor import with_dtensor
from peers.megatron import megatron_model
from peers.megatron_latent import latent_model
from peers.models import MODELS, Call, build, cache_of, rewind
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import DistributedConfig, PreTrainedModel, StaticCache

from rolemesh.compiler.analysis import local_flops
from rolemesh.compiler.backend import observing
from rolemesh.compiler.integrate import IMPLEMENTATION, integrate
from rolemesh.compiler.ir.program import Program
from rolemesh.runtime.store import default_store
from rolemesh.runtime.traffic import Record, record_traffic

__all__ = ["PEERS", "Counts", "Peer"]


class Counts(NamedTuple):
    """What one step does on one rank.

    Attributes:
        flops: Floating-point operations of contractions.
        collectives: How many of each kind.
        received: Bytes received in them.
    """

    flops: int
    collectives: Counter[str]
    received: float

    @classmethod
    def of(cls, flops: int, records: Sequence[Record]) -> Counts:
        """Counts of a step that took these collectives."""
        kinds = Counter(record.op for record in records)
        return cls(flops, kinds, sum(record.received for record in records))


@dataclass(frozen=True)
class Peer:
    """One way to run a call on this rank.

    Attributes:
        step: Runs it; returns the last token's logits, whole.
        rewind: Makes it ready to run again.
        weight_bytes: Bytes of the weights that this rank holds, once it has run.
        count: Runs a step and counts what it does on this rank; None if nothing can tell.
    """

    step: Callable[[], torch.Tensor]
    rewind: Callable[[], None]
    weight_bytes: Callable[[], int]
    count: Callable[[], Counts] | None = None


def _bytes(model: torch.nn.Module) -> int:
    """Bytes of a model's weights on this rank."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)


def _of_transformers(
    model: PreTrainedModel, cache: StaticCache, call: Call, compiled: Callable[..., object]
) -> Peer:
    ids = call.ids(model.config.vocab_size)

    def step() -> torch.Tensor:
        with torch.no_grad():
            logits = compiled(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits.full_tensor() if isinstance(logits, DTensor) else logits

    return Peer(step, lambda: rewind(cache, call), lambda: _bytes(model))


def megatron(name: str, phase: str) -> Peer:
    """Tensor parallelism written by hand."""
    source, call = build(name), MODELS[name].calls[phase]
    group = dist.group.WORLD
    assert group is not None
    if hasattr(source.config, "kv_lora_rank"):
        model, cache = latent_model(source, group), cache_of(source, call)
    else:
        model = megatron_model(source, group)
        cache = cache_of(source, call, group.rank(), group.size())
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    ids, start = call.ids(source.config.vocab_size), torch.tensor(call.start)

    def step() -> torch.Tensor:
        with torch.no_grad():
            return compiled(ids, cache, start)

    def experts(*shapes: tuple[int, ...], out_shape: object) -> int:
        _, routes, _, gate_up, down = shapes
        rows = torch.Size(routes).numel()
        return 2 * rows * (torch.Size(gate_up[1:]).numel() + torch.Size(down[1:]).numel())

    def count() -> Counts:
        counter = FlopCounterMode(
            display=False, custom_mapping={torch.ops.megatron.experts: experts}
        )
        with torch.no_grad(), record_traffic() as records, counter:
            model(ids, cache, start)
        return Counts.of(counter.get_total_flops(), records)

    return Peer(step, lambda: None, lambda: _bytes(model), count)


def dtensor(name: str, phase: str) -> Peer:
    """DTensor's `parallelize_module` of the model of transformers."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    model, call = build(name), MODELS[name].calls[phase]
    cache = cache_of(model, call, dist.get_rank(), mesh.size())
    compiled = torch.compile(with_dtensor(model, mesh), fullgraph=True, dynamic=False)
    return _of_transformers(model, cache, call, compiled)


def transformers_tp(name: str, phase: str) -> Peer:
    """The tensor parallelism of transformers, by the plan of the model.

    The model is distributed as `from_pretrained` does it with `DistributedConfig(tp_size=...)`,
    which would also need `accelerate` and a checkpoint.
    """
    model, call = build(name), MODELS[name].calls[phase]
    rank, ranks = dist.get_rank(), dist.get_world_size()
    cache = cache_of(model, call, rank, ranks)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    wanted, _, meshes = model.prepare_distribute_model(DistributedConfig(tp_size=ranks))
    model = model.maybe_distribute_model(model, wanted, meshes)
    return _of_transformers(model, cache, call, torch.compile(model, dynamic=False))


def rolemesh(role: str, ops: str | None = IMPLEMENTATION) -> Callable[[str, str], Peer]:
    """This project, with a role.

    Args:
        role: The role.
        ops: Which implementations of attention and experts the model uses; None for its own.
    """

    def peer(name: str, phase: str) -> Peer:
        integrate("transformers")
        model, call = build(name, ops), MODELS[name].calls[phase]
        cache = cache_of(model, call)
        options = {"mesh": {"tp": dist.get_world_size()}, "role": role, "target": "inductor"}
        compiled = torch.compile(
            model, backend="rolemesh", fullgraph=True, dynamic=False, options=options
        )
        made = _of_transformers(model, cache, call, compiled)

        def held() -> int:
            kept = (default_store().find(parameter) for parameter in model.parameters())
            return sum(entry.local.nbytes for entry in kept if entry is not None)

        def count() -> Counts:
            found: list[Counts] = []

            def observe(
                program: Program, run: Callable[[], list[torch.Tensor]]
            ) -> list[torch.Tensor]:
                with record_traffic() as records:
                    results = run()
                flops = sum(local_flops(program, node) for node in program.ops)
                found.append(Counts.of(flops, records))
                return results

            with observing(observe):
                made.step()
            (counts,) = found
            return counts

        return Peer(made.step, made.rewind, held, count)

    return peer


PEERS: Mapping[str, Callable[[str, str], Peer]] = {
    "megatron": megatron,
    "dtensor": dtensor,
    "transformers": transformers_tp,
    "rolemesh:decode": rolemesh("decode"),
    "rolemesh:pd_mixed": rolemesh("pd_mixed"),
    "rolemesh:prefill": rolemesh("prefill"),
    "rolemesh without integrate:decode": rolemesh("decode", None),
}
"""Peers by name, each made for a model and a phase; what follows a colon is the role."""
