"""Slices whose bounds were read from a tensor, as reads at positions.

    start = position.item()
    ids[:, start : start + 5]

has a fixed length but a start that depends on data. `aten.index` takes the positions as a tensor,
`arange(5) + position`. A slice that would run over the end has no fixed length, and the graph
asserts that it has; so every position exists.
"""

from __future__ import annotations

import torch
from torch import fx

from rolemesh.compiler.capture.editing import Editor, argument_list, depends_on_data, tensor_value
from rolemesh.compiler.capture.scalars import FORMS

__all__ = ["slice_at_an_offset"]

aten = torch.ops.aten

_DEFAULTS = (0, None, None, 1)
"""Dim, start, end and step of a slice."""


def slice_at_an_offset(node: fx.Node) -> fx.Node | None:
    """The read that a slice with a fixed length and bounds from a tensor stands for."""
    given: list[fx.node.Argument] = [*node.args, *_DEFAULTS[len(node.args) - 1 :]]
    x, dim, start, end, step = given
    value = tensor_value(node)
    assert isinstance(dim, int)
    if step != 1 or not (_is_read(start) or _is_read(end)) or depends_on_data(value.shape[dim]):
        return None
    editor = Editor(node, node)
    size = editor.number(value.shape[dim])
    offset = _offset(editor, 0 if start is None else start)
    if size is None or offset is None:
        return None
    steps = editor.call(aten.arange.default, size, device=value.device)
    places = editor.call(aten.add.Tensor, steps, offset)
    return editor.call(aten.index.Tensor, x, [*[None] * (dim % value.ndim), places])


def _is_read(bound: object) -> bool:
    return isinstance(bound, fx.Node) and depends_on_data(bound.meta["val"])


def _offset(editor: Editor, number: object) -> int | fx.Node | None:
    """A number as the tensor `i64[]` that it was read or computed from; a plain one as it is."""
    if not isinstance(number, fx.Node):
        return number if isinstance(number, int) else None
    read = argument_list(number, aten._local_scalar_dense.default)
    if read:
        tensor = tensor_value(read[0])
        if tensor.dtype is not torch.int64:
            return None
        return editor.call(aten.view.default, read[0], []) if tensor.ndim else read[0]
    if number.target not in FORMS or isinstance(number.args[1], fx.Node):
        return None
    first = _offset(editor, number.args[0])
    return None if first is None else editor.call(FORMS[number.target], first, number.args[1])
