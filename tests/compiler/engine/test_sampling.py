"""Draws follow the probabilities that the options leave."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from rolemesh.compiler.engine.sampling import Sampler, Sampling

PROBABILITIES = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])
DRAWS = 3000


def _counts(top_k: int = 0, top_p: float = 1.0) -> Counter[int]:
    sampler = Sampler(Sampling(temperature=1.0, top_k=top_k, top_p=top_p, seed=5))
    return Counter(sampler(PROBABILITIES.log()) for _ in range(DRAWS))


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 2}, [1, 3]),
        ({"top_k": 9}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.7}, [1, 3]),
        ({"top_p": 0.71}, [1, 3, 4]),
        ({"top_p": 0.01}, [1]),
        ({"top_k": 3, "top_p": 0.5}, [1, 3]),
    ],
)
def test_draws_follow_the_probabilities(options: dict[str, float], kept: list[int]) -> None:
    counts = _counts(**options)
    assert sorted(counts) == kept
    total = float(PROBABILITIES[kept].sum())
    for token in kept:
        assert counts[token] / DRAWS == pytest.approx(float(PROBABILITIES[token]) / total, abs=0.04)


def test_temperature_zero_takes_the_likeliest() -> None:
    sampler = Sampler(Sampling())
    assert {sampler(PROBABILITIES.log()) for _ in range(3)} == {1}


def test_a_low_temperature_sharpens() -> None:
    cold = Sampler(Sampling(temperature=0.1, seed=1))
    counts = Counter(cold(PROBABILITIES.log()) for _ in range(300))
    assert counts[1] > 250


def test_equal_seeds_draw_equal_tokens() -> None:
    draws = [
        [sampler(PROBABILITIES.log()) for _ in range(20)]
        for sampler in (Sampler(Sampling(temperature=1.0, seed=seed)) for seed in (3, 3, 4))
    ]
    assert draws[0] == draws[1] != draws[2]
