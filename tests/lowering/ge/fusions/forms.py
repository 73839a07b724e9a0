"""A graph before and after fusion: as text, and run on real tensors on one rank or on several."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from rolemesh.compiler.ir.program import Origin, origin
from rolemesh.lowering.flatten import as_fake, flatten
from rolemesh.lowering.ge.fusions.all import fuse
from rolemesh.lowering.npu.define import npu_ops
from rolemesh.lowering.npu.matmul_collectives import Group
from rolemesh.runtime.ge.communicator import Communicator, Request
from rolemesh.runtime.ge.rendezvous import run_ranks

__all__ = [
    "Forms",
    "both_forms",
    "f",
    "flat",
    "fused",
    "graph_text",
    "hits",
    "near",
    "run_both_on_ranks",
    "same_values",
]

_COLLECTIVES = {
    torch.ops._c10d_functional.all_gather_into_tensor.default: "all_gather",
    torch.ops._c10d_functional.reduce_scatter_tensor.default: "reduce_scatter",
    torch.ops._c10d_functional.all_reduce.default: "all_reduce",
    torch.ops._c10d_functional.all_to_all_single.default: "all_to_all",
    torch.ops._c10d_functional.broadcast.default: "broadcast",
}
_WITH_GROUP = ("npu_mm_reduce_scatter_base", "npu_mm_all_reduce_base", "npu_all_gather_base_mm")
_WITH_GROUP += ("npu_all_to_all_matmul",)


class Forms(NamedTuple):
    """A flat graph, its fused form, and how often each op was made."""

    before: fx.GraphModule
    after: fx.GraphModule
    made: dict[str, int]


def f(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Random numbers; equal arguments give equal ones."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def flat(function: Callable[..., object], examples: Sequence[Tensor]) -> fx.GraphModule:
    """A function as a flat graph, whose nodes come from one place of one module."""
    fakes = as_fake(examples)  # some are fake already
    with torch.no_grad(), fakes[0].fake_mode:
        module = make_fx(function)(*fakes)
    for node in module.graph.nodes:
        node.meta["origin"] = Origin("model.layer", "model.py:1")
    return flatten(module, fakes)


def fused(before: fx.GraphModule, *, within_limits: bool = True) -> Forms:
    """Fuse a copy of a flat graph, and check what holds for every node of it."""
    after = fx.GraphModule(before, copy.deepcopy(before.graph))
    for old, new in zip(before.graph.nodes, after.graph.nodes, strict=True):
        new.meta = dict(old.meta)  # a copied fake tensor would be of another mode
    made = fuse(after.graph, "group-{}".format, within_limits=within_limits)
    after.graph.lint()
    after.recompile()
    for node in after.graph.nodes:
        assert node.op in ("placeholder", "output") or "val" in node.meta
        if node.op == "call_function" and "npu::npu_" in str(getattr(node.target, "_schema", "")):
            assert origin(node).reason.removeprefix("fused ") in made
    inputs = len(after.graph.find_nodes(op="placeholder"))
    assert all(node.op == "placeholder" for node in list(after.graph.nodes)[:inputs])
    outputs = zip(_results(before), _results(after), strict=True)
    assert all(old.meta["val"].shape == new.meta["val"].shape for old, new in outputs)
    return Forms(before, after, made)


def both_forms(
    function: Callable[..., object], *examples: Tensor, within_limits: bool = True
) -> Forms:
    """A function's graph before and after fusion."""
    return fused(flat(function, examples), within_limits=within_limits)


def hits(function: Callable[..., object], *examples: Tensor, **options: bool) -> dict[str, int]:
    """How often a function's graph was rewritten to each op, which gives the same values."""
    forms = both_forms(function, *examples, **options)
    same_values(forms.before(*examples), forms.after(*examples))
    return {name.removeprefix("npu_"): count for name, count in forms.made.items() if count}


def same_values(expected: object, found: object) -> None:
    """Compare results; those in low precision by their largest element."""
    left, right = ((x,) if isinstance(x, Tensor) else x for x in (expected, found))
    for old, new in zip(left, right, strict=True):  # type: ignore[arg-type]
        near(old, new)


def near(expected: Tensor, found: Tensor) -> None:
    """Compare tensors of one dtype: equal, but for a few roundings relative to the largest."""
    assert (expected.dtype, expected.shape) == (found.dtype, found.shape)
    if not expected.is_floating_point():
        torch.testing.assert_close(found, expected)
        return
    roundings = {torch.float32: 40, torch.float16: 8, torch.bfloat16: 4}[expected.dtype]
    largest = expected.float().abs().nan_to_num().max().item() if expected.numel() else 0.0
    bound = roundings * torch.finfo(expected.dtype).eps * largest
    torch.testing.assert_close(found.float(), expected.float(), rtol=0, atol=bound, equal_nan=True)


def run_both_on_ranks(
    forms: Sequence[Forms], inputs: Sequence[Sequence[Tensor]]
) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Run both forms of all ranks' graphs, one thread a rank.

    Args:
        forms: For each rank, its graph.
        inputs: For each rank, its inputs.

    Returns:
        For each rank the results before and after.
    """

    def run(rank: int, communicator: Communicator) -> tuple[list[Tensor], list[Tensor]]:
        pair = (forms[rank].before, forms[rank].after)
        copies = ([x.clone() for x in inputs[rank]] for _ in pair)
        with torch.no_grad():
            return tuple(  # type: ignore[return-value]
                _OnRank(module, communicator, len(forms)).run(*given)
                for module, given in zip(pair, copies, strict=True)
            )

    return run_ranks(len(forms), run)


class _OnRank(fx.Interpreter):
    """Runs a graph whose collectives go over one group of all ranks."""

    def __init__(self, module: fx.GraphModule, communicator: Communicator, ranks: int) -> None:
        super().__init__(module)
        self.communicator = communicator
        self.ranks = ranks
        self.node = ""

    def run_node(self, n: fx.Node) -> object:
        self.node = n.name
        return super().run_node(n)

    def call_function(self, target: object, args: tuple, kwargs: dict) -> object:  # type: ignore[override, type-arg]
        name = getattr(getattr(target, "_schema", None), "name", "")
        if target is torch.ops._c10d_functional.wait_tensor.default:
            return args[0]
        if target in _COLLECTIVES:
            kind = _COLLECTIVES[target]  # type: ignore[index]
            root = args[1] if kind == "broadcast" else 0
            found = self._exchange(kind, args[0], root=root)
            shape = list(args[0].shape)
            if kind == "all_gather":
                shape[0] *= self.ranks
            if kind == "reduce_scatter":
                shape[0] //= self.ranks
            return found.view(shape)
        if name.removeprefix("npu::") in _WITH_GROUP:
            op = npu_ops()[name.removeprefix("npu::")]
            x, weight, hcom, *rest = args
            assert hcom.startswith("group-")
            return op.reference(x, weight, Group(self.ranks, self._exchange), *rest, **kwargs)
        return super().call_function(target, args, kwargs)  # type: ignore[arg-type]

    def _exchange(self, kind: str, x: Tensor, root: int = 0) -> Tensor:
        group = f"tag=;rank_list={','.join(map(str, range(self.ranks)))}"
        reduction = "sum" if kind in ("all_reduce", "reduce_scatter") else ""
        request = Request(kind, group, self.node, reduction=reduction, root=root)
        wire = x.reshape(-1) if kind == "all_to_all" else x.contiguous()
        return self.communicator.exchange(request, wire)


def graph_text(graph: fx.Graph) -> str:
    """The ops of a graph, one a line, with dtype and shape of each result."""
    lines = []
    for node in graph.nodes:
        if node.op == "call_function":
            given = [*map(str, node.args), *(f"{k}={v}" for k, v in node.kwargs.items())]
            value = node.meta["val"]
            kinds = ", ".join(map(_kind, value if isinstance(value, tuple | list) else [value]))
            name = getattr(node.target, "__name__", str(node.target))
            lines.append(f"%{node.name} = {name}({', '.join(given)}) : {kinds}")
    return "\n".join([*lines, f"return {', '.join(map(str, _results_of(graph)))}"])


def _kind(value: object) -> str:
    assert isinstance(value, Tensor)
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"


def _results_of(graph: fx.Graph) -> list[fx.Node]:
    results = graph.output_node().args[0]
    return list(results) if isinstance(results, tuple | list) else [results]  # type: ignore[list-item]


def _results(module: fx.GraphModule) -> list[fx.Node]:
    return _results_of(module.graph)
