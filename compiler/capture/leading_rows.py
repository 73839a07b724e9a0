"""Rows that a mask picks, computed on and scattered, as all rows with those of the mask in front.

Vision-language models drop images that are padding, and put what the tower makes of the others in
the place of the tokens that stand for it:

    y = masked_scatter(y, is_image, tower(x[mask]))

where the number of images depends on data. `masked_scatter` reads its source from the front, as
far as it needs it. So if every op between treats rows apart, all rows do as well as those of the
mask, if those come first: `tower(x[argsort(~mask)])`. The price is the work on images of padding.

A model may return such rows too, or pieces of them. The Program then gives all rows and where the
returned ones start and end, and they are cut out when it has run (`cut_rows`).
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from rolemesh.compiler.capture.apart import (
    MixedError,
    RowsApart,
    flat_rows,
    is_pick,
    picked_rows,
)
from rolemesh.compiler.capture.editing import Editor, argument_list, depends_on_data, tensor_value
from rolemesh.compiler.capture.entry import cut_rows

__all__ = ["rows_in_front"]

aten = torch.ops.aten


def rows_in_front(node: fx.Node) -> fx.Node | None:
    """`masked_scatter(y, mask2, f(x[mask]))` on all rows, if f treats rows apart."""
    base, taking, source = node.args
    assert isinstance(source, fx.Node)
    mask = _mask(source)
    if mask is None:
        return None
    between = picked_rows(mask, source)
    if not between:
        return None
    editor = Editor(node, source)
    front = _Front(editor, mask)
    try:
        front.apart.emit(between)
        if front.apart.piece(source) is not None:
            return None
        result = editor.call(node.target, base, taking, front.apart.all_rows(source))
        returned = set(between).intersection(_returned(node.graph))
        cuts = {item: front.cut(item) for item in returned}
    except (MixedError, RuntimeError):  # RuntimeError: an op that takes no other number of rows
        return None
    for item, cut in cuts.items():
        node.graph.output_node().replace_input_with(item, cut)
    return result


def _mask(source: fx.Node) -> fx.Node | None:
    """The mask that picked the rows from which a value of a size that depends on data comes."""
    seen: set[fx.Node] = set()
    pending = [source]
    while pending:
        node = pending.pop()
        if node in seen or not depends_on_data(node.meta.get("val")):
            continue
        seen.add(node)
        arguments = argument_list(node, aten.index.Tensor)
        if arguments and len(arguments[1]) == 1:
            mask: fx.Node = arguments[1][0]
            if is_pick(node, mask) and tensor_value(mask).dtype is torch.bool:
                return mask
        pending += node.all_input_nodes
    return None


def _returned(graph: fx.Graph) -> list[fx.Node]:
    return graph.output_node().all_input_nodes


class _Front:
    """All rows, those of a mask in front and in order."""

    def __init__(self, editor: Editor, mask: fx.Node) -> None:
        self._editor = editor
        self._mask = mask
        self._order: fx.Node | None = None
        self.apart = RowsApart(editor, mask, self._arranged)

    def _arranged(self, rows: fx.Node) -> fx.Node:
        call = self._editor.call
        if self._order is None:
            flat = flat_rows(self._editor, self._mask, tensor_value(self._mask).ndim)
            left_out = call(aten._to_copy.default, call(aten.logical_not.default, flat),
                            dtype=torch.int32)  # fmt: skip
            ordered = call(aten.sort.stable, left_out, stable=True, dim=0)
            self._order = call(operator.getitem, ordered, 1)
        return call(aten.index_select.default, rows, 0, self._order)

    def cut(self, item: fx.Node) -> fx.Node:
        """What a model returns: the rows of the mask, or a piece of them."""
        call = self._editor.call
        made = self.apart.all_rows(item)
        piece = self.apart.piece(item)
        if piece is None:
            bounds = [call(aten.sum.default, self._mask)]
        else:
            counts = piece.counts
            bounds = counts[:1]
            for count in counts[1 : piece.number + 1]:
                bounds = [call(aten.add.Tensor, bounds[0], count), bounds[0]]
        args: tuple[fx.node.Argument, ...] = (self.apart.unit(made), made, *bounds)
        with made.graph.inserting_before(made.graph.output_node()):
            cut = made.graph.create_node("call_function", cut_rows, args)
        cut.meta.update(item.meta)
        return cut
