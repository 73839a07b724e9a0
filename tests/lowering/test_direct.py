"""Collectives as one exchange give what collectives give, and reduce in the order of ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.distributed as dist
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.lowering.direct import LARGEST, exchange_directly, position_on_gloo
from rolemesh.runtime.groups import groups_for, stand_in_groups
from rolemesh.runtime.launch import run_processes
from rolemesh.runtime.traffic import record_traffic

c10d = torch.ops._c10d_functional
wait = c10d.wait_tensor.default

Compute = Callable[[torch.Tensor], torch.Tensor]


def collectives(ranks: int, group: str) -> dict[str, Compute]:
    """One function a collective, each of `[rows, 5]`."""

    def reduce_scatter(op: str) -> Compute:
        return lambda x: wait(c10d.reduce_scatter_tensor(x, op, ranks, group)) * 2

    def all_reduce(op: str) -> Compute:
        return lambda x: wait(c10d.all_reduce(x, op, group)) + x

    def between(x: torch.Tensor) -> torch.Tensor:
        started = c10d.all_gather_into_tensor(x, ranks, group)
        return x.sum() * wait(started)

    return {
        **{f"reduce_scatter {op}": reduce_scatter(op) for op in ("sum", "max", "min")},
        **{f"all_reduce {op}": all_reduce(op) for op in ("sum", "max", "min")},
        "all_gather": lambda x: wait(c10d.all_gather_into_tensor(x, ranks, group)).neg(),
        "started all_gather": between,
    }


def traced(function: Compute, example: torch.Tensor, mode: str = "fake") -> fx.GraphModule:
    return make_fx(function, tracing_mode=mode)(example)


def issued(graph: fx.Graph) -> Counter[str]:
    """Collectives of a graph by name."""
    targets = [node.target for node in graph.nodes if getattr(node.target, "namespace", "")]
    names = [t._opname for t in targets if t.namespace == "_c10d_functional"]
    return Counter(name for name in names if name != "wait_tensor")


def both_ways(mesh: Mesh, mode: str) -> list[tuple[str, bool, Counter[str], float]]:
    """On a rank: for each collective whether the exchange gives its bits, and what is issued."""
    (group,) = groups_for(mesh).names.values()
    ranks, found = mesh.size, []
    for name, function in collectives(ranks, group).items():
        for dtype in (torch.float32, torch.bfloat16, torch.int64):
            module = traced(function, torch.ones(2 * ranks, 5, dtype=dtype), mode)
            exchange_directly(module.graph, position_on_gloo)
            module.recompile()
            rows = 3 * ranks if mode == "symbolic" else 2 * ranks
            generator = torch.Generator().manual_seed(dist.get_rank())
            x = torch.randint(-9, 9, (rows, 5), generator=generator).to(dtype)
            with record_traffic() as records:
                got = module(x)
            same = torch.equal(got, function(x)) and got.is_contiguous()
            received = sum(record.received for record in records) / x.nbytes
            found.append((name, same, issued(module.graph), received))
    return found


@pytest.mark.processes
@pytest.mark.parametrize(("ranks", "mode"), [(2, "fake"), (3, "fake"), (2, "symbolic")])
def test_an_exchange_gives_the_bits_of_the_collective(ranks: int, mode: str) -> None:
    arguments = (Mesh({"tp": ranks}), mode)
    for found in run_processes(both_ways, ranks, arguments, fork=True):
        assert isinstance(found, list)
        assert len(found) == 24
        for name, same, kinds, received in found:
            assert same, name
            kind = name.split()[-1] if name.startswith("started") else name.split()[0]
            stays = mode == "symbolic" and kind == "all_reduce"  # of a size that is not known
            assert kinds == {kind if stays else "all_to_all_single": 1}, name
            share = {"reduce_scatter": (ranks - 1) / ranks}.get(kind, ranks - 1)
            assert received == pytest.approx(2 * (ranks - 1) / ranks if stays else share), name


def summed(mesh: Mesh) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """On a rank: its value, the sum of all, and its chunk of that sum."""
    (group,) = groups_for(mesh).names.values()
    generator = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randn(2 * mesh.size, 7, generator=generator)
    results = []
    for name in ("all_reduce sum", "reduce_scatter sum"):
        function = collectives(mesh.size, group)[name]
        module = traced(function, x)
        exchange_directly(module.graph, position_on_gloo)
        module.recompile()
        results.append(module(x))
    return x, results[0] - x, results[1] / 2


@pytest.mark.processes
def test_sums_go_from_the_first_rank_to_the_last() -> None:
    ranks = run_processes(summed, 3, (Mesh({"tp": 3}),), fork=True)
    total, chunks = _in_order([r[0] for r in ranks]), [r[2] for r in ranks]  # type: ignore[index]
    assert torch.equal(torch.cat(chunks), total)
    for x, whole, _ in ranks:  # type: ignore[misc]
        assert torch.equal(whole, (total + x) - x)


def _in_order(values: Sequence[torch.Tensor]) -> torch.Tensor:
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total


def issued_on(mesh: Mesh, rows: int, names: Sequence[str]) -> dict[str, Counter[str]]:
    """What this process issues for float32 `[rows, 5]`, by collective."""
    (group,) = groups_for(mesh).names.values()
    found = {}
    for name in names:
        module = traced(collectives(mesh.size, group)[name], torch.ones(rows, 5))
        exchange_directly(module.graph, position_on_gloo)
        found[name] = issued(module.graph)
    return found


@pytest.mark.processes
def test_an_all_reduce_of_many_bytes_stays() -> None:
    names = ["all_reduce sum", "reduce_scatter sum", "all_gather"]
    for rows, stays in ((LARGEST // 20, False), (LARGEST // 20 + 2, True)):
        (kinds, _) = run_processes(issued_on, 2, (Mesh({"tp": 2}), rows, names), fork=True)
        assert isinstance(kinds, dict)
        reduces = kinds.pop("all_reduce sum")
        assert reduces == {"all_reduce" if stays else "all_to_all_single": 1}
        assert set(map(str, kinds.values())) == {str(Counter({"all_to_all_single": 1}))}


def test_collectives_of_another_backend_stay() -> None:
    mesh = Mesh({"tp": 2})
    with stand_in_groups(mesh, 0):
        kinds = issued_on(mesh, 4, list(collectives(2, "0")))
    assert [*kinds] == [*collectives(2, "0")]
    assert "all_to_all_single" not in sum(kinds.values(), Counter())
