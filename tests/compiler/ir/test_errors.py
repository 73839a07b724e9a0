"""RolemeshError: its text, its checks, its trip between processes, and docs/errors.md."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import pytest

from rolemesh.compiler.ir.errors import CODES, RolemeshError


def test_message_says_what_where_why_fix() -> None:
    error = RolemeshError(
        "RM012",
        "aten.dropout draws random numbers",
        where="layers.0.mlp, model.py:31",
        why="ranks would draw different numbers for one value",
        fix="call model.eval() before compiling",
    )
    assert str(error) == (
        "[RM012] aten.dropout draws random numbers\n"
        "  where: layers.0.mlp, model.py:31\n"
        "  why: ranks would draw different numbers for one value\n"
        "  fix: call model.eval() before compiling"
    )
    assert error.title == "random op in a sharded inference graph"


def test_empty_parts_are_left_out_and_long_parts_indented() -> None:
    error = RolemeshError("RM003", "unknown target 'gpu'", fix="use one of\neager\ninductor")
    assert str(error) == (
        "[RM003] unknown target 'gpu'\n  fix: use one of\n    eager\n    inductor"
    )


def test_unknown_code_is_refused() -> None:
    with pytest.raises(ValueError, match="'RM999' is not an error code"):
        RolemeshError("RM999", "something")


def test_empty_sentence_is_refused() -> None:
    with pytest.raises(ValueError, match="RM001 needs a sentence"):
        RolemeshError("RM001", "")


def test_pickle_keeps_every_part() -> None:
    error = RolemeshError("RM013", "rank 2 died", where="rank 2", why="signal 9", fix="see its log")
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.code, copy.what, copy.where, copy.why, copy.fix) == (
        error.code,
        error.what,
        error.where,
        error.why,
        error.fix,
    )
    assert str(copy) == str(error)


def test_codes_are_numbered_without_gaps_and_titles_differ() -> None:
    assert list(CODES) == [f"RM{number:03}" for number in range(1, len(CODES) + 1)]
    assert len(set(CODES.values())) == len(CODES)


def test_codes_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        CODES["RM001"] = "other"


def test_docs_list_exactly_the_codes(repository: Path) -> None:
    text = (repository / "docs/errors.md").read_text(encoding="utf-8")
    documented = re.findall(r"^## (RM\d{3}): (.+)$", text, flags=re.MULTILINE)
    assert documented == list(CODES.items())
