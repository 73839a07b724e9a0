"""Running a lowered GE graph on the ranks that are processes."""

from __future__ import annotations

import torch

from rolemesh.lowering.ge.engine import running_on
from rolemesh.lowering.ge.options import GeOptions
from rolemesh.lowering.targets import Runnable
from rolemesh.runtime.ge.engine import ReferenceEngine
from rolemesh.runtime.ge.process_groups import ProcessGroups

__all__ = ["on_process_groups"]


def on_process_groups(run: Runnable, options: GeOptions) -> Runnable:
    """Let a lowered graph run on the reference executor, with collectives over process groups.

    With CANN the graph runs on the NPU, and nothing of this is used.
    """
    engine = ReferenceEngine(ProcessGroups(), seed=options.order_seed)

    def running(*args: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        with running_on(engine):
            return run(*args)

    return running
