"""The ledger against real process groups: number, order, op and bytes, on every rank."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")

import torch
import torch.distributed as dist

from rolemesh.compiler.api import Compiled, lower, shard
from rolemesh.compiler.capture.entry import Captured
from rolemesh.compiler.capture.tracing import Traced, trace
from rolemesh.compiler.cli import main as cli
from rolemesh.compiler.command.check_options import CheckOptions
from rolemesh.compiler.debug.ledger.ledger import Entry, ledger_of
from rolemesh.compiler.dump.reader import open_run
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.models.cases import Case
from rolemesh.runtime.launch import run_processes
from rolemesh.runtime.store import default_store
from rolemesh.runtime.traffic import Record, record_traffic

pytestmark = pytest.mark.processes

Issued = dict[str, list[Record]]


def worker(case: Case, traces: dict[str, Traced], options: CheckOptions, folder: str) -> Issued:
    """One rank: it writes its run directory, runs each phase, and says what its groups did."""
    assert dist.get_world_size() == options.mesh.size
    found = {}
    with torch.no_grad():
        for phase, traced in traces.items():
            sharded = shard(traced, options.mesh, options.role, phase=phase, dump=folder)
            found[phase] = issued(lower(sharded).compile(), *case.phases[phase])
    return found


def issued(compiled: Compiled, args: tuple[object, ...], kwargs: dict[str, object]) -> list[Record]:
    """What this rank's groups do in one call."""
    records: list[Record] = []

    def run(captured: Captured, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        program = compiled.programs.at(captured.program.values(inputs))
        with record_traffic() as found:
            outputs = program(inputs, default_store())
        records.extend(found)
        return outputs

    compiled.sharded.traced.entry.call(run, *args, **kwargs)
    return records


def expected(entry: Entry, rank: int, mesh: Mesh) -> Record:
    """What an entry over one axis says that a rank's groups do."""
    (axis,) = entry.axes
    owns = entry.owner == mesh.coordinate(rank)[mesh.index(axis)]
    return Record(entry.op, 0 if owns else entry.received, mesh.axis_size(axis))


@pytest.mark.parametrize(
    ("model", "role", "mesh"),
    [
        ("hf:deepseek_v32", "prefill", "tp=4"),  # broadcasts ahead of use, from every rank
        ("hf:llama", "pd_mixed", "tp=3"),  # two phases, uneven
    ],
)
def test_the_ledger_is_what_the_process_groups_did(
    model: str, role: str, mesh: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = CheckOptions(model, role, Mesh.parse(mesh), layers=2)
    case = options.load()
    phases = ("prefill",) if role == "prefill" else ("prefill", "decode")
    with torch.no_grad():
        traces = {}
        for phase in phases:
            args, kwargs = case.phases[phase]
            traces[phase] = trace(case.model, *args, **kwargs)
    ranks = run_processes(
        worker, options.mesh.size, (case, traces, options, str(tmp_path)), fork=True
    )
    for rank, moved in enumerate(ranks):
        assert isinstance(moved, dict)
        run = open_run(tmp_path, rank)
        assert [program.phase for program in run.programs] == [*moved] == [*phases]
        for phase, records in moved.items():
            entries = ledger_of(run.program(phase).stage()).entries
            assert records == [expected(entry, rank, options.mesh) for entry in entries]
            assert len({record.op for record in records}) >= 3
    # What the same processes wrote agrees, rank by rank.
    folder = str(tmp_path)
    assert cli.main(["ledger", folder, "--by", "op"]) == 0
    size = options.mesh.size
    out = capsys.readouterr().out
    assert out.endswith(f"{size} ranks issue the same collectives in the same order\n")
    assert cli.main(["diff", folder, "--rank", "0", "--to-rank", str(size - 1)]) == 0
    stages = sum(len(program.stage_names) for program in open_run(tmp_path, 0).programs)
    assert capsys.readouterr().out == f"no difference in {stages} of {stages} stages\n"
