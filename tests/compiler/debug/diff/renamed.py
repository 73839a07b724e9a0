"""A stage under other names, and with a few nodes changed, for tests of what matches stages."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from rolemesh.compiler.dump.reader import Stage

__all__ = ["edited", "renamed"]


def renamed(stage: Stage, names: Mapping[str, str]) -> Stage:
    """The same stage with every node under another name."""

    def value(data: Any) -> Any:
        if isinstance(data, list):
            return [value(item) for item in data]
        if isinstance(data, dict):
            if data.keys() == {"node"}:
                return {"node": names[data["node"]]}
            if data.keys() == {"routed"}:
                key, *rest = data["routed"]
                return {"routed": [":".join(names.get(w, w) for w in key.split(":")), *rest]}
            return {key: value(item) for key, item in data.items()}
        return data

    head = value(stage.data["program"])
    for entry in head["inputs"]:
        entry["node"] = names[entry["node"]]
    nodes = []
    for entry in stage.data["nodes"]:
        node = value(entry)
        for field in ("name", "value", "user"):
            if node.get(field):
                node[field] = names.get(node[field], node[field])
        nodes.append(node)
    return Stage(
        stage.program, stage.number, stage.name, {**stage.data, "program": head, "nodes": nodes}, ""
    )


def edited(stage: Stage, edit: Callable[[list[dict[str, Any]]], None]) -> Stage:
    """The stage with its list of nodes changed in place."""
    data = copy.deepcopy(dict(stage.data))
    edit(data["nodes"])
    return Stage(stage.program, stage.number, stage.name, data, "")
