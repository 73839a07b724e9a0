"""Names of graph inputs, from the expressions that Dynamo gives for them."""

from __future__ import annotations

import pytest
import torch

from rolemesh.compiler.capture.sources import Frame, input_names, module_path, readable, source_line
from rolemesh.compiler.ir.program import InputKind

MODEL = torch.nn.Linear(1, 1)
WRAPPER = Frame({"self": MODEL}, ("input_ids", "attention_mask"), "args", "kwargs")
VALUE = torch.zeros(1)

PARAMETER, BUFFER, USER = InputKind.PARAMETER, InputKind.BUFFER, InputKind.USER


@pytest.mark.parametrize(
    ("source", "name", "kind"),
    [
        ("L['self']._parameters['weight']", "weight", PARAMETER),
        (
            "L['self']._modules['model']._modules['layers']._modules['0']._buffers['scale']",
            "model.layers.0.scale",
            BUFFER,
        ),
        ("L['self'].blocks[1]._parameters['weight']", "blocks.1.weight", PARAMETER),
        ("G['net']._modules['0']._parameters['bias']", "0.bias", PARAMETER),
        ("L['self'].table", "table", BUFFER),
        ("L['self'].tables['k']", "tables.k", BUFFER),
        ("dict.__getitem__(L['self']._modules, 'a')._parameters['w']", "a.w", PARAMETER),
        ("L['input_ids']", "input_ids", USER),
        ("L['args'][0]", "input_ids", USER),
        ("L['args'][1]", "attention_mask", USER),
        ("L['args'][2]", "args[2]", USER),
        ("L['kwargs']['past'].layers[0].keys", "past.layers[0].keys", USER),
        ("L['cache']['k'][3]", "cache['k'][3]", USER),
        ("L['x'].size()[0]", "x.shape[0]", USER),
        ("G['TABLE']", "TABLE", USER),
        ("list(L['x'])[0]", "list(L['x'])[0]", USER),
        ("not an expression", "not an expression", USER),
    ],
)
def test_name_and_kind(source: str, name: str, kind: InputKind) -> None:
    assert input_names([source], [VALUE], WRAPPER) == ((name, kind),)


def test_a_parameter_outside_any_registry() -> None:
    (found,) = input_names(["L['self'].alias"], [torch.nn.Parameter(VALUE)], WRAPPER)
    assert found == ("alias", PARAMETER)


def test_positional_names_apply_to_wrappers_only() -> None:
    (found,) = input_names(["L['args'][0]"], [VALUE], Frame(varargs="args"))
    assert found.name == "args[0]"


def test_two_models_are_told_apart_by_their_variables() -> None:
    sources = [f"L['{root}']._modules['up']._parameters['weight']" for root in ("draft", "main")]
    names = [entry.name for entry in input_names(sources, [VALUE, VALUE], Frame())]
    assert names == ["draft.up.weight", "main.up.weight"]


def test_names_are_unique_whatever_the_sources() -> None:
    sources = ["L['a']._parameters['w']", "G['a']._parameters['w']"]
    names = [entry.name for entry in input_names(sources, [VALUE, VALUE], Frame())]
    assert names == sources


def test_module_path_is_the_innermost_module() -> None:
    stack = {"1": ("L['self'].model", object), "2": ("L['self'].model.layers.0", object)}
    assert module_path(stack) == "model.layers.0"
    assert module_path({"1": ("L['self']", object)}) == ""
    assert module_path({"1": ("G['net'].up", object)}) == "up"
    assert module_path(None) == ""


def test_source_line_is_the_innermost_one_of_the_model() -> None:
    trace = (
        '  File "/home/me/modeling_x.py", line 7, in forward\n    y = self.up(x)\n'
        f'  File "{torch.__file__}", line 9, in forward\n    return F.linear(x)\n'
    )
    assert source_line(trace) == "modeling_x.py:7"
    assert source_line(None) == ""


def test_readable_writes_paths_as_the_author_would() -> None:
    text = "tensor 'L['args'][0]' size mismatch; L['kwargs']['past'].n == 3; L['self'].k == 1"
    assert readable(text, WRAPPER) == "tensor 'input_ids' size mismatch; past.n == 3; self.k == 1"
