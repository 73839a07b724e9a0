"""Small stages made by hand, for tests of what reads them."""

from __future__ import annotations

from collections.abc import Sequence

from rolemesh.compiler.dump.reader import Stage

__all__ = ["collective", "node", "stage_of"]


def node(name: str, op: str, *operands: str, **data: object) -> dict[str, object]:
    """A node's entry; `kinds` is `f32[6]` unless given."""
    arguments = [{"node": operand} for operand in operands]
    entry = {"name": name, "op": op, "args": arguments, "kinds": ["f32[6]"]}
    return {key: value for key, value in {**entry, **data}.items() if value != []}


def collective(op: str, size: int, *axes: str) -> dict[str, object]:
    """What a node says of what it moves."""
    return {"op": op, "axes": list(axes or ("tp",)), "bytes": size, "formula": str(size)}


def stage_of(
    nodes: Sequence[dict[str, object]],
    inputs: Sequence[tuple[str, str, str]] = (),
    outputs: Sequence[str] = (),
    name: str = "partition",
    number: int = 5,
    mesh: dict[str, int] | None = None,
) -> Stage:
    """A stage of these nodes; inputs are a node, a name and a kind each."""
    head = {
        "name": "decode.decode",
        "mesh": {"tp": 4} if mesh is None else mesh,
        "inputs": [{"node": n, "name": text, "kind": kind} for n, text, kind in inputs],
        "outputs": [{"value": {"node": output}} for output in outputs],
    }
    data = {"number": number, "stage": name, "program": head, "rules": [], "nodes": list(nodes)}
    return Stage("decode/decode", number, name, data, f"text of {name}\n")
