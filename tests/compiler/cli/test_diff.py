"""`rolemesh diff`: what is compared with what, exit codes, text and JSON."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from tests.compiler.recorded import record

from rolemesh.compiler.cli import main as cli

pytestmark = pytest.mark.xdist_group("recorded")

Ran = tuple[int, str, str]


@pytest.fixture
def run() -> str:
    return str(record("hf:llama", "pd_mixed")[0])


def diff(capsys: pytest.CaptureFixture[str], *arguments: str) -> Ran:
    code = cli.main(["diff", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_run_and_itself(capsys: pytest.CaptureFixture[str], run: str) -> None:
    assert diff(capsys, run, run) == (0, "no difference in 26 of 26 stages\n", "")
    code, out, _ = diff(capsys, run, run, "--json", "--program", "decode")
    found = json.loads(out)
    assert code == 0
    assert found["schema_version"] == 1
    assert found["equal"] is True
    assert [entry["after"]["stage"] for entry in found["comparisons"]][:2] == [
        "capture", "canonicalise",
    ]  # fmt: skip
    assert all(not entry["changes"] for entry in found["comparisons"])


def test_a_pass_and_itself(capsys: pytest.CaptureFixture[str], run: str) -> None:
    code, out, _ = diff(capsys, run, run, "--program", "decode", "--stage", "seed")
    assert code == 0
    assert out.startswith("no difference: ")


def test_two_passes(capsys: pytest.CaptureFixture[str], run: str) -> None:
    code, out, _ = diff(
        capsys, run, "--program", "decode", "--stage", "push_back", "--to-stage", "partition"
    )
    assert code == 1
    assert out.startswith("pd_mixed/decode push_back -> pd_mixed/decode partition\n")
    assert "mesh.all_gather" in out
    assert "\x1b" not in out


def test_two_phases(capsys: pytest.CaptureFixture[str], run: str) -> None:
    code, out, _ = diff(
        capsys, run, "--program", "prefill", "--to-program", "decode", "--color", "always"
    )
    assert code == 1
    assert "\x1b[1mpd_mixed/prefill verify -> pd_mixed/decode verify\x1b[0m" in out
    assert "B=2 T=13 -> B=2 T=1: so " in out
    code, full, _ = diff(capsys, run, "--program", "prefill", "--to-program", "decode", "--full")
    assert code == 1
    assert full.count("\n") > 2 * out.count("\n")


def test_two_roles(capsys: pytest.CaptureFixture[str], run: str) -> None:
    other = str(record("hf:deepseek_v32", "prefill")[0])
    code, out, _ = diff(capsys, run, other, "--program", "prefill", "--to-program", "prefill")
    assert code == 1
    names = [Path(path).name for path in (run, other)]
    assert out.startswith(
        f"{names[0]}: pd_mixed/prefill verify -> {names[1]}: prefill/prefill verify\n"
    )
    code, out, _ = diff(capsys, run, other)
    assert code == 1
    assert f"only in {run}: pd_mixed/decode\n" in out
    assert f"only in {other}: prefill/prefill\n" in out


def test_a_stage_that_only_one_run_has(
    capsys: pytest.CaptureFixture[str], run: str, tmp_path: Path
) -> None:
    index = json.loads((Path(run) / "index.json").read_text(encoding="utf-8"))
    index["programs"] = index["programs"][1:]
    stages = index["programs"][0]["stages"]
    del stages[[stage["pass"] for stage in stages].index("prefetch")]
    (tmp_path / "pd_mixed").symlink_to(Path(run) / "pd_mixed")
    (tmp_path / "index.json").write_text(json.dumps(index), encoding="utf-8")
    code, out, _ = diff(capsys, run, str(tmp_path), "--program", "decode")
    assert code == 1
    assert out == (
        f"only in {run}: stage prefetch of pd_mixed/decode\n\nno difference in 12 of 12 stages\n"
    )
    code, out, _ = diff(capsys, run, str(tmp_path), "--json")
    assert json.loads(out)["only_in"] == {
        "pd_mixed/prefill": run,
        "stage prefetch of pd_mixed/decode": run,
    }


def test_ranks(capsys: pytest.CaptureFixture[str], run: str, tmp_path: Path) -> None:
    for rank in (0, 1):
        (tmp_path / f"rank_{rank}").symlink_to(run)
    code, out, _ = diff(capsys, str(tmp_path), "--rank", "0", "--to-rank", "1")
    assert (code, out) == (0, "no difference in 26 of 26 stages\n")
    code, _, err = diff(capsys, str(tmp_path), "--rank", "0", "--to-rank", "2")
    assert code == 3
    assert err.startswith("[RM035]")


def test_a_stage_on_standard_input(
    capsys: pytest.CaptureFixture[str], run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = f"{run}/pd_mixed/decode/006_partition.json"
    monkeypatch.setattr("sys.stdin", io.StringIO(Path(stage).read_text(encoding="utf-8")))
    code, out, _ = diff(capsys, "-", stage)
    assert code == 0, out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run"], "nothing to compare with: name RUN2, --to-rank, --to-program or --to-stage"),
        (["-", "-"], "standard input can be read once: name a file as RUN2"),
        (["run", "--to-stge", "seed"], "did you mean --to-stage?"),
    ],
)
def test_usage(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["diff", *arguments])
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


def test_names_that_do_not_exist(capsys: pytest.CaptureFixture[str], run: str) -> None:
    code, out, err = diff(capsys, run, "--program", "decode", "--to-stage", "sed")
    assert (code, out) == (3, "")
    assert "did you mean 'seed'?" in err
    code, _, err = diff(capsys, run, "--to-stage", "seed")
    assert code == 3
    assert "name one of them with --program" in err
