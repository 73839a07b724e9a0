"""A rank that is alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist

from rolemesh.runtime import store


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group of this process alone, and a store of its own."""
    monkeypatch.setattr(store, "_DEFAULT", store.Store())
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
