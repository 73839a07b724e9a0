"""Rows that a mask picks, computed on and written back, as a choice between all rows.

Models that give rows to experts or adapters by hand write

    y[mask] = adapter(x[mask])

where the number of rows depends on data. If every op between treats rows apart, then working on all
rows and keeping those of the mask gives the same: `y = where(mask, adapter(x), y)`.
"""

from __future__ import annotations

import torch
from torch import fx

from rolemesh.compiler.capture.apart import MixedError, RowsApart, flat_rows, picked_rows
from rolemesh.compiler.capture.editing import Editor, tensor_value

__all__ = ["rows_of_a_mask"]

aten = torch.ops.aten


def rows_of_a_mask(node: fx.Node) -> fx.Node | None:
    """What `index_put(y, [mask], f(x[mask]))` comes to on all rows, if f treats rows apart."""
    base, subscripts, rows, accumulate = (*node.args, False)[:4]
    if accumulate or not isinstance(subscripts, list | tuple) or len(subscripts) != 1:
        return None
    mask = subscripts[0]
    if not isinstance(base, fx.Node) or not isinstance(rows, fx.Node):
        return None
    if not isinstance(mask, fx.Node) or tensor_value(mask).dtype is not torch.bool:
        return None
    between = picked_rows(mask, rows)
    if not between:
        return None
    try:
        return _chosen(Editor(node, rows), base, mask, between)
    except (MixedError, RuntimeError):  # RuntimeError: an op that takes no other number of rows
        return None


def _chosen(editor: Editor, base: fx.Node, mask: fx.Node, between: list[fx.Node]) -> fx.Node:
    """`where(mask, f(x), y)`, over flat rows."""
    ndim = tensor_value(mask).ndim
    apart = RowsApart(editor, mask, lambda rows: rows)
    apart.emit(between)
    rows = apart.all_rows(between[-1])
    table = flat_rows(editor, base, ndim)
    value = tensor_value(rows)
    if apart.piece(between[-1]) is not None or value.shape != tensor_value(table).shape:
        raise MixedError
    keep = flat_rows(editor, mask, ndim)
    for _ in range(value.ndim - 1):
        keep = editor.call(aten.unsqueeze.default, keep, -1)
    result = editor.call(aten.where.self, keep, rows, table)
    if ndim == 1:
        return result
    sizes = [editor.number(size) for size in tensor_value(base).shape]
    if None in sizes:
        raise MixedError
    return editor.call(aten.view.default, result, sizes)
