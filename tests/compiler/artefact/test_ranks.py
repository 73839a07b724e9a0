"""Ranks as processes: one saves, all load; they agree, and compile again together."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tests.compiler.artefact.small import Model, assert_same, call, lowered

import rolemesh
from rolemesh.compiler.artefact.load import ArtefactWarning, open_artefact
from rolemesh.compiler.ir.errors import RolemeshError
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
        program = rolemesh.load(
            Path(folder, "three"),
            Model(),
            recompile=lambda: open_artefact(Path(folder, "two"), Model()),
        )
    said.append(" ".join(w.category.__name__ for w in caught))
    assert_same(call().of(program), want)
    dist.barrier()
    assert_same(call().of(rolemesh.load(Path(folder, "three"), Model())), want)
    assert not torch._dynamo.utils.counters, "Dynamo and AOTAutograd have seen nothing"
    return said


def test_ranks_load_together(tmp_path):
    rolemesh.save(lowered(), tmp_path / "rank_0" / "artefact")
    rolemesh.save(lowered(), tmp_path / "two")
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
