"""One Program after one pass as the JSON of a run directory.

Beyond the Program itself (`compiler.ir.serial`) a node has what tools ask for: its types as text
with layouts, why an input lies as it does, what propagation decided and what else it priced, and of
collectives and contractions what they cost. `docs/debugging.md` has the schema.

A node's line has a part that its graph fixes, made once for all stages that share the graph, and a
part that passes change without touching the graph: layouts and decisions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from torch import fx

from rolemesh.compiler.analysis import cost_analysis, local_flops
from rolemesh.compiler.dump.files import KIND_STAGE, SCHEMA_VERSION
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.ledger import Collective
from rolemesh.compiler.ir.program import Decision, Program, operand_nodes, tensor_types
from rolemesh.compiler.ir.rule import Choice, Rule
from rolemesh.compiler.ir.rule_text import choice_text, rule_text
from rolemesh.compiler.ir.serial import encode_head, encode_layouts, encode_node
from rolemesh.compiler.ir.serial_values import Json, encode_placement, encode_size

__all__ = ["StageEncoder", "unchanged"]

_dumps = json.JSONEncoder(ensure_ascii=False).encode


def unchanged(before: Program, after: Program) -> bool:
    """Whether a pass left everything that a node's line, or its text, tells of."""
    return all(getattr(before, name) is getattr(after, name) for name in _TOLD)


_TOLD = ("graph", "inputs", "outputs", "mesh", "layouts", "decisions", "seeds", "scope")


class StageEncoder:
    """Writes the stages of one Program, in the order of its passes."""

    def __init__(self) -> None:
        self._decided: Program | None = None
        self._last: Program | None = None
        self._nodes: _Nodes | None = None
        self._body = ""

    def encode(self, program: Program, stage: str, number: int) -> str:
        """A stage as JSON with a line per node.

        Args:
            program: The Program after the pass.
            stage: The pass's name.
            number: The stage's number.
        """
        if program.decisions:
            self._decided = program
        if self._last is None or self._nodes is None or not unchanged(self._last, program):
            if self._nodes is None or program.graph is not self._nodes.graph:
                self._nodes = _Nodes(program.graph)
            self._body = ",\n".join(self._nodes.lines(program, self._decided))
        self._last = program
        head: dict[str, Json] = {
            "schema_version": SCHEMA_VERSION,
            "kind": KIND_STAGE,
            "stage": stage,
            "number": number,
            "program": encode_head(program),
            "rules": list(self._nodes.rules) if program.decisions else [],
        }
        if self._nodes.sizes:
            head["sizes"] = dict(self._nodes.sizes)
        return f'{_dumps(head)[:-1]}, "nodes": [\n{self._body}\n]}}\n'


_Changing = tuple[tuple[Layout, ...] | None, Decision | None, str | None]


class _Nodes:
    """The lines of one graph's nodes, over the stages that share it.

    Attributes:
        graph: The graph.
        rules: Sharding rules as text, by the number that decisions give.
        sizes: Values of the symbols in formulas of bytes.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.rules: list[Json] = []
        self.sizes: Mapping[str, int] = {}
        self._numbered: dict[int, tuple[int, Rule]] = {}
        self._fixed: dict[fx.Node, str] = {}
        self._told: dict[fx.Node, tuple[_Changing, str]] = {}
        self._needs: dict[tuple[int, tuple[Choice, ...]], Json] = {}
        self._costs: Mapping[str, tuple[Collective, str, str]] = {}

    def lines(self, program: Program, decided: Program | None) -> list[str]:
        """The line of every node but the output.

        Args:
            program: The Program.
            decided: The last one that has decisions.
        """
        if "partition" in program.history and decided is not None:
            found = cost_analysis(decided, program)
            self._costs = {
                c.record.node: (c.record, str(c.formula), str(c.most)) for c in found.collectives
            }
            self.sizes = {str(symbol): int(value) for symbol, value in found.sizes.items()}
            self._told.clear()  # a collective's bytes depend on other nodes' layouts too
        return [self._line(program, node) for node in self.graph.nodes if node.op != "output"]

    def _line(self, program: Program, node: fx.Node) -> str:
        fixed = self._fixed.get(node)
        if fixed is None:
            fixed = self._fixed[node] = _dumps(encode_node(node))[:-1] + ", "
        state = program.layouts.get(node), program.decisions.get(node), program.seeds.get(node)
        told = self._told.get(node)
        if told is None or any(a is not b for a, b in zip(told[0], state, strict=True)):
            told = self._told[node] = state, _dumps(self._changing(program, node, *state))[1:]
        return fixed + told[1]

    def _changing(
        self,
        program: Program,
        node: fx.Node,
        layouts: tuple[Layout, ...] | None,
        decision: Decision | None,
        seed: str | None,
    ) -> dict[str, Json]:
        found = encode_layouts(program, node)
        types = tensor_types(node)
        partitioned = "partition" in program.history
        if layouts is not None and program.mesh is not None:
            mesh = program.mesh
            pairs = list(zip(types, layouts, strict=True))
            found["kinds"] = [layout.text(value, mesh) for value, layout in pairs]
            if partitioned:
                found["local"] = [
                    [encode_size(n) for n in layout.local_shape(value.shape, mesh)]
                    for value, layout in pairs
                ]
        else:
            found["kinds"] = [str(value) for value in types]
        if seed is not None:
            found["seed"] = seed
        if decision is not None:
            found |= self._decision(node, decision)
        if node.name in self._costs:
            found["collective"] = _collective(*self._costs[node.name])
        elif partitioned and node.op == "call_function":
            flops = local_flops(program, node)
            if flops:
                found["flops"] = encode_size(flops)
        return found

    def _decision(self, node: fx.Node, decision: Decision) -> dict[str, Json]:
        rule = decision.rule
        number = self._number(rule)
        key = (number, decision.choices)
        if key not in self._needs:
            self._needs[key] = [
                [
                    None if placement is None else encode_placement(placement)
                    for placement in (rule.operand_placement(i, c) for c in decision.choices)
                ]
                for i in range(len(operand_nodes(node)))
            ]
        texts: list[Json] = [choice_text(rule, choice) for choice in decision.choices]
        found: dict[str, Json] = {
            "rule": number,
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
        return {"decision": found, "needs": self._needs[key]}

    def _number(self, rule: Rule) -> int:
        """The number of a rule; the rule is kept, so that no other takes its identity."""
        if id(rule) not in self._numbered:
            self._numbered[id(rule)] = len(self.rules), rule
            self.rules.append(rule_text(rule))
        return self._numbered[id(rule)][0]


def _collective(record: Collective, formula: str, most: str) -> dict[str, Json]:
    found: dict[str, Json] = {
        "op": record.op,
        "axes": list(record.axes),
        "dim": record.dim,
        "shape": [encode_size(n) for n in record.shape],
        "dtype": str(record.dtype).removeprefix("torch."),
        "bytes": int(record.bytes_received),
        "formula": formula,
    }
    return {**found, "most": most} if record.is_expected else found
