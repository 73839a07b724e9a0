"""Sizes of calls: how many rows and tokens programs are made for, and the padding up to them.

A decode call is padded to the next bucket of rows. A prompt is read in chunks: of any length if one
prefill program serves all lengths, else padded to the next of the prefill sizes. Layers with states
would take a pad for a token, so that for models with such layers a chunk is exactly as long as one
of the sizes, and sizes go down to 1. Where a model reads a state only if tokens come one by one,
all chunks of a prompt after the first are one token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rolemesh.compiler.ir.errors import RolemeshError

__all__ = ["Sizes", "decode_buckets", "prefill_lengths"]

_LEAST_SYMBOLIC = 2
"""Least extent that torch takes for a symbolic size: it makes programs of their own for 0 and 1."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of an engine.

    Attributes:
        buckets: Numbers of rows of a decode call, ascending.
        prefill: Numbers of tokens of a prefill call, ascending; empty for any number.
        most: Most tokens of a prefill call.
        exact: Whether a prefill call must have no pads.
        continues: Whether a call of several tokens may go on from a state.
    """

    buckets: tuple[int, ...]
    prefill: tuple[int, ...]
    most: int
    exact: bool
    continues: bool = True

    def bucket(self, rows: int) -> int:
        """The smallest bucket for a number of rows that is at most the largest bucket."""
        return next(bucket for bucket in self.buckets if bucket >= rows)

    def chunk(self, tokens: int, *, fresh: bool) -> int:
        """How many of a prompt's remaining tokens the next call reads.

        Args:
            tokens: Number of remaining tokens.
            fresh: Whether they are the prompt's first ones.
        """
        if not self.exact:
            return min(tokens, self.most)
        if not fresh and not self.continues:
            return 1
        return max(size for size in self.prefill if size <= min(tokens, self.most))

    def padded(self, tokens: int) -> int:
        """Tokens of the call that reads a chunk."""
        if not self.prefill:
            return max(tokens, _LEAST_SYMBOLIC)
        return next(size for size in self.prefill if size >= tokens)


def decode_buckets(buckets: Sequence[int] | None, slots: int, unit: int) -> tuple[int, ...]:
    """Check a list of decode buckets, or choose one.

    Args:
        buckets: As the user gives them; None for doubled units up to all slots.
        slots: Number of slots.
        unit: What each must be a multiple of: the ranks that share the rows of a batch.

    Raises:
        RolemeshError: RM018 for a list that is empty or has a number that does not fit.
    """
    if buckets is None:
        found = [unit]
        while found[-1] < slots:
            found.append(min(2 * found[-1], -(-slots // unit) * unit))
        return tuple(found)
    problem = ""
    if not buckets:
        problem = "it is empty"
    elif wrong := [size for size in buckets if not isinstance(size, int) or size < 1]:
        problem = f"{wrong[0]!r} is not a positive number of requests"
    elif wrong := [size for size in buckets if size % unit]:
        problem = f"{wrong[0]} is not a multiple of {unit}, the ranks that share a batch's requests"
    elif len(set(buckets)) < len(buckets):
        problem = "a number is there twice"
    if problem:
        raise RolemeshError(
            "RM018",
            f"bad decode buckets {list(buckets)}",
            where="option buckets of rolemesh.Engine",
            why=problem,
            fix=f"pass different multiples of {unit}, for example {[unit, 2 * unit]}",
        )
    return tuple(sorted(buckets))


def prefill_lengths(sizes: Sequence[int] | None, max_len: int, exact: bool) -> tuple[int, ...]:
    """Check a list of prefill lengths, or choose powers of two.

    Args:
        sizes: As the user gives them; None for powers of two up to `max_len`.
        max_len: Tokens a slot can hold.
        exact: Whether calls must have no pads.

    Raises:
        RolemeshError: RM018 for a list that is empty or has a number that does not fit.
    """
    if sizes is None:
        found = [1 if exact else min(16, max_len)]
        while 2 * found[-1] <= max_len:
            found.append(2 * found[-1])
        return tuple(found) if exact or found[-1] == max_len else (*found, max_len)
    problem = ""
    if not sizes:
        problem = "it is empty"
    elif wrong := [n for n in sizes if not isinstance(n, int) or not 1 <= n <= max_len]:
        problem = f"{wrong[0]!r} is not between 1 and the {max_len} tokens that a slot holds"
    elif exact and 1 not in sizes:
        problem = "1 is missing, and layers with states take no pads"
    if problem:
        raise RolemeshError(
            "RM018",
            f"bad prefill sizes {list(sizes)}",
            where="option prefill_sizes of rolemesh.Engine",
            why=problem,
            fix=f"pass numbers of tokens up to {max_len}" + (", and 1 among them" * exact),
        )
    return tuple(sorted(set(sizes)))
