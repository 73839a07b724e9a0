"""Our own converters: each makes the one GE op that it is for, with its attributes."""

from __future__ import annotations

import pytest
import torch
from tests.lowering.ge.lowered import module_of
from tests.lowering.ge.numerics import Function, compare, lowered, tensor
from torch import Tensor
from torch._guards import TracingContext, tracing

from rolemesh.lowering.flatten import as_fake, flatten
from rolemesh.lowering.ge.converters import register_converters
from rolemesh.lowering.ge.engine import running_on
from rolemesh.lowering.ge.loader import load_torchair
from rolemesh.runtime.ge.engine import ReferenceEngine
from rolemesh.runtime.ge.graph import Node

FLOAT, INT = torch.float32, torch.int64


def ran(function: Function, *inputs: Tensor) -> dict[str, Node]:
    """The GE ops that ran, by type, after a check of their results."""
    nodes: dict[str, Node] = {}
    run = lowered(function, inputs)
    engine = ReferenceEngine(observe=lambda node, _: nodes.update({node.type: node}))
    with running_on(engine):
        compare(run(*inputs), function(*inputs))
    return nodes


@pytest.mark.parametrize(
    ("function", "inputs", "kind"),
    [
        (torch.atan2, (tensor(FLOAT, 3, 5), tensor(FLOAT, 5, seed=1)), "Atan2"),
        (torch.fmod, (tensor(FLOAT, 3, 5), tensor(FLOAT, 5, seed=1)), "TruncateMod"),
        (torch.erfc, (tensor(FLOAT, 3, 5),), "Erfc"),
        (torch.trunc, (tensor(FLOAT, 3, 5) * 4,), "Trunc"),
        (torch.bitwise_xor, (tensor(INT, 3, 5), tensor(INT, 5, seed=1)), "BitwiseXor"),
        (lambda x: x << 2, (tensor(INT, 3, 5),), "LeftShift"),
        (lambda x: x >> 2, (tensor(INT, 3, 5),), "RightShift"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_elementwise(function: Function, inputs: tuple[Tensor, ...], kind: str) -> None:
    assert kind in ran(function, *inputs)


@pytest.mark.parametrize(
    ("function", "kind", "keeps"),
    [
        (lambda x: x.amax(1), "ReduceMax", False),
        (lambda x: x.amin((0, -1), keepdim=True), "ReduceMin", True),
        (lambda x: x.amax(), "ReduceMax", False),
        (lambda x: x.prod(1, keepdim=True), "ReduceProd", True),
        (torch.prod, "ReduceProd", False),
    ],
)
def test_reductions(function: Function, kind: str, keeps: bool) -> None:
    node = ran(function, tensor(FLOAT, 3, 5, 2))[kind]
    assert node.attributes.bool("keep_dims") is keeps


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("stable", [False, True])
def test_sort(stable: bool, descending: bool) -> None:
    x = tensor(INT, 3, 40)
    node = ran(lambda x: torch.sort(x, stable=stable, descending=descending)[0], x)["Sort"]
    assert node.attributes.bool("stable") is stable
    assert node.attributes.bool("descending") is descending


def test_equal_elements_keep_their_order() -> None:
    """Many of them: a sort that is not stable keeps a few in order too."""
    x = torch.arange(3000).remainder(3)
    ran(lambda x: list(x.sort(stable=True)), x)
    ran(lambda x: x.argsort(stable=True, descending=True), x)


@pytest.mark.parametrize("form", ["none", "tanh"])
def test_gelu(form: str) -> None:
    x = tensor(FLOAT, 3, 50)
    node = ran(lambda x: torch.nn.functional.gelu(x, approximate=form), x)["GeluV2"]
    assert node.attributes.str("approximate") == form


def test_registering_again_changes_nothing() -> None:
    torchair = load_torchair()
    for _ in range(2):
        register_converters(torchair)
        assert "ReduceMax" in ran(lambda x: x.amax(0), tensor(FLOAT, 3, 2))


def test_only_the_last_dim_can_be_sorted() -> None:
    """The decomposition moves other dims there; without it the converter refuses."""
    module = load_torchair().module
    register_converters(load_torchair())
    fakes = as_fake([tensor(FLOAT, 3, 4)])
    graph = flatten(module_of(lambda x: x.sort(dim=0, stable=True), 1, 2), fakes)
    context = TracingContext(fakes[0].fake_mode)
    with tracing(context), pytest.raises(ValueError, match="the last dim, not dim 0 of 2"):
        module.get_compiler(module.CompilerConfig())(graph, fakes)
