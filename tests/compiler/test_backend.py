"""`torch.compile(backend="rolemesh")` as its users call it: on real ranks, and with bad input."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch._inductor.config
import torch.distributed as dist
from tests.models import forget_compiled
from torch import nn
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh

import rolemesh
from rolemesh.compiler.backend import observing
from rolemesh.compiler.command.check_ranks import expected_traffic
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.program import Program
from rolemesh.compiler.models.cases import cache_tensors, load_case
from rolemesh.runtime.launch import run_processes
from rolemesh.runtime.store import default_store, gather
from rolemesh.runtime.traffic import record_traffic

# --------------------------------------------------------------------------------------------------
# Real ranks.


class Call(NamedTuple):
    """What one call left behind on a rank."""

    phase: str
    error: float
    cache_error: float
    moved: Counter[tuple[str, int]]
    said: Counter[tuple[str, int]]
    compiles: int
    pointers: dict[str, int]
    stored_bytes: int
    whole_bytes: int


class Observed:
    """Keeps the Program of a run, and the collectives that it issued."""

    def __init__(self, target: str) -> None:
        self.target = target

    def __call__(
        self, program: Program, run: Callable[[], list[torch.Tensor]]
    ) -> list[torch.Tensor]:
        with record_traffic() as records:
            results = run()
        self.phase = program.phase
        self.moved = Counter((record.op, int(record.received)) for record in records)
        self.said = expected_traffic(program, dist.get_rank(), self.target)
        return results


def calls_in_turn(
    spec: str, layers: int, axes: dict[str, int] | None, turns: list[str], options: dict[str, str]
) -> list[Call]:
    """One rank: compile a model, call its phases in turn, compare with the model uncompiled.

    `axes` is the mesh; None for a DeviceMesh over all ranks.
    """
    torch._inductor.config.compile_threads = 1
    forget_compiled()  # what the parent compiled counts towards Dynamo's limits
    plain = load_case(spec, layers=layers)
    case = load_case(spec, layers=layers)
    mesh = axes or init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    compiled = torch.compile(
        case.model,
        backend="rolemesh",
        fullgraph=True,
        dynamic=False,
        options={"mesh": mesh, **options},
    )
    counters.clear()
    calls = []
    for name in turns:
        observed = Observed(options.get("target", "eager"))
        args, kwargs = case.phases[name]
        plain_args, plain_kwargs = plain.phases[name]
        with torch.no_grad():
            want = plain.model(*plain_args, **plain_kwargs).logits
            with observing(observed):
                got = compiled(*args, **kwargs).logits
        ours = cache_tensors(kwargs["past_key_values"]).values()
        theirs = cache_tensors(plain_kwargs["past_key_values"]).values()
        stored = default_store().stored()
        calls.append(
            Call(
                observed.phase,
                float((got - want).abs().max()),
                max(float((gather(a) - b).abs().max()) for a, b in zip(ours, theirs, strict=True)),
                observed.moved,
                observed.said,
                counters["stats"]["unique_graphs"],
                {entry.name: entry.local.data_ptr() for entry in stored},
                sum(entry.local.nbytes for entry in stored),
                sum(weight.untyped_storage().nbytes() for weight in case.model.parameters()),
            )
        )
    return calls


@pytest.mark.processes
@pytest.mark.parametrize(
    ("spec", "ranks"),
    [("hf:llama", 3), ("hf:deepseek_v32", 2)],
    ids=["llama on 3 ranks", "deepseek on 2 ranks"],
)
def test_phases_share_one_storage_and_compile_once(spec: str, ranks: int) -> None:
    turns = ["prefill", "decode", "prefill"]
    arguments = (spec, 2, {"tp": ranks}, turns, {"role": "pd_mixed"})
    for calls in run_processes(calls_in_turn, ranks, arguments, fork=True):
        assert isinstance(calls, list)
        assert [call.phase for call in calls] == turns
        assert [call.compiles for call in calls] == [1, 2, 2]
        assert max(call.error for call in calls) < 1e-4
        assert max(call.cache_error for call in calls) < 1e-4
        first = calls[0]
        assert first.pointers
        for call in calls:
            assert call.moved == call.said
            assert call.moved
            assert call.pointers == first.pointers
            assert call.stored_bytes == first.stored_bytes
            assert call.whole_bytes == 0


@pytest.mark.processes
def test_inductor_on_a_device_mesh() -> None:
    arguments = ("hf:llama", 1, None, ["prefill"], {"role": "prefill", "target": "inductor"})
    for calls in run_processes(calls_in_turn, 2, arguments, fork=True):
        assert isinstance(calls, list)
        assert calls[0].error < 1e-4
        assert calls[0].cache_error < 1e-4
        assert calls[0].moved == calls[0].said
        assert calls[0].whole_bytes == 0


SCRIPT = """
import sys, torch
torch.manual_seed(0)  # ranks must have the same weights
model = torch.nn.Sequential(torch.nn.Embedding(8, 4), torch.nn.Linear(4, 8)).eval()
tokens = torch.arange(6).reshape(1, 6)
with torch.no_grad():
    want = model(tokens)
    assert "rolemesh" not in sys.modules
    run = torch.compile(model, backend="rolemesh", options={"role": "prefill", "mesh": {"tp": 2}})
    assert torch.allclose(run(tokens), want)
"""


@pytest.mark.processes
def test_under_torchrun_without_importing_rolemesh(tmp_path: object) -> None:
    path = f"{tmp_path}/script.py"
    with open(path, "w", encoding="utf-8") as file:
        file.write(SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    run = subprocess.run(
        [*torchrun, "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", path],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr


# --------------------------------------------------------------------------------------------------
# Bad input: what reaches the caller of a compiled model is a RolemeshError, with all its parts.


class Model(nn.Module):
    """A language model without layers and without a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 4)
        self.head = nn.Linear(4, 8)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(tokens))


class Dropout(Model):
    """One that draws random numbers."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(nn.functional.dropout(self.embedding(tokens), 0.5, training=True))


class Selected(Model):
    """One whose sizes depend on data."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(tokens[tokens > 3]))


class Bad(NamedTuple):
    """A wrong use, and what its error must say."""

    options: dict[str, object]
    code: str
    what: str
    where: str
    why: str
    fix: str
    model: type[nn.Module] = Model
    phase: str = ""
    gradients: bool = False


GOOD = {"role": "prefill", "mesh": {"tp": 1}}
BAD = {
    "role": Bad(
        {**GOOD, "role": "prefil"},
        "RM001",
        "unknown role 'prefil'",
        "option role",
        "the roles are prefill, decode, pd_mixed",
        "did you mean 'prefill'?",
    ),
    "axis": Bad(
        {**GOOD, "axis": "tq"}, "RM002", "unknown mesh axis 'tq'", "", "tp", "use one of these axes"
    ),
    "target": Bad(
        {**GOOD, "target": "inducter"},
        "RM003",
        "unknown target 'inducter'",
        "option target",
        "the targets are eager, inductor",
        "did you mean 'inductor'?",
    ),
    "phase option": Bad(
        {**GOOD, "phase": "decode"},
        "RM004",
        "role 'prefill' has no phase 'decode'",
        "option phase",
        "it runs prefill",
        "use one of these phases",
    ),
    "phase of the call": Bad(
        GOOD, "RM004", "role 'prefill' has no phase 'decode'", "", "it runs prefill", "use one",
        phase="decode",
    ),
    "option": Bad(
        {**GOOD, "rolle": "prefill"},
        "RM018",
        "unknown option 'rolle'",
        "options of torch.compile",
        "the options are",
        "did you mean 'role'?",
    ),
    "type of an option": Bad(
        {**GOOD, "prefetch": "two"},
        "RM018",
        "option 'prefetch' is 'two'",
        "options of torch.compile",
        "it must be a int",
        "pass a int",
    ),
    "no mesh": Bad(
        {"role": "prefill"},
        "RM018",
        "the option mesh is missing",
        "options of torch.compile",
        "layouts are over the axes of a mesh",
        'pass options={"mesh"',
    ),
    "mesh": Bad(
        {**GOOD, "mesh": "tp=4"}, "RM015", "'tp=4' is not a mesh", "option mesh",
        "a mesh is a dict", 'write for example {"tp": 4}',
    ),
    "world size": Bad(
        {**GOOD, "mesh": {"tp": 4}},
        "RM005",
        "the mesh has 4 ranks, but 1 processes run",
        "mesh",
        "every rank of the mesh is one process",
        "start 4 processes, or use a mesh of 1 ranks",
    ),
    "no cache": Bad(
        {**GOOD, "role": "decode"},
        "RM007",
        "role 'decode' decodes with a cache, but this call updates none",
        "the model's arguments",
        "no input of the captured graph is a cache",
        "pass past_key_values=StaticCache",
    ),
    "gradients": Bad(
        GOOD, "RM017", "captured with gradients enabled", "weight", "require gradients",
        "torch.no_grad()", gradients=True,
    ),
    "random op": Bad(
        GOOD, "RM012", "random op", "test_backend.py", "ranks would draw different numbers",
        "model.eval()", model=Dropout,
    ),
    "data-dependent op": Bad(
        GOOD, "RM011", "depends on data", "test_backend.py", "fixed sizes", "torch.where",
        model=Selected,
    ),
}  # fmt: skip


def refusals() -> dict[str, tuple[str, str, dict[str, str]]]:
    """The errors of all wrong uses, in a world of one rank."""
    found = {}
    for name, bad in BAD.items():
        forget_compiled()
        compiled = torch.compile(bad.model().eval(), backend="rolemesh", options=dict(bad.options))
        try:
            # Without this, Dynamo breaks the graph at an op whose result's size depends on data.
            dynamic = torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
            with torch.set_grad_enabled(bad.gradients), dynamic:
                if bad.phase:
                    with rolemesh.phase(bad.phase):
                        compiled(torch.arange(6).reshape(1, 6))
                else:
                    compiled(torch.arange(6).reshape(1, 6))
        except RolemeshError as error:
            parts = {part: getattr(error, part) for part in ("what", "where", "why", "fix")}
            found[name] = (error.code, str(error), parts)
    return found


@pytest.fixture(scope="module")
def refused() -> dict[str, tuple[str, str, dict[str, str]]]:
    (found,) = run_processes(refusals, 1, fork=True)
    assert isinstance(found, dict)
    return found


@pytest.mark.processes
@pytest.mark.xdist_group("refusals")
@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str, refused: dict[str, tuple[str, str, dict[str, str]]]) -> None:
    bad = BAD[name]
    code, text, parts = refused[name]
    assert code == bad.code
    assert text.startswith(f"[{bad.code}] ")
    for part in ("what", "where", "why", "fix"):
        assert getattr(bad, part) in parts[part]
        assert parts[part].split("\n", 1)[0] in text


def test_no_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    compiled = torch.compile(Model().eval(), backend="rolemesh", options=GOOD)
    with torch.no_grad(), pytest.raises(RolemeshError) as caught:
        compiled(torch.arange(6).reshape(1, 6))
    error = caught.value
    assert error.code == "RM006"
    assert "torch.distributed has no process group" in str(error)
    assert "mesh" in error.where
    assert "its 1 ranks are 1 processes that must be able to talk" in str(error)
    assert "torchrun --nproc-per-node 1" in error.fix
    assert "rolemesh.lockstep" in error.fix
