"""Moves in pieces and rounds, so that no process stages more than a given number of bytes.

A move between processes is staged twice: where it is sent and where it arrives. A round's moves are
staged at once; rounds follow one another. Moves within a process are copies and stage nothing.

Rounds are filled in order: a move goes to the first round, not before the last one of its sender or
its receiver, in which both still have room.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rolemesh.runtime.reshard.moves import Ints, Moves, Places

__all__ = ["Staged", "stage"]


@dataclass(frozen=True, eq=False)
class Staged:
    """The moves of one tensor, in rounds.

    Attributes:
        moves: The moves, by round, those that move nothing between processes first.
        rounds: The round of each; -1 for those within a process.
        count: Number of rounds.
        nbytes: Bytes of each.
        peaks: Most bytes that each process stages in a round.
    """

    moves: Moves
    rounds: Ints
    count: int
    nbytes: Ints
    peaks: Ints

    @property
    def moved_bytes(self) -> int:
        """Bytes that go from one process to another."""
        return int(self.nbytes[self.rounds >= 0].sum())

    @property
    def kept_bytes(self) -> int:
        """Bytes that stay in their process."""
        return int(self.nbytes[self.rounds < 0].sum())


def stage(moves: Moves, itemsize: int, limit: int, places: Places, processes: int) -> Staged:
    """Cut moves into pieces that can be staged, and put them into rounds.

    Args:
        moves: The moves of one tensor.
        itemsize: Bytes of an element, at most `limit`.
        limit: Most bytes that a process stages at once.
        places: Where the ranks are.
        processes: Number of processes.
    """
    sources = np.array(places.sources, np.int64)
    targets = np.array(places.targets, np.int64)
    away = sources[moves.source] != targets[moves.target]
    moves = _split(moves, away, limit // itemsize)
    sender, receiver = sources[moves.source], targets[moves.target]
    nbytes = moves.elements * itemsize
    away = sender != receiver
    # Neighbours in this order have other senders and receivers: a round then serves many of them.
    turn = (moves.source - moves.target) % max(1, len(sources))
    order = np.lexsort((np.arange(len(moves)), moves.target, turn, away))
    moves, away, nbytes = moves.take(order), away[order], nbytes[order]
    sender, receiver = sender[order], receiver[order]
    rounds, peaks = _rounds(sender, receiver, np.where(away, nbytes, 0), limit, processes)
    rounds = np.where(away, rounds, -1)
    order = np.argsort(rounds, kind="stable")
    count = int(rounds.max(initial=-1)) + 1
    return Staged(moves.take(order), rounds[order], count, nbytes[order], peaks)


def _rounds(
    sender: Ints, receiver: Ints, nbytes: Ints, limit: int, processes: int
) -> tuple[Ints, Ints]:
    """The round of each move, and what each process stages at most."""
    total = np.zeros(processes, np.int64)
    np.add.at(total, sender, nbytes)
    np.add.at(total, receiver, nbytes)
    if total.max(initial=0) <= limit:
        return np.zeros(len(nbytes), np.int64), total
    last, load, peak = ([0] * processes for _ in range(3))
    rounds = []
    for a, b, size in zip(sender.tolist(), receiver.tolist(), nbytes.tolist(), strict=True):
        if not size:
            rounds.append(0)
            continue
        number = max(last[a], last[b])
        if any(last[p] == number and load[p] + size > limit for p in (a, b)):
            number += 1
        for process in (a, b):
            load[process] = size + (load[process] if last[process] == number else 0)
            last[process] = number
            peak[process] = max(peak[process], load[process])
        rounds.append(number)
    return np.array(rounds, np.int64), np.array(peak, np.int64)


def _split(moves: Moves, away: NDArray[np.bool_], most: int) -> Moves:
    """Moves between processes, none of more than `most` elements."""
    for dim in range(moves.size.shape[1]):
        inner = moves.size[:, dim + 1 :].prod(axis=1, dtype=np.int64)
        # Cut this dim into runs of whole inner slices; if not even one fits, into single indices,
        # which the next dim cuts.
        step = np.maximum(1, most // np.maximum(1, inner))
        step = np.where(away & (moves.elements > most), step, np.maximum(1, moves.size[:, dim]))
        pieces = -(-moves.size[:, dim] // step)
        if (pieces == 1).all():
            continue
        row = np.repeat(np.arange(len(moves)), pieces)
        ordinal = np.arange(len(row)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        offset = ordinal * step[row]
        away, moves = away[row], moves.take(row)
        moves.size[:, dim] = np.minimum(step[row], moves.size[:, dim] - offset)
        for box in (moves.start, moves.source_at, moves.target_at):
            box[:, dim] += offset
    return moves
