"""A compiled model in a new process: nothing is traced, sharded or compiled, and all is equal."""

from __future__ import annotations

import os
from collections import Counter

import pytest
import torch
import torch._inductor.config
import torch.distributed as dist
from torch import nn
from torch._dynamo.utils import counters

from rolemesh.compiler import backend
from rolemesh.compiler.cache import captured
from rolemesh.compiler.cache.state import versions
from rolemesh.compiler.ir.spec import P
from rolemesh.runtime import rank
from rolemesh.runtime.launch import run_processes
from rolemesh.runtime.store import gather

pytestmark = pytest.mark.processes

Result = tuple[Counter[str], list[torch.Tensor]]


class Model(nn.Module):
    """Two linear layers, one of which writes what it sees to a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 14, bias=False)
        self.down = nn.Linear(14, 6, bias=False)

    def forward(self, x: torch.Tensor, cache: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        inner = torch.nn.functional.silu(self.up(x))
        cache.index_copy_(0, at, inner)
        return x + self.down(inner + cache.sum(0))


ANNOTATIONS = {"up.weight": P("tp"), "down.weight": P(None, "tp"), "cache": P(None, "tp")}


def counting(counts: Counter[str], module: object, name: str) -> None:
    """Count the calls of a function from here on; a process of its own forgets it."""
    function = getattr(module, name)

    def counted(*args: object, **kwargs: object) -> object:
        counts[name] += 1
        return function(*args, **kwargs)

    setattr(module, name, counted)


def serve(folder: str, target: str, dynamic: bool) -> Result:
    """Call a compiled model on one rank; what was done for it, the results and the cache."""
    os.environ.update(ROLEMESH_CACHE="1", ROLEMESH_CACHE_DIR=folder)
    torch._inductor.config.compile_threads = 1  # a fork would wait for its parent's workers
    counters.clear()  # those of the process that this one is a copy of
    counts: Counter[str] = Counter()
    counting(counts, captured, "capture")
    counting(counts, backend, "shard_program")
    if target == "inductor":
        counting(counts, rank, "bind")
    torch.manual_seed(0)
    model = Model().requires_grad_(False)
    mesh = {"tp": dist.get_world_size()}
    options = {"mesh": mesh, "annotations": ANNOTATIONS, "target": target}
    compiled = torch.compile(model, backend="rolemesh", options=options)
    cache = torch.zeros(9, 14)
    results = []
    for tokens in (5, 3) if dynamic else (5,):
        x, at = torch.randn(tokens, 6), torch.arange(tokens) + 1
        if dynamic:
            torch._dynamo.mark_dynamic(x, 0)
            torch._dynamo.mark_dynamic(at, 0)
        with torch.no_grad():
            results.append(compiled(x, cache, at))
    counts["fxgraph_cache_miss"] = counters["inductor"]["fxgraph_cache_miss"]
    return +counts, [*results, gather(cache)]


@pytest.mark.parametrize(
    ("target", "ranks", "dynamic"), [("eager", 2, True), ("inductor", 1, False)]
)
def test_a_new_process_hits(
    tmp_path_factory: pytest.TempPathFactory, target: str, ranks: int, dynamic: bool
) -> None:
    versions()  # read once: the processes are forks of this one
    arguments = (str(tmp_path_factory.mktemp("cache")), target, dynamic)
    cold, warm = (run_processes(serve, ranks, arguments, fork=True, timeout=280) for _ in range(2))
    for (done, first), (counts, results) in zip(cold, warm, strict=True):  # type: ignore[misc]
        assert ranks > 1 or done["shard_program"] == 1  # of several ranks one may be late, and hit
        assert counts == Counter()
        for one, other in zip(first, results, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
