"""Where a node comes from, for people who read an error that it raised."""

from __future__ import annotations

from torch import fx

from rolemesh.compiler.ir.program import origin

__all__ = ["add_note", "describe"]


def describe(node: fx.Node) -> str:
    """One line that names a node, its op, its module path and its source line."""
    where = origin(node)
    parts = [f"%{node.name} = {node.target}"]
    if where.module:
        parts.append(f"in {where.module}")
    if where.source:
        parts.append(f"at {where.source}")
    if where.reason:
        parts.append(f"({where.reason})")
    return " ".join(parts)


def add_note(error: BaseException, node: fx.Node, rank: int | None = None) -> None:
    """Say in `error` which node, and on which rank, raised it."""
    on = f" on rank {rank}" if rank is not None else ""
    error.add_note(f"raised{on} by {describe(node)}")
