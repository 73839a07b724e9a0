"""Bytes that one rank holds while a recorded stage runs, from its local shapes.

The convention is that of `compiler.analysis.memory_analysis`, which has the live Program; a test
holds both to the same numbers. Views count as new memory, so temporaries are an upper bound.
"""

from __future__ import annotations

import math
from collections import defaultdict

from rolemesh.compiler.debug.sizes import itemsize, sizes_of
from rolemesh.compiler.dump.reader import Node, Stage
from rolemesh.compiler.memory import MemoryAnalysis

__all__ = ["memory_of"]


def memory_of(stage: Stage) -> MemoryAnalysis | None:
    """What a rank holds while a stage runs; None before partitioning, when nothing is local."""
    if "partition" not in stage.head["history"]:
        return None
    size = sizes_of(stage)

    def held(node: Node) -> int:
        return sum(
            math.prod(map(size, shape)) * itemsize(value["dtype"])
            for value, shape in zip(node.data["types"], node.data["local"], strict=True)
        )

    weights = caches = 0
    owned: dict[int, int] = defaultdict(int)
    for entry in stage.head["inputs"]:
        node = stage.nodes[entry["node"]]
        placements = node.layouts[0]
        owners = [p["owner"] for p in placements if isinstance(p, dict) and "owner" in p]
        if owners:
            owned[owners[0]] += held(node)
        elif entry.get("mutated", False):
            caches += held(node)
        elif entry["kind"] != "user":
            weights += held(node)
    computed = {node.name: held(node) for node in stage.nodes.values() if node.op != "input"}
    slots = {}
    for node in stage.nodes.values():
        if node.op == "mesh.broadcast_start":
            slots[node.data["kwargs"]["slot"]] = computed[node.name]
            computed[node.name] = 0
        elif node.op == "mesh.wait" and stage.nodes[node.operands[0]].op == "mesh.broadcast_start":
            computed[node.name] = 0
    most = max(owned.values(), default=0)
    return MemoryAnalysis(weights + most, caches, sum(slots.values()), _peak(stage, computed))


def _peak(stage: Stage, held: dict[str, int]) -> int:
    """Most bytes alive at once; a value dies at its last use, a result of the program never."""
    last = {operand: node.name for node in stage.nodes.values() for operand in node.operands}
    for output in stage.head["outputs"]:
        if isinstance(output["value"], dict) and "node" in output["value"]:
            last.pop(output["value"]["node"], None)
    dying: dict[str, list[str]] = defaultdict(list)
    for name, user in last.items():
        dying[user].append(name)
    alive = peak = 0
    for name, size in held.items():
        alive += size
        peak = max(peak, alive)
        alive -= sum(held.get(dead, 0) for dead in dying[name])
    return peak
