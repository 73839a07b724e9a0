"""Role train: gradients of one device on every mesh, and the textbook's collectives and bytes."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from tests.training import LAYERS, TOKENS, Step, check, step

from rolemesh.compiler.api import shard, trace, trace_training
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.ledger import Collective, collectives
from rolemesh.compiler.ir.program import InputKind, Program, tensor_type
from rolemesh.compiler.ir.spec import P
from rolemesh.compiler.training import lockstep_gradients

HIDDEN, BYTES = 72, 4


@pytest.mark.parametrize("model", ["llama", "qwen3_moe", "deepseek_v3"])
@pytest.mark.xdist_group("training")
def test_gradients_of_sequence_parallel_are_those_of_one_device(model: str) -> None:
    given = step(model)
    check(given, shard(given.traced, {"sp": 3}, "train"))


@pytest.mark.parametrize("mesh", [{"dp": 2, "fsdp": 2}, {"dp": 2, "sp": 2}, {"fsdp": 3}], ids=str)
@pytest.mark.xdist_group("training")
def test_a_batch_that_does_not_divide_is_padded(mesh: dict[str, int]) -> None:
    given = step("llama", 5)
    check(given, shard(given.traced, mesh, "train"))


def halves(given: Step, mesh: dict[str, int], **options: float) -> tuple[Program, Program]:
    found = shard(given.traced, mesh, "train", **options).stages.halves  # type: ignore[arg-type]
    assert found is not None
    return found.forward, found.backward


def received(found: tuple[Collective, ...], op: str, axis: str) -> float:
    return float(sum(r.bytes_received for r in found if r.op == op and axis in r.axes))


def numbers(program: Program, ranks: int) -> dict[str, int]:
    """Elements of each parameter, the first dim padded to a multiple of the ranks."""
    found = {}
    for node, entry in zip(program.placeholders, program.inputs, strict=True):
        if entry.kind is InputKind.PARAMETER:
            first, *rest = tensor_type(node).shape
            found[entry.name] = -(-first // ranks) * ranks * math.prod(rest)
    return found


@pytest.mark.xdist_group("training")
def test_fully_sharded_gathers_each_weight_twice_and_scatters_its_gradient() -> None:
    forward, backward = halves(step("llama"), {"fsdp": 4})
    sizes = numbers(forward, 4)
    there, back = collectives(forward), collectives(backward)
    total = sum(sizes.values()) * BYTES * 3 // 4
    table = sizes["model.embed_tokens.weight"] * BYTES * 3 // 4  # backward does not read it
    assert received(there, "all_gather", "fsdp") == total
    assert received(back, "all_gather", "fsdp") == total - table
    assert received(back, "reduce_scatter", "fsdp") == total
    assert {r.op for r in there if r.bytes_received > 8} == {"all_gather"}
    assert {r.op for r in back} == {"all_gather", "reduce_scatter"}
    gathered = [r for r in there if r.op == "all_gather"]
    assert len(gathered) == len(sizes)


@pytest.mark.xdist_group("training")
def test_data_parallel_sums_all_gradients_in_one_bucket() -> None:
    forward, backward = halves(step("llama"), {"dp": 4})
    total = sum(p.numel() for p in step("llama").model.parameters())
    assert [r.bytes_received for r in collectives(forward)] == [2 * 3 * BYTES // 4]  # the loss
    (bucket,) = collectives(backward)
    assert (bucket.op, bucket.bytes_received) == ("all_reduce", 2 * 3 * total * BYTES // 4)


def of_layers(found: tuple[Collective, ...]) -> list[Collective]:
    """Collectives of hidden states: as large as those, or a rank's part."""
    hidden = 4 * TOKENS * HIDDEN * BYTES
    return [r for r in found if r.bytes_received >= hidden * 3 / 4]


@pytest.mark.xdist_group("training")
def test_tensor_parallel_sums_hidden_states_twice_a_layer_and_direction() -> None:
    given = step("llama")
    forward, backward = halves(given, {"tp": 4})
    hidden = 4 * TOKENS * HIDDEN * BYTES * 2 * 3 // 4
    # Besides those of the layers, the embedding's sum, and that of the head's input gradient.
    there = [r for r in collectives(forward) if r.op == "all_reduce" and r.bytes_received >= hidden]
    back = of_layers(collectives(backward))
    assert [r.bytes_received for r in there] == [hidden] * (2 * LAYERS + 1)
    assert [(r.op, r.bytes_received) for r in back] == [("all_reduce", hidden)] * (2 * LAYERS + 1)
    rows = 4 * TOKENS * BYTES * 2 * 3 // 4
    small = [r.bytes_received for r in collectives(forward) if r.op == "all_reduce"]
    assert [n for n in small if n < hidden] == [rows] * 3  # maximum, sum and the target's logit
    assert not [r for r in collectives(backward) if r not in back]


@pytest.mark.xdist_group("training")
def test_sequence_parallel_gathers_and_scatters_in_place_of_sums() -> None:
    forward, backward = halves(step("llama"), {"sp": 2})
    padded = 4 * (TOKENS + 1) * HIDDEN * BYTES // 2
    there = Counter(r.op for r in collectives(forward) if r.bytes_received == padded)
    # Per layer a gather before attention and before the MLP, and a scatter behind them; the
    # embedding's scatter and the head's gather.
    assert there == {"all_gather": 2 * LAYERS + 1, "reduce_scatter": 2 * LAYERS + 1}
    scattered = [r for r in collectives(backward) if r.op == "reduce_scatter"]
    assert [r.bytes_received for r in scattered] == [padded] * (2 * LAYERS + 1)


@pytest.mark.xdist_group("training")
def test_less_memory_saves_less_and_gathers_no_weight_for_it() -> None:
    given = step("llama")

    def saved(program: Program) -> int:
        return sum(
            math.prod(program.layout(node).local_shape(tensor_type(node).shape, program.the_mesh))
            for node, entry in zip(program.placeholders, program.inputs, strict=True)
            if entry.kind is InputKind.SAVED
        )

    sizes = [saved(halves(given, {"fsdp": 2}, memory_budget=b)[1]) for b in (1.0, 0.5, 0.0)]
    assert sizes[0] > sizes[1] > sizes[2]
    for budget in (0.5, 0.0):
        check(given, shard(given.traced, {"fsdp": 2}, "train", memory_budget=budget))


class Rows(nn.Module):
    """Two projections whose sizes share no factor with each other."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 14)
        self.down = nn.Linear(14, 10, bias=False)

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (self.down(torch.relu(self.up(x))) - target).square().mean()


class Gated(nn.Module):
    """Two projections in one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 16, bias=False)
        self.down = nn.Linear(8, 10, bias=False)

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        gate, up = self.up(x).chunk(2, -1)
        return (self.down(torch.relu(gate) * up) - target).square().mean()


def test_a_packed_weight_is_one_box_unless_annotated() -> None:
    model = Gated()
    args = torch.randn(4, 6), torch.randn(4, 10)
    traced = trace_training(model, *args)
    model(*args).backward()
    for given, layout in (
        ({}, "f32[16, 6]"),
        ({"up.weight": P("tp", None, parts={0: 2})}, "f32[(2 x 8@tp), 6]"),
    ):
        sharded = shard(traced, {"tp": 2}, "train", annotations=given)
        program = sharded.program
        node = program.placeholders[[x.name for x in program.inputs].index("up.weight")]
        assert program.layout(node).text(tensor_type(node), program.the_mesh) == layout
        _, found = lockstep_gradients(sharded, *args, poison=True, check=True)
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, model.get_parameter(name).grad)


def test_text_of_a_joint_program(golden: object) -> None:
    traced = trace_training(Rows(), torch.randn(4, 6), torch.randn(4, 10))
    sharded = shard(traced, {"fsdp": 2}, "train")
    assert sharded.stages.halves is not None
    parts = (traced.program, sharded.stages.halves.forward, sharded.stages.halves.backward)
    golden("joint", "\n\n".join(map(str, parts)))  # type: ignore[operator]


def failing(code: str, *words: str) -> pytest.RaisesExc[RolemeshError]:
    return pytest.raises(RolemeshError, match=rf"(?s)\[{code}\].*" + ".*".join(words))


X, Y = torch.ones(4, 6), torch.zeros(4, 10)


def test_what_has_no_gradients_is_no_training_step() -> None:
    model = Rows()
    with failing("RM017", "no result is a number"):
        trace_training(model.up, X)
    with failing("RM017", "no input of the graph requires"):
        trace_training(Rows().requires_grad_(False), X, Y)


def test_a_trace_has_gradients_wherever_it_is_made() -> None:
    model = Rows()
    with torch.no_grad():
        traced = trace_training(model, X, Y)
    loss, found = lockstep_gradients(shard(traced, {"dp": 2}, "train"), X, Y)
    model(X, Y).backward()
    torch.testing.assert_close(loss, model(X, Y))
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad)


def test_a_trace_fits_its_role() -> None:
    training = trace_training(Rows(), X, Y)
    with torch.no_grad():
        inference = trace(Rows(), X, Y)
    with failing("RM017", "'decode'", "with gradients", "trace_training"):
        shard(training, {"tp": 2}, "decode")
    with failing("RM017", "'train'", "without gradients"):
        shard(inference, {"tp": 2}, "train")
    sharded = shard(inference, {"tp": 2})
    with failing("RM017", "no gradients", "rolemesh.lockstep"):
        lockstep_gradients(sharded, X, Y)


def test_axes_and_budgets_that_mean_nothing() -> None:
    traced = trace_training(Rows(), X, Y)
    with failing(
        "RM002", "no use for the mesh axis 'ddp'", "dp, fsdp, tp, sp", "did you mean 'dp'"
    ):
        shard(traced, {"ddp": 2}, "train")
    with failing("RM018", "memory_budget is 2"):
        shard(traced, {"dp": 2}, "train", memory_budget=2)


def test_parameters_must_be_where_they_can_be_replaced() -> None:
    models = {"only": Rows()}

    def hidden(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = models["only"](x, y)
        return found

    with failing("RM017", "in no module that the compiled function can see"):
        trace_training(hidden, X, Y)


def test_global_settings_are_those_of_the_trace() -> None:
    sharded = shard(trace_training(Rows(), X, Y), {"dp": 2}, "train")
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with failing("RM020", "a global setting differs", "default_dtype"):
            lockstep_gradients(sharded, X, Y)
    finally:
        torch.set_default_dtype(default)
