"""docs/models.md: written from results, and read back.

The file is the only store of results: a run that measures a few architectures reads it, replaces
their rows and writes it again.

Invariants: the text depends on the results alone, not on the order or time of measurement, and
`parse(render(results))` gives the results back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from tests.coverage.architectures import (
    ARCHITECTURES,
    EXPLANATIONS,
    ROLES,
    Architecture,
    Kind,
)

__all__ = ["NOT_RUN", "OK", "Results", "Row", "parse", "render", "summary"]

OK = "ok"
NOT_RUN = "not run"
_UNRULED = "ops on every rank"

_HEAD = """\
# Models

Architectures of `transformers` that PyTorch captures as one graph, and what `rolemesh check` says
of each: a tiny model with random weights in fp32, 13 tokens, a batch of 2, one decode step, 4 ranks
in lock-step. `ok` means that every result, every cache tensor and every buffer equals that of one
device. Anything else is the first reason why not, with the op and the source line if there is one.

`ops on every rank` lists ops that have no sharding rule: they are computed whole on every rank,
which is right but shares no work.

This file is generated: `make sweep` checks everything and rewrites it,
`make sweep ARGS="--only llama,gemma2"` some rows. CI checks a sample.
"""


@dataclass(frozen=True)
class Row:
    """What was found out about one architecture.

    Attributes:
        verdicts: By role: `OK`, `NOT_RUN` or the reason.
        unruled: Names of ops without a sharding rule, sorted.
    """

    verdicts: Mapping[str, str] = field(default_factory=dict)
    unruled: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every role is."""
        return all(verdict == OK for verdict in self.verdicts.values())

    @property
    def problems(self) -> tuple[str, ...]:
        """The reasons of the roles that ran and are not ok."""
        return tuple(v for v in self.verdicts.values() if v not in (OK, NOT_RUN))


Results = Mapping[Architecture, Row]


def summary(results: Results) -> str:
    """How many architectures are ok, in one line."""
    passed = sum(results[entry].ok for entry in ARCHITECTURES if entry in results)
    return f"{passed} of {len(ARCHITECTURES)} architectures are ok in every role."


def render(results: Results) -> str:
    """The file's text; an architecture without a result has `not run` in every cell."""
    lines = [_HEAD, summary(results)]
    for kind in Kind:
        entries = [entry for entry in ARCHITECTURES if entry.kind is kind]
        if entries:
            lines += ["", f"## {kind.value}", "", *_table(kind, entries, results)]
    problems = [entry for entry in ARCHITECTURES if results.get(entry, Row()).problems]
    if problems:
        lines += ["", "## What is not ok, and why"]
    for entry in problems:
        reason = EXPLANATIONS.get((entry.kind, entry.name), "Not explained yet.")
        lines += ["", f"**{entry.name}** ({entry.kind.value.lower()}): {reason}"]
    return "\n".join(lines) + "\n"


def _table(kind: Kind, entries: list[Architecture], results: Results) -> Iterator[str]:
    yield _line("architecture", *ROLES[kind], _UNRULED)
    yield "|---" * (len(ROLES[kind]) + 2) + "|"
    for entry in entries:
        row = results.get(entry, Row())
        verdicts = [row.verdicts.get(role, NOT_RUN) for role in entry.roles]
        yield _line(entry.name, *verdicts, " ".join(row.unruled))


def _line(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "&#124;") for cell in cells) + " |"


def parse(text: str) -> dict[Architecture, Row]:
    """The results that a file holds, without rows of architectures that the lists do not have."""
    known = set(ARCHITECTURES)
    found = {}
    kind: Kind | None = None
    for line in text.splitlines():
        if line.startswith("## "):
            kind = next((kind for kind in Kind if kind.value == line[3:]), None)
        elif kind is not None and line.startswith("| "):
            name, *verdicts, unruled = _cells(line)
            entry = Architecture(kind, name)
            if entry in known:
                by_role = dict(zip(entry.roles, verdicts, strict=True))
                found[entry] = Row(by_role, tuple(unruled.split()))
    return found


def _cells(line: str) -> list[str]:
    return [cell.strip().replace("&#124;", "|") for cell in line[1:-1].split("|")]
