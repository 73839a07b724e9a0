"""Choosing the next token from logits: greedy, or drawn with a seed of the request's own.

Every rank draws on its own, from the whole logits that each of them has, with a generator that
depends on nothing but the request: so all ranks choose the same token, and a request's tokens do
not depend on what else is served.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from rolemesh.compiler.ir.errors import RolemeshError

__all__ = ["Sampler", "Sampling"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: Logits are divided by it; 0 takes the likeliest token.
        top_k: Draw from this many likeliest tokens; 0 for all.
        top_p: Draw from the likeliest tokens whose probabilities sum up to this much, at least one.
        seed: Seed of the request's generator.

    Raises:
        RolemeshError: RM018 for a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        problems = (
            ("temperature", self.temperature, self.temperature >= 0, "at least 0"),
            ("top_k", self.top_k, self.top_k >= 0, "at least 0"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "more than 0 and at most 1"),
        )
        for name, value, fits, range_ in problems:
            if not fits:
                raise RolemeshError(
                    "RM018",
                    f"{name} is {value!r}",
                    where="sampling options",
                    why=f"it must be {range_}",
                    fix=f"pass a {name} of {range_}",
                )


@dataclass
class Sampler:
    """Chooses the tokens of one request.

    Attributes:
        sampling: How.
    """

    sampling: Sampling
    _generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(self.sampling.seed)

    def __call__(self, logits: torch.Tensor) -> int:
        """The next token.

        Args:
            logits: `[vocabulary]`, on any device and of any floating dtype.
        """
        how = self.sampling
        if how.temperature == 0:
            return int(logits.argmax())
        scores, order = (logits.detach().float().cpu() / how.temperature).sort(descending=True)
        probabilities = scores.softmax(-1)
        if how.top_k:
            probabilities[how.top_k :] = 0
        if how.top_p < 1:
            before = probabilities.cumsum(-1) - probabilities
            total = probabilities.sum()
            probabilities[before >= how.top_p * total] = 0
        return int(order[torch.multinomial(probabilities, 1, generator=self._generator)])
