"""docs/models.md lists what the sweep covers, and a sample of it is measured again."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.coverage.architectures import (
    ARCHITECTURES,
    EXPLANATIONS,
    Architecture,
    Kind,
    selected,
)
from tests.coverage.measure import measure
from tests.coverage.sweep import measure_apart
from tests.coverage.table import NOT_RUN, OK, Row, parse, render

SAMPLE = (
    ("gemma2", "prefill"),  # sliding windows
    ("olmoe", "decode"),  # experts
    ("mamba", "decode"),  # states instead of a cache of keys
    ("granitemoehybrid", "prefill"),  # states and attention
    ("deepseek_v2", "pd_mixed"),  # latent attention
    ("bart", "decode"),  # encoder and decoder
    ("olmo_hybrid", "prefill"),  # linear attention
    ("gpt2", "pd_mixed"),  # layer norms, one head of keys for each of queries
)
"""One architecture of each build, with the role to measure."""


class Missing(Architecture):
    """A type that `transformers` does not have."""

    @property
    def model(self) -> str:
        return "hf:no_such_type"


class Deadly(Architecture):
    """A model that ends its process."""

    @property
    def model(self) -> str:
        os._exit(7)


@pytest.fixture(scope="module")
def document() -> str:
    root = Path(__file__).resolve().parent.parent.parent
    return (root / "docs" / "models.md").read_text(encoding="utf-8")


def test_the_document_has_every_architecture_with_every_role(document: str) -> None:
    results = parse(document)
    assert list(results) == list(ARCHITECTURES)
    for entry, row in results.items():
        assert tuple(row.verdicts) == entry.roles
        assert NOT_RUN not in row.verdicts.values(), f"{entry.name}: make sweep"
        if not row.ok:
            assert (entry.kind, entry.name) in EXPLANATIONS, f"{entry.name} is not explained"
    assert document == render(results), "make sweep writes this file; do not edit it"


def test_only_what_is_not_ok_is_explained(document: str) -> None:
    results = parse(document)
    failing = {(entry.kind, entry.name) for entry, row in results.items() if not row.ok}
    assert set(EXPLANATIONS) <= failing


@pytest.mark.parametrize(("name", "role"), SAMPLE)
def test_a_sample_gives_what_the_document_says(document: str, name: str, role: str) -> None:
    entry = Architecture(Kind.CAUSAL, name)
    said = parse(document)[entry]
    found = measure(entry, (role,))
    assert found.verdicts == {role: said.verdicts[role]}
    assert set(found.unruled) <= set(said.unruled)


def test_a_document_reads_back_as_written() -> None:
    first, second, *_ = ARCHITECTURES
    encoder = next(entry for entry in ARCHITECTURES if entry.kind is Kind.ENCODER)
    bad = "[RM011] a | b; where: c.py:3"
    results = {
        first: Row(dict.fromkeys(first.roles, OK)),
        second: Row({**dict.fromkeys(second.roles, OK), "decode": bad}, ("aten.a", "aten.b")),
        encoder: Row({"prefill": bad}),
    }
    text = render(results)
    read = parse(text)
    assert {entry: read[entry] for entry in results} == results
    missing = set(ARCHITECTURES) - set(results)
    assert {v for entry in missing for v in read[entry].verdicts.values()} == {NOT_RUN}
    assert render(read) == text
    assert f"1 of {len(ARCHITECTURES)} architectures are ok" in text
    assert text.index(f"**{second.name}**") < text.index(f"**{encoder.name}**")
    assert f"**{first.name}**" not in text


def test_a_failure_is_a_verdict_with_its_code_and_line() -> None:
    row = measure(Missing(Kind.CAUSAL, "llama"), ("decode",))
    assert row.verdicts["decode"].startswith("[RM019] unknown causal-LM type 'no_such_type'; where")
    assert not row.ok


@pytest.mark.parametrize(
    ("kind", "seconds", "verdict"),
    [(Architecture, 0.01, "no result in 0.01 s"), (Deadly, 60.0, "ended with exit code 7")],
)
def test_a_hang_and_a_crash_are_verdicts(
    kind: type[Architecture], seconds: float, verdict: str
) -> None:
    row, _ = measure_apart(kind(Kind.CAUSAL, "llama"), seconds)
    assert tuple(row.verdicts) == ("prefill", "decode", "pd_mixed")
    assert all(found.endswith(verdict) for found in row.verdicts.values())


def test_selection() -> None:
    both = selected(("llama",))
    assert {entry.kind for entry in both} == {Kind.CAUSAL, Kind.ENCODER}
    assert selected(("encoder/llama",)) == [Architecture(Kind.ENCODER, "llama")]
    halves = [selected(("causal",), (part, 2)) for part in (1, 2)]
    assert halves[0] + halves[1] == [e for e in ARCHITECTURES if e.kind is Kind.CAUSAL]
    with pytest.raises(ValueError, match="'lama' is not an architecture"):
        selected(("lama",))
    with pytest.raises(ValueError, match="no part 3 of 2"):
        selected((), (3, 2))
