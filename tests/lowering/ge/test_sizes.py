"""GE graphs of programs with symbolic sizes: how many there are, and what is kept or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.lowering.ge.symbolic_mixer import Mixer, mixer_input, sharded_mixer

from rolemesh.compiler.api import LoweredRanks, lower
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.lowering.ge import target as ge_target

RANKS = 2


def check(run: LoweredRanks, model: Mixer, batch: int, tokens: int) -> None:
    x = mixer_input(batch, tokens)
    for got, want in zip(run(x, poison=True), model(x), strict=True):  # type: ignore[call-overload]
        torch.testing.assert_close(got, want)


def test_one_graph_serves_all_sizes_and_one_more_those_of_one_token_a_rank() -> None:
    sharded, model = sharded_mixer(RANKS)
    run = lower(sharded, "ge").lockstep()
    for batch, tokens in ((2, 13), (3, 6), (5, 7), (13, 13), (4, 31), (2, 4)):
        check(run, model, batch, tokens)
    assert len(run.programs) == 1
    for batch, tokens in ((4, 2), (5, 8)):
        check(run, model, batch, tokens)
    assert len(run.programs) == 2
    program = run.programs.at(sharded.program.hints)
    batch, tokens = sharded.program.hints
    for value in range(2, 200):  # sizes of weights, such as 6 and 10, are nothing special
        for other in (2, 6, value):
            assert program.serves({batch: value, tokens: other}) == (other > RANKS)
            assert program.serves({batch: other, tokens: value}) == (value > RANKS)


def test_a_symbol_that_no_input_has_as_a_size_is_an_input_of_the_graph(tmp_path: Path) -> None:
    for folder, split in (("split", True), ("whole", False)):
        sharded, _ = sharded_mixer(2, split=split)
        lower(sharded, "ge", {"dump": str(tmp_path / folder)}).lockstep()
        (path,) = (tmp_path / folder).glob("*rank0.pbtxt")
        inputs = path.read_text(encoding="utf-8").count('op: "Data"')
        assert inputs == (4 if split else 3)  # torchair drops a symbol that it reads off a tensor


def test_graphs_are_exported_with_the_symbols_as_inputs(tmp_path: Path) -> None:
    contents = []
    for tokens in (13, 11):
        folder = tmp_path / str(tokens)
        sharded, _ = sharded_mixer(2, tokens=tokens)
        lower(sharded, "ge", {"export": str(folder), "dump": str(folder)}).lockstep()
        assert len(list(folder.glob("*.air"))) == 2
        contents.append([path.read_bytes() for path in sorted(folder.iterdir())])
    assert contents[0] == contents[1]  # nothing of the example is in the graph


def test_compiled_graphs_are_kept_with_what_they_rely_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_all() -> list[int]:
        counts = []
        for tokens in (13, 11):  # another example, the same graph
            sharded, model = sharded_mixer(2, tokens=tokens)
            run = lower(sharded, "ge", {"cache": str(tmp_path)}).lockstep()
            for other in (5, 2, 8):
                check(run, model, 3, other)
            counts.append(len(run.programs))
        return counts

    assert run_all() == [2, 2]
    assert len(list(tmp_path.iterdir())) == 2 * 2  # by rank, and by chunks of one token or more

    def fail(*_: object, **__: object) -> object:
        raise AssertionError("the graph is converted again")

    monkeypatch.setattr(ge_target, "prepare", fail)
    assert run_all() == [2, 2]


def test_gears_go_with_sizes_of_inputs() -> None:
    sharded, model = sharded_mixer(2, split=False)
    gears = {"x": {0: [2, 3], 1: [13, 6]}}
    run = lower(sharded, "ge", {"dim_gears": gears}).lockstep()
    check(run, model, 3, 6)
    with pytest.raises(RolemeshError, match="sizes 3, 13 are no gear of the graph"):
        check(run, model, 3, 13)


def test_gears_are_refused_where_a_symbol_is_no_size_of_an_input() -> None:
    sharded, _ = sharded_mixer(2)
    with pytest.raises(RolemeshError) as caught:
        lower(sharded, "ge", {"dim_gears": {"x": {0: [2, 3], 1: [7, 3]}}}).lockstep()
    error = caught.value
    assert error.code == "RM018"
    assert error.what.startswith("option 'dim_gears' of target 'ge' does not fit graph 'Mixer")
    assert error.why == (
        "sizes depend on s1, which is the size of no input of this rank: GE would get it as a "
        "value, and gears are of sizes"
    )
