"""What one rank holds, in bytes: what analyses of a Program and of a recorded stage both give.

This module imports no torch, so that reading a run is quick.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MemoryAnalysis"]


@dataclass(frozen=True)
class MemoryAnalysis:
    """Bytes one rank holds.

    Attributes:
        weights: Local shards of parameters, buffers and constants; for layer-sharded weights the
            largest share of any rank.
        caches: Local shards of tensors the program updates.
        pool: Buffers that received weights take in turn.
        temporaries: Most bytes of intermediate values alive at once, in graph order.
    """

    weights: int
    caches: int
    pool: int
    temporaries: int

    @property
    def total(self) -> int:
        """The sum."""
        return self.weights + self.caches + self.pool + self.temporaries
