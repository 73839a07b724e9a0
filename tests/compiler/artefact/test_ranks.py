"""Ranks as processes: one saves, all load; they agree, and compile again together."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tests.compiler.artefact.small import Model, assert_same, call, lowered

import rolemesh
from rolemesh.compiler.artefact.load import ArtefactWarning
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.runtime import rank as rank_module
from rolemesh.runtime.launch import run_processes
from rolemesh.runtime.store import gather

pytestmark = pytest.mark.processes


def loads(folder: str) -> list[str]:
    """What each way of loading gave, on one rank."""
    rank, said = dist.get_rank(), []
    own = Path(folder, f"rank_{rank}", "artefact")
    mine, other = call(), call()
    want = other.of(Model())
    program = rolemesh.load(own, Model(), broadcast=True)  # only rank 0 has it
    assert_same(mine.of(program), want)
    torch.testing.assert_close(gather(mine.state.cache), other.state.cache)
    assert not own.parent.exists() or rank == 0
    for path, how in (
        (Path(folder, "three"), {}),  # for three ranks
        (own, {}),  # rank 1 has none
        (Path(folder, "nothing"), {"broadcast": True}),
    ):
        try:
            rolemesh.load(path, Model(), **how)
        except RolemeshError as error:
            said.append(f"{error.code} {error.where} {error.why}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        program = rolemesh.load(Path(folder, "three"), Model(), recompile=lowered)
    said.append(" ".join(w.category.__name__ for w in caught))
    assert_same(call().of(program), want)
    dist.barrier()
    assert_same(call().of(rolemesh.load(Path(folder, "three"), Model())), want)
    return said


def test_ranks_load_together(tmp_path):
    rolemesh.save(lowered(), tmp_path / "rank_0" / "artefact")
    rolemesh.save(lowered(ranks=3), tmp_path / "three")
    first, second = run_processes(loads, 2, (str(tmp_path),), timeout=120)
    for said in (first, second):
        assert said[0].startswith("RM043 ranks: 3 in the artefact, 2 here")
        assert said[3] == ArtefactWarning.__name__
    for found, text in (
        (first[1], "rank 1 cannot use it"),
        (second[1], "No such file"),
        (first[2], "No such file"),
        (second[2], "rank 0 could not read it"),
    ):
        assert found.startswith("RM042")
        assert text in found


def inductor(folder: str) -> tuple[int, int]:
    """How often one rank bound a graph, to compile a program and then to load it."""
    os.environ.update(ROLEMESH_CACHE="1", ROLEMESH_CACHE_DIR=str(Path(folder, "cache")))
    bind, bound = rank_module.bind, []
    rank_module.bind = lambda *args, **more: bound.append(args) or bind(*args, **more)  # type: ignore[attr-defined]
    program = lowered(ranks=1, target="inductor").compile()
    rolemesh.save(program, Path(folder, "artefact"))
    compiled = len(bound)
    loaded = rolemesh.load(Path(folder, "artefact"), Model())
    assert_same(call().of(loaded), call().of(Model()))
    return compiled, len(bound) - compiled


def test_code_of_inductor_is_found_again(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    (found,) = run_processes(inductor, 1, (str(tmp_path),), timeout=200)
    assert found == (1, 0)
