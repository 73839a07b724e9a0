"""The harness finds wrong rules: each of these has one mistake, and must fail."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tests.passes.rules.harness import check_op, make_call

from rolemesh.compiler.ir.rule import Kind, OpCall, Rule, RuleBuilder
from rolemesh.passes.rules import creation, pointwise, reductions, slicing, views
from rolemesh.passes.rules.registry import LocalFunction, RuleFunction, Rules

aten = torch.ops.aten


def f(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def with_kind(rule: RuleFunction, factor: int, kind: Kind) -> RuleFunction:
    def mutant(call: OpCall) -> Rule:
        right = rule(call)
        kinds = tuple(kind if i == factor else k for i, k in enumerate(right.kinds))
        return dataclasses.replace(right, kinds=kinds)

    return mutant


def with_fields(rule: RuleFunction, **fields: object) -> RuleFunction:
    return lambda call: dataclasses.replace(rule(call), **fields)  # type: ignore[arg-type]


def unit_before_pieces(call: OpCall) -> Rule:
    """A packed dim seen from the wrong side."""
    builder = RuleBuilder()
    unit, pieces = builder.factor(6), builder.factor(2, Kind.REPLICATE)
    rest = builder.factor(5)
    return builder.build([[unit + pieces, rest]], [[unit, rest]] * 2)


def all_pass(call: OpCall) -> Rule:
    builder = RuleBuilder()
    dims = builder.dims(call.operands[0].shape)
    return builder.build([dims], [dims])


MUTANTS: dict[str, tuple[object, tuple[object, ...], RuleFunction, LocalFunction | None]] = {
    "softmax over a shard": (
        aten._softmax.default,
        (f(4, 6), 1, False),
        with_kind(reductions.RULES["aten::_softmax"], 1, Kind.PASS),
        None,
    ),
    "scan of a shard": (
        aten.cumsum.default,
        (f(4, 6), 1),
        with_kind(reductions.RULES["aten::cumsum"], 1, Kind.PASS),
        None,
    ),
    "flip of a shard": (aten.flip.default, (f(4, 6), [0]), all_pass, None),
    "a sum that is not partial": (
        aten.sum.dim_IntList,
        (f(4, 6), [1]),
        with_kind(reductions.RULES["aten::sum.dim_IntList"], 1, Kind.PASS),
        None,
    ),
    "an extreme that is added": (
        aten.amax.default,
        (f(4, 6), [1]),
        with_fields(reductions.RULES["aten::amax"], reduction="sum"),
        None,
    ),
    "a maximum with the pads of a minimum": (
        aten.amax.default,
        (f(5, 3), [0]),
        with_fields(reductions.RULES["aten::amax"], reduction="min"),
        None,
    ),
    "a bias added on every rank": (
        aten.add.Tensor,
        (f(4, 6), f(6)),
        with_fields(pointwise.RULES["aten::add.Tensor"], linear=((True, False),)),
        None,
    ),
    "a partial value through a nonlinearity": (
        aten.relu.default,
        (f(4, 6),),
        with_fields(pointwise.RULES["aten::relu"], linear=((True,),)),
        None,
    ),
    "a product of two partial values": (
        aten.mul.Tensor,
        (f(4, 6), f(6)),
        with_fields(pointwise.RULES["aten::mul"], linear=((True, True),)),
        None,
    ),
    "a cast that makes indices of pads": (
        aten._to_copy.default,
        (f(5, 3),),
        pointwise.broadcast_rule,
        None,
    ),
    "a view to the logical sizes": (
        aten.view.default,
        (f(4, 6), [24]),
        views.RULES["aten::view.default"],
        None,
    ),
    "an expand to the logical sizes": (
        aten.expand.default,
        (f(4, 1), [4, 6]),
        views.RULES["aten::expand"],
        None,
    ),
    "a squeeze of a dim with one local row": (
        aten.squeeze.dim,
        (f(2, 6), 0),
        views.RULES["aten::squeeze"],
        None,
    ),
    "halves of a packed weight interleaved": (
        aten.split.Tensor,
        (f(12, 5), 6),
        unit_before_pieces,
        slicing.LOCAL["aten::split"],
    ),
    "a slice at the logical start": (
        aten.slice.Tensor,
        (f(12, 5), 0, 4, 8),
        slicing.RULES["aten::slice"],
        None,
    ),
    "a triangle without its row offset": (
        aten.tril.default,
        (f(6, 6),),
        creation.RULES["aten::tril"],
        None,
    ),
    "zeros in the shape of an unread operand": (
        aten.zeros_like.default,
        (f(4, 6),),
        creation.RULES["aten::zeros_like"],
        None,
    ),
    "factors that do not make up the extent": (
        aten.neg.default,
        (f(4, 6),),
        with_fields(pointwise.RULES["aten::neg"], sizes=(4, 3)),
        None,
    ),
    "operands that share a factor of different dims": (
        aten.add.Tensor,
        (f(6, 6), f(6, 6)),
        with_fields(pointwise.RULES["aten::add.Tensor"], operands=(((0,), (1,)), ((1,), (0,)))),
        None,
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_rule_fails(name: str) -> None:
    target, args, rule, local = MUTANTS[name]
    assert isinstance(target, torch._ops.OpOverload)
    kwargs: dict[str, object] = {"dtype": torch.int64} if "cast" in name else {}
    op = target._schema.name
    rules = Rules(({op: rule},), ({op: local},) if local else ())
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        check_op(rules, target, args, kwargs)


def test_the_call_has_types_in_place_of_tensors() -> None:
    call, outputs = make_call(aten.cat.default, ([f(2, 3), f(4, 3)],))
    assert [value.shape for value in call.operands] == [(2, 3), (4, 3)]
    assert call.args == ([call.operands[0], call.operands[1]],)
    assert call.results[0].shape == tuple(outputs[0].shape) == (6, 3)
