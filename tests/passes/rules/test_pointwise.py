"""Elementwise ops: which operands they are linear in, and that every listed op is elementwise."""

from __future__ import annotations

import itertools

import pytest
import torch
from tests.passes.rules.harness import check_op, make_call
from tests.passes.rules.rule_line import rule_line

from rolemesh.passes.rules import pointwise
from rolemesh.passes.rules.registry import Rules

aten = torch.ops.aten
SEEDS = itertools.count()  # no two operands alike: x - x tells nothing
RULES = Rules((pointwise.RULES,), (pointwise.LOCAL,))


def f(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Positive, so that roots and logarithms are defined; below 1 for the inverses."""
    random = torch.rand(shape, generator=torch.Generator().manual_seed(next(SEEDS)))
    return (random * 0.9 + 0.05).to(dtype)


def h(*shape: int) -> torch.Tensor:
    return f(*shape, dtype=torch.bfloat16)


def i(*shape: int) -> torch.Tensor:
    return torch.randint(1, 9, shape, generator=torch.Generator().manual_seed(next(SEEDS)))


def m(*shape: int) -> torch.Tensor:
    return i(*shape) > 4


# What the docstring of the table promises: op, arguments, rule.
CASES = [
    (aten.neg.default, (f(5, 3),), "a b -> a b | linear 1"),
    (aten.add.Tensor, (f(5, 3), f(5, 3)), "a b, a b -> a b | linear 11"),
    (aten.add.Tensor, (h(5, 3), h(3)), "a b, b -> a b | linear 11"),
    (aten.add.Tensor, (f(5, 3), 2.0), "a b -> a b"),
    (aten.add.Scalar, (f(5, 3), 2.0), "a b -> a b"),
    (aten.sub.Tensor, (f(5, 1), f(3)), "a 1, b -> a b | linear 11"),
    (aten.sub.Tensor, (f(5, 3), 1.0), "a b -> a b"),
    (aten.rsub.Scalar, (f(5, 3), 1.0), "a b -> a b"),
    (aten.rsub.Tensor, (f(5, 3), f(5, 3)), "a b, a b -> a b | linear 11"),
    (aten.mul.Tensor, (f(5, 3), f(3)), "a b, b -> a b | linear 10 01"),
    (aten.mul.Tensor, (h(4, 1, 5), h(3, 1)), "a 1 b, c 1 -> a c b | linear 10 01"),
    (aten.mul.Tensor, (f(5, 3), 0.5), "a b -> a b | linear 1"),
    (aten.mul.Scalar, (f(5, 3), 0.5), "a b -> a b | linear 1"),
    (aten.mul.Tensor, (i(5, 3), i(3)), "a b, b -> a b | linear 10 01"),
    (aten.div.Tensor, (f(5, 3), f(5, 1)), "a b, a 1 -> a b | linear 10"),
    (aten.div.Tensor, (f(5, 3), 3.0), "a b -> a b | linear 1"),
    (aten.div.Scalar, (f(5, 3), 3.0), "a b -> a b | linear 1"),
    (aten.addcmul.default, (f(5, 3), f(5, 3), f(3)), "a b, a b, b -> a b | linear 110 101"),
    (aten.addcdiv.default, (f(5, 3), f(5, 3), f(3)), "a b, a b, b -> a b | linear 110"),
    (aten.lerp.Scalar, (f(5, 3), f(5, 3), 0.3), "a b, a b -> a b | linear 11"),
    (aten.lerp.Tensor, (f(5, 3), f(5, 3), f(3)), "a b, a b, b -> a b | linear 110"),
    (aten.where.self, (m(5, 1), f(5, 3), f(3)), "a 1, a b, b -> a b"),
    (aten.where.self, (m(5, 3), f(), f(5, 3)), "a b, ., a b -> a b"),
    (aten.masked_fill.Scalar, (f(5, 3), m(3), 0.0), "a b, b -> a b"),
    (aten.masked_fill.Tensor, (f(5, 3), m(5, 1), f()), "a b, a 1, . -> a b"),
    (aten.clamp.default, (f(5, 3), 0.2, 0.7), "a b -> a b"),
    (aten.clamp.Tensor, (f(5, 3), f(3), None), "a b, b -> a b"),
    (aten.pow.Tensor_Scalar, (f(5, 3), 2), "a b -> a b"),
    (aten.pow.Scalar, (2.0, f(5, 3)), "a b -> a b"),
    (aten.pow.Tensor_Tensor, (f(5, 3), f(3)), "a b, b -> a b"),
    (aten.maximum.default, (i(5, 3), i(3)), "a b, b -> a b"),
    (aten.le.Tensor, (i(7, 1), i(5)), "a 1, b -> a b"),
    (aten.ge.Scalar, (i(7, 5), 4), "a b -> a b"),
    # A dim of extent one that no operand broadcasts is a factor, so that a batch of one shards.
    (aten.add.Tensor, (f(1, 3), f(1, 3)), "a b, a b -> a b | linear 11"),
    (aten.add.Tensor, (f(), f()), "., . -> . | linear 11"),
    (aten.silu_backward.default, (f(5, 3), f(5, 3)), "a b, a b -> a b | linear 10"),
    (
        aten.log_sigmoid_backward.default,
        (f(5, 3), f(5, 3), f(5, 3)),
        "a b, a b, a b -> a b | linear 100",
    ),
    (aten.threshold_backward.default, (f(5, 3), f(5, 3), 0.5), "a b, a b -> a b | linear 10"),
    (aten.copy.default, (f(5, 3), h(5, 3)), "_, a b -> a b | linear 01"),
    (aten.copy.default, (f(5, 3), f(5, 3)), "_, a b -> a b | linear 01"),
    (aten.copy.default, (f(5, 3), f(3)), "_, a -> b a | linear 01"),
    (aten.copy.default, (f(5, 3), f(5, 1)), "_, a 1 -> a b | linear 01"),
    (aten.copy.default, (f(5, 3), h(3)), "a b, b -> a b"),
    (aten.copy.default, (f(5, 3), i(5, 3)), "_, a b -> a b"),
]


@pytest.mark.parametrize(("target", "args", "text"), CASES, ids=lambda v: str(v)[:40])
def test_rule(target: torch._ops.OpOverload, args: tuple[object, ...], text: str | None) -> None:
    assert check_op(RULES, target, args, expect=text) > 0


@pytest.mark.parametrize(
    ("source", "dtype", "text"),
    [
        (f(5, 3), torch.bfloat16, "a b -> a b | linear 1"),
        (h(5, 3), torch.float32, "a b -> a b | linear 1"),
        (f(5, 3), torch.int8, "a b -> a b"),
        (f(5, 3), torch.bool, "a b -> a b"),
        # Pads of floats are arbitrary, and arbitrary numbers are no indices.
        (f(5, 3), torch.int64, "a! b! -> a! b!"),
        (i(5, 3), torch.float32, "a b -> a b"),
        (m(5, 3), torch.int64, "a b -> a b"),
    ],
)
def test_casts(source: torch.Tensor, dtype: torch.dtype, text: str) -> None:
    check_op(RULES, aten._to_copy.default, (source,), {"dtype": dtype}, expect=text)


def _arguments(name: str) -> tuple[object, ...]:
    """Arguments that the op's schema accepts: positive floats, integers for bit ops."""
    op, _, overload = name.removeprefix("aten::").partition(".")
    schema = getattr(getattr(aten, op), overload or "default")._schema
    integers = op.startswith("bitwise")
    args: list[object] = []
    for argument in schema.arguments:
        kind = str(argument.type)
        if argument.kwarg_only:
            break
        if kind in ("Tensor", "Optional[Tensor]"):
            is_condition = argument.name in ("condition", "mask")
            # The second operand broadcasts, except where the op wants equal shapes.
            shape = (3,) if len(args) == 1 and "backward" not in op else (5, 3)
            if argument.name == "value" and op in ("fill", "masked_fill"):
                shape = ()
            make = m if is_condition else i if integers else f
            args.append(make(*shape))
        elif argument.has_default_value():
            continue  # given defaults only at the end, so nothing after them is needed
        else:
            args.append({"number": 2, "float": 0.5, "bool": False, "int": 1}.get(kind, 1))
    return tuple(args)


def _overloads(name: str) -> list[str]:
    op, _, overload = name.removeprefix("aten::").partition(".")
    if overload:
        return [name]
    packet = getattr(aten, op)
    found = []
    for name_of_overload in packet.overloads():
        arguments = getattr(packet, name_of_overload)._schema.arguments
        kinds = [str(argument.type) for argument in arguments]
        if "Tensor" in kinds and not any(a.alias_info is not None for a in arguments):
            found.append(f"{name}.{name_of_overload}")
    return found


@pytest.mark.parametrize(
    "name", [overload for name in pointwise.RULES for overload in _overloads(name)]
)
def test_every_overload_in_the_table_is_elementwise(name: str) -> None:
    op, _, overload = name.removeprefix("aten::").partition(".")
    kwargs: dict[str, object] = {"rounding_mode": "floor"} if overload.endswith("_mode") else {}
    if overload == "decimals":
        kwargs = {"decimals": 1}
    target = getattr(getattr(aten, op), overload)
    args = (*_arguments(name), *((0.5,) if name == "aten::clamp.default" else ()))
    assert check_op(RULES, target, args, kwargs, ranks=(2, 3), limit=2) > 0
    call, _ = make_call(target, args, kwargs)
    assert "!" not in rule_line(RULES.rule(call))
