"""The ranks of a check as real processes.

This process compiles the model through `torch.compile(backend="rolemesh")` as far as its graphs;
then it forks, so that the ranks share the graphs, and each rank shards and runs its part over gloo.
Ranks compare with the single device, and hold the compiler to its word: the traffic of the process
groups, the bytes of each stored shard, and that no full parameter is left.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
import torch._inductor.config
import torch.distributed as dist

from rolemesh.compiler.backend import observing
from rolemesh.compiler.capture.tracing import compile_only
from rolemesh.compiler.command.check_options import CheckOptions
from rolemesh.compiler.command.report import Description, StoredRow, describe
from rolemesh.compiler.command.steps import RankResult, Record, Step, compare_step, drive
from rolemesh.compiler.ir.dialect import PLAIN, MeshOp
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.ledger import collective
from rolemesh.compiler.ir.program import Program
from rolemesh.compiler.models.cases import Case
from rolemesh.lowering.direct import exchanged
from rolemesh.lowering.targets import TARGETS
from rolemesh.runtime.config import Config
from rolemesh.runtime.launch import run_processes
from rolemesh.runtime.phase import phase
from rolemesh.runtime.store import default_store, gather
from rolemesh.runtime.traffic import record_traffic

__all__ = ["expected_traffic", "run_on_processes"]

Compiled = Callable[..., object]


def run_on_processes(
    case: Case, steps: Sequence[Step], records: Sequence[Record], options: CheckOptions
) -> list[RankResult]:
    """Run the steps of the role's phases on one process per rank.

    Args:
        case: The case; each rank has a copy of its own.
        steps: The plan, up to the last step that the ranks run.
        records: What the single device left behind, by step.
        options: What to check.

    Raises:
        RolemeshError: If the model cannot be compiled for the role.
    """
    wrap = cast("Callable[..., Compiled]", torch.compile)
    compiled = wrap(
        case.model,
        backend="rolemesh",
        fullgraph=True,
        dynamic=False,
        isolate_recompiles=True,  # what this process compiled before is no recompile
        options={
            "role": options.role,
            "optimise": options.optimise,
            "mesh": dict(zip(options.mesh.names, options.mesh.sizes, strict=True)),
            "target": options.target,
            "target_options": options.parsed_options,
            **({} if options.dump is None else {"dump": options.dump}),
        },
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as ranks do: Dynamo guards on it
    for key in {step.key: None for step in steps if step.phase}:
        args, kwargs = case.phases[key]
        compile_only(compiled, *args, **kwargs)
    torch.set_num_threads(threads)
    seconds = Config.read().timeout
    try:
        ranks = run_processes(
            _rank,
            options.mesh.size,
            (case, compiled, steps, records, options),
            timeout=2 * seconds,
            collective_timeout=seconds,
            fork=True,
        )
    except RolemeshError as error:
        cause = error.__cause__
        raise (cause if isinstance(cause, RolemeshError) else error) from None
    return cast("list[RankResult]", ranks)


def _rank(
    case: Case,
    compiled: Compiled,
    steps: Sequence[Step],
    records: Sequence[Record],
    options: CheckOptions,
) -> RankResult:
    """One rank's part."""
    torch._inductor.config.compile_threads = max(1, (os.cpu_count() or 1) // dist.get_world_size())
    observer = _Observer(options.target)

    def call(step: Step, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        if not step.phase:
            return case.model(*args, **kwargs)
        observer.phase = step.phase
        with phase(step.phase), observing(observer):
            return compiled(*args, **kwargs)

    results = []
    state: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        made = drive(case, steps, call, records)
        for step, record, (arguments, result) in zip(steps, records, made, strict=True):
            found, state = compare_step(
                case, step, arguments, result, record, options.allowed, gather
            )
            results.append(found)
    rows = {row.name: row for entry in observer.compiled.values() for row in entry.storage}
    problems = (*observer.problems, *_storage_problems(rows), *_whole_parameters(case.model))
    whole = {name: tensor.clone() for name, tensor in state.items()}
    return RankResult(
        tuple(results), observer.compiled, problems, whole if dist.get_rank() == 0 else None
    )


@dataclass
class _Observer:
    """Describes each program once, and compares the traffic of each run with its collectives."""

    target: str
    phase: str = ""
    compiled: dict[str, Description] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def __call__(
        self, program: Program, run: Callable[[], list[torch.Tensor]]
    ) -> list[torch.Tensor]:
        rank = dist.get_rank()
        if self.phase not in self.compiled:
            self.compiled[self.phase] = describe(program)
        with record_traffic() as records:
            results = run()
        moved = Counter((r.op, 0 if r.op in _ROUTED else int(r.received)) for r in records)
        said = expected_traffic(program, rank, self.target)
        if moved != said:
            self.problems.append(
                f"{self.phase} on rank {rank}: the process groups moved {_counts(moved - said)} "
                f"that the report does not have, and not {_counts(said - moved)} that it has"
            )
        return results


def expected_traffic(program: Program, rank: int, target: str) -> Counter[tuple[str, int]]:
    """How often a rank takes part in each collective over gloo, by op and bytes it receives.

    For collectives over one axis; over several axes, they are one exchange per axis. Of rows that
    move by a call's routes the bytes are not known, and 0 stands for them.
    """
    routes = TARGETS[target].routes
    counts: Counter[tuple[str, int]] = Counter()
    for node in program.ops:
        if isinstance(node.target, MeshOp) and node.target.communicates:
            entry = collective(program, node)
            index = program.the_mesh.index(entry.axes[0])
            owner = node.kwargs.get("owner")
            owns = owner == program.the_mesh.coordinate(rank)[index]
            op, received = entry.op, entry.bytes_received
            if node.target in PLAIN:
                op = op if routes else PLAIN[node.target].name
                received = 0 if routes else entry.bytes_most
            elif target == "inductor":
                op, received = exchanged(entry, program.the_mesh.sizes[index])
            counts[op, 0 if owns else received] += 1
    return counts


_ROUTED = frozenset(op.name for op in PLAIN)
"""Names of collectives that move as many rows as a call's routes say."""


def _counts(counter: Counter[tuple[str, int]]) -> str:
    parts = [f"{count} {op} of {size} bytes" for (op, size), count in sorted(counter.items())]
    return ", ".join(parts) or "nothing"


def _storage_problems(rows: dict[str, StoredRow]) -> list[str]:
    """Shards that have another size than the report says."""
    found = []
    for stored in default_store().stored():
        row = rows.get(stored.name)
        size = stored.local.nbytes
        if row is None or (size != row.bytes_local and not (row.owned and size == 0)):
            said = "does not list it" if row is None else f"says {row.bytes_local}"
            found.append(f"{stored.name} takes {size} bytes, but the report {said}")
    return found


def _whole_parameters(model: torch.nn.Module) -> Sequence[str]:
    """Parameters that live as shards and still have their full storage."""
    return [
        f"parameter {name} still has its full storage"
        for name, parameter in model.named_parameters()
        if default_store().find(parameter) is not None and parameter.untyped_storage().nbytes()
    ]
