"""Compiled graphs on disk: found again, run without conversion, and never trusted blindly."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.lowering.ge.small_graphs import (
    SIGNATURE,
    dynamic_fakes,
    sharded_mlp,
    step,
    step_graph,
    step_inputs,
)
from tests.models import forget_compiled
from torch import Tensor, fx, nn

from rolemesh.compiler.api import lower
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.lowering.flatten import as_fake
from rolemesh.lowering.ge import cached
from rolemesh.lowering.ge import target as ge_target
from rolemesh.lowering.ge.cached import entry_of
from rolemesh.lowering.ge.engine import running_on
from rolemesh.lowering.ge.loader import load_torchair
from rolemesh.lowering.ge.options import GeOptions
from rolemesh.lowering.ge.target import lower_ge
from rolemesh.runtime.ge.engine import ReferenceEngine
from rolemesh.runtime.groups import stand_in_groups
from rolemesh.runtime.launch import run_processes
from rolemesh.runtime.store import gather


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def run_step(
    folder: Path, inputs: Sequence[Tensor], examples: Sequence[Tensor] | None = None
) -> tuple[Tensor | None, ...]:
    run = lower_ge(step_graph(), examples or inputs, SIGNATURE, GeOptions(cache=str(folder)))
    with running_on(ReferenceEngine()):
        return run(*inputs)


def check_step(got: Sequence[Tensor | None], want: tuple[Tensor, Tensor]) -> None:
    for found, expected in zip(got, want, strict=True):
        torch.testing.assert_close(found, expected)


def convert_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tracing and conversion fail from here on."""

    def fail(*_: object, **__: object) -> object:
        raise AssertionError("the graph is converted again")

    monkeypatch.setattr(ge_target, "prepare", fail)
    monkeypatch.setattr(ge_target, "convert", fail)
    monkeypatch.setattr(load_torchair("cpu").module, "get_compiler", fail)


def the_file(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_second_time_nothing_is_converted(
    folder: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    want = step(step_inputs(dtype))
    check_step(run_step(folder, step_inputs(dtype)), want)
    convert_nothing(monkeypatch)
    inputs = step_inputs(dtype)
    got = run_step(folder, inputs)
    check_step(got, want)
    assert got[0] is inputs[2]  # the cache is written in place
    other = [inputs[0] * 2, *inputs[1:]]
    want = step(other)
    check_step(run_step(folder, other), want)


def test_a_graph_with_dynamic_dims_is_kept_for_all_sizes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_step(folder, step_inputs(), dynamic_fakes(step_inputs()))
    convert_nothing(monkeypatch)
    for tokens in (5, 2, 6):
        inputs = step_inputs(tokens=tokens)
        want = step(inputs)
        check_step(run_step(folder, inputs, dynamic_fakes(step_inputs())), want)


def test_other_inputs_are_refused_as_without_a_cache(folder: Path) -> None:
    for _ in range(2):
        with pytest.raises(Exception, match="RM029"):
            run_step(folder, step_inputs(tokens=4), step_inputs(tokens=3))


def test_files_are_private_and_stable(folder: Path) -> None:
    run_step(folder, step_inputs())
    path = the_file(folder)
    assert path.name.startswith(f"{SIGNATURE.name}.")
    assert path.stat().st_mode & 0o777 == 0o600
    content = path.read_bytes()
    path.unlink()
    run_step(folder, step_inputs())
    assert the_file(folder).read_bytes() == content


def key(
    graph: fx.GraphModule | None = None,
    inputs: Sequence[Tensor] | None = None,
    signature: object = SIGNATURE,
    version: str = "",
    **options: object,
) -> str:
    torchair = load_torchair("cpu")
    found = entry_of(
        graph or step_graph(),
        as_fake(inputs or step_inputs()),
        signature,  # type: ignore[arg-type]
        GeOptions(cache="somewhere", **options),  # type: ignore[arg-type]
        replace(torchair, version=version or torchair.version),
    )
    assert found is not None
    return found.key


def renamed(name: str) -> fx.GraphModule:
    module = step_graph()
    module.graph.find_nodes(op="placeholder")[0]._rename(name)
    return module


def constant(value: float) -> fx.GraphModule:
    module = step_graph()
    module.register_buffer("scale", torch.tensor([value]))
    with module.graph.inserting_before(module.graph.output_node()):
        node = module.graph.get_attr("scale")
        module.graph.output_node().prepend(node)
    return module


def test_equal_graphs_have_equal_keys() -> None:
    assert key() == key()
    assert key(order_seed=3, dump="a", export="b") == key()  # they do not change what is compiled
    assert key(constant(1.0)) == key(constant(1.0))


@pytest.mark.parametrize(
    "other",
    [
        lambda: key(step_graph(scale=0.25)),
        lambda: key(renamed("y")),
        lambda: key(constant(1.0)),
        lambda: key(inputs=step_inputs(torch.float16)),
        lambda: key(inputs=step_inputs(tokens=4)),
        lambda: key(inputs=[x.mT.contiguous().mT if x.ndim == 2 else x for x in step_inputs()]),
        lambda: key(inputs=dynamic_fakes(step_inputs())),
        lambda: key(signature=replace(SIGNATURE, name="small.decode.rank1")),
        lambda: key(signature=replace(SIGNATURE, inputs=SIGNATURE.inputs[::-1])),
        lambda: key(frozen_parameters=False),
        lambda: key(fuse=False),
        lambda: key(dim_gears={"x": {0: [2, 4]}}),
        lambda: key(version="9.9.9"),
    ],
)
def test_what_changes_the_graph_changes_the_key(other: Callable[[], str]) -> None:
    assert other() != key()


def test_values_of_constants_are_in_the_key() -> None:
    assert key(constant(1.0)) != key(constant(2.0))


def test_the_code_that_lowers_is_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = key()
    monkeypatch.setattr(cached, "_own_sources", lambda: "another version")
    assert key() != before


def test_the_ranks_of_a_group_are_in_the_key() -> None:
    graph = fx.Graph()
    reduce = torch.ops._c10d_functional.all_reduce.default
    graph.output((graph.call_function(reduce, (graph.placeholder("x"), "sum", "0")),))
    module = fx.GraphModule(nn.Module(), graph)
    keys = []
    for size in (2, 3, 2):
        with stand_in_groups(Mesh({"tp": size}), 1):
            keys.append(key(module))
    assert keys[0] == keys[2] != keys[1]


def overwritten(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    overwritten(path, bytes(content))


def cut_short(path: Path) -> None:
    overwritten(path, path.read_bytes()[:-7])


def emptied(path: Path) -> None:
    overwritten(path, b"")


def binary(path: Path) -> None:
    overwritten(path, b"\x80\xff" * 99)


def other_code(path: Path) -> None:
    lines = path.read_text().split("\n")
    body = {**json.loads(lines[3]), "code": "raise SystemExit('run unchecked')"}
    overwritten(path, "\n".join([*lines[:3], json.dumps(body)]).encode())


def of_another_graph(path: Path) -> None:
    lines = path.read_text().split("\n")
    overwritten(path, "\n".join([lines[0], "0" * 64, *lines[2:]]).encode())


def open_to_all(path: Path) -> None:
    path.chmod(0o644)


def linked(path: Path) -> None:
    path.rename(path.with_suffix(".moved"))
    path.symlink_to(path.with_suffix(".moved"))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (flipped, "it is damaged, or was made for another graph"),
        (cut_short, "it is damaged, or was made for another graph"),
        (emptied, "it is damaged, or was made for another graph"),
        (binary, "UnicodeDecodeError"),
        (other_code, "it is damaged, or was made for another graph"),
        (of_another_graph, "it is damaged, or was made for another graph"),
        (open_to_all, "others have access to it (mode 644, not 600)"),
        (linked, "it is no ordinary file"),
    ],
)
def test_a_file_that_cannot_be_trusted_is_made_again(
    folder: Path, damage: Callable[[Path], None], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_step(folder, step_inputs())
    path = the_file(folder)
    content = path.read_bytes()
    damage(path)
    want = step(step_inputs())
    with pytest.warns(RuntimeWarning, match="is not used, and converted again") as caught:
        check_step(run_step(folder, step_inputs()), want)
    assert any(reason in str(warning.message) for warning in caught)
    assert path.read_bytes() == content
    assert not path.is_symlink()
    convert_nothing(monkeypatch)
    check_step(run_step(folder, step_inputs()), want)


def test_a_file_of_another_user_is_not_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_step(folder, step_inputs())
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.warns(RuntimeWarning, match="it belongs to another user"):
        run_step(folder, step_inputs())


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    occupied = tmp_path / "file"
    occupied.write_text("a file, not a folder")
    with (
        pytest.warns(RuntimeWarning, match="NotADirectoryError"),
        pytest.raises(RolemeshError, match=r"\[RM018\] option 'cache' of target 'ge'"),
    ):
        run_step(occupied, step_inputs())


def test_files_of_the_graph_are_written_on_every_start(folder: Path, tmp_path: Path) -> None:
    run_step(folder, step_inputs())
    options = GeOptions(cache=str(folder), dump=str(tmp_path))
    lower_ge(step_graph(), step_inputs(), SIGNATURE, options)
    assert (tmp_path / f"{SIGNATURE.name}.pbtxt").exists()


def test_functions_that_text_cannot_tell_apart_are_not_kept(folder: Path) -> None:
    graph = fx.Graph()
    graph.output((graph.call_function(lambda x: x * 3, (graph.placeholder("x"),)),))
    module = fx.GraphModule(nn.Module(), graph)
    signature = replace(SIGNATURE, inputs=SIGNATURE.inputs[:1], outputs=SIGNATURE.outputs[1:])
    with pytest.warns(RuntimeWarning, match=r"is not kept in .*: node \S+ calls <function"):
        run = lower_ge(module, [torch.ones(2, 3)], signature, GeOptions(cache=str(folder)))
    with running_on(ReferenceEngine()):
        assert torch.equal(run(torch.ones(2, 3))[0], torch.full((2, 3), 3.0))  # type: ignore[arg-type]
    assert not folder.exists()


def mlp_rank(folder: str, convert: bool) -> tuple[list[Tensor], list[str]]:
    """One rank: two calls of the model, and what the cache holds then."""
    if not convert:
        convert_nothing(pytest.MonkeyPatch())
    sharded, model = sharded_mlp(2)
    run = lower(sharded, "ge", {"cache": folder}).compile()
    outputs = [run(torch.full((5, 6), value)) for value in (0.5, -2.0)]
    assert all(isinstance(value, Tensor) for value in outputs)
    return [*outputs, gather(model.seen)], sorted(os.listdir(folder))  # type: ignore[list-item]


@pytest.mark.processes
def test_processes_start_from_what_others_compiled(folder: Path) -> None:
    worker = f"{__file__}:mlp_rank"
    first = run_processes(worker, 2, (str(folder), True), fork=True)
    second = run_processes(worker, 2, (str(folder), False))
    _, model = sharded_mlp()
    want = [model(torch.full((5, 6), value)) for value in (0.5, -2.0)]
    for by_rank in (first, second):
        for values, names in by_rank:  # type: ignore[misc]
            assert [name.split(".")[1] for name in names] == ["rank0", "rank1"]
            for found, expected in zip(values, [*want, model.seen], strict=True):
                torch.testing.assert_close(found, expected)


class Gate(nn.Module):
    """A model of a user who knows nothing of rolemesh."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)
        self.register_buffer("bias", torch.arange(4.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.step(x)

    def step(self, x: Tensor) -> Tensor:
        return torch.relu(self.linear(x) + self.bias)


@pytest.mark.parametrize("dynamic", [False, True])
def test_torchairs_own_cache_compile_works(
    tmp_path: Path, dynamic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torchair = load_torchair("cpu").module
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        models = Gate(), Gate()
    models[1].load_state_dict({k: v * 2 for k, v in models[0].state_dict().items()})
    config = torchair.CompilerConfig()
    with torch.no_grad(), running_on(ReferenceEngine()):
        for model in models:  # the second one starts from the file that the first one left
            forget_compiled()
            run = torchair.inference.cache_compile(
                model.step, config=config, cache_dir=str(tmp_path), dynamic=dynamic
            )
            for rows in (3, 5) if dynamic else (3,):
                x = torch.linspace(-2, 2, rows * 6).reshape(rows, 6)
                torch.testing.assert_close(run(x), model.step(x))
            convert_nothing(monkeypatch)
    (path,) = tmp_path.rglob("compiled_module")
    assert path.stat().st_mode & 0o777 == 0o600
