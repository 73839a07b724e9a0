"""Stages in torch's own structured trace, while the compiler works.

Where TORCH_TRACE names a folder, torch writes its trace there, and `tlparse` makes a page of it.
Each stage is an artifact. A backend compiles when it is called, outside of any frame that Dynamo
compiles, so stages stand under the compile id `-_-_-_-`. `compiler/debug/export/torch_trace.py`
writes such artifacts from a run directory.
"""

from __future__ import annotations

import torch._logging

from rolemesh.compiler.dump.files import stage_name
from rolemesh.compiler.ir.program import Program
from rolemesh.compiler.ir.text import program_text

__all__ = ["trace_stage"]


def trace_stage(program: Program, name: str) -> None:
    """Write the Program after its last pass to the trace; does nothing if torch writes none.

    Args:
        program: The Program.
        name: What it is called, `<role>.<phase>`.
    """
    stage = stage_name(len(program.history) - 1, program.history[-1])
    torch._logging.trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": f"{name}.{stage}", "encoding": "string"},
        payload_fn=lambda: program_text(program),
        expect_trace_id=False,
    )
