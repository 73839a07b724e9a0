"""`rolemesh ledger`: exit codes, text, JSON, and ranks that differ."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from tests.compiler.recorded import record, recorded_run

from rolemesh.compiler.cli import main as cli
from rolemesh.compiler.dump.files import checksum

pytestmark = pytest.mark.xdist_group("recorded")

Ran = tuple[int, str, str]


@pytest.fixture
def run() -> str:
    return str(record("hf:llama", "pd_mixed")[0])


def ledger(capsys: pytest.CaptureFixture[str], *arguments: str) -> Ran:
    code = cli.main(["ledger", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_text(capsys: pytest.CaptureFixture[str], run: str) -> None:
    code, out, err = ledger(capsys, run)
    assert (code, err) == (0, "")
    assert "pd_mixed/prefill, verify   tp=4 B=2 T=13\n" in out
    assert "pd_mixed/decode, verify   tp=4 B=2 T=1\n" in out
    assert "index_copy(past_key_values.layers[0].keys) needs all of it" in out


@pytest.mark.parametrize("by", ["module", "op", "layer", "none"])
def test_by(capsys: pytest.CaptureFixture[str], run: str, by: str) -> None:
    code, out, _ = ledger(capsys, run, "--program", "decode", "--by", by, "--color", "always")
    assert code == 0
    totals = [line.split() for line in out.splitlines() if line.startswith("  all ")]
    sharded = record("hf:llama", "pd_mixed")[1]["decode"]
    moved = sum(record.bytes_received for record in sharded.collectives)
    assert totals == [["all", str(len(sharded.collectives)), f"{moved:,}"]]
    assert ("layer 1 " in out) == (by == "layer")


def test_json(capsys: pytest.CaptureFixture[str], run: str) -> None:
    code, out, _ = ledger(capsys, run, "--json", "--program", "prefill", "--tokens", "64")
    found = json.loads(out)
    assert code == 0
    assert found["ok"] is True
    assert found["schema_version"] == 1
    assert found["order"] == {"ranks": [], "divergences": []}
    (program,) = found["programs"]
    assert program["sizes"] == {"tp": 4, "B": 2, "T": 64}
    assert program["bytes"] == sum(entry["received"] for entry in program["collectives"])
    gathers = [e for e in program["collectives"] if e["formula"] == "8*B*(tp - 1)*ceiling(T/tp)"]
    assert [entry["received"] for entry in gathers] == [8 * 2 * 3 * 16]
    assert {"node", "op", "axes", "dim", "shape", "dtype", "layer", "cause", "window"} <= (
        gathers[0].keys()
    )
    for by in ("op", "axis", "layer", "module"):
        assert sum(total["received"] for total in program["totals"][by]) == program["bytes"]


def write_ranks(folder: Path, run: str, changed: int) -> None:
    """Three ranks' run directories, one of which has two collectives the other way round."""
    for rank in range(4):
        shutil.copytree(run, folder / f"rank_{rank}")
    index_path = folder / f"rank_{changed}" / "index.json"
    index = json.loads(index_path.read_text(encoding="utf-8"))
    entry = index["programs"][1]["stages"][-1]["json"]
    path = index_path.parent / entry["file"]
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    first, second = [n for n in data["nodes"] if "collective" in n][2:4]
    places = [data["nodes"].index(node) for node in (first, second)]
    data["nodes"][places[0]], data["nodes"][places[1]] = second, first
    path.write_text(json.dumps(data), encoding="utf-8")
    entry["sha256"] = checksum(path.read_bytes())
    index_path.write_text(json.dumps(index), encoding="utf-8")


def test_ranks_that_differ(capsys: pytest.CaptureFixture[str], run: str, tmp_path: Path) -> None:
    write_ranks(tmp_path, run, changed=3)
    code, out, _ = ledger(capsys, str(tmp_path), "--by", "op")
    assert code == 1
    *_, last = out.split("\n\n")
    nodes = recorded_run("hf:llama", "pd_mixed").program("decode").stage().nodes.values()
    moved = [(node, node.collective) for node in nodes if node.collective is not None]
    said = [
        f"{c['op']} tp dim {c['dim']} of f32{c['shape']} (%{node.name}, {node.module})"
        for node, c in moved[2:4]
    ]
    assert said[0] != said[1]
    assert last.splitlines() == [
        "pd_mixed/decode, collective 2: the ranks differ",
        *[f"  rank {rank}: {text}" for rank, text in enumerate([said[0]] * 3 + [said[1]])],
    ]
    code, out, _ = ledger(capsys, str(tmp_path), "--json")
    found = json.loads(out)
    assert code == 1
    assert found["ok"] is False
    assert found["order"]["ranks"] == [0, 1, 2, 3]
    assert found["order"]["divergences"][0]["position"] == 2


def test_bad_input(capsys: pytest.CaptureFixture[str], run: str, tmp_path: Path) -> None:
    for arguments, code, said in (
        ((str(tmp_path),), "RM035", "index.json"),
        ((run, "--program", "decod"), "RM018", "there is no program 'decod'"),
        ((run, "--stage", "propagate"), "RM018", "name partition or a later stage"),
    ):
        exit_code, out, err = ledger(capsys, *arguments)
        assert (exit_code, out) == (3, "")
        assert err.startswith(f"[{code}]")
        assert said in err
