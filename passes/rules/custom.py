"""Rules of the user's own ops."""

from __future__ import annotations

import re

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.passes.rules.defaults import default_rules
from rolemesh.passes.rules.einsum import parse
from rolemesh.passes.rules.registry import RuleFunction

__all__ = ["register_rule"]

_OP_NAME = re.compile(r"[A-Za-z_]\w*::\w+(\.\w+)?")


def register_rule(name: str, spec: str | RuleFunction) -> None:
    """Say how a custom op shards, or replace the rule of an op that has one.

    Args:
        name: `library::op` for all overloads, or `library::op.overload` for one.
        spec: Dims of the tensor operands and results, as in an einsum: a name on the left only is
            summed away, `name!` must stay whole on every rank (see `rolemesh.passes.rules.einsum`).
            Or a function from an `OpCall` to its `Rule`.

    Raises:
        RolemeshError: RM022 if the name or the spec is malformed.

    Example:
        >>> register_rule("my_kernels::rms_norm", "... d!, d! -> ... d!")
        >>> register_rule("my_kernels::int4_mm", "m k, k n, n -> m n")
    """
    if not _OP_NAME.fullmatch(name):
        raise RolemeshError(
            "RM022",
            what=f"{name!r} does not name an op",
            where=f"register_rule({name!r}, ...)",
            why="ops are found by the name they were registered with",
            fix="write library::op or library::op.overload",
        )
    default_rules().register(name, parse(spec, name) if isinstance(spec, str) else spec)
