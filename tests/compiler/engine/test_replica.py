"""The smallest call of a role, by whose program an engine learns where its weights lie."""

from __future__ import annotations

from typing import NoReturn

import pytest
import torch

from rolemesh.compiler.engine.cache import CachePlan, TensorPlan
from rolemesh.compiler.engine.replica import Replica
from rolemesh.compiler.engine.rows import CacheRows
from rolemesh.compiler.engine.sizes import Sizes
from rolemesh.compiler.roles import role_named

KEYS = TensorPlan((4, 2, 24, 5), torch.float32, 2)
STATE = TensorPlan((4, 7, 5), torch.float32, None)


def runs(*_: object, **__: object) -> NoReturn:
    raise AssertionError("nothing is run")


@pytest.mark.parametrize(
    ("role", "tensor", "prefill", "expected"),
    [
        ("pd_mixed", KEYS, (), ("decode", (2, 1), True)),
        ("decode", STATE, (1, 4), ("decode", (2, 1), False)),
        ("prefill", KEYS, (8, 24), ("prefill", (1, 8), True)),
        ("prefill", STATE, (1, 4), ("prefill", (1, 1), True)),
        ("prefill", KEYS, (), ("prefill", (1, 2), True)),  # of any length, which starts at two
    ],
)
def test_smallest_call(
    role: str,
    tensor: TensorPlan,
    prefill: tuple[int, ...],
    expected: tuple[str, tuple[int, int], bool],
) -> None:
    cpu = torch.device("cpu")
    plan = CachePlan({"0": tensor}, 3, 24)
    sizes = Sizes((2, 6), prefill, 24, exact=plan.has_states)
    replica = Replica(runs, CacheRows(plan, cpu, None, ""), sizes, role_named(role), 11, cpu)
    phase, batch, fresh = replica.smallest_call()
    assert (phase, batch.size, fresh) == expected
    assert (batch.rows == plan.scratch).all()
    assert (batch.slots == plan.scratch).all()
