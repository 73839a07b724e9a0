"""Stages as a graph collection of Google's Model Explorer.

The format is `GraphCollection` of `src/server/package/src/model_explorer/types.py` in
github.com/google-ai-edge/model-explorer: nodes with a namespace that is folded layer by layer,
attributes, and edges from the operands. All values of attributes are strings.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rolemesh.compiler.debug.show.collapse import module_rows
from rolemesh.compiler.debug.show.select import ROOT, modules_of, stored_names
from rolemesh.compiler.debug.show.show import argument_text
from rolemesh.compiler.dump.files import stage_name
from rolemesh.compiler.dump.reader import Node, Stage

__all__ = ["graph_collection"]

_COLLECTIVE = "#f6b26b"


def graph_collection(
    label: str, stages: Sequence[tuple[Stage, Sequence[Node]]]
) -> dict[str, object]:
    """The collection, with a graph per stage.

    Args:
        label: What the collection is called.
        stages: Stages with the nodes to draw of each.
    """
    graphs = [_graph(stage, nodes) for stage, nodes in stages]
    return {"label": label, "graphSorting": "name_asc", "graphs": graphs}


def _graph(stage: Stage, nodes: Sequence[Node]) -> dict[str, object]:
    modules, stored = modules_of(stage), stored_names(stage)
    drawn = {node.name for node in nodes}
    return {
        "id": f"{stage.program} {stage_name(stage.data['number'], stage.name)}",
        "nodes": [
            _node(node, stage, modules[node.name].replace(".", "/"), stored, drawn)
            for node in nodes
        ],
        "groupNodeAttributes": _groups(stage, nodes),
    }


def _node(
    node: Node, stage: Stage, namespace: str, stored: Mapping[str, str], drawn: set[str]
) -> dict[str, object]:
    found: dict[str, object] = {
        "id": node.name,
        "label": stored.get(node.name) or node.op,
        "namespace": namespace,
        "attrs": _pairs(_attributes(node)),
        "incomingEdges": [
            {
                "sourceNodeId": operand,
                "sourceNodeOutputId": _output_of(node),
                "targetNodeInputId": str(place),
            }
            for place, operand in enumerate(node.operands)
            if operand in drawn
        ],
        "inputsMetadata": [
            {"id": str(place), "attrs": _pairs([("layout", ", ".join(stage.nodes[name].kinds))])}
            for place, name in enumerate(node.operands)
        ],
        "outputsMetadata": [
            {"id": str(place), "attrs": _pairs([("tensor_shape", kind)])}
            for place, kind in enumerate(node.kinds)
        ],
    }
    if node.collective is not None:
        found["style"] = {"backgroundColor": _COLLECTIVE}
    return found


def _attributes(node: Node) -> Iterator[tuple[str, str]]:
    yield "name", node.name
    yield "op", node.op
    arguments = [argument_text(value) for value in node.data.get("args", [])]
    keywords = node.data.get("kwargs", {}).items()
    arguments += [f"{name}={argument_text(value)}" for name, value in keywords]
    if arguments:
        yield "arguments", ", ".join(arguments)
    if node.data.get("local"):
        yield "local shape", "; ".join(map(str, node.data["local"]))
    for what, text in (("source", node.source), ("reason", node.reason)):
        if text:
            yield what, text
    if node.collective is not None:
        yield "axes", ", ".join(node.collective["axes"])
        yield "bytes received", str(node.collective["bytes"])
        yield "formula", node.collective["formula"]


def _output_of(node: Node) -> str:
    """Which result of its operand a node reads; only `getitem` reads another than the first."""
    return str(node.data["args"][1]) if node.op == "getitem" else "0"


def _groups(stage: Stage, nodes: Sequence[Node]) -> dict[str, dict[str, str]]:
    """What each module does, and under the empty name what the whole graph is."""
    mesh = ", ".join(f"{axis}={size}" for axis, size in stage.mesh.items())
    groups = {"": {"stage": stage.name, "mesh": mesh or "none yet"}}
    depth = max(path.count(".") + 1 for path in modules_of(stage).values())
    for length in range(1, depth + 1):
        for row in module_rows(stage, nodes, length, fold=False):
            if row.path == ROOT or row.path.count(".") + 1 < length:
                continue  # counted whole at the depth of its own path
            groups[row.path.replace(".", "/")] = {
                "ops": str(row.ops),
                "collectives": ", ".join(f"{n} {what}" for what, n in row.collectives.items()),
                "bytes received": str(row.bytes),
            }
    return groups


def _pairs(items: Iterator[tuple[str, str]] | Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"key": key, "value": value} for key, value in items]
