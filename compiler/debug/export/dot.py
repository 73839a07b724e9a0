"""A stage as DOT, the language of Graphviz: modules are clusters, collectives stand out.

What the chosen nodes read from outside them is drawn dashed, so that one module can be drawn alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rolemesh.compiler.debug.show.select import modules_of, stored_names
from rolemesh.compiler.dump.reader import Node, Stage

__all__ = ["dot_text"]

_Tree = dict[str, "_Tree | None"]
"""By full path, the modules in a module; by name, its nodes, which have None."""

_STYLES: Mapping[str, str] = {
    "collective": 'style=filled, fillcolor="#f6b26b"',
    "mesh": 'style=filled, fillcolor="#fff2cc"',
    "input": "shape=ellipse",
    "op": "",
}


def dot_text(stage: Stage, nodes: Sequence[Node]) -> str:
    """The nodes as a directed graph, from operand to user.

    Args:
        stage: The stage.
        nodes: The nodes to draw.
    """
    return "\n".join(_lines(stage, nodes)) + "\n"


def _lines(stage: Stage, nodes: Sequence[Node]) -> Iterator[str]:
    drawn = {node.name: node for node in nodes}
    stored = stored_names(stage)
    yield f"digraph {_quoted(f'{stage.program} after {stage.name}')} {{"
    yield "  graph [fontname=monospace, labeljust=l];"
    yield "  node [shape=box, fontname=monospace, fontsize=10];"
    yield "  edge [arrowsize=0.6];"
    yield from _cluster(_tree(stage, nodes), drawn, stored, "  ")
    outside = [
        operand
        for operand in dict.fromkeys(name for node in nodes for name in node.operands)
        if operand not in drawn
    ]
    for name in outside:
        yield f"  {_node(stage.nodes[name], stored, 'style=dashed')}"
    for node in nodes:
        for operand in dict.fromkeys(node.operands):
            yield f"  {_quoted(operand)} -> {_quoted(node.name)};"
    yield "}"


def _tree(stage: Stage, nodes: Sequence[Node]) -> _Tree:
    modules = modules_of(stage)
    root: _Tree = {}
    for node in nodes:
        inside = root
        parts = modules[node.name].split(".") if modules[node.name] else []
        for length in range(1, len(parts) + 1):
            found = inside.setdefault(f"module {'.'.join(parts[:length])}", {})
            assert found is not None
            inside = found
        inside[node.name] = None
    return root


def _cluster(
    tree: _Tree, drawn: Mapping[str, Node], stored: Mapping[str, str], indent: str
) -> Iterator[str]:
    for name, inside in tree.items():
        if inside is None:
            yield indent + _node(drawn[name], stored)
            continue
        path = name.removeprefix("module ")
        yield f"{indent}subgraph {_quoted(f'cluster {path}')} {{"
        yield f"{indent}  label={_quoted(path)};"
        yield from _cluster(inside, drawn, stored, indent + "  ")
        yield indent + "}"


def _node(node: Node, stored: Mapping[str, str], style: str | None = None) -> str:
    title = stored.get(node.name, f"%{node.name} = {node.op}")
    lines = [title, *node.kinds]
    if node.collective is not None:
        lines.append(f"{'/'.join(node.collective['axes'])}: {node.collective['bytes']:,} B")
    label = "\\n".join(_escaped(line) for line in lines)
    tooltip = "\\n".join(map(_escaped, filter(None, (node.module, node.source, node.reason))))
    attributes = [f'label="{label}"', f'tooltip="{tooltip or label}"']
    attributes += filter(None, [_STYLES[_class(node)] if style is None else style])
    return f"{_quoted(node.name)} [{', '.join(attributes)}];"


def _class(node: Node) -> str:
    if node.collective is not None:
        return "collective"
    if node.op.startswith("mesh."):
        return "mesh"
    return "input" if node.op == "input" else "op"


def _quoted(text: str) -> str:
    return f'"{_escaped(text)}"'


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')
