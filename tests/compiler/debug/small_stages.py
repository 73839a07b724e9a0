"""Small partitioned stages made of plain data, for tests of what reads stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rolemesh.compiler.dump.reader import Stage
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.traffic import received_bytes

__all__ = ["collective", "node", "stage"]


def node(
    name: str,
    op: str,
    operands: Sequence[str] = (),
    shape: Sequence[int | str] = (),
    dtype: str = "float32",
    **more: object,
) -> dict[str, Any]:
    """A node with one result of a local shape, which is its logical one too."""
    return {
        "name": name,
        "op": op,
        "args": [{"node": operand} for operand in operands],
        "types": [{"dtype": dtype, "shape": list(shape)}],
        "local": [list(shape)],
        **more,
    }


def collective(
    name: str,
    op: str,
    operand: str,
    axes: Mapping[str, int],
    shape: Sequence[int],
    module: str = "",
    owner: int | None = None,
) -> dict[str, Any]:
    """A collective of fp32 tensors of a shape, over axes of these sizes."""
    kind = op.removeprefix("mesh.").removesuffix("_start")
    ranks = Mesh(axes).size
    size = 4
    for extent in shape:
        size *= extent
    moved = int(received_bytes(kind, size, ranks))
    kwargs = {"axes": list(axes)} | ({} if owner is None else {"owner": owner})
    record = {"op": kind, "axes": list(axes), "shape": list(shape), "bytes": moved}
    return node(name, op, [operand], shape, kwargs=kwargs, collective=record, module=module)


def stage(
    nodes: Sequence[Mapping[str, Any]],
    mesh: Mapping[str, int],
    history: Sequence[str] = ("partition",),
    **head: object,
) -> Stage:
    """The stage of these nodes."""
    program = {"mesh": dict(mesh), "history": list(history), "inputs": [], "outputs": [], **head}
    data = {"program": program, "nodes": list(nodes)}
    return Stage("role/phase", len(history), history[-1], data, "")
