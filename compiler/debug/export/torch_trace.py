"""Stages as a structured trace of torch, which `tlparse` makes a page of.

The records are those of `torch._logging.trace_structured`: a prefix in the form of glog, metadata
as JSON, and a payload of lines that start with a tab. Every program is a compile id of its own, and
every stage an artifact of it. Times and threads are zero: equal runs give equal traces.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator

from rolemesh.compiler.dump.files import stage_name
from rolemesh.compiler.dump.reader import Stage

__all__ = ["trace_text"]

_PREFIX = "V0101 00:00:00.000000 0 rolemesh/run:1]"


def trace_text(stages: Iterable[Stage]) -> str:
    """The trace: for each stage its text, and its JSON.

    Args:
        stages: The stages, those of one program after each other.
    """
    return "".join(_records(stages))


def _records(stages: Iterable[Stage]) -> Iterator[str]:
    frames: dict[str, int] = {}
    for stage in stages:
        frame = frames.setdefault(stage.program, len(frames))
        program = stage.program.replace("/", ".")
        name = f"{program}.{stage_name(stage.data['number'], stage.name)}"
        if stage.text:
            yield _record(name, "string", stage.text, frame)
        yield _record(name, "json", json.dumps(stage.data, ensure_ascii=False), frame)


def _record(name: str, encoding: str, payload: str, frame: int) -> str:
    metadata = {
        "artifact": {"name": name, "encoding": encoding},
        "frame_id": frame,
        "frame_compile_id": 0,
        "attempt": 0,
        "has_payload": hashlib.md5(payload.encode(), usedforsecurity=False).hexdigest(),
    }
    lines = "".join(f"\n\t{line}" for line in payload.split("\n"))
    return f"{_PREFIX} {json.dumps(metadata)}{lines}\n"
