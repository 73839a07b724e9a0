"""A run directory as large as wanted: the last layer of a recorded program, repeated.

Copies are wired as layers are: what a layer reads of the layer before, its copy reads of the copy
before. Only tools that read run directories are meant to see the result; it was never compiled.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from rolemesh.compiler.dump.files import INDEX, checksum, stage_name
from rolemesh.compiler.dump.reader import Node, RecordedProgram, Run, open_run

__all__ = ["large_run"]

_LAYER = re.compile(r"^model\.layers\.(\d+)(?=\.|$)")


def large_run(
    program: RecordedProgram, folder: Path, nodes: int, passes: Collection[str] = ()
) -> Run:
    """Write a run whose last stage has at least so many nodes.

    Args:
        program: A program with at least two layers, `model.layers.0` and so on.
        folder: The folder to write to.
        nodes: Nodes of the last stage.
        passes: The stages to write; all by default.
    """
    last = program.stage().data["nodes"]
    inputs = program.stage().head["inputs"]
    layer = max(int(m[1]) for node in last if (m := _LAYER.match(node.get("module", ""))))
    one = len(_of_layer(last, inputs, layer))
    copies = -(-(nodes - len(last)) // one)
    stages = []
    for stage in program.stages():
        if passes and stage.name not in passes:
            continue
        grown = _grown(json.loads(json.dumps(stage.data)), layer, copies)
        name = stage_name(stage.number, stage.name)
        entry: dict[str, Any] = {"number": len(stages), "pass": stage.name}
        for kind, ending, text in (("json", "json", json.dumps(grown)), ("text", "txt", "")):
            path = folder / f"{name}.{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            entry[kind] = {"file": path.name, "sha256": checksum(text.encode())}
        stages.append(entry)
    index = {**open_run(program.folder).index, "programs": [{**program.entry, "stages": stages}]}
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")
    return open_run(folder)


def _of_layer(nodes: list[Any], inputs: list[Any], layer: int) -> set[str]:
    """Names of a layer's nodes, and of its weights."""
    prefix = re.compile(rf"^model\.layers\.{layer}(?=\.|$)")
    weights = {entry["node"] for entry in inputs if prefix.match(entry["name"])}
    return weights | {node["name"] for node in nodes if prefix.match(node.get("module", ""))}


def _grown(data: dict[str, Any], layer: int, copies: int) -> dict[str, Any]:
    head, nodes = data["program"], data["nodes"]
    own = _of_layer(nodes, head["inputs"], layer)
    before = _of_layer(nodes, head["inputs"], layer - 1)
    template = [node for node in nodes if node["name"] in own]
    entries = [entry for entry in head["inputs"] if entry["node"] in own]
    # What the layer reads of the one before, its copies read of the copy before: the last value of
    # that type. Where a layer has none of that type, all read the same value.
    by_type = {str(node["types"]): node["name"] for node in template}
    read = {operand for node in template for operand in Node(node).operands} & before
    types = {node["name"]: str(node["types"]) for node in nodes}
    handed = {name: by_type[types[name]] for name in read if types[name] in by_type}
    for copy in range(1, copies + 1):
        names = {name: f"{name}_copy{copy}" for name in own}
        previous = {name: f"{name}_copy{copy - 1}" if copy > 1 else name for name in own}
        names |= {name: previous[value] for name, value in handed.items()}
        for node in template:
            nodes.append(_copied(node, names, layer, copy))
        for entry in entries:
            name = _LAYER.sub(f"model.layers.{layer + copy}", entry["name"])
            head["inputs"].append({**entry, "node": names[entry["node"]], "name": name})
    # Inputs come first, in their order.
    nodes.sort(key=lambda node: node["op"] != "input")
    return data


def _copied(node: dict[str, Any], names: dict[str, str], layer: int, copy: int) -> dict[str, Any]:
    found = dict(node)
    for key in ("args", "kwargs"):
        if key in found:
            found[key] = _renamed(node[key], names)
    for key in ("name", "value", "user"):
        if key in found:
            found[key] = names.get(node[key], node[key])
    if "module" in found:
        found["module"] = _LAYER.sub(f"model.layers.{layer + copy}", node["module"])
    return found


def _renamed(value: Any, names: dict[str, str]) -> Any:
    if isinstance(value, list):
        return [_renamed(item, names) for item in value]
    if isinstance(value, dict):
        if set(value) == {"node"}:
            return {"node": names.get(value["node"], value["node"])}
        return {key: _renamed(item, names) for key, item in value.items()}
    return value
