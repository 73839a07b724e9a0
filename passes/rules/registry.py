"""Where sharding rules are looked up.

Each family of ops has a file with one table `RULES` (op name -> function from an `OpCall` to its
`Rule`) and, for ops whose arguments change on a shard, one table `LOCAL` (op name -> function from
a `LocalCall` to the arguments to run with). A name is `namespace::op.overload`, or
`namespace::op` for all overloads.

Rules are derived from shapes and non-tensor arguments given as plain tuples and integers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.rule import Choice, Kind, OpCall, Rule, RuleBuilder

__all__ = [
    "LocalCall",
    "LocalForm",
    "LocalFunction",
    "MissingRuleWarning",
    "RuleFunction",
    "Rules",
    "replicated_rule",
]

_Found = TypeVar("_Found")
RuleFunction = Callable[[OpCall], Rule]


@dataclass(frozen=True, slots=True)
class LocalCall:
    """One call that is about to run on local tensors.

    Attributes:
        call: The call as captured, with logical types.
        rule: Its rule.
        choices: One choice per mesh axis.
        mesh: The mesh.
        args: Positional arguments to run with; tensors are opaque handles.
        kwargs: Keyword arguments, likewise.
        operand_layouts: Layouts the operands arrive in; None for one that is not read.
        result_layouts: Layouts of the results.
    """

    call: OpCall
    rule: Rule
    choices: tuple[Choice, ...]
    mesh: Mesh
    args: tuple[object, ...]
    kwargs: dict[str, object]
    operand_layouts: tuple[Layout | None, ...]
    result_layouts: tuple[Layout, ...]

    def result_shape(self, index: int = 0) -> tuple[int, ...]:
        """Local shape of a result."""
        return self.result_layouts[index].local_shape(self.call.results[index].shape, self.mesh)

    def operand_shape(self, index: int) -> tuple[int, ...]:
        """Local shape of an operand."""
        shape = self.call.operands[index].shape
        layout = self.operand_layouts[index]
        return shape if layout is None else layout.local_shape(shape, self.mesh)


LocalForm = tuple[Callable[..., object], tuple[object, ...], dict[str, object]]
"""Target, positional and keyword arguments to run on a rank."""

LocalFunction = Callable[[LocalCall], LocalForm]


class MissingRuleWarning(UserWarning):
    """An op has no sharding rule, so it runs whole on every rank (RM010)."""


def replicated_rule(call: OpCall) -> Rule:
    """The rule that is right for every op: nothing shards."""
    builder = RuleBuilder()
    operands = [builder.dims(value.shape, Kind.REPLICATE) for value in call.operands]
    results = [builder.dims(value.shape, Kind.REPLICATE) for value in call.results]
    return builder.build(operands, results)


class Rules:
    """A set of rules, looked up by op.

    Args:
        rules: Tables of rule functions.
        local: Tables of local forms.

    Attributes:
        is_extended: Whether a rule was added to the tables.
    """

    def __init__(
        self,
        rules: tuple[Mapping[str, RuleFunction], ...],
        local: tuple[Mapping[str, LocalFunction], ...] = (),
    ) -> None:
        self._rules: dict[str, RuleFunction] = {k: v for table in rules for k, v in table.items()}
        self._local: dict[str, LocalFunction] = {k: v for table in local for k, v in table.items()}
        self._by_target: dict[object, RuleFunction | None] = {}
        self._local_by_target: dict[object, LocalFunction | None] = {}
        self.is_extended = False

    def register(self, name: str, rule: RuleFunction) -> None:
        """Add or replace the rule of one op."""
        self._rules[name] = rule
        self._by_target.clear()
        self.is_extended = True

    def covers(self, target: object) -> bool:
        """Whether an op has a rule of its own."""
        return self._function(target) is not None

    def rule(self, call: OpCall, where: str = "") -> Rule:
        """The rule of a call; the replicated rule, with a warning, for an op without one."""
        function = self._function(call.target)
        if function is None:
            warnings.warn(
                f"[RM010] {call.target} has no sharding rule\n"
                f"  where: {where or 'unknown'}\n"
                f"  why: it is not in rolemesh's tables, so it runs whole on every rank\n"
                f"  fix: rolemesh.register_rule({_name(call.target)[0]!r}, 'b m k, k n -> b m n')",
                MissingRuleWarning,
                stacklevel=2,
            )
            function = replicated_rule
        return function(call)

    def localize(self, local: LocalCall) -> LocalForm:
        """What to run on a rank: the same call unless the op's family says otherwise."""
        function = self._localizer(local.call.target)
        return (
            (local.call.target, local.args, local.kwargs) if function is None else function(local)
        )

    def localizes(self, target: object) -> bool:
        """Whether a chunk of an op may be another call than the op's own."""
        return self._localizer(target) is not None

    def _localizer(self, target: object) -> LocalFunction | None:
        try:
            return self._local_by_target[target]
        except KeyError:
            found = self._local_by_target[target] = _find(self._local, target)
            return found

    def _function(self, target: object) -> RuleFunction | None:
        try:
            return self._by_target[target]
        except KeyError:
            found = self._by_target[target] = _find(self._rules, target)
            return found


def _name(target: object) -> tuple[str, str]:
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name, target._overloadname
    return str(target), ""


def _find(table: Mapping[str, _Found], target: object) -> _Found | None:
    name, overload = _name(target)
    return table.get(f"{name}.{overload}") or table.get(name)
