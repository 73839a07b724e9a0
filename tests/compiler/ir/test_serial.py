"""Programs survive being written as JSON: same text, same JSON, same results."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import operator
from collections.abc import Sequence
from typing import Any, cast

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

import rolemesh
from rolemesh.compiler.api import Sharded
from rolemesh.compiler.ir import dialect
from rolemesh.compiler.ir.dims import Dim, Scope
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.placement import (
    REPLICATE,
    Owner,
    Partial,
    Placement,
    Routed,
    Segment,
    Segmented,
    Shard,
)
from rolemesh.compiler.ir.program import Input, InputKind, Origin, Output, Program
from rolemesh.compiler.ir.serial import decode_program, encode_head, encode_layouts, encode_node
from rolemesh.compiler.ir.serial_values import (
    decode_argument,
    decode_assumption,
    decode_placement,
    decode_size,
    decode_type,
    encode_argument,
    encode_placement,
    encode_size,
    encode_type,
)
from rolemesh.compiler.ir.tensor import TensorType
from rolemesh.compiler.models.cases import Case, load_case
from rolemesh.runtime.lockstep import assemble_outputs, run_lockstep, scatter_inputs

Written = tuple[dict[str, Any], list[dict[str, Any]]]

CASES = [
    pytest.param(*case, marks=pytest.mark.xdist_group(f"serial-{case[0]}"))
    for case in (
        ("llama", "prefill", "prefill", False),  # owners, broadcasts into buffers
        ("phi3", "decode", "decode", False),  # packed weights, in segments
        ("qwen3_moe", "pd_mixed", "prefill", True),  # routed rows
        ("mamba2", "pd_mixed", "prefill", True),  # long formulas, and assumptions
    )
]
"""Model, role, phase, and whether the number of tokens is symbolic."""


@functools.cache
def sharded_case(name: str, role: str, phase: str, symbolic: bool) -> tuple[Case, Sharded]:
    case = load_case(f"hf:{name}", tokens=13, batch=3, max_len=40, layers=2 - symbolic)
    args, kwargs = case.fresh().phases[phase]
    if symbolic:
        torch._dynamo.mark_dynamic(cast("torch.Tensor", args[0]), 1)
    with torch.no_grad():
        traced = rolemesh.trace(case.model, *args, **kwargs)
    return case, rolemesh.shard(traced, {"tp": 4}, role, phase=phase)


def written(program: Program) -> Written:
    """What a file would have of a Program."""
    nodes = [
        encode_node(node) | encode_layouts(program, node)
        for node in program.graph.nodes
        if node.op != "output"
    ]
    head, body = json.loads(json.dumps([encode_head(program), nodes], allow_nan=False))
    return head, body


@pytest.mark.parametrize(("name", "role", "phase", "symbolic"), CASES)
def test_programs_are_read_back_as_they_were(
    name: str, role: str, phase: str, symbolic: bool
) -> None:
    _, sharded = sharded_case(name, role, phase, symbolic)
    for program in (sharded.traced.program, sharded.stages.decided, sharded.program):
        assert (program.scope is not None) is symbolic
        data = written(program)
        again = decode_program(*data)
        assert str(again) == str(program)
        assert written(again) == data
        assert len(again.layouts) == len(program.layouts)


@pytest.mark.parametrize(("name", "role", "phase", "symbolic"), CASES)
def test_what_is_read_back_runs_the_same(name: str, role: str, phase: str, symbolic: bool) -> None:
    case, sharded = sharded_case(name, role, phase, symbolic)
    again = decode_program(*written(sharded.program))
    args, kwargs = case.fresh().phases[phase]
    ids = cast("torch.Tensor", args[0])
    if symbolic:
        ids = torch.cat([ids, ids[:, :9]], 1)  # another size than the traced one

    def run(_: object, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        results = []
        for program in (sharded.program, again):
            program = program.at(program.values(inputs))
            outputs = run_lockstep(program, scatter_inputs(program, inputs), check=True)
            results.append(assemble_outputs(program, outputs))
        for expected, found in zip(*results, strict=True):
            assert (expected is None) == (found is None)
            if expected is not None and found is not None:
                torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
        return cast("list[torch.Tensor]", results[1])

    with torch.no_grad():
        got = sharded.traced.entry.call(run, ids, *args[1:], **kwargs)
        want = case.model(ids, *args[1:], **case.fresh().phases[phase][1])
    torch.testing.assert_close(got.logits, want.logits, rtol=0, atol=1e-4)  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------- values, one by one


def sizes_of(scope: Scope) -> st.SearchStrategy[int]:
    """Plain sizes, and formulas as passes and models make them."""
    symbols: list[int] = [scope.size(symbol) for symbol in scope.hints]
    leaves = st.one_of(st.integers(1, 64), st.sampled_from(symbols))
    operators = st.sampled_from([operator.add, operator.sub, operator.mul, _floordiv, _mod])

    def extend(inner: st.SearchStrategy[int]) -> st.SearchStrategy[int]:
        return st.builds(lambda function, a, b: function(a, b), operators, inner, inner)

    return st.recursive(leaves, extend, max_leaves=5)


def _floordiv(a: int, b: int) -> int:
    return a // (b * b + 1)


def _mod(a: int, b: int) -> int:
    """By a plain number: sympy does not end for some formulas."""
    return a % (int(b) % 64 + 65)


def new_scope() -> Scope:
    scope = Scope()
    scope.symbol("T", 13)
    scope.symbol("B", 3, 1, 64)
    return scope


SCOPE = new_scope()
SIZES = sizes_of(SCOPE)
DIM = st.integers(0, 5)
SEGMENTS = st.lists(st.builds(Segment, SIZES, SIZES, SIZES, st.integers(1, 4)), min_size=1)
PLACEMENTS = st.one_of(
    st.just(REPLICATE),
    st.builds(Partial, st.sampled_from(["sum", "max", "min", "avg"])),
    st.builds(Owner, st.integers(0, 7)),
    st.builds(Shard, DIM, SIZES, SIZES),
    st.builds(Segmented, DIM, SEGMENTS.map(tuple)),
    st.builds(Routed, st.sampled_from(["gt", "mine_3"]), DIM, SIZES, SIZES),
)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool])
GRAPH = fx.Graph()
NODES = {name: GRAPH.placeholder(name) for name in ("x", "y")}
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**62), 2**62),
    st.floats(),
    st.text(),
    st.complex_numbers(),
    DTYPES,
    SIZES,
    st.sampled_from([torch.strided, torch.channels_last, torch.contiguous_format]),
    st.sampled_from([torch.device("cpu"), torch.device("meta"), torch.device("cuda", 1)]),
    st.sampled_from(sorted(NODES.values(), key=str)),
    st.builds(Shard, DIM, SIZES, SIZES),
    st.builds(Segmented, DIM, SEGMENTS.map(tuple)),
)
ARGUMENTS = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3), max_leaves=6)


def through_json(data: object) -> Any:
    return json.loads(json.dumps(data, allow_nan=False))


@settings(max_examples=150)
@given(SIZES)
def test_sizes(size: int) -> None:
    again = decode_size(through_json(encode_size(size)), SCOPE)
    assert type(again) is type(size)
    assert again == size


@settings(max_examples=100)
@given(SIZES)
def test_a_size_reads_the_same_in_another_scope(size: int) -> None:
    text = encode_size(size)
    again = decode_size(text, new_scope())
    assert encode_size(again) == text
    assert int(again) == int(size)


@settings(max_examples=100)
@given(PLACEMENTS)
def test_placements(placement: Placement) -> None:
    assert decode_placement(through_json(encode_placement(placement)), SCOPE) == placement


@settings(max_examples=50)
@given(st.lists(SIZES, max_size=4), DTYPES)
def test_types(shape: Sequence[int], dtype: torch.dtype) -> None:
    value = TensorType(tuple(shape), dtype)
    assert decode_type(through_json(encode_type(value)), SCOPE) == value


@settings(max_examples=200)
@given(ARGUMENTS)
def test_arguments(argument: object) -> None:
    again = decode_argument(through_json(encode_argument(argument)), NODES, SCOPE)
    assert _same(again, argument), again


def _same(a: object, b: object) -> bool:
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return a == b or (math.isnan(a) and math.isnan(b))
    if isinstance(a, complex) and isinstance(b, complex):
        return _same(a.real, b.real) and _same(a.imag, b.imag)
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("relation", ["T > 5", "T - 32 <= 0", "3*((T//4)) >= 2", "Mod(T, 8) < B"])
def test_assumptions(relation: str) -> None:
    found = decode_assumption(relation, SCOPE)
    values = dict(zip(SCOPE.hints, (17, 1), strict=True))
    truth = {"T": 17, "B": 1, "Mod": operator.mod}
    assert bool(found.subs(values)) is eval(relation, truth)
    assert found.free_symbols <= set(SCOPE.hints)


@settings(max_examples=50)
@given(SIZES, SIZES)
def test_assumptions_that_comparisons_make(left: int, right: int) -> None:
    scope = new_scope()
    a, b = (decode_size(encode_size(size), scope) for size in (left, right))
    assert isinstance(a < b, bool)
    for assumption in scope.assumptions:
        assert str(decode_assumption(str(assumption), scope)) == str(assumption)


def test_a_size_of_a_formula_that_was_captured() -> None:
    scope = new_scope()
    (tokens, batch) = scope.hints
    size = scope.size(sympy.Max(tokens, batch * tokens - 3))
    assert isinstance(size, Dim)
    assert decode_size(encode_size(size), scope) == size


# ------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("op", ["aten.no_such_op.default", "mesh.no_such_op", "nonsense", ""])
def test_an_op_that_does_not_exist_is_named(op: str) -> None:
    head, nodes = everything()
    nodes[1]["op"] = op
    with pytest.raises(ValueError, match=f"there is no op '{op}'; import the library that defines"):
        decode_program(head, nodes)


@pytest.mark.parametrize("op", ["load_library.__func__.__call__", "aten.mm.__class__"])
def test_other_callables_than_ops_are_refused(op: str) -> None:
    head, nodes = everything()
    nodes[1]["op"] = op
    with pytest.raises(ValueError, match=f"'{op}' is no op"):
        decode_program(head, nodes)


def test_names_of_arguments_are_names() -> None:
    head, nodes = everything()
    nodes[1]["kwargs"] = {"x=print(1), y": 1}
    with pytest.raises(ValueError, match="has an argument that cannot be named"):
        decode_program(head, nodes)


def test_a_node_that_is_missing_is_named() -> None:
    head, nodes = everything()
    with pytest.raises(ValueError, match="the data is no program: KeyError: 'x'"):
        decode_program(head, nodes[1:])
    with pytest.raises(ValueError, match="two nodes have the name x"):
        decode_program(head, [nodes[0], *nodes])


@pytest.mark.parametrize("text", ["T + Q", "len(T)", "T +", "T / 2", "'T'", "T < 3"])
def test_a_formula_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no formula over the sizes of this program"):
        decode_size(text, SCOPE)


@pytest.mark.parametrize("data", [{"shard": []}, {"shard": [0, 1]}, {"routed": []}, {"x": 1}, 3])
def test_a_placement_that_is_none_is_refused(data: Any) -> None:
    with pytest.raises(ValueError, match="is no placement"):
        decode_placement(data, SCOPE)


def everything() -> Written:
    """A partitioned Program with two axes, pins, a symbol and an assumption."""
    scope = Scope()
    tokens = scope.symbol("T", 13)
    scope.sources[tokens.formula] = 0, 1
    assert tokens > 8  # an assumption
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["type"] = TensorType((2, tokens), torch.float32)
    moved = graph.call_function(dialect.ALL_GATHER, (x,), {"axes": ("tp",), "shard": SHARD})
    moved.meta["type"] = x.meta["type"]
    moved.meta["origin"] = Origin("layers.0", "model.py:3", "because", "x", "topk")
    best = graph.call_function(torch.ops.aten.topk.default, (moved, 2), {"sorted": False})
    best.meta["type"] = TensorType((2, 2), torch.float32), TensorType((2, 2), torch.int64)
    first = graph.call_function(operator.getitem, (best, 0))
    first.meta["type"] = TensorType((2, 2), torch.float32)
    graph.output((first, None))
    whole, split = Layout((REPLICATE, REPLICATE)), Layout((REPLICATE, SHARD))
    program = Program(
        "small",
        graph,
        (Input("x", InputKind.USER, mutated=True),),
        (Output(), Output(0)),
        phase="decode",
        mesh=Mesh({"dp": 2, "tp": 3}),
        layouts={x: (split,), moved: (whole,), best: (whole, whole), first: (whole,)},
        pinned={0: split},
        history=("seed", "partition"),
        scope=scope,
    )
    return written(program)


SHARD = Shard(1, 1, 13)
WRONG = st.sampled_from([None, 7, -1, "T", "1 +", [], {}, [[]], {"node": "z"}, {"shard": [1]}, 0.5])


def test_everything_a_program_has() -> None:
    data = everything()
    program = decode_program(*data)
    assert written(program) == data
    assert program.phase == "decode"
    assert program.pinned == {0: Layout((REPLICATE, SHARD))}
    assert program.inputs == (Input("x", InputKind.USER, mutated=True),)
    assert program.outputs == (Output(), Output(0))
    assert program.scope is not None
    (symbol,) = program.scope.hints
    assert program.fits({symbol: 9})
    assert not program.fits({symbol: 8})
    assert program.values([torch.empty(2, 21)]) == {symbol: 21}


@settings(max_examples=400)
@given(st.data())
def test_damaged_data_is_refused_with_a_value_error_or_read(data: st.DataObject) -> None:
    """No other error comes out, whatever is cut off or replaced."""
    head, nodes = everything()
    target: Any = data.draw(st.sampled_from([head, nodes]))
    path: list[tuple[Any, Any]] = []
    while not path or (isinstance(target, dict | list) and target and data.draw(st.integers(0, 3))):
        keys = list(target) if isinstance(target, dict) else range(len(target))
        path.append((target, data.draw(st.sampled_from(keys))))
        target = target[path[-1][1]]
    parent, key = path[-1]
    if data.draw(st.booleans()):
        del parent[key]
    else:
        parent[key] = data.draw(WRONG)
    with contextlib.suppress(ValueError):
        assert isinstance(decode_program(head, nodes), Program)
