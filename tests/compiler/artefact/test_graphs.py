"""GE graphs in an artefact: what one process converted, others load, and never trust blindly."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist
from tests.compiler.artefact.small import Model, assert_same, call, lowered

import rolemesh
from rolemesh.compiler.artefact import folder
from rolemesh.compiler.artefact import graphs as graphs_module
from rolemesh.compiler.artefact.folder import read_folder
from rolemesh.compiler.artefact.load import ArtefactWarning
from rolemesh.compiler.debug.show.artefact import summarise_artefact
from rolemesh.lowering.ge import cached
from rolemesh.lowering.ge import target as ge_target
from rolemesh.runtime.launch import run_processes


def conversions(action: Callable[[], object]) -> int:
    """How many graphs torchair converts meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        convert, made = ge_target.convert, []
        patch.setattr(ge_target, "convert", lambda *args: made.append(args) or convert(*args))
        action()
    return len(made)


def loads(path: Path, **options: object) -> int:
    """How many graphs are converted to load an artefact, whose program is right."""
    return conversions(
        lambda: assert_same(
            call().of(rolemesh.load(path, Model(), **options)),  # type: ignore[arg-type]
            call().of(Model()),
        )
    )


def the_graph(path: Path) -> Path:
    (file,) = (path / "program" / "ge").iterdir()
    return file


def the_warning(path: Path) -> str:
    """The one warning of a load that converts the graph."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert loads(path) == 1
    (found,) = (w for w in caught if issubclass(w.category, RuntimeWarning))
    return str(found.message)


@pytest.fixture
def path(tmp_path: Path, one_rank: None) -> Path:
    """An artefact with the graph of the only rank."""
    rolemesh.save(lowered(ranks=1, target="ge").compile(), tmp_path / "artefact")
    return tmp_path / "artefact"


def test_what_was_compiled_is_loaded(path):
    assert the_graph(path).name.startswith("Model.rank0.")
    assert the_graph(path).stat().st_mode & 0o777 == 0o600
    assert loads(path) == 0
    assert summarise_artefact(read_folder(path)).programs[0].graphs == 1


@pytest.mark.usefixtures("one_rank")
def test_what_was_not_compiled_is_converted_at_the_first_load(tmp_path):
    path = tmp_path / "artefact"
    rolemesh.save(lowered(ranks=1, target="ge"), path)
    assert [entry.name for entry in path.iterdir() if entry.is_dir()] == ["program"]
    assert not (path / "program" / "ge").exists()
    assert [loads(path), loads(path)] == [1, 0]


def test_graphs_stay_with_their_artefact(path, tmp_path):
    before = the_graph(path).read_bytes()
    rolemesh.save(lowered(ranks=1, target="ge"), path)  # the same
    assert the_graph(path).read_bytes() == before
    rolemesh.save(rolemesh.load(path, Model()).programs, tmp_path / "copy")
    assert the_graph(tmp_path / "copy").read_bytes() == before
    assert (tmp_path / "copy/index.json").read_bytes() == (path / "index.json").read_bytes()
    rolemesh.save(lowered(ranks=1, target="ge", fuse=False), path)
    assert not (path / "program" / "ge").exists()


def test_graphs_of_ranks_that_save_at_the_same_time_stay(path, monkeypatch):
    before, same, answers = the_graph(path), folder._equals, [False]
    monkeypatch.setattr(folder, "_equals", lambda *of: answers.pop() if answers else same(*of))
    rolemesh.save(lowered(ranks=1, target="ge"), path)  # the other rank's was not there yet
    assert not answers
    assert the_graph(path) == before


def test_a_damaged_graph_is_converted_again(path):
    before = the_graph(path).read_bytes()
    damaged = bytearray(before)
    damaged[len(damaged) // 2] ^= 1
    the_graph(path).write_bytes(damaged)
    with pytest.warns(RuntimeWarning, match="is not used, and converted again"):
        assert loads(path) == 1
    assert the_graph(path).read_bytes() == before
    assert loads(path) == 0


def test_a_graph_for_other_options_is_not_used(path):
    before = the_graph(path)
    content = before.read_bytes()
    rolemesh.save(lowered(ranks=1, target="ge", frozen_parameters=False), path)
    assert loads(path) == 1
    after = the_graph(path)
    assert after.name != before.name
    after.write_bytes(content)
    with pytest.warns(RuntimeWarning, match="was made for another graph"):
        assert loads(path) == 1


def test_a_graph_of_another_torchair_is_not_used(path, monkeypatch):
    load = ge_target.load_torchair
    monkeypatch.setattr(ge_target, "load_torchair", lambda d: replace(load(d), version="0"))
    assert [loads(path), loads(path)] == [1, 0]
    assert len(graphs_module.graph_files(path, "program")) == 2


def test_a_folder_that_cannot_be_written_to_costs_the_conversion(path, monkeypatch, tmp_path):
    the_graph(path).unlink()

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(cached, "write_whole", refuse)
        assert "is not kept in" in the_warning(path)
        compiled = lowered(ranks=1, target="ge").compile()
        with pytest.warns(RuntimeWarning, match=r"graphs are not kept in .*PermissionError"):
            rolemesh.save(compiled, tmp_path / "other")
    assert [loads(path), loads(path)] == [1, 0]


def test_graphs_of_another_user_are_not_run(path, monkeypatch):
    before = the_graph(path).stat()
    monkeypatch.setattr(os, "getuid", lambda: before.st_uid + 1)
    assert "they belong to another user" in the_warning(path)
    assert the_graph(path).stat() == before


@pytest.mark.usefixtures("one_rank")
def test_a_folder_that_the_options_name_comes_first(tmp_path):
    path, cache = tmp_path / "artefact", str(tmp_path / "cache")
    rolemesh.save(lowered(ranks=1, target="ge", cache=cache), path)
    assert [loads(path), loads(path)] == [1, 0]
    assert not (path / "program" / "ge").exists()


@pytest.mark.usefixtures("one_rank")
def test_what_is_made_anew_keeps_its_graphs(tmp_path):
    path, program = tmp_path / "artefact", lowered(ranks=1, target="ge")
    with pytest.warns(ArtefactWarning):
        assert loads(path, recompile=lambda: program) == 1
    assert loads(path) == 0


def loads_on_ranks(place: str) -> list[int]:
    """How many graphs a rank converts: for all ranks' graphs, and for a folder of rank 0."""
    path = Path(place, "artefact")
    own = path if dist.get_rank() == 0 else Path(place, "nothing")
    counts = [loads(path), loads(own, broadcast=True)]
    assert not Path(place, "nothing").exists()
    return counts


@pytest.mark.processes
@pytest.mark.parametrize("symbolic", [False, True])
def test_one_process_makes_the_graphs_of_all_ranks(symbolic, tmp_path):
    program = lowered(symbolic=symbolic, target="ge")
    assert conversions(lambda: rolemesh.save(program.lockstep(), tmp_path / "artefact")) == 2
    names = graphs_module.graph_files(tmp_path / "artefact", "program")
    assert [name.split(".")[1] for name in names] == ["rank0", "rank1"]
    found = run_processes(f"{__file__}:loads_on_ranks", 2, (str(tmp_path),), timeout=120, fork=True)
    assert found == [[0, 0], [0, 1]]
