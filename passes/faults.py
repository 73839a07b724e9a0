"""The error of a Program that breaks an invariant."""

from __future__ import annotations

from typing import NoReturn

from torch import fx

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.program import Program, origin

__all__ = ["fail"]


def fail(program: Program, node: fx.Node, what: str, why: str) -> NoReturn:
    """Raise the error.

    Args:
        program: The Program.
        node: The node that breaks it.
        what: What the node is or does, to follow its name.
        why: What holds of every partitioned Program.

    Raises:
        RolemeshError: RM016.
    """
    where = origin(node)
    raise RolemeshError(
        "RM016",
        what=f"%{node.name} {what}",
        where=f"program {program.name} after {' '.join(program.history)}; "
        f"module {where.module or '?'} at {where.source or '?'}",
        why=why,
        fix="this is a defect of the pass that made the node: report it with the program's text",
    )
