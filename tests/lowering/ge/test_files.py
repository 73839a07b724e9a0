"""Files of converted graphs: stable, whole, and the graph that runs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.lowering.ge.small_graphs import (
    RANKS,
    SIGNATURE,
    sharded_mlp,
    step,
    step_graph,
    step_inputs,
)

from rolemesh.compiler.api import lower
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.lowering.ge import files
from rolemesh.lowering.ge.files import read_text, safe_name
from rolemesh.lowering.ge.options import GeOptions
from rolemesh.lowering.ge.target import lower_ge
from rolemesh.runtime.ge.executor import Executor
from rolemesh.runtime.ge.graph import Graph
from rolemesh.runtime.ge.ops.all import OPS
from rolemesh.runtime.ge.parse import parse_graph
from rolemesh.runtime.ge.rendezvous import run_ranks
from rolemesh.runtime.lockstep import scatter_inputs

# Writes all files of a model with collectives; converts another graph first, to move the counters.
SCRIPT = """
import sys, warnings
warnings.simplefilter("ignore")
from rolemesh.compiler.api import lower
from rolemesh.lowering.ge.target import lower_ge
from tests.lowering.ge.small_graphs import SIGNATURE, sharded_mlp, step_graph, step_inputs
lower_ge(step_graph(), step_inputs(), SIGNATURE)
lower(sharded_mlp()[0], "ge", {"dump": sys.argv[1], "export": sys.argv[1]}).lockstep()
"""


def written(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def of_air(path: Path) -> bytes:
    return path.read_bytes()


FORMS = [(".pbtxt", read_text), (".air", of_air)]


def mlp_files(folder: Path) -> dict[str, bytes]:
    lower(sharded_mlp()[0], "ge", {"dump": str(folder), "export": str(folder)}).lockstep()
    return written(folder)


def test_each_rank_has_its_files_and_nothing_else_is_left(tmp_path: Path) -> None:
    found = mlp_files(tmp_path / "made" / "here")
    forms = ("air", "pbtxt", "txt")
    names = [f"Mlp.rank{rank}.{form}" for rank in range(RANKS) for form in forms]
    assert sorted(found) == names
    assert all(found.values())
    # Ranks differ in where their chunk begins, and in nothing that a group is called.
    assert found["Mlp.rank0.pbtxt"] != found["Mlp.rank2.pbtxt"]
    for rank in range(RANKS):
        assert b"rank_list=0,1,2" in found[f"Mlp.rank{rank}.air"]


def test_two_runs_and_two_processes_write_the_same_bytes(tmp_path: Path) -> None:
    first = mlp_files(tmp_path / "first")
    assert mlp_files(tmp_path / "second") == first
    other = tmp_path / "other"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(other)],
        env={**os.environ, "PYTHONHASHSEED": "3", "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert written(other) == first


@pytest.mark.parametrize(("form", "read"), FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_read_back_computes_the_same(
    tmp_path: Path, form: str, read: Callable[[Path], bytes], dtype: torch.dtype
) -> None:
    options = GeOptions(dump=str(tmp_path), export=str(tmp_path))
    inputs = step_inputs(dtype)
    lower_ge(step_graph(), inputs, SIGNATURE, options)
    graph = parse_graph(read(tmp_path / f"{SIGNATURE.name}{form}"))
    want = step(inputs)
    results = Executor(graph, OPS).run(inputs)
    torch.testing.assert_close(results[0], want[1])
    torch.testing.assert_close(inputs[2], want[0])  # the cache, written in place


@pytest.mark.parametrize(("form", "read"), FORMS)
def test_files_of_all_ranks_compute_what_the_model_does(
    tmp_path: Path, form: str, read: Callable[[Path], bytes]
) -> None:
    mlp_files(tmp_path)
    sharded, model = sharded_mlp()
    graphs = [parse_graph(read(tmp_path / f"Mlp.rank{rank}{form}")) for rank in range(RANKS)]
    x = torch.arange(30.0).reshape(5, 6) / 7 - 2
    by_name = {**dict(model.named_parameters()), **dict(model.named_buffers()), "x": x}
    program = sharded.program
    locals_ = scatter_inputs(program, [by_name[entry.name] for entry in program.inputs])
    results = run_ranks(
        RANKS,
        lambda rank, communicator: Executor(graphs[rank], OPS, communicator).run(
            [of_ranks[rank] for of_ranks in locals_]
        ),
    )
    want = model(x)
    for of_rank in results:
        torch.testing.assert_close(of_rank[0], want)


def test_an_offline_model_keeps_what_the_graph_updates(tmp_path: Path) -> None:
    lower_ge(step_graph(), step_inputs(), SIGNATURE, GeOptions(export=str(tmp_path)))
    graph = parse_graph((tmp_path / f"{SIGNATURE.name}.air").read_bytes())
    assert [node.type for node in graph.data] == ["Data", "Data", "RefData", "Data"]


def test_writing_files_does_not_change_what_runs(tmp_path: Path) -> None:
    plain = lower_ge(step_graph(), step_inputs(), SIGNATURE)
    options = GeOptions(dump=str(tmp_path), export=str(tmp_path))
    filed = lower_ge(step_graph(), step_inputs(), SIGNATURE, options)
    models = [run.compiled.runner.graph.model for run in (plain, filed)]  # type: ignore[attr-defined]
    for model in models:
        model.graph[0].name = ""
    assert models[0] == models[1]


def test_the_text_says_what_torchairs_own_dump_says(tmp_path: Path) -> None:
    """torchair's dump is the form that viewers know; only the order of attributes is ours."""
    run = lower_ge(step_graph(), step_inputs(), SIGNATURE, GeOptions(dump=str(tmp_path)))
    theirs = tmp_path / "theirs.pbtxt"
    run.compiled.runner.dump(str(theirs))  # type: ignore[attr-defined]
    ours = tmp_path / f"{SIGNATURE.name}.pbtxt"
    assert "node {" in theirs.read_text()
    assert _nodes(read_text(ours)) == _nodes(read_text(theirs))


def _nodes(model: bytes) -> object:
    from torchair._ge_concrete_graph.ge_ir_pb2 import ModelDef

    return list(ModelDef.FromString(model).graph[0].op)


def test_control_edges_and_unfed_inputs_survive_the_text(tmp_path: Path) -> None:
    run = lower_ge(step_graph(), step_inputs(), SIGNATURE)
    model = run.compiled.runner.graph.model  # type: ignore[attr-defined]
    relu = next(op for op in model.graph[0].op if op.type == "Relu")
    relu.input.append("MatMul:-1")
    relu.input.append("")
    relu.input_desc.add(name="unfed")
    path = tmp_path / "edges.pbtxt"
    path.write_text(files._text(model.graph[0]))
    again: Graph = parse_graph(read_text(path))
    node = again.nodes[relu.name]
    assert node.controls == ("MatMul",)
    assert node.inputs[-1] is None
    assert [desc.name for desc in node.input_descs] == ["x", "unfed"]


@pytest.mark.parametrize("option", ["dump", "export"])
def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path, option: str) -> None:
    occupied = tmp_path / "file"
    occupied.write_text("a file, not a folder")
    with pytest.raises(RolemeshError) as caught:
        lower_ge(step_graph(), step_inputs(), SIGNATURE, GeOptions(**{option: str(occupied)}))
    error = caught.value
    assert error.code == "RM018"
    assert error.what == f"option {option!r} of target 'ge': cannot write to {str(occupied)!r}"
    assert "file" in error.why
    assert error.fix == "name a folder that this process can make, or write to"


@pytest.mark.parametrize(
    "text", ["node {", "graph { }", "node { attr { key: 'a' value { s: '{' } } }"]
)
def test_text_of_something_else_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.pbtxt"
    path.write_text(text)
    with pytest.raises(RolemeshError, match=r"\[RM027\] a file is no GE graph as text") as caught:
        read_text(path)
    assert caught.value.where == str(path)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.pbtxt"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RolemeshError, match="RM027"):
        read_text(path)


@pytest.mark.parametrize(
    ("name", "safe"),
    [("pd_mixed.decode.rank0", "pd_mixed.decode.rank0"), ("a/b c", "a_b_c"), ("..", "_")],
)
def test_a_name_is_no_path(name: str, safe: str) -> None:
    assert safe_name(name) == safe
