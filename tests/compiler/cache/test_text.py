"""Plain data as text: equal for equal values only."""

from __future__ import annotations

import itertools

import pytest
import torch

from rolemesh.compiler.cache.text import NotCacheableError, digest, plain_text
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.spec import P
from rolemesh.passes.cost import CostTable

DIFFERENT = [
    None,
    0,
    False,
    0.0,
    -0.0,
    1,
    True,
    "1",
    b"1",
    (),
    [],
    {},
    (1,),
    [1],
    (1, (2,)),
    ((1, 2),),
    {"a": 1},
    {1},
    slice(1),
    ...,
    float("nan"),
    torch.float32,
    torch.device("cpu"),
    torch.contiguous_format,
    "torch.float32",
    CostTable(),
    CostTable(call=1.0),
    P("tp"),
    P("tp", units={0: 2}),
    Mesh({"tp": 2}),
    Mesh({"tp": 4}),
    Mesh({"dp": 2}),
]


def test_unequal_values_have_unequal_texts() -> None:
    for first, second in itertools.combinations(DIFFERENT, 2):
        assert plain_text(first) != plain_text(second)


def test_order_counts_where_it_means_something() -> None:
    assert plain_text({"a": 1, "b": 2}) == plain_text({"b": 2, "a": 1})
    assert plain_text([1, 2]) != plain_text([2, 1])


@pytest.mark.parametrize("value", [object(), len, torch.ones(1), [lambda: 0], CostTable])
def test_other_objects_are_refused(value: object) -> None:
    with pytest.raises(NotCacheableError, match="is no plain data"):
        plain_text(value)


def test_a_digest_keeps_its_parts_apart() -> None:
    assert digest("ab", "c") != digest("a", "bc") != digest("abc")
