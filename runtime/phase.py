"""The phase a call belongs to, when the user says it rather than leaving it to be inferred."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["current_phase", "phase"]

_PHASE: ContextVar[str | None] = ContextVar("rolemesh_phase", default=None)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Run calls of compiled models inside the block as phase `name` of their role.

    The phase is read at each call, not when the model is compiled, so one captured graph can serve
    several phases.

    Args:
        name: A phase of the role, for example `decode`. An unknown one raises RM004 at the call.
    """
    token = _PHASE.set(name)
    try:
        yield
    finally:
        _PHASE.reset(token)


def current_phase() -> str | None:
    """The phase of the innermost `phase` block; None outside of one."""
    return _PHASE.get()
