"""Capture without an NPU goes wrong where capture on an NPU goes wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.lowering.npugraph.capture import Capturer, Pool, Recording
from rolemesh.runtime.groups import stand_in_groups
from rolemesh.runtime.traffic import record_traffic

_aten = torch.ops.aten


def captured(
    function: Callable[..., Tensor], *inputs: Tensor, capturer: Capturer, pool: Pool | None = None
) -> tuple[Recording, Tensor]:
    recording = capturer.recording()
    with capturer.capturing(recording, pool=pool):
        result = function(*inputs)
    return recording, result


@pytest.fixture
def capturer() -> Capturer:
    return Capturer()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_replay_computes_what_eager_computes(capturer: Capturer, dtype: torch.dtype) -> None:
    def chain(x: Tensor, y: Tensor) -> Tensor:
        z = (x @ y).relu().t().reshape(5, 3, 1) * 2  # views, and a copy where a view is impossible
        return torch.cat([z.split(2)[1], z[:1] - 1]).softmax(0)

    x, y = torch.randn(3, 7, dtype=dtype), torch.randn(7, 5, dtype=dtype)
    recording, result = captured(chain, x, y, capturer=capturer)
    recording.replay()
    assert torch.equal(result, chain(x, y))
    x.copy_(torch.randn(3, 7))
    recording.replay()
    assert torch.equal(result, chain(x, y))


def test_capturing_computes_and_changes_nothing(capturer: Capturer) -> None:
    x, total = torch.ones(3), torch.zeros(3)
    _, result = captured(lambda: total.add_(x) + 1, capturer=capturer)
    assert torch.equal(total, torch.zeros(3))
    assert result.isnan().all()


def test_writes_in_place_happen_once_a_replay(capturer: Capturer) -> None:
    x, total = torch.ones(3), torch.zeros(4)

    def step() -> Tensor:
        total[1:].add_(x)
        _aten.mul.out(x, 2.0, out=total[:3])
        return total * 1

    recording, result = captured(step, capturer=capturer)
    for _ in range(2):
        recording.replay()
    assert total.tolist() == [2.0, 2.0, 2.0, 2.0]
    assert torch.equal(result, total)


def test_an_input_that_is_not_copied_is_not_seen(capturer: Capturer) -> None:
    static = torch.zeros(2)
    recording, result = captured(lambda: static + 1, capturer=capturer)
    static = torch.full((2,), 5.0)  # another tensor: the graph knows the first one only
    recording.replay()
    assert result.tolist() == [1.0, 1.0]


def test_the_next_replay_overwrites_results(capturer: Capturer) -> None:
    x = torch.zeros(2)
    recording, result = captured(lambda: x + 1, capturer=capturer)
    recording.replay()
    first = result
    x.fill_(8.0)
    recording.replay()
    assert first.tolist() == [9.0, 9.0]


@pytest.mark.parametrize(
    ("make", "bad"),
    [
        (lambda: torch.ones(2) * 2, float("nan")),
        (lambda: torch.ones(2, dtype=torch.int32) * 2, torch.iinfo(torch.int32).max),
        (lambda: torch.zeros(2).bool(), True),
    ],
)
def test_graphs_of_one_pool_spoil_each_other(
    capturer: Capturer, make: Callable[[], Tensor], bad: object
) -> None:
    pools = capturer.pool(), capturer.pool()
    assert pools[0] != pools[1]
    first, result = captured(make, capturer=capturer, pool=pools[0])
    neighbour, _ = captured(make, capturer=capturer, pool=pools[0])
    stranger, _ = captured(make, capturer=capturer, pool=pools[1])
    first.replay()
    want = result.clone()
    stranger.replay()
    assert torch.equal(result, want)
    neighbour.replay()
    assert torch.allclose(result, torch.full_like(result, bad), equal_nan=True)  # type: ignore[call-overload]


def test_memory_is_only_taken_not_filled_again(capturer: Capturer) -> None:
    recording, buffer = captured(lambda: torch.empty_like(torch.zeros(2)), capturer=capturer)
    buffer.fill_(3.0)
    recording.replay()
    assert buffer.tolist() == [3.0, 3.0]


def test_collectives_are_exchanged_by_the_replay_only(capturer: Capturer) -> None:
    with stand_in_groups(Mesh({"tp": 2}), 1) as groups, record_traffic() as records:
        ops = torch.ops._c10d_functional

        def gathered() -> Tensor:
            moved = ops.all_gather_into_tensor(torch.ones(3), 2, groups.names["tp"])
            return ops.wait_tensor(moved) + 1

        recording, result = captured(gathered, capturer=capturer)
        assert result.shape == (6,)
        assert not records
        recording.replay()
        assert len(records) == 1


class Log(TorchDispatchMode):
    """The names of all ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_result_of_a_collective_is_waited_for_before_it_is_read(capturer: Capturer) -> None:
    with stand_in_groups(Mesh({"tp": 2}), 1) as groups:
        reduce = torch.ops._c10d_functional.all_reduce
        recording, _ = captured(
            lambda: reduce(torch.ones(3), "sum", groups.names["tp"]), capturer=capturer
        )
        with Log() as log:
            recording.replay()
    start = log.names.index("_c10d_functional.all_reduce.default")
    assert log.names[start + 1 :] == ["_c10d_functional.wait_tensor.default", "aten.copy_.default"]


def test_tensors_are_made_on_the_host(capturer: Capturer) -> None:
    recording, result = captured(
        lambda: torch.ops.aten.full.default([2], 7, device=torch.device("meta")), capturer=capturer
    )
    recording.replay()
    assert result.tolist() == [7, 7]


def test_a_recording_that_is_reset_does_nothing(capturer: Capturer) -> None:
    total = torch.zeros(1)
    recording, _ = captured(lambda: total.add_(1), capturer=capturer)
    recording.reset()
    recording.replay()
    assert total.item() == 0


def test_ops_that_read_values_cannot_be_captured(capturer: Capturer) -> None:
    x = torch.ones(2)
    with pytest.raises(Exception, match="_local_scalar_dense"):
        captured(lambda: x + x.sum().item(), capturer=capturer)
