"""Rules of the user's own ops, and the tables as one."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from tests.passes.rules.harness import check_op, make_call
from tests.passes.rules.rule_line import rule_line

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.rule import OpCall, Rule
from rolemesh.passes.rules import default_rules, defaults, register_rule
from rolemesh.passes.rules.registry import MissingRuleWarning, replicated_rule

LIBRARY = "rolemesh_test_custom"


@pytest.fixture(scope="module")
def op() -> torch._ops.OpOverload:
    """`[T, D]` by `[D]`: a norm times a weight."""

    @torch.library.custom_op(f"{LIBRARY}::norm", mutates_args=())
    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * x.pow(2).mean(-1, keepdim=True).rsqrt() * weight

    found = getattr(torch.ops, LIBRARY).norm.default
    assert isinstance(found, torch._ops.OpOverload)
    return found


@pytest.fixture(autouse=True)
def fresh_rules() -> Iterator[None]:
    """Registrations of one test are not seen by others."""
    default_rules.cache_clear()
    yield
    default_rules.cache_clear()


def operands() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 5, 8, generator=generator), torch.randn(8, generator=generator)


def test_spec(op: torch._ops.OpOverload) -> None:
    assert not default_rules().covers(op)
    register_rule(f"{LIBRARY}::norm", "... d!, d! -> ... d!")
    check_op(default_rules(), op, operands(), expect="a b c!, c! -> a b c!")


def test_wrong_spec_is_found_by_running_it(op: torch._ops.OpOverload) -> None:
    """A norm needs the whole dim; the harness users may borrow tells them so."""
    register_rule(f"{LIBRARY}::norm", "... d, d -> ... d")
    with pytest.raises(AssertionError, match="norm"):
        check_op(default_rules(), op, operands())


def test_overload_goes_before_name(op: torch._ops.OpOverload) -> None:
    call, _ = make_call(op, operands())
    register_rule(f"{LIBRARY}::norm", "b t d!, d! -> b t d!")
    register_rule(f"{LIBRARY}::norm.other", "b! t! d!, d! -> b! t! d!")
    assert rule_line(default_rules().rule(call)) == "a b c!, c! -> a b c!"


def test_function(op: torch._ops.OpOverload) -> None:
    calls: list[OpCall] = []

    def rule(call: OpCall) -> Rule:
        calls.append(call)
        return replicated_rule(call)

    with pytest.warns(MissingRuleWarning):  # looked up before, and so remembered as missing
        default_rules().rule(make_call(op, operands())[0])
    register_rule(f"{LIBRARY}::norm", rule)
    call, _ = make_call(op, operands())
    default_rules().rule(call)
    assert calls == [call]


def test_a_rule_may_be_replaced() -> None:
    call, _ = make_call(torch.ops.aten.mm.default, (torch.ones(2, 3), torch.ones(3, 4)))
    register_rule("aten::mm", "m k!, k! n -> m n")
    assert rule_line(default_rules().rule(call)) == "a b!, b! c -> a c"


@pytest.mark.parametrize("name", ["norm", "lib::", "::norm", "lib::op.", "lib.op", "a::b::c", ""])
def test_bad_name(name: str) -> None:
    with pytest.raises(RolemeshError) as caught:
        register_rule(name, "a -> a")
    assert str(caught.value) == (
        f"[RM022] {name!r} does not name an op\n"
        f"  where: register_rule({name!r}, ...)\n"
        "  why: ops are found by the name they were registered with\n"
        "  fix: write library::op or library::op.overload"
    )


def test_bad_spec_registers_nothing(op: torch._ops.OpOverload) -> None:
    with pytest.raises(RolemeshError, match="RM022"):
        register_rule(f"{LIBRARY}::norm", "a -> b")
    assert not default_rules().covers(op)


def test_no_op_is_in_two_families() -> None:
    found = Counter(name for family in defaults.FAMILIES for name in family.RULES)
    assert [name for name, count in found.items() if count > 1] == []


def test_every_local_form_has_a_rule() -> None:
    for family in defaults.FAMILIES:
        names = {name.partition(".")[0] for name in family.RULES}
        assert {name.partition(".")[0] for name in family.LOCAL} <= names


def test_names_are_those_of_ops() -> None:
    """A misspelt name would be a rule that is never found."""
    for family in defaults.FAMILIES:
        for name in (*family.RULES, *family.LOCAL):
            library, _, rest = name.partition("::")
            base, _, overload = rest.partition(".")
            if library != "aten":
                continue
            packet = getattr(torch.ops.aten, base, None)
            assert packet is not None, name
            assert not overload or overload in packet.overloads(), name


def test_rules_are_derived_in_microseconds() -> None:
    """A layer has hundreds of ops; the limit leaves room for a busy machine."""
    ones, ids = torch.ones, torch.zeros(6, dtype=torch.long)
    aten = torch.ops.aten
    rules = default_rules()
    for target, args in (
        (aten.mm.default, (ones(6, 4), ones(4, 3))),
        (aten.index.Tensor, (ones(9, 4), [ids])),
        (aten.index_put.default, (ones(9, 4), [ids], ones(6, 4))),
        (aten.scatter_add.default, (ones(9, 4), 0, ids[:, None], ones(6, 4))),
        (
            aten._scaled_dot_product_flash_attention_for_cpu.default,
            (ones(2, 4, 3, 8), ones(2, 2, 5, 8), ones(2, 2, 5, 8)),
        ),
    ):
        call, _ = make_call(target, args)
        times = []
        for _ in range(200):
            start = time.perf_counter()
            rules.rule(call)
            times.append(time.perf_counter() - start)
        assert min(times) < 100e-6, f"{target}: {min(times) * 1e6:.0f} us"
