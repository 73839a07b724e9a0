"""Captured graphs from the cache run as those that were just captured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.compiler.cache.graphs import Recorder
from tests.models import forget_compiled
from torch import nn

from rolemesh.compiler.cache.folder import CacheWarning
from rolemesh.passes.rules.defaults import default_rules


class Cached(nn.Module):
    """Writes rows of a cache and a counter, and has a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 4)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(
        self, x: torch.Tensor, cache: torch.Tensor, at: torch.Tensor
    ) -> tuple[torch.Tensor, None, int]:
        self.seen.add_(x.shape[0])
        cache.index_copy_(0, at, self.linear(x))
        return cache.sum(0) + torch.tensor([1.0, 2.0, 3.0, 4.0]), None, x.shape[0]


def calls(model: nn.Module, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.arange(tokens * 5.0).view(tokens, 5)
    return x, torch.zeros(7, 4), torch.arange(tokens) + 1


def test_a_hit_writes_caches_and_returns_what_the_graph_returns(tmp_path: Path) -> None:
    found = []
    for recorder in (Recorder(tmp_path), Recorder(tmp_path)):
        torch.manual_seed(0)
        model = Cached().requires_grad_(False)
        x, cache, at = calls(model, 3)
        output, none, size = recorder.run(model, x, cache, at)  # type: ignore[misc]
        assert none is None
        assert size == 3
        assert model.seen == 3
        found.append((recorder.traced, output, cache))
    (first, *cold), (second, *warm) = found
    assert (first, second) == (1, 0)
    torch.manual_seed(0)  # for the same weights
    expected = Cached()
    x, cache, at = calls(expected, 3)
    with torch.no_grad():
        reference = expected(x, cache, at)[0]
    for output, written in (cold, warm):
        torch.testing.assert_close(output, reference)
        torch.testing.assert_close(written, cache)


def test_symbolic_sizes_serve_other_sizes_after_a_hit(tmp_path: Path) -> None:
    for traced in (1, 0):
        recorder = Recorder(tmp_path)
        torch.manual_seed(0)
        model = Cached().requires_grad_(False)
        forget_compiled()
        compiled = torch.compile(model, backend=recorder, dynamic=None)
        for tokens in (3, 5, 2):
            x, cache, at = calls(model, tokens)
            torch._dynamo.mark_dynamic(x, 0)
            torch._dynamo.mark_dynamic(at, 0)
            with torch.no_grad():
                output, _, size = compiled(x, cache, at)
            assert size == tokens
            torch.testing.assert_close(cache[1 : tokens + 1], model.linear(x))
            torch.testing.assert_close(output, cache.sum(0) + torch.arange(1.0, 5.0))
        assert recorder.traced == traced
        assert len(recorder.keys) == 1


def test_guards_that_tracing_added_are_taken_again(tmp_path: Path) -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        # Tracing asks whether the reshape is a view, and which sizes are one.
        return torch.nn.functional.pad(x, (0, 1)).reshape(-1)[:-1].view(-1, 1)

    for _ in range(2):
        recorder = Recorder(tmp_path)
        forget_compiled()
        compiled = torch.compile(function, backend=recorder, dynamic=True)
        with torch.no_grad():
            for width in (4, 6, 9):
                x = torch.randn(3, width)
                torch.testing.assert_close(compiled(x), function(x))


def test_graph_breaks_hit_piece_by_piece(tmp_path: Path) -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        x = x * 2
        torch._dynamo.graph_break()
        return x + 1

    x = torch.arange(6.0)
    for traced in (2, 0):
        recorder = Recorder(tmp_path)
        torch.testing.assert_close(recorder.run(function, x), x * 2 + 1)
        assert recorder.traced == traced
        assert len(recorder.keys) == 2


def _view(x: torch.Tensor) -> torch.Tensor:
    return x.view(-1)


def _transposed_in_place(x: torch.Tensor) -> torch.Tensor:
    x.t_()
    return x + 1


def _two_views(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    made = x * 2
    return made[0], made[1]


@pytest.mark.parametrize("function", [_view, _two_views])
def test_outputs_that_share_memory_are_right_or_not_kept(
    tmp_path: Path, function: Callable[[torch.Tensor], object]
) -> None:
    for _ in range(2):
        x = torch.arange(6.0).view(2, 3)
        recorder = Recorder(tmp_path)
        result = recorder.run(function, x)
        torch.testing.assert_close(result, function(x))
        if function is _view:
            assert recorder.keys == [None]
            assert recorder.traced == 1
            assert result.data_ptr() == x.data_ptr()  # type: ignore[attr-defined]


def test_settings_that_change_what_surrounds_a_graph_are_not_kept(tmp_path: Path) -> None:
    x = torch.arange(6.0).view(2, 3)
    recorder = Recorder(tmp_path)
    with torch.autocast("cpu", torch.bfloat16):
        recorder.run(lambda x: x @ x.t(), x)
    assert recorder.keys == [None]


def test_registered_rules_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(tmp_path)
    monkeypatch.setattr(default_rules(), "is_extended", True)
    recorder.run(lambda x: x + 1, torch.ones(3))
    assert recorder.keys == [None]


def test_a_damaged_entry_is_captured_anew(tmp_path: Path) -> None:
    x = torch.ones(3)
    Recorder(tmp_path).run(torch.sin, x)
    (path,) = tmp_path.glob("captured/*/*")
    path.write_bytes(path.read_bytes()[:-5] + b"xxxxx")
    recorder = Recorder(tmp_path)
    with pytest.warns(CacheWarning):
        recorder.run(torch.sin, x)
    assert recorder.traced == 1
    recorder = Recorder(tmp_path)
    recorder.run(torch.sin, x)
    assert recorder.traced == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda patch: patch.setattr("rolemesh.compiler.cache.state.versions", lambda: "other"),
        lambda patch: patch.setattr(torch.backends.mkldnn, "enabled", False, raising=False),
        lambda _: torch.set_float32_matmul_precision("medium"),
        lambda _: torch.use_deterministic_algorithms(True),
        lambda _: torch.backends.cuda.enable_flash_sdp(False),
        lambda patch: patch.setattr(torch._functorch.config, "cse", False),
    ],
    ids=["versions", "mkldnn", "matmul", "deterministic", "sdp", "functorch"],
)
def test_another_state_misses(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[pytest.MonkeyPatch], None],
) -> None:
    precision = torch.get_float32_matmul_precision()
    x = torch.ones(3)
    Recorder(tmp_path).run(torch.sin, x)
    try:
        change(monkeypatch)
        recorder = Recorder(tmp_path)
        recorder.run(torch.sin, x)
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.use_deterministic_algorithms(False)
        torch.backends.cuda.enable_flash_sdp(True)
    assert recorder.traced == 1
