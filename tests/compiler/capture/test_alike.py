"""What makes layers alike."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from torch import nn

from rolemesh.compiler.capture.alike import Alike, groups_alike, held_by


class Rates:
    """An object of Python's, which can be looked into."""

    def __init__(self, rate: float) -> None:
        self.rate = rate


class Slotted:
    """One that cannot."""

    __slots__ = ("rate",)


CONFIG = Slotted()


class Layer(nn.Module):
    """A layer with one of everything."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.layer_idx = index
        self.config = CONFIG
        self.linear = nn.Linear(3, 4)
        self.act = nn.functional.silu
        self.rates = {"a": [Rates(0.5), 2], "b": (None, torch.float16)}
        self.part = functools.partial(torch.add, alpha=2)
        self.register_buffer("scale", torch.ones(5))
        self.mine = self.again

    def again(self) -> None:
        """A method that the layer holds bound to itself."""


def tie(layer: Layer) -> None:
    layer.linear.bias = layer.linear.weight


CHANGES: dict[str, Callable[[Layer], object]] = {
    "nothing": lambda layer: None,
    "weight": lambda layer: layer.linear.weight.data.fill_(7),
    "index": lambda layer: setattr(layer, "layer_idx", 5),
    "config": lambda layer: setattr(layer, "config", Slotted()),
    "kind of a value": lambda layer: setattr(layer, "layer_idx", True),
    "activation": lambda layer: setattr(layer, "act", nn.functional.gelu),
    "deep inside": lambda layer: setattr(layer.rates["a"][0], "rate", 0.25),
    "another item": lambda layer: layer.rates.update(c=1),
    "partial": lambda layer: setattr(layer, "part", functools.partial(torch.add, alpha=3)),
    "bound to another": lambda layer: setattr(layer, "mine", Layer(0).again),
    "hook": lambda layer: layer.register_forward_hook(lambda *_: None),
    "mode": lambda layer: layer.train(),
    "dtype": lambda layer: layer.bfloat16(),
    "strides": lambda layer: setattr(layer.linear.weight, "data", torch.ones(3, 4).T),
    "gradient": lambda layer: layer.linear.weight.requires_grad_(False),
    "tied": tie,
    "a module more": lambda layer: layer.add_module("more", nn.Linear(1, 1)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_layers_are_alike_but_for_weights_and_place(change: str) -> None:
    first, other = Layer(1).eval(), Layer(2).eval()
    CHANGES[change](other)
    assert Alike(1).holds(2, [first], [other]) is (change in ("nothing", "weight"))


def test_a_copy_of_an_object_that_cannot_be_looked_into() -> None:
    first, other = Layer(1), copy.deepcopy(Layer(1))
    assert other.config is not first.config
    assert not Alike(1).holds(1, [first], [other])


def test_layers_that_share_a_tensor_are_no_group() -> None:
    layers = nn.ModuleList(Layer(index) for index in range(5))
    ((group, compared),) = groups_alike(layers, None)
    assert [index for index, _ in group] == [0, 1, 2, 3, 4]
    assert id(layers[3].linear.weight) in compared  # type: ignore[union-attr]
    layers[3].linear.weight = layers[2].linear.weight  # type: ignore[union-attr]
    assert list(groups_alike(layers, None)) == []


def test_layers_hold_their_tensors_in_one_order() -> None:
    names = [held.name for held in held_by("stack.3", Layer(3))]
    assert names == ["stack.3.scale", "stack.3.linear.weight", "stack.3.linear.bias"]
