"""`rolemesh explain`: arguments, exit codes, and the JSON."""

from __future__ import annotations

import json
import re

import pytest
from tests.compiler.recorded import record

from rolemesh.compiler.cli import main as cli

pytestmark = pytest.mark.xdist_group("recorded")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    folder, _ = record("hf:deepseek_v32", "pd_mixed")
    code = cli.main(["explain", str(folder), *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_collective(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "all_to_all", "--program", "decode")
    assert (code, err) == (0, "")
    assert out.startswith("%all_to_all = mesh.all_to_all(%")
    assert "on tp: dim 0 split -> dim 1 split" in out
    assert "attention output: split by heads of the input features" in out
    assert "model.layers.0.self_attn.o_proj   modeling_deepseek_v32.py:" in out


def test_colour(capsys: pytest.CaptureFixture[str]) -> None:
    _, plain, _ = run(capsys, "mm_7", "--program", "decode", "--color", "never")
    _, coloured, _ = run(capsys, "mm_7", "--program", "decode", "--color", "always")
    assert "\x1b" not in plain
    assert "\x1b[36m+sum(tp)\x1b[0m" in coloured
    assert re.sub(r"\x1b\[\d*m", "", coloured) == plain


def test_one_stage_is_not_enough(capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = record("hf:deepseek_v32", "pd_mixed")
    (stage,) = folder.glob("pd_mixed/decode/*_push_back.json")
    code = cli.main(["explain", str(stage), "mm_7"])
    captured = capsys.readouterr()
    assert (code, captured.out) == (3, "")
    assert "[RM018] pd_mixed.decode has no stage propagate" in captured.err
    assert "name a whole run directory" in captured.err


def test_all_writes_every_decision(capsys: pytest.CaptureFixture[str]) -> None:
    _, some, _ = run(capsys, "all_to_all", "--program", "decode")
    _, every, _ = run(capsys, "all_to_all", "--program", "decode", "--all")
    assert every.count("      rule  ") > 10 > some.count("      rule  ")


def test_json_has_the_whole_chain(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "mm_7", "--program", "decode", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["schema_version"] == 1
    assert found["program"] == "pd_mixed/decode"
    assert found["module"] == "model.layers.0.self_attn.o_proj"
    assert found["source"].startswith("modeling_deepseek_v32.py:")
    assert found["move"] is None
    (chain,) = found["layout"]
    first, *_, last = chain["links"]
    assert first["placement"] == {"partial": "sum"}
    decision = first["decision"]
    assert decision["rule"].startswith("([i, j], [j, k])->([i, k])")
    assert decision["reason"].startswith("follows o_proj.weight; following")
    follows = [entry["follows"] for entry in decision["alternatives"]]
    assert follows == ["operand 1", "operand 0", ""]
    assert [operand["needs"] for operand in decision["operands"]] == [
        {"shard": [1, 1, 16]},
        {"shard": [0, 1, 16]},
    ]
    assert last["how"] == "seed"
    assert last["name"] == "model.layers.0.self_attn.o_proj.weight"


def test_json_of_a_collective(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "all_to_all", "--program", "decode", "--json")
    found = json.loads(out)
    assert found["layout"] == []
    move = found["move"]
    assert move["value"] == found["expression"].removeprefix("mesh.all_to_all(%").rstrip(")")
    (step,) = move["steps"]
    # One token of each of two prompts, padded to a rank each; K = 256 of 4 bytes; 3/4 of it.
    assert step["collective"]["bytes"] == 3 * 256 // 4 * 4
    assert "tp" in step["collective"]["formula"]
    assert move["sizes"]["tp"] == 4
    (side,) = move["sides"]
    assert (side["before"], side["after"]) == ({"shard": [0, 1, 2]}, {"shard": [1, 1, 16]})


def test_one_axis(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "mm_7", "--program", "decode", "--axis", "tp")
    assert "why a pending sum on tp" in out
    code, out, err = run(capsys, "mm_7", "--program", "decode", "--axis", "dp")
    assert (code, out) == (3, "")
    assert "[RM002] the mesh has no axis 'dp'" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mm_7"], "[RM018] 2 programs fit"),
        (["mm_*", "--program", "decode"], "nodes fit 'mm_*'"),
        (["all_to_al", "--program", "decode"], "did you mean 'all_to_all"),
        (["mm_7", "--program", "decod"], "did you mean 'decode'"),
    ],
)
def test_bad_input_is_3(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (3, "")
    assert message in err


def test_usage_is_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run(capsys)
    assert stop.value.code == 2
    assert "required: NODE" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        run(capsys, "mm_7", "--axes", "tp")
    assert stop.value.code == 2
    assert "did you mean --axis?" in capsys.readouterr().err


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["explain", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "examples:\n  rolemesh explain run " in text
    assert "exit codes:" in text
