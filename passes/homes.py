"""Homes: where values would lie if they followed the tokens all the way.

Propagation may take a value elsewhere: heads of attention, features of an MLP. A pending sum of it
is then scattered to where the value is at home, instead of being summed whole, and the op that
reads it goes on from there. A home is read off the rules alone, whatever the operands do by now.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import fx

from rolemesh.compiler.ir.placement import REPLICATE, Placement, Shard
from rolemesh.compiler.ir.program import InputKind, Program
from rolemesh.compiler.ir.rule import Kind, Rule, Split
from rolemesh.passes.calls import Op

__all__ = ["Homes"]


class Homes:
    """Homes on one mesh axis, found in graph order.

    Args:
        program: The Program.
        placements: Placements of its inputs.
        ops: Its ops.
        ranks: Ranks of the axis.
    """

    def __init__(
        self,
        program: Program,
        placements: Mapping[fx.Node, Sequence[Placement]],
        ops: Mapping[fx.Node, Op],
        ranks: int,
    ) -> None:
        self._ops = ops
        self._ranks = ranks
        self._trains = program.is_joint
        self._homes: dict[fx.Node, Shard] = {
            node: placement
            for node, entry in zip(program.placeholders, program.inputs, strict=True)
            if entry.kind is InputKind.USER
            and not entry.mutated
            and isinstance(placement := placements[node][0], Shard)
        }
        self._choices: dict[fx.Node, Split] = {}  # of ops with several results
        self._followed: dict[object, tuple[Split | None, Placement]] = {}

    def follow(self, op: Op) -> Split | None:
        """The choice that follows the tokens through an op; None if they are not in it."""
        if not self._homes:
            return None
        homes = tuple(map(self._homes.get, op.operands))
        if homes.count(None) == len(homes):
            return None
        key = (id(op.call), homes)
        found = self._followed.get(key)
        if found is None:
            found = self._followed[key] = self._following(op.rule, homes)
        choice, place = found
        if choice is not None:
            if isinstance(place, Shard):
                self._homes[op.node] = place
            if len(op.call.results) > 1:
                self._choices[op.node] = choice
        return choice

    def take(self, node: fx.Node, source: fx.Node, position: int) -> None:
        """Find the home of one of an op's results.

        In training, a gradient that an op on whole tokens gives is at home where the value is that
        it is of: the operand of its type.
        """
        choice = self._choices.get(source)
        if choice is not None:
            place = self._ops[source].rule.result_placement(position, choice)
            if isinstance(place, Shard):
                self._homes[node] = place
            return
        for operand in self._ops[source].operands if self._trains else ():
            if operand in self._homes and operand.meta["type"] == node.meta["type"]:
                self._homes[node] = self._homes[operand]
                return

    def _following(
        self, rule: Rule, homes: Sequence[Shard | None]
    ) -> tuple[Split | None, Placement]:
        """The choice that follows the first home it can, and where the first result lies then."""
        for position, home in enumerate(homes):
            if home is not None and position not in rule.unread:
                choice = rule.match(rule.operands[position], home, self._ranks)
                if isinstance(choice, Split):
                    place = rule.result_placement(0, choice)
                    if rule.kinds[choice.factor] is Kind.PASS or isinstance(place, Shard):
                        return choice, place
        return None, REPLICATE
