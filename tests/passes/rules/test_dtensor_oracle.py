"""DTensor's sharding propagation as an oracle: it must accept what our rules offer.

Every whole-dim choice of a rule is put to DTensor as operand placements on a mesh of two ranks. It
must take them as they are, and give the result placements that our rule says. Where it does not,
`DIFFERENCES` says why; an entry that no longer differs fails too. A new op is one line in `CALLS`.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from tests.passes.rules.dtensor_calls import MORE_CALLS
from tests.passes.rules.harness import choices_of, make_call, tensors_in
from tests.passes.rules.rule_line import rule_line
from tests.passes.rules.samples import Call, case, f, i, m
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement
from torch.testing._internal.distributed.fake_pg import FakeStore

from rolemesh.compiler.ir import layout as ours
from rolemesh.compiler.ir.rule import Choice, Linear, OpCall, Rule, Split
from rolemesh.passes.rules.defaults import default_rules

aten = torch.ops.aten
RANKS = 2

CALLS: list[Call] = [
    # Views. All extents are even, so that DTensor never refuses one for its size.
    case(aten.view.default, f(4, 6), [24]),
    case(aten.view.default, f(24, 8), [4, 6, 8]),
    case(aten.view.default, f(4, 6, 8), [24, 2, 4]),
    case(aten._unsafe_view.default, f(4, 6, 8), [24, 8]),
    case(aten.unsqueeze.default, f(4, 6), 1),
    case(aten.squeeze.dim, f(4, 1, 6), 1),
    case(aten.squeeze.default, f(4, 1, 6)),
    case(aten.expand.default, f(4, 1, 6), [4, 8, 6]),
    case(aten.permute.default, f(4, 6, 8), [2, 0, 1]),
    case(aten.transpose.int, f(4, 6, 8), 0, 2),
    case(aten.t.default, f(4, 6)),
    case(aten.repeat.default, f(4, 6), [2, 1, 1]),
    case(aten.flip.default, f(4, 6), [1]),
    case(aten.bucketize.Tensor, f(4, 6), f(8)),
    case(aten.linalg_solve_triangular.default, f(4, 6, 6), f(4, 6, 8), upper=False),
    case(aten.roll.default, f(4, 6), [1], [1]),
    case(aten.constant_pad_nd.default, f(4, 6), [1, 1]),
    case(aten.unfold.default, f(4, 6), 1, 2, 1),
    case(aten.diagonal.default, f(4, 6, 8), 0, 1, 2),
    case(aten.clone.default, f(4, 6)),
    case(aten.alias.default, f(4, 6)),
    case(aten.detach.default, f(4, 6)),
    # Slicing.
    case(aten.slice.Tensor, f(4, 6), 1, 1, 5),
    case(aten.select.int, f(4, 6, 8), 1, 0),
    case(aten.split.Tensor, f(4, 12), 6, 1),
    case(aten.split_with_sizes.default, f(4, 12), [4, 8], 1),
    case(aten.unbind.int, f(4, 6), 1),
    case(aten.cat.default, [f(4, 6), f(4, 8)], 1),
    case(aten.stack.default, [f(4, 6), f(4, 6)], 1),
    case(aten.slice_scatter.default, f(4, 12), f(4, 6), 1, 0, 6),
    case(aten.select_scatter.default, f(4, 6), f(6), 0, 1),
    case(aten.slice_backward.default, f(4, 6), [4, 12], 1, 0, 6, 1),
    case(aten.select_backward.default, f(6), [4, 6], 0, 1),
    # Pointwise.
    case(aten.neg.default, f(4, 6)),
    case(aten.add.Tensor, f(4, 6), f(4, 6)),
    case(aten.add.Tensor, f(4, 6), f(6)),
    case(aten.add.Tensor, f(4, 6), 2.0),
    case(aten.sub.Tensor, f(4, 6), f(4, 6)),
    case(aten.mul.Tensor, f(4, 6), f(4, 1)),
    case(aten.mul.Tensor, f(4, 6), 2.0),
    case(aten.mul.Scalar, f(4, 6), 2.0),
    case(aten.div.Tensor, f(4, 6), f(6)),
    case(aten.div.Tensor, f(4, 6), 2.0),
    case(aten.where.self, m(4, 6), f(4, 6), f(6)),
    case(aten.masked_fill.Scalar, f(4, 6), m(6), 0.0),
    case(aten.clamp.default, f(4, 6), 0.2, 0.7),
    case(aten.pow.Tensor_Scalar, f(4, 6), 2),
    case(aten.rsqrt.default, f(4, 6)),
    case(aten.sigmoid.default, f(4, 6)),
    case(aten.silu.default, f(4, 6)),
    case(aten.gelu.default, f(4, 6)),
    case(aten.relu.default, f(4, 6)),
    case(aten.tanh.default, f(4, 6)),
    case(aten.exp.default, f(4, 6)),
    case(aten.cos.default, f(4, 6)),
    case(aten.maximum.default, f(4, 6), f(6)),
    case(aten.le.Tensor, f(4, 1), f(6)),
    case(aten.ge.Scalar, f(4, 6), 0.5),
    case(aten.bitwise_and.Tensor, m(4, 6), m(4, 6)),
    case(aten.logical_not.default, m(4, 6)),
    case(aten.floor_divide.default, i(4, 6), 2),
    case(aten.remainder.Scalar, i(4, 6), 2),
    case(aten.lerp.Scalar, f(4, 6), f(4, 6), 0.5),
    case(aten.addcmul.default, f(4, 6), f(4, 6), f(4, 6)),
    case(aten.silu_backward.default, f(4, 6), f(4, 6)),
    case(aten.threshold_backward.default, f(4, 6), f(4, 6), 0),
    case(aten._to_copy.default, f(4, 6), dtype=torch.bfloat16),
    case(aten._to_copy.default, m(4, 6), dtype=torch.int64),
    # Creation.
    case(aten.zeros_like.default, f(4, 6)),
    case(aten.new_zeros.default, f(4, 6), [4, 6]),
    case(aten.tril.default, f(8, 4, 6)),
    case(aten.triu.default, f(8, 4, 6)),
    # Reductions.
    case(aten.sum.dim_IntList, f(4, 6, 8), [1]),
    case(aten.sum.default, f(4, 6)),
    case(aten.mean.dim, f(4, 6, 8), [-1], True),
    case(aten.mean.default, f(4, 6)),
    case(aten.amax.default, f(4, 6), [1]),
    case(aten.amin.default, f(4, 6), [1]),
    case(aten.max.default, f(4, 6)),
    case(aten.max.dim, f(4, 6), 1),
    case(aten.argmax.default, f(4, 6), 1),
    case(aten.any.dim, m(4, 6), 1),
    case(aten.all.dim, m(4, 6), 1),
    case(aten.prod.dim_int, f(4, 6), 1),
    case(aten.cumsum.default, f(4, 6), 1),
    case(aten.logsumexp.default, f(4, 6), [1]),
    case(aten.var.correction, f(4, 6), [1]),
    case(aten._softmax.default, f(4, 6), 1, False),
    case(aten._log_softmax.default, f(4, 6), 1, False),
    case(aten._softmax_backward_data.default, f(4, 6), f(4, 6), 1, torch.float32),
    case(aten.topk.default, f(4, 6), 2),
    case(aten.sort.default, f(4, 6)),
    case(aten.sort.stable, f(4, 6), stable=True, dim=1),
    case(aten.linalg_vector_norm.default, f(4, 6), 2, [1]),
    case(aten.native_layer_norm.default, f(4, 6, 8), [8], f(8), f(8), 1e-5),
    case(aten._fused_rms_norm.default, f(4, 6, 8), [8], f(8), 1e-5),
    # Matrix products and indexing.
    case(aten.mm.default, f(4, 6), f(6, 8)),
    case(aten.bmm.default, f(4, 6, 8), f(4, 8, 10)),
    case(aten.addmm.default, f(8), f(4, 6), f(6, 8)),
    case(aten.baddbmm.default, f(4, 6, 10), f(4, 6, 8), f(4, 8, 10)),
    case(aten.embedding.default, f(10, 8), i(4, 6)),
    case(aten.index_select.default, f(4, 6), 0, i(8)),
    case(aten.gather.default, f(4, 6), 1, i(4, 8)),
    case(aten.scatter.src, f(4, 6), 1, i(4, 2), f(4, 2)),
    case(aten.index.Tensor, f(4, 6), [i(8)]),
    *MORE_CALLS,
]

# Why DTensor says otherwise. None of these is a different result: it offers less than we do.
FREE = "we let a rank make only its part of what is repeated or constant; DTensor makes it whole"
PARTIAL = "linear, but DTensor does not let a partial value through"
WHOLE = "DTensor wants it whole; a shard of another dim, or of the rows, needs no other rank"
UNKNOWN = "DTensor has no rule"

# Op and choice: the factor that is split, by its letter in `rule_line`, or the partial operands.
DIFFERENCES: dict[tuple[str, str], str] = {
    ("expand.default", "c"): FREE,
    ("repeat.default", "c"): FREE,
    ("zeros_like.default", "a"): FREE,
    ("zeros_like.default", "b"): FREE,
    ("new_zeros.default", "a"): FREE,
    ("new_zeros.default", "b"): FREE,
    ("linalg_solve_triangular.default", "d"): WHOLE,
    ("embedding_dense_backward.default", "d"): FREE,
    ("diagonal.default", "a"): WHOLE,
    ("diagonal.default", "1"): PARTIAL,
    ("tril.default", "a"): WHOLE,
    ("tril.default", "b"): WHOLE,
    ("tril.default", "1"): PARTIAL,
    ("triu.default", "a"): WHOLE,
    ("triu.default", "b"): WHOLE,
    ("triu.default", "1"): PARTIAL,
    ("unfold.default", "a"): UNKNOWN,
    ("unfold.default", "1"): UNKNOWN,
    ("clone.default", "1"): PARTIAL,
    ("slice_scatter.default", "11"): PARTIAL,
    ("select_scatter.default", "11"): PARTIAL,
    ("lerp.Scalar", "11"): PARTIAL,
    ("addcmul.default", "110"): PARTIAL,
    ("addcmul.default", "101"): PARTIAL,
    ("silu_backward.default", "10"): PARTIAL,
    ("threshold_backward.default", "10"): PARTIAL,
    ("mean.dim", "1"): PARTIAL,
    ("mean.default", "1"): PARTIAL,
    ("cumsum.default", "1"): PARTIAL,
    ("_softmax_backward_data.default", "10"): PARTIAL,
    ("embedding.default", "10"): PARTIAL,
    ("gather.default", "10"): PARTIAL,
    ("_log_softmax_backward_data.default", "10"): PARTIAL,
    ("addcdiv.default", "110"): PARTIAL,
    ("copy.default", "a"): UNKNOWN,
    ("copy.default", "b"): UNKNOWN,
    ("copy.default", "01"): UNKNOWN,
    ("dot.default", "10"): PARTIAL,
    ("dot.default", "01"): PARTIAL,
    ("gelu_backward.default", "10"): PARTIAL,
    ("scatter_add.default", "101"): PARTIAL,
    ("sigmoid_backward.default", "10"): PARTIAL,
    ("tanh_backward.default", "10"): PARTIAL,
    ("logit_backward.default", "10"): PARTIAL,
    ("native_dropout_backward.default", "10"): PARTIAL,
    ("nll_loss_backward.default", "1000"): PARTIAL,
    ("nll_loss2d_backward.default", "10000"): PARTIAL,
    **{
        (f"{name}.default", factor): FREE
        for name in (
            "empty_like",
            "full_like",
            "ones_like",
            "new_empty",
            "new_empty_strided",
            "new_full",
            "new_ones",
        )
        for factor in "ab"
    },
}

# Op and operand dim that DTensor shards where we do not.
DTENSOR_ONLY: dict[tuple[str, int], str] = {
    ("any.dim", 1): "a pending disjunction is no reduction of the mesh dialect",
    ("all.dim", 1): "nor is a pending conjunction",
    ("prod.dim_int", 1): "nor is a pending product",
    ("norm.ScalarOpt_dim", 1): "nor is a pending norm",
    ("linalg_vector_norm.default", 1): "nor is a pending norm; DTensor has one partial per order",
}


# Ops that both know and that are not put to DTensor here, and why.
UNTESTED: dict[str, str] = {
    "_grouped_mm": "runs on bf16 with aligned strides only; test_moe runs all its choices",
    **{
        f"_scaled_dot_product_{name}_attention{way}": "no CPU kernel to make the call with"
        for name in ("cudnn", "efficient", "flash")
        for way in ("", "_backward")
    },
    "_fused_rms_norm_backward": "no CPU kernel to make the call with",
    "convolution": "DTensor's rule is for exchanges of halos; test_convolution runs all choices",
    "eye": "has no operand",
    "view_as_complex": "complex values are outside the layouts' invariants on pads",
    "view_as_real": "complex values are outside the layouts' invariants on pads",
}


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    yield init_device_mesh("cpu", (RANKS,))
    dist.destroy_process_group()


def placement(mine: ours.Placement | None, extents: tuple[int, ...]) -> Placement | None:
    """Our placement in DTensor's terms; None if it has no word for it."""
    if isinstance(mine, ours.Partial):
        return Partial(mine.op)
    if isinstance(mine, ours.Shard):
        whole = mine.size == extents[mine.dim] or mine.size % RANKS == 0
        return Shard(mine.dim) if mine.outer == 1 and whole else None
    return Replicate()


def choice_name(rule: Rule, choice: Choice) -> str:
    if isinstance(choice, Linear):
        return "".join(str(int(flag)) for flag in rule.linear[choice.pattern])
    assert isinstance(choice, Split)
    seen: list[int] = []
    for dims in (*rule.operands, *rule.results):
        seen += [factor for factors in dims for factor in factors if factor not in seen]
    return chr(ord("a") + seen.index(choice.factor))


def whole_choices(rule: Rule) -> list[Choice]:
    return [
        choice
        for choice in choices_of(rule, RANKS)
        if isinstance(choice, Linear)
        or (
            isinstance(choice, Split)
            and choice.outer == 1
            and choice.size == rule.sizes[choice.factor]
        )
    ]


def dtensor(whole: torch.Tensor, mesh: DeviceMesh, placed: Placement) -> DTensor:
    parts = whole.chunk(RANKS, placed.dim) if isinstance(placed, Shard) else (whole,)
    return DTensor.from_local(
        parts[0], mesh, [placed], run_check=False, shape=whole.shape, stride=whole.stride()
    )


def substitute(value: object, tensors: Iterator[DTensor]) -> object:
    if isinstance(value, torch.Tensor):
        return next(tensors)
    if isinstance(value, list):
        return [substitute(item, tensors) for item in value]
    return value


def verdict(mesh: DeviceMesh, given: Call, call: OpCall, rule: Rule, choice: Choice) -> str | None:
    """What DTensor says to a choice: `agrees`, a difference, or None if it has no word for it."""
    target, args, kwargs = given
    placed = [
        placement(rule.operand_placement(index, choice), value.shape)
        for index, value in enumerate(call.operands)
    ]
    expected = [
        placement(rule.result_placement(index, choice), value.shape)
        for index, value in enumerate(call.results)
    ]
    if any(p is None for p in (*placed, *expected)):
        return None
    wholes = tensors_in([list(args), kwargs])
    operands = iter([dtensor(x, mesh, p) for x, p in zip(wholes, placed, strict=True) if p])
    dispatcher = DTensor._op_dispatcher
    info = dispatcher.unwrap_to_op_info(
        target,
        tuple(substitute(arg, operands) for arg in args),
        {key: substitute(value, operands) for key, value in kwargs.items()},
    )
    try:
        found = dispatcher.sharding_propagator.propagate_op_sharding_non_cached(info.schema)
    except NotImplementedError:
        return "no rule"
    except RuntimeError as error:
        return f"refuses: {str(error).splitlines()[0]}"
    if found.redistribute_schema is not None:
        asked = [spec.placements for spec in found.redistribute_schema.args_spec]
        if asked != [spec.placements for spec in info.schema.args_spec]:
            return f"redistributes to {[str(p[0]) for p in asked]}"
    specs = found.output_spec
    results = [
        spec.placements[0] for spec in (specs if isinstance(specs, tuple | list) else [specs])
    ]
    if results != expected:
        return f"gives {[str(p) for p in results]} instead of {[str(p) for p in expected]}"
    return "agrees"


@pytest.mark.parametrize("given", CALLS, ids=lambda given: str(given[0]))
def test_dtensor_agrees(mesh: DeviceMesh, given: Call) -> None:
    target, args, kwargs = given
    call, _ = make_call(target, args, kwargs)
    rule = default_rules().rule(call)
    said = {choice_name(rule, c): verdict(mesh, given, call, rule, c) for c in whole_choices(rule)}
    name = str(target).removeprefix("aten.")
    differ = {key: text for key, text in said.items() if text not in ("agrees", None)}
    listed = {key for op, key in DIFFERENCES if op == name}
    assert set(differ) == listed & set(said), f"{name}: {rule_line(rule)}: {said}"


def test_every_listed_difference_is_of_a_call_above() -> None:
    names = {str(target).removeprefix("aten.") for target, _, _ in CALLS}
    assert {op for op, _ in (*DIFFERENCES, *DTENSOR_ONLY)} <= names


def test_every_op_that_both_know_is_put_to_dtensor(mesh: DeviceMesh) -> None:
    """By name: overloads of one op share our rule."""
    propagator = DTensor._op_dispatcher.sharding_propagator
    tables = [table for table in vars(propagator).values() if isinstance(table, dict)]
    known = {op for table in tables for op in table if isinstance(op, torch._ops.OpOverload)}
    both = {op._schema.name.partition("::")[2] for op in known if default_rules().covers(op)}
    tested = {target._schema.name.partition("::")[2] for target, _, _ in CALLS}
    assert len(both) > 180
    assert {name.rstrip("_") for name in both} - tested == set(UNTESTED)


@pytest.mark.parametrize(
    "given", [c for c in CALLS if len(tensors_in([list(c[1]), c[2]])) == 1], ids=lambda c: str(c[0])
)
def test_we_shard_what_dtensor_shards(mesh: DeviceMesh, given: Call) -> None:
    """Of ops with one operand: a sharded dim that DTensor takes as it is, our rule takes too."""
    target, args, kwargs = given
    call, _ = make_call(target, args, kwargs)
    rule = default_rules().rule(call)
    (whole,) = tensors_in([list(args), kwargs])
    dispatcher = DTensor._op_dispatcher
    only = set()
    for dim in range(whole.ndim):
        if rule.unread or whole.shape[dim] % RANKS:
            continue
        operands = iter([dtensor(whole, mesh, Shard(dim))])
        info = dispatcher.unwrap_to_op_info(
            target, tuple(substitute(arg, operands) for arg in args), kwargs
        )
        try:
            found = dispatcher.sharding_propagator.propagate_op_sharding_non_cached(info.schema)
        except (NotImplementedError, RuntimeError):
            continue
        schema = found.redistribute_schema or info.schema
        if schema.args_spec[0].placements != (Shard(dim),):
            continue
        if rule.match(rule.operands[0], ours.Shard(dim, 1, whole.shape[dim]), RANKS) is None:
            only.add(dim)
    name = str(target).removeprefix("aten.")
    assert only == {dim for op, dim in DTENSOR_ONLY if op == name}, rule_line(rule)
