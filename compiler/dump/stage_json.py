"""One Program after one pass as the JSON of a run directory.

Beyond the Program itself (`compiler.ir.serial`) a node has what tools ask for: its types as text
with layouts, why an input lies as it does, what propagation decided and what else it priced, and of
collectives and contractions what they cost. `docs/debugging.md` has the schema.

A node's line is made once for all stages that share a graph, but for what passes change without
touching the graph: layouts and decisions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from torch import fx

from rolemesh.compiler.analysis import cost_analysis, local_flops
from rolemesh.compiler.dump.files import KIND_STAGE, SCHEMA_VERSION
from rolemesh.compiler.ir.ledger import Collective
from rolemesh.compiler.ir.program import Decision, Program, operand_nodes, tensor_types
from rolemesh.compiler.ir.rule import Choice, Rule
from rolemesh.compiler.ir.rule_text import choice_text, rule_text
from rolemesh.compiler.ir.serial import encode_head, encode_layouts, encode_node
from rolemesh.compiler.ir.serial_values import Json, encode_placement, encode_size

__all__ = ["StageEncoder"]


class StageEncoder:
    """Writes the stages of one Program, in the order of its passes."""

    def __init__(self) -> None:
        self._decided: Program | None = None
        self._lines: dict[fx.Node, str] = {}
        self._graph: fx.Graph | None = None

    def encode(self, program: Program, stage: str, number: int) -> str:
        """A stage as JSON with a line per node.

        Args:
            program: The Program after the pass.
            stage: The pass's name.
            number: The stage's number.
        """
        if program.graph is not self._graph:
            self._lines, self._graph = {}, program.graph
        if program.decisions:
            self._decided = program
        writer = _Nodes(program, self._decided, self._lines)
        lines = [writer.line(node) for node in program.graph.nodes if node.op != "output"]
        head: dict[str, Json] = {
            "schema_version": SCHEMA_VERSION,
            "kind": KIND_STAGE,
            "stage": stage,
            "number": number,
            "program": encode_head(program),
            "rules": list(writer.rules.values()),
        }
        if program.scope is None and writer.sizes:
            head["sizes"] = dict(writer.sizes)
        body = ",\n".join(lines)
        return f'{_dumps(head)[:-1]}, "nodes": [\n{body}\n]}}\n'


def _dumps(value: Json) -> str:
    return json.dumps(value, ensure_ascii=False)


class _Nodes:
    """The lines of one stage's nodes."""

    def __init__(
        self, program: Program, decided: Program | None, lines: dict[fx.Node, str]
    ) -> None:
        self.program = program
        self.lines = lines
        self.rules: dict[int, Json] = {}
        self.numbers: dict[int, int] = {}
        self.needs: dict[tuple[int, tuple[Choice, ...]], Json] = {}
        self.costs: Mapping[str, tuple[Collective, str]] = {}
        self.sizes: Mapping[str, int] = {}
        self.partitioned = "partition" in program.history
        if self.partitioned and decided is not None:
            found = cost_analysis(decided, program)
            self.costs = {c.record.node: (c.record, str(c.formula)) for c in found.collectives}
            self.sizes = {str(symbol): int(value) for symbol, value in found.sizes.items()}

    def line(self, node: fx.Node) -> str:
        static = self.lines.get(node)
        if static is None:
            static = self.lines[node] = _dumps(encode_node(node))[:-1]
        changing = _dumps(self._changing(node))[1:]
        return static + ", " + changing if len(changing) > 1 else static + "}"

    def _changing(self, node: fx.Node) -> dict[str, Json]:
        program = self.program
        found = encode_layouts(program, node)
        layouts = program.layouts.get(node)
        types = tensor_types(node)
        if layouts is not None and program.mesh is not None:
            mesh = program.mesh
            pairs = list(zip(types, layouts, strict=True))
            found["kinds"] = [layout.text(value, mesh) for value, layout in pairs]
            if self.partitioned:
                found["local"] = [
                    [encode_size(n) for n in layout.local_shape(value.shape, mesh)]
                    for value, layout in pairs
                ]
        else:
            found["kinds"] = [str(value) for value in types]
        if node in program.seeds:
            found["seed"] = program.seeds[node]
        decision = program.decisions.get(node)
        if decision is not None:
            found |= self._decision(node, decision)
        if node.name in self.costs:
            record, formula = self.costs[node.name]
            found["collective"] = _collective(record, formula)
        elif self.partitioned and node.op == "call_function":
            flops = local_flops(program, node)
            if flops:
                found["flops"] = encode_size(flops)
        return found

    def _decision(self, node: fx.Node, decision: Decision) -> dict[str, Json]:
        rule = decision.rule
        key = (id(rule), decision.choices)
        if key not in self.needs:
            self.needs[key] = [
                [
                    None if placement is None else encode_placement(placement)
                    for placement in (rule.operand_placement(i, c) for c in decision.choices)
                ]
                for i in range(len(operand_nodes(node)))
            ]
        texts: list[Json] = [choice_text(rule, choice) for choice in decision.choices]
        found: dict[str, Json] = {
            "rule": self._rule(rule),
            "choices": texts,
            "reasons": list(decision.reasons),
        }
        if any(decision.alternatives):
            found["alternatives"] = [
                [
                    {
                        "choice": choice_text(rule, priced.choice),
                        "price": round(float(priced.price), 3),
                        "moved": round(float(priced.moved), 3),
                        "follows": priced.follows,
                    }
                    for priced in of_axis
                ]
                for of_axis in decision.alternatives
            ]
        return {"decision": found, "needs": self.needs[key]}

    def _rule(self, rule: Rule) -> int:
        number = self.numbers.get(id(rule))
        if number is None:
            number = self.numbers[id(rule)] = len(self.rules)
            self.rules[number] = rule_text(rule)
        return number


def _collective(record: Collective, formula: str) -> dict[str, Json]:
    return {
        "op": record.op,
        "axes": list(record.axes),
        "dim": record.dim,
        "shape": [encode_size(n) for n in record.shape],
        "dtype": str(record.dtype).removeprefix("torch."),
        "bytes": int(record.bytes_received),
        "formula": formula,
    }
