"""Ranks load their shards together: each byte read once a node, little memory, all or nothing."""

from __future__ import annotations

import contextlib
import io
import math
import os
import random
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from tests.layouts import random_layout
from tests.models import Prompt, Setup, model_of, traced
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

from rolemesh.compiler.api import shard
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.placement import Owner, Shard
from rolemesh.compiler.ir.program import InputKind
from rolemesh.compiler.models.tiny_models import tiny_config, tiny_model
from rolemesh.lowering.chunks import holds, scatter_one
from rolemesh.runtime.checkpoint.files import open_checkpoint
from rolemesh.runtime.checkpoint.hub import HubNaming
from rolemesh.runtime.checkpoint.load import load_checkpoint
from rolemesh.runtime.launch import run_processes
from rolemesh.runtime.store import Store

pytestmark = pytest.mark.processes


@dataclass
class Job:
    """One model to load: its checkpoint, the model that saved it, and a layout by tensor name."""

    folder: Path
    saved: PreTrainedModel
    layouts: Mapping[str, Layout]


@dataclass
class Loaded:
    """What one rank has, read and held."""

    locals_: dict[str, torch.Tensor]
    reads: list[tuple[str, int, int]]
    peak: int
    bar: str


class Allocations(TorchDispatchMode):
    """Counts the bytes of all CPU storages that are made inside and still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.now = self.peak = 0

    def free(self, storage: int) -> None:
        self.now -= self.live.pop(storage)

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and value.device.type == "cpu":
                storage = value.untyped_storage()
                if id(storage) not in self.live:
                    self.live[id(storage)] = storage.nbytes()
                    weakref.finalize(storage, self.free, id(storage))
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
        return result


@dataclass
class Reads:
    """Stands in for `os.preadv` and notes what was read."""

    seen: list[tuple[str, int, int]] = field(default_factory=list)
    real: Callable[..., int] = os.preadv

    def __call__(self, descriptor: int, buffers: Sequence[memoryview], at: int) -> int:
        count = self.real(descriptor, buffers, at)
        self.seen.append((os.readlink(f"/proc/self/fd/{descriptor}"), at, at + count))
        return count


def job(folder: Path, mesh: Mesh, name: str, dtype: torch.dtype, seed: int) -> Job:
    """A saved model with random layouts, of which some tensors are owned and some replicated."""
    kind, _, tied = name.partition(" ")
    overrides = {"tie_word_embeddings": True} if tied else {}
    saved = tiny_model(tiny_config(kind, layers=2, **overrides), seed=seed, dtype=dtype)
    assert isinstance(saved, PreTrainedModel)
    folder /= name.replace(" ", "_")
    saved.save_pretrained(folder, max_shard_size="150KB")
    choose = random.Random(seed).choice
    layouts = {
        key: random_layout(choose, value.shape, mesh, owner=True)
        for key, value in stored(saved).items()
    }
    return Job(folder, saved, layouts)


def stored(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers, a tied one under its first name."""
    first = {id(value): name for name, value in reversed(model.state_dict(keep_vars=True).items())}
    return {n: v for n, v in model.state_dict(keep_vars=True).items() if first[id(v)] == n}


def empty(saved: PreTrainedModel) -> PreTrainedModel:
    """The same model without storage."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(saved.config, dtype=saved.dtype)


def load(task: Job, mesh: Mesh, node: str | None) -> Loaded:
    """Load on one rank, and look at it."""
    store, model = Store(), empty(task.saved)
    tensors = model.state_dict(keep_vars=True)
    reads, shown = Reads(), io.StringIO()
    with (
        mock.patch("os.preadv", reads),
        contextlib.redirect_stderr(shown),
        Allocations() as memory,
    ):
        load_checkpoint(
            task.folder, tensors, task.layouts, mesh, store, naming=HubNaming(model), node=node
        )
    locals_ = {}
    for name in task.layouts:
        found = store.find(tensors[name])
        assert found is not None
        assert (found.name, found.layout, found.mesh) == (name, task.layouts[name], mesh)
        locals_[name] = found.local
    assert len(store.stored()) == len(locals_)
    return Loaded(locals_, reads.seen, memory.peak, shown.getvalue())


def worker(tasks: Sequence[Job], mesh: Mesh, nodes: Sequence[str] | None) -> list[Loaded]:
    node = nodes[dist.get_rank()] if nodes else None
    return [load(task, mesh, node) for task in tasks]


def load_and_check(tasks: Sequence[Job], mesh: Mesh, nodes: Sequence[str] | None = None) -> None:
    """Load on a process a rank and check what each has; all on one node if none are named."""
    by_rank = run_processes(worker, mesh.size, (tasks, mesh, nodes), fork=True)
    for task, *ranks in zip(tasks, *cast("list[list[Loaded]]", by_rank), strict=True):
        check(task, mesh, ranks, nodes or ["here"] * mesh.size)


def check(task: Job, mesh: Mesh, ranks: Sequence[Loaded], nodes: Sequence[str]) -> None:
    whole = stored(task.saved)
    for rank, loaded in enumerate(ranks):
        for name, layout in task.layouts.items():
            tensor = whole[name].detach()
            if holds(layout, mesh, rank):
                expected = scatter_one(tensor, layout, mesh, rank)
            else:
                expected = tensor.new_empty(0)
            assert loaded.locals_[name].dtype == tensor.dtype
            assert torch.equal(loaded.locals_[name], expected), (name, layout, rank)
        shards = sum(local.nbytes for local in loaded.locals_.values())
        largest = max(tensor.nbytes for tensor in whole.values())
        assert loaded.peak <= shards + largest, (rank, loaded.peak, shards, largest)
    checkpoint = open_checkpoint(task.folder)
    there = sorted(
        (os.path.realpath(entry.file), entry.start, entry.start + entry.type.nbytes)
        for entry in checkpoint.entries.values()
    )
    for node in set(nodes):
        members = [loaded for loaded, other in zip(ranks, nodes, strict=True) if other == node]
        assert merged([r for loaded in members for r in loaded.reads]) == merged(there)
        mine = [sum(stop - start for _, start, stop in loaded.reads) for loaded in members]
        assert sum(mine) == checkpoint.nbytes, "no byte is read twice"
        assert min(mine) > checkpoint.nbytes / len(members) / 2, "the reading is spread"
        assert ["loading weights: 100%" in loaded.bar for loaded in members] == [
            position == 0 for position in range(len(members))
        ]


def merged(ranges: Sequence[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    """Ranges in order, those that touch as one."""
    found: list[tuple[str, int, int]] = []
    for file, start, stop in sorted(ranges):
        if found and found[-1][0] == file and found[-1][2] == start:
            start = found.pop()[1]
        found.append((file, start, stop))
    return found


def test_four_ranks_of_one_node(tmp_path: Path) -> None:
    mesh = Mesh({"dp": 2, "tp": 2})
    tasks = [
        job(tmp_path, mesh, "llama tied", torch.float32, seed=3),
        job(tmp_path, mesh, "qwen3_moe", torch.bfloat16, seed=4),
        job(tmp_path, mesh, "gpt_oss", torch.float32, seed=5),
        job(tmp_path, mesh, "deepseek_v32", torch.float32, seed=6),
    ]
    load_and_check(tasks, mesh)


def test_layouts_of_a_role(tmp_path: Path) -> None:
    """The names of a Program's inputs are those of the model's tensors."""
    setup = Setup("llama")
    saved = model_of(setup)
    assert isinstance(saved, PreTrainedModel)
    saved.save_pretrained(tmp_path)
    program = shard(traced(setup, Prompt(2, 7)), {"tp": 2}, "prefill").program
    layouts = {
        entry.name: program.layout(node)
        for entry, node in zip(program.inputs, program.placeholders, strict=True)
        if entry.kind is InputKind.PARAMETER
    }
    assert layouts.keys() == stored(saved).keys()
    assert not all(layout.is_replicated for layout in layouts.values())
    load_and_check([Job(tmp_path, saved, layouts)], program.the_mesh)


def test_three_ranks_on_two_nodes(tmp_path: Path) -> None:
    mesh = Mesh({"tp": 3})
    tasks = [
        job(tmp_path, mesh, "mixtral", torch.float32, seed=7),
        job(tmp_path, mesh, "phi3", torch.bfloat16, seed=8),
    ]
    load_and_check(tasks, mesh, ["a", "b", "a"])


TENSORS = {"embed": torch.arange(21.0).reshape(7, 3), "norm": torch.arange(5.0)}
LAYOUTS = {"embed": Layout((Shard(0, 1, 7),)), "norm": Layout((Owner(1),))}


def refuse(good: Path, truncated: Path) -> list[str]:
    """Every way in which one rank alone finds a problem; then all is well."""
    rank, mesh, texts = dist.get_rank(), Mesh({"tp": 2}), []

    def attempt(path: Path, tensors: Mapping[str, torch.Tensor], there: Sequence[str] = ()) -> str:
        store = Store()
        for name in there:
            store.put(tensors[name], name, LAYOUTS[name], mesh, torch.empty(0))
        try:
            load_checkpoint(path, tensors, LAYOUTS, mesh, store, progress=False, node=str(rank))
        except RolemeshError as error:
            assert [s.name for s in store.stored()] == [*there], "nothing is half-done"
            return str(error)
        return "; ".join(
            str(s.local.tolist()) for s in sorted(store.stored(), key=lambda s: s.name)
        )

    def fails(descriptor: int, buffers: Sequence[memoryview], at: int) -> int:
        raise OSError(5, "Input/output error")

    meta = {name: value.to("meta") for name, value in TENSORS.items()}
    texts.append(attempt(truncated if rank else good, meta))
    other = {**meta, "norm": torch.empty(4, device="meta")}
    texts.append(attempt(good, other if rank else meta))
    broken: Sequence[Callable[..., int]] = (fails, lambda *_: 0)
    for preadv in broken:
        with mock.patch("os.preadv", preadv) if rank else contextlib.nullcontext():
            texts.append(attempt(good, meta))
    texts.append(attempt(good, meta, ["norm"] if rank else []))
    texts.append(attempt(good, meta))
    return texts


def test_all_ranks_refuse_together(tmp_path: Path) -> None:
    good, truncated = tmp_path / "good.safetensors", tmp_path / "truncated.safetensors"
    save_file(TENSORS, good)
    truncated.write_bytes(good.read_bytes()[:-2])
    first, second = run_processes(refuse, 2, (good, truncated), fork=True, timeout=60.0)
    assert isinstance(first, list)
    assert isinstance(second, list)
    assert first[:5] == second[:5]
    assert "[RM032] the checkpoint" in first[0]
    assert "truncated.safetensors: truncated: norm ends at byte" in first[0]
    assert "[RM033]" in first[1]
    assert "shape: norm is [5], the model has [4]" in first[1]
    assert "[RM032] reading the checkpoint failed: [Errno 5] Input/output error" in first[2]
    assert "[RM032] reading the checkpoint failed: it ends at byte" in first[3]
    assert "nothing writes to it" in first[3]
    assert "[RM024] norm is stored already" in first[4]
    assert first[5] == f"{TENSORS['embed'][:4].tolist()}; []"
    padded = [*TENSORS["embed"][4:].tolist(), TENSORS["embed"][6].tolist()]
    assert second[5] == f"{padded}; {TENSORS['norm'].tolist()}"


def test_tensors_without_a_layout_are_checked_but_not_read(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    assert run_processes(only_norm, 1, (tmp_path,), fork=True) == [20]


def test_the_bar_waits_for_no_lock_of_the_process_that_was_forked(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    held, end = threading.Event(), threading.Event()

    def hold() -> None:
        with tqdm.get_lock():
            held.set()
            end.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    try:
        assert run_processes(only_norm, 1, (tmp_path,), fork=True, timeout=60.0) == [20]
    finally:
        end.set()
        thread.join()


def only_norm(folder: Path) -> int:
    """Load one of two tensors; the bytes that were read."""
    store, reads = Store(), Reads()
    tensors = {name: value.to("meta") for name, value in TENSORS.items()}
    mesh = Mesh({"tp": 1})
    layouts = {"norm": Layout.replicated(mesh), "unknown": Layout.replicated(mesh)}
    with mock.patch("os.preadv", reads):
        load_checkpoint(folder, tensors, layouts, mesh, store)
    assert [math.prod(s.local.shape) for s in store.stored()] == [5]
    return sum(stop - start for _, start, stop in reads.seen)
