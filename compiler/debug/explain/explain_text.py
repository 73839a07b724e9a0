"""An explanation as text for people.

The first links of a chain are written in full: the op, its rule and what of it is split, the pass's
reason, and what else was priced. Further ones take a line each, unless all are asked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from rolemesh.compiler.debug.explain.chains import OUTPUT, Chain, Link
from rolemesh.compiler.debug.explain.decided import Decision, Priced, placement_words
from rolemesh.compiler.debug.explain.explain import Explanation
from rolemesh.compiler.debug.explain.moves import Move, MoveStep, Side
from rolemesh.compiler.debug.paint import Painter

__all__ = ["explanation_text"]

_FULL = 4
_PAGE = 118


def explanation_text(found: Explanation, painter: Painter, *, full: bool = False) -> str:
    """The text of an explanation.

    Args:
        found: The explanation.
        painter: Colours layouts and headings, or does not.
        full: Whether every link of a chain is written in full.
    """
    return "\n".join(
        painter.kind(line) if line.startswith(" ") else painter.bold(line)
        for line in _lines(found, full)
    )


def _lines(found: Explanation, full: bool) -> Iterator[str]:
    call = f" = {found.expression}" if found.expression else "   an input"
    yield f"{found.name}{call}"
    yield f"  {found.kind}"
    places = [found.program, found.module, found.source]
    yield f"  {'   '.join(filter(None, places))}"
    if found.local is not None:
        yield f"  a rank holds [{', '.join(map(str, found.local))}]"
    if found.moves:
        yield f"  brought elsewhere by {', '.join(f'%{name}' for name in found.moves)}"
    for chain in found.layout:
        end = placement_words(chain.links[0].placement)
        yield from ("", f"why {end} on {chain.axis}")
        yield from _chain(chain, len(chain.links) if full else _FULL)
    if found.move is not None:
        yield from _move(found.node, found.move, full)


def _chain(chain: Chain, full: int) -> Iterator[str]:
    for link in chain.links[:full]:
        yield from _link(link)
    yield from _columns([_short(link) for link in chain.links[full:]])


def _short(link: Link) -> tuple[str, str, str]:
    return (link.name, link.kind, link.text)


def _columns(rows: Sequence[tuple[str, str, str]]) -> Iterator[str]:
    """Rows of name, kind and text; what is wide moves its own row only."""
    widths = [min(max((len(row[i]) for row in rows), default=0), 44) for i in range(2)]
    for name, kind, text in rows:
        yield f"  {name.ljust(widths[0])}  {kind.ljust(widths[1])}  {text}".rstrip()


def _link(link: Link) -> Iterator[str]:
    call = f" = {link.expression}" if link.expression else ""
    places = "   ".join(filter(None, (link.module, link.source)))
    yield f"  {link.name}{call}   {link.kind}".rstrip()
    if places:
        yield f"      at       {places}"
    if link.decision is not None and link.how != "whole operands":
        yield from _decision(link.decision)
    if link.replaced is not None:
        yield f"      was      {link.replaced.choice} after {link.replaced.stage}"
        yield from _priced(link.replaced.alternatives)
    label = "given" if link.how in ("seed", "annotation") else "so"
    yield f"      {label:<7}  {link.text}"


def _decision(decision: Decision) -> Iterator[str]:
    yield f"      rule     {decision.rule}"
    needs = [
        f"{operand.name} {placement_words(operand.needs)}"
        for operand in decision.operands
        if operand.needs is not None
    ]
    result = placement_words(decision.result)
    yield from _wrapped("choice", f"{decision.choice}: ", [*needs, f"gives {result}"], ", ")
    if decision.reason:
        yield f"      because  {decision.reason} ({decision.stage})"
    yield from _priced(decision.alternatives)


def _priced(alternatives: Sequence[Priced]) -> Iterator[str]:
    for index, entry in enumerate(alternatives):
        ratio = "" if entry.ratio is None or not index else f", {entry.ratio:,.1f}x"
        follows = f", {_follows(entry.follows)}" if entry.follows else ""
        label = "priced" if not index else ""
        yield (
            f"      {label:<7}  {_number(entry.price):>9}  {entry.choice}"
            f" (moves {_number(entry.moved)}{follows}{ratio})"
        )


def _follows(what: str) -> str:
    return {"tokens": "follows the tokens", "result": "as its result must lie"}.get(
        what, f"follows {what}"
    )


def _wrapped(label: str, start: str, parts: Sequence[str], between: str) -> Iterator[str]:
    """Parts after each other, on as many lines as they need."""
    line = f"      {label:<7}  {start}"
    indent = " " * 15
    for index, part in enumerate(parts):
        piece = part + (between.rstrip() if index + 1 < len(parts) else "")
        if len(line) + len(piece) > _PAGE and line.strip():
            yield line.rstrip()
            line = indent
        line += f"{piece} "
    yield line.rstrip()


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == 0 else f"{value:.3g}"


def _move(node: str, move: Move, full: bool) -> Iterator[str]:
    user = "the program's result" if move.user == OUTPUT else f"%{move.user}"
    yield ""
    yield {
        "operand": f"{user} = {move.user_expression} needs {move.value_name} in another layout",
        "output": f"{move.value_name} is returned in another layout",
        "pads": f"{user} = {move.user_expression} must not count the pads of {move.value_name}",
        "marks": f"{move.value_name} says which rows of {user} = {move.user_expression} a rank has",
    }[move.purpose]
    rows = [("lies", move.before, "")]
    rows.extend((f"%{step.node}", step.kind, _step(step, move.sizes)) for step in move.steps)
    yield from _columns(rows)
    if move.ahead is not None:
        yield f"  started {move.ahead} ops before it is waited for"
    if move.also_for:
        others = ", ".join(OUTPUT if name == OUTPUT else f"%{name}" for name in move.also_for)
        yield f"  also read there by {others}"
    reason = next(step.reason for step in move.steps if step.node == node)
    if reason:
        yield f"  recorded cause: {reason}"
    for side in move.sides:
        yield from _side(move, side, full)


def _side(move: Move, side: Side, full: bool) -> Iterator[str]:
    ends = (side.before, side.after)
    yield from (
        "",
        f"on {side.axis}: {' -> '.join(dict.fromkeys(map(placement_words, ends)))}",
        f"why {move.value_name} lies so",
    )
    yield from _chain(side.value, len(side.value.links) if full else 1)
    yield {
        "operand": f"why %{move.user} needs another layout",
        "output": "why it is returned in another layout",
        "pads": f"why %{move.user} reads it so",
        "marks": f"why rows of %{move.user} are marked",
    }[move.purpose]
    yield from _chain(side.user, len(side.user.links) if full else 1)


def _step(step: MoveStep, sizes: Mapping[str, int]) -> str:
    text = step.op
    if step.collective is not None:
        formula = str(step.collective["formula"])
        words = set(re.findall(r"[A-Za-z]\w*", formula))
        values = ", ".join(f"{name} = {size}" for name, size in sizes.items() if name in words)
        text += f", a rank receives {step.collective['bytes']:,} B = {formula}"
        text += f" with {values}" if values else ""
    return f"{text}, into buffer {step.slot}" if step.slot else text
