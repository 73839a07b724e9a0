"""Why a value lies as it does: the chain of decisions from it back to what was given.

A link is one value. Its placement on the axis comes from the value that `next` names, by the op's
decision: an operand that was followed, an operand whose sum stays pending, or, where push_back
changed a choice for the users' sake, a user. The chain ends at an input with its seed, at what the
user wrote, or at an op that is computed whole for want of anything better.

Invariant: every chain ends. Links of unchanged choices go to operands; those of changed ones go to
users, and a user's choice is its own or was changed for later users in turn.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rolemesh.compiler.debug.explain.decided import (
    CONSTRAIN,
    WHOLE,
    Decided,
    Decision,
    Pin,
    Placement,
    placement_words,
)

__all__ = ["OUTPUT", "Chain", "Chains", "Link"]

OUTPUT = "output"
"""The name of a program's output node."""
_EARLY = "gathered early: "
_TOKENS = "tokens: "
_ANNOTATED = "annotated by the user: "


@dataclass(frozen=True)
class Link:
    """Why one value lies as it does on one axis.

    Attributes:
        node: Its node.
        name: Its name for people.
        expression: The op's call; empty for an input.
        op: The op; `input` for an input.
        module: Module path; empty if unknown.
        source: `file.py:line` of the model's code; empty if unknown.
        kind: Its type with its layout.
        placement: How it lies on the axis.
        how: What decided it. With `next`: `follows`, `pending`, `item`, `whole operands`, `tokens`,
            `pinned`, `wanted` or `gathered early`. At the end: `seed`, `annotation`, `whole`,
            `pinned`, `constant` or `one rank`.
        text: The same in words.
        decision: What was decided for its op, if anything was.
        replaced: What propagate had decided, where push_back decided otherwise.
        next: The value that it comes from; empty at the end.
    """

    node: str
    name: str
    expression: str
    op: str
    module: str
    source: str
    kind: str
    placement: Placement
    how: str
    text: str
    decision: Decision | None = None
    replaced: Decision | None = None
    next: str = ""


@dataclass(frozen=True)
class Chain:
    """The links of one value on one axis.

    Attributes:
        axis: The axis.
        links: From the value on.
    """

    axis: str
    links: tuple[Link, ...]


class Chains:
    """Makes the chains of one program."""

    def __init__(self, decided: Decided) -> None:
        self.decided = decided
        self._scores: dict[int, dict[str, int]] = {}

    def chain(self, name: str, axis: int) -> Chain:
        """The chain of a value, or of the program's output, on an axis."""
        return Chain(self.decided.axes[axis], tuple(self._walk(name, axis)))

    def _walk(self, name: str, axis: int) -> Iterator[Link]:
        while name:
            link = self._link(name, axis)
            yield link
            name = link.next

    def _link(self, name: str, axis: int) -> Link:
        decided = self.decided
        if name == OUTPUT:
            text = "every rank returns the whole output"
            return Link(name, OUTPUT, "", OUTPUT, "", "", "", WHOLE, "pinned", text)
        node = decided.stage.nodes[name]
        if decided.ranks[axis] == 1:
            return self._made(name, axis, "one rank", "the axis has one rank, which holds all")
        if node.op == "input":
            seed = str(node.data["seed"])
            how = "annotation" if seed.startswith(_ANNOTATED) else "seed"
            return self._made(name, axis, how, seed)
        if node.op == "getitem":
            (source,) = node.operands
            text = f"result {node.data['args'][1]} of {decided.label(source)}"
            return self._made(name, axis, "item", text, following=source)
        decision = decided.decision(name, axis)
        if decided.changed(name, axis):
            return self._pushed_back(name, axis, decision)
        pin = decided.pins.get(name)
        if pin is not None:
            return self._pinned(name, axis, decision, pin)
        if decision.choice == "whole":
            return self._whole(name, axis, decision)
        follows = decision.alternatives[0].follows
        if follows == "tokens":
            source = self._token_input(name, axis)
            text = f"stays with the tokens, as {decided.label(source)} lies"
            text += _brought(decision)
            return self._made(name, axis, "tokens", text, decision, following=source)
        if follows:
            operand = decision.operands[int(follows.removeprefix("operand "))]
            text = f"follows {operand.name}: {placement_words(operand.has)}"
            alike = [o.name for o in decision.operands if o.has == o.needs != WHOLE]
            alike = [name for name in dict.fromkeys(alike) if name != operand.name]
            text += f", as {' and '.join(alike)} lies too" if alike else ""
            text += _brought(decision)
            return self._made(name, axis, "follows", text, decision, following=operand.node)
        operand = next(o for o in decision.operands if o.needs not in (None, WHOLE))
        text = f"the op is linear, so what is pending in {operand.name} stays pending"
        return self._made(name, axis, "pending", text, decision, following=operand.node)

    def _pushed_back(self, name: str, axis: int, decision: Decision) -> Link:
        """A choice that was changed for the users' sake."""
        decided = self.decided
        users = decided.readers(name)
        early = decision.reason.startswith(_EARLY)
        user = users[0] if users else self.decided.returned(name)[0][0] or OUTPUT
        if early:
            text = f"whole already, since that gathers less: {decision.reason.removeprefix(_EARLY)}"
        else:
            text = f"all that read it want this chunk, as {decided.label(user)} does"
        replaced = decided.decision(name, axis, first=True)
        how = "gathered early" if early else "wanted"
        return self._made(name, axis, how, text, decision, replaced, user)

    def _pinned(self, name: str, axis: int, decision: Decision, pin: Pin) -> Link:
        if self.decided.stage.nodes[name].op == CONSTRAIN:
            return self._made(name, axis, "annotation", pin.text, decision)
        if decision.result == WHOLE and pin.layout[axis] != WHOLE:
            must = placement_words(pin.layout[axis])
            text = f"the op cannot give {must}: computed whole and cut afterwards"
            return self._made(name, axis, "whole", text, decision)
        return self._made(name, axis, "pinned", pin.text, decision, following=pin.input)

    def _whole(self, name: str, axis: int, decision: Decision) -> Link:
        """An op that is computed whole: because its operands are, or because that is cheapest."""
        read = [operand for operand in decision.operands if operand.needs is not None]
        if not read:
            text = "it reads no tensor: every rank computes it"
            return self._made(name, axis, "constant", text, decision)
        if all(operand.has == WHOLE for operand in read):
            scores = self._known_scores(axis)
            source = max(read, key=lambda operand: scores[operand.node])
            text = f"all that it reads is whole, as {source.name}"
            return self._made(name, axis, "whole operands", text, decision, following=source.node)
        brought = "; ".join(
            f"{o.name} is {placement_words(o.has)}" for o in read if o.has != o.needs
        )
        if decision.alternatives:
            text = f"computed whole, which is cheapest although {brought}"
        else:
            text = f"computed whole: the rule passes no other way on, and {brought}"
        return self._made(name, axis, "whole", text, decision)

    def _known_scores(self, axis: int) -> dict[str, int]:
        """How much a whole value tells: it was decided (2), comes from the tokens (1), or not."""
        scores = self._scores.get(axis)
        if scores is None:
            scores = self._scores[axis] = {}
            decided = self.decided
            for name, node in decided.stage.nodes.items():
                if node.op == "input":
                    scores[name] = int(str(node.data["seed"]).startswith(_TOKENS))
                elif node.op == "getitem" or self._inherits(name, axis):
                    scores[name] = max((scores[o] for o in node.operands), default=0)
                else:
                    scores[name] = 2
        return scores

    def _inherits(self, name: str, axis: int) -> bool:
        """Whether an op is whole because all its operands were."""
        before = self.decided.before
        decision = before.nodes[name].decision
        assert decision is not None
        return decision["choices"][axis] == "whole" and all(
            self.decided.placement(operand, axis, before) == WHOLE
            for operand in self.decided.operands(name)
        )

    def _token_input(self, name: str, axis: int) -> str:
        """The input of tokens, or of images, that an op's operands come from: the nearest one."""
        decided = self.decided
        inputs = {
            value
            for value, entry in decided.inputs.items()
            if entry["kind"] == "user"
            and not entry.get("mutated")
            and "shard" in decided.placement(value, axis)
        }
        seen, layer = {name}, [name]
        while layer:
            operands = [o for value in layer for o in decided.stage.nodes[value].operands]
            found = next((operand for operand in operands if operand in inputs), None)
            if found is not None:
                return found
            layer = [operand for operand in dict.fromkeys(operands) if operand not in seen]
            seen.update(layer)
        raise AssertionError(f"%{name} stays with tokens that it does not come from")

    def _made(
        self,
        name: str,
        axis: int,
        how: str,
        text: str,
        decision: Decision | None = None,
        replaced: Decision | None = None,
        following: str = "",
    ) -> Link:
        decided = self.decided
        node = decided.stage.nodes[name]
        return Link(
            name,
            decided.label(name),
            "" if node.op == "input" else decided.expression(node),
            node.op,
            node.module,
            node.source,
            decided.kind(name),
            decided.placement(name, axis),
            how,
            text,
            decision,
            replaced,
            following,
        )


def _brought(decision: Decision) -> str:
    """What a choice has brought from elsewhere, if that costs anything."""
    moved = [o for o in decision.operands if o.has not in (WHOLE, o.needs) and o.needs is not None]
    if not moved or not decision.alternatives[0].moved:
        return ""
    where = " and ".join(f"{operand.name} ({placement_words(operand.has)})" for operand in moved)
    return f", and {where} is brought there"
