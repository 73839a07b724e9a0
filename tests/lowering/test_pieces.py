"""Graphs in pieces: the same results, one piece for layers that are alike, in every use of it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

import pytest
import torch
from tests.models import Prompt, Setup, traced
from torch import Tensor, fx

from rolemesh.compiler.api import shard
from rolemesh.compiler.ir.program import Program
from rolemesh.lowering.bind import bind
from rolemesh.lowering.direct import Position, exchange_directly
from rolemesh.lowering.flatten import as_fake, flatten
from rolemesh.lowering.pieces import Code, Piece, Steps, pieces_of
from rolemesh.lowering.signature import Signature
from rolemesh.lowering.sizes import Examples
from rolemesh.lowering.write_back import copy_back
from rolemesh.runtime.groups import stand_in_groups

aten = torch.ops.aten

LLAMA = Setup("llama", layers=4)
GPT_OSS = Setup("gpt_oss", layers=8)  # every second layer has a sliding window
DEEPSEEK = Setup("deepseek_v32", "rolemesh", "rolemesh", layers=5)


def flat_graph(program: Program) -> fx.GraphModule:
    """The graph of rank 1 as a target that compiles gets it, copies of new values at its end."""
    with stand_in_groups(program.the_mesh, program.the_mesh.size - 1) as groups:
        module = bind(program, groups.rank, groups.names)
        fakes = as_fake(Examples(program, groups.rank).inputs)
        flat = flatten(module, fakes)
        position = Position(groups.rank, program.the_mesh.size)
        exchange_directly(flat.graph, lambda group, device: position)
        copy_back(flat.graph, Signature.of(program, groups.rank).mutated)
    flat.recompile()
    return flat


def interpreted(piece: Piece) -> Code:
    """A piece run op by op, on inputs of the sizes and strides that it was cut for."""

    def run(args: list[Tensor | int]) -> Sequence[Tensor | None]:
        for arg, example in zip(args, piece.examples, strict=True):
            if isinstance(arg, Tensor):
                assert isinstance(example, Tensor)
                assert (arg.dtype, str(arg.shape), str(arg.stride())) == (
                    example.dtype,
                    str(example.shape),
                    str(example.stride()),
                )
        results: Sequence[Tensor | None] = fx.Interpreter(piece.module).run(*args)
        return results

    return run


def run_pieces(pieces: Sequence[Piece], steps: Steps, args: list[Tensor | int]) -> Sequence[object]:
    return steps.run([interpreted(piece) for piece in pieces], args)


@pytest.mark.parametrize(
    ("setup", "phase"), [(LLAMA, "prefill"), (GPT_OSS, "decode"), (DEEPSEEK, "decode")]
)
def test_pieces_of_a_model_compute_what_the_graph_does(setup: Setup, phase: str) -> None:
    step = traced(setup, Prompt(2, 5), None if phase == "prefill" else 0)
    program = shard(step, {"tp": 1}, "decode", phase="decode").program
    flat = flat_graph(program)
    split = pieces_of(flat, 2)
    assert split is not None
    pieces, steps = split
    assert len(pieces) < len(steps.steps)
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(x.shape, generator=generator).to(x.dtype) / 5
        if x.dtype.is_floating_point
        else torch.ones(x.shape, dtype=x.dtype)
        for x in Examples(program, 0).inputs
        if isinstance(x, Tensor)
    ]
    others = [x.clone() for x in inputs]
    with torch.no_grad():
        expected = fx.Interpreter(flat).run(*inputs)
        given: list[Tensor | int] = [*others]
        got = run_pieces(pieces, steps, given)
    assert given == []
    torch.testing.assert_close(list(got), list(expected), rtol=0, atol=0)
    torch.testing.assert_close(others, inputs, rtol=0, atol=0)  # caches too


@pytest.mark.parametrize(
    ("setup", "phase"), [(LLAMA, "decode"), (GPT_OSS, "prefill"), (DEEPSEEK, "prefill")]
)
def test_pieces_take_what_they_were_cut_for(setup: Setup, phase: str) -> None:
    """With collectives, some of which run from one piece into the next."""
    step = traced(setup, Prompt(2, 5), None if phase == "prefill" else 0)
    program = shard(step, {"tp": 2}, "pd_mixed", phase=phase).program
    flat = flat_graph(program)
    split = pieces_of(flat, 2)
    assert split is not None
    pieces, steps = split
    ops = [sum(node.op == "call_function" for node in p.module.graph.nodes) for p in pieces]
    ran = sum(ops[step.piece] for step in steps.steps)
    assert ran == sum(node.op == "call_function" for node in flat.graph.nodes)
    values = [node.meta["val"] for node in flat.graph.find_nodes(op="placeholder")]
    with values[0].fake_mode:
        run_pieces(pieces, steps, values)


class Chain:
    """A hand-built graph of equal layers: hidden states, a weight each, and what `extra` adds."""

    def __init__(self, layers: int, extra: Callable[[Chain, int], None] = lambda _, __: None):
        self.mode = torch._subclasses.FakeTensorMode()
        self.graph = fx.Graph()
        self.x = self.input("x", (4, 6))
        self.weights = [self.input(f"w{layer}", (4, 6)) for layer in range(layers)]
        self.caches = [self.input(f"c{layer}", (9, 6)) for layer in range(layers)]
        self.results: list[fx.Node] = []
        for layer in range(layers):
            self.x = self.op(aten.mul.Tensor, self.x, self.weights[layer])
            for _ in range(40):
                self.x = self.op(aten.add.Tensor, self.x, 0.5)
            extra(self, layer)

    def input(self, name: str, shape: tuple[int, ...]) -> fx.Node:
        node = self.graph.placeholder(name)
        with self.mode:
            node.meta["val"] = torch.empty(shape)
        return node

    def op(self, target: Callable[..., object], *args: object) -> fx.Node:
        node = self.graph.call_function(target, args)  # type: ignore[arg-type]
        with self.mode:
            node.meta["val"] = target(*fx.map_arg(args, lambda operand: operand.meta["val"]))
        return node

    def module(self) -> fx.GraphModule:
        self.graph.output((self.x, *self.results))
        return fx.GraphModule(torch.nn.Module(), self.graph)


def check(chain: Chain) -> tuple[Sequence[Piece], Steps] | None:
    """The pieces, which compute what the graph does, if there are any."""
    module = chain.module()
    inputs = [
        torch.rand(node.meta["val"].shape) for node in chain.graph.find_nodes(op="placeholder")
    ]
    others = [x.clone() for x in inputs]
    expected = module(*inputs)
    split = pieces_of(module, 3)
    if split is not None:
        got = run_pieces(*split, [*others])
        torch.testing.assert_close(list(got), list(expected), rtol=0, atol=0)
        torch.testing.assert_close(others, inputs, rtol=0, atol=0)
    return split


def test_few_repeats_are_no_piece() -> None:
    assert check(Chain(2)) is None
    split = check(Chain(5))
    assert split is not None
    assert [step.piece for step in split[1].steps] == [0, 1, 1, 1, 1, 2]


def test_steps_are_plain_data() -> None:
    split = check(Chain(5))
    assert split is not None
    assert Steps.of(split[1].saved()) == Steps(
        [step._replace() for step in Steps.of(split[1].saved()).steps],
        split[1].results,
        split[1].slots,
    )


def test_new_values_of_caches_are_written_by_the_layer() -> None:
    def write(chain: Chain, layer: int) -> None:
        rows = chain.op(aten.slice_scatter.default, chain.caches[layer], chain.x, 0, 2, 6)
        chain.x = chain.op(aten.slice.Tensor, chain.op(aten.sin.default, rows), 0, 1, 5)
        chain.writes = [*getattr(chain, "writes", []), (chain.caches[layer], rows)]

    chain = Chain(5, write)
    for cache, rows in chain.writes:
        chain.op(aten.copy_.default, cache, rows)
    split = check(chain)
    assert split is not None
    layer = split[0][1].module.graph
    assert len(layer.find_nodes(op="call_function", target=aten.copy_.default)) == 1
    assert all(len(step.outputs) == 1 for step in split[1].steps[:-1])


def test_a_write_waits_for_who_reads_what_was_there() -> None:
    chain = Chain(5)
    views = [chain.op(aten.slice.Tensor, cache, 0, 0, 4) for cache in chain.caches]
    values = [chain.op(aten.neg.default, cache) for cache in chain.caches]
    for view in views:
        chain.x = chain.op(aten.add.Tensor, chain.x, view)
    for cache, value in zip(chain.caches, values, strict=True):
        chain.op(aten.copy_.default, cache, value)
    assert check(chain) is not None


def test_layers_of_other_sizes_are_not_taken_for_one() -> None:
    chain = Chain(5)
    chain.weights[3].meta["val"] = chain.weights[3].meta["val"].t().contiguous().t()
    module = chain.module()
    assert pieces_of(module, 3) is None


def test_no_piece_returns_several_values_at_once() -> None:
    def split(chain: Chain, layer: int) -> None:
        halves = chain.op(aten.split.Tensor, chain.x, 3, 1)
        one, other = (chain.op(operator.getitem, halves, index) for index in (0, 1))
        chain.x = chain.op(aten.cat.default, [other, one], 1)

    found = check(Chain(6, split))
    assert found is not None
    for piece in found[0]:
        (returned,) = piece.module.graph.output_node().args
        assert all(isinstance(node.meta["val"], Tensor) for node in returned)
