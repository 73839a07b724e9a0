"""Layout chains of every value, held against rules and layouts of the Program itself."""

from __future__ import annotations

import pytest
from tests.compiler.debug.explain.explained import ALL, Case, Explained, explained
from torch import fx

from rolemesh.compiler.debug.explain.chains import OUTPUT, Link
from rolemesh.compiler.debug.explain.decided import WHOLE
from rolemesh.compiler.ir.placement import Partial, Placement, Replicate, Routed, same_placement
from rolemesh.compiler.ir.program import Decision, InputKind, operand_nodes, tensor_types
from rolemesh.compiler.ir.rule import Kind, Linear, Split, Whole
from rolemesh.compiler.ir.serial_values import encode_placement

pytestmark = pytest.mark.xdist_group("recorded")

ENDS = {"seed", "annotation", "whole", "constant", "pinned"}


@pytest.mark.parametrize("case", ALL, ids=" ".join)
def test_every_chain_leads_back_to_what_was_given(case: Case) -> None:
    found = explained(case)
    seen: set[str] = set()
    for axis in range(len(found.facts.axes)):
        truth = _Truth(found, axis)
        for name, node in found.nodes.items():
            if node.op == "output":
                continue
            links = found.chains.chain(name, axis).links
            assert [link.next for link in links] == [*(link.node for link in links[1:]), ""]
            assert links[0].node == name
            assert links[-1].how in ENDS
            for link in links:
                truth.check(link)
        seen |= truth.seen
    assert seen >= {"seed", "follows", "whole operands", "pinned", "constant"}
    # In decode no keys are computed for users that want a part of them.
    assert "wanted" in seen or case[1:3] == ("decode", "decode")


class _Truth:
    """What must hold for a link of each kind, read off the Program; each is looked at once."""

    def __init__(self, found: Explained, axis: int) -> None:
        self.found, self.axis = found, axis
        self.decided = found.decided
        self.ranks = found.decided.the_mesh.sizes[axis]
        self.checked: set[str] = set()
        self.seen: set[str] = set()
        self.homes = self._homes()

    def check(self, link: Link) -> None:
        self.seen.add(link.how)
        if link.node in self.checked or link.node == OUTPUT:
            return
        self.checked.add(link.node)
        node = self.found.nodes[link.node]
        assert link.placement == encode_placement(self.placement(node))
        assert link.kind
        if link.decision is not None:
            decision = self.decided.decisions[node]
            result = decision.rule.result_placement(0, decision.choices[self.axis])
            assert self.same(result, self.placement(node), node)
            assert link.decision.reason == decision.reasons[self.axis]
        getattr(self, f"is_{link.how.replace(' ', '_')}")(link, node)

    def placement(self, node: fx.Node) -> Placement:
        return self.decided.layouts[node][0].placements[self.axis]

    def same(self, a: Placement | None, b: Placement, node: fx.Node) -> bool:
        return a is not None and same_placement(a, b, tensor_types(node)[0].shape, self.ranks)

    def made(self, node: fx.Node) -> tuple[Decision, list[fx.Node]]:
        return self.decided.decisions[node], operand_nodes(node)

    def need(self, node: fx.Node, operand: fx.Node) -> list[Placement | None]:
        decision, operands = self.made(node)
        choice = decision.choices[self.axis]
        return [
            decision.rule.operand_placement(i, choice)
            for i, other in enumerate(operands)
            if other is operand and i not in decision.rule.unread
        ]

    def is_seed(self, link: Link, node: fx.Node) -> None:
        assert node.op == "placeholder"
        assert link.text == self.decided.seeds[node]

    def is_follows(self, link: Link, node: fx.Node) -> None:
        """The choice is what the operand's own layout makes of the rule."""
        decision, _ = self.made(node)
        choice = decision.choices[self.axis]
        assert not isinstance(choice, Whole | Linear)
        operand = self.found.nodes[link.next]
        assert not isinstance(self.placement(operand), Replicate | Partial)
        assert any(self.same(n, self.placement(operand), operand) for n in self.need(node, operand))

    def is_pending(self, link: Link, node: fx.Node) -> None:
        decision, _ = self.made(node)
        assert isinstance(decision.choices[self.axis], Linear)
        operand = self.found.nodes[link.next]
        assert isinstance(self.placement(operand), Partial | Routed)
        assert any(isinstance(need, Partial) for need in self.need(node, operand))

    def is_item(self, link: Link, node: fx.Node) -> None:
        source, position = node.args
        assert isinstance(source, fx.Node)
        assert isinstance(position, int)
        assert source.name == link.next
        layouts = self.decided.layouts
        assert layouts[node][0] == layouts[source][position]

    def is_whole_operands(self, link: Link, node: fx.Node) -> None:
        decision, operands = self.made(node)
        read = [o for i, o in enumerate(operands) if i not in decision.rule.unread]
        assert self.found.nodes[link.next] in read
        assert all(isinstance(self.placement(operand), Replicate) for operand in read)

    def is_constant(self, link: Link, node: fx.Node) -> None:
        decision, operands = self.made(node)
        assert all(i in decision.rule.unread for i in range(len(operands)))

    def is_whole(self, link: Link, node: fx.Node) -> None:
        """Some operand is not whole, and no choice that was priced is cheaper."""
        decision, operands = self.made(node)
        assert isinstance(decision.choices[self.axis], Whole)
        before = self.found.facts.before
        assert any(before.nodes[o.name].layouts[0][self.axis] != WHOLE for o in operands)
        priced = decision.alternatives[self.axis]
        assert all(entry.price >= priced[0].price for entry in priced)
        assert not priced or isinstance(priced[0].choice, Whole)

    def is_tokens(self, link: Link, node: fx.Node) -> None:
        """The choice is where the value would be had it never left the tokens' layout."""
        choice = self.decided.decisions[node].choices[self.axis]
        assert choice == self.homes[node][0]
        assert link.next in self.homes[node][2]

    def is_pinned(self, link: Link, node: fx.Node) -> None:
        (index,) = [
            i for i, value in enumerate(self.decided.results)
            if value is node and self.decided.outputs[i].mutates is not None
        ]  # fmt: skip
        mutated = self.decided.placeholders[self.decided.outputs[index].mutates or 0]
        assert mutated.name == link.next
        assert self.placement(mutated) == self.placement(node)

    def is_wanted(self, link: Link, node: fx.Node) -> None:
        """Propagate had it whole; now it lies as the reader needs it."""
        assert self.found.facts.before.nodes[node.name].layouts[0][self.axis] == WHOLE
        assert link.replaced is not None
        assert link.replaced.choice == "whole"
        self._reader_needs(link, node, self.placement(node))

    def is_gathered_early(self, link: Link, node: fx.Node) -> None:
        """Propagate had it split; now it is whole, as the reader needs it."""
        assert link.replaced is not None
        assert link.replaced.choice.startswith("split")
        assert isinstance(self.placement(node), Replicate)
        self._reader_needs(link, node, self.placement(node))

    def _reader_needs(self, link: Link, node: fx.Node, placement: Placement) -> None:
        reader = self.found.nodes[link.next]
        if reader.op == "output":
            assert node in self.decided.results
            return
        values = [node, *(user for user in node.users if user in operand_nodes(reader))]
        needs = [need for value in values for need in self.need(reader, value)]
        assert any(self.same(need, placement, node) for need in needs)

    def _homes(self) -> dict[fx.Node, tuple[Split | None, Placement, set[str]]]:
        """Where each value would lie, followed from the tokens by the rules alone."""
        homes: dict[fx.Node, tuple[Split | None, Placement, set[str]]] = {}
        for node, entry in zip(self.decided.placeholders, self.decided.inputs, strict=True):
            placement = self.placement(node)
            shard = "shard" in encode_placement(placement)  # type: ignore[operator]
            if entry.kind is InputKind.USER and not entry.mutated and shard:
                homes[node] = None, placement, {node.name}
        for node in self.decided.ops:
            if node not in self.decided.decisions:
                (source,) = node.all_input_nodes
                if source in homes:
                    choice, _, names = homes[source]
                    assert choice is not None
                    rule = self.decided.decisions[source].rule
                    homes[node] = None, rule.result_placement(node.args[1], choice), names  # type: ignore[arg-type]
                continue
            rule, operands = self.decided.decisions[node].rule, operand_nodes(node)
            names = set().union(*(homes[o][2] for o in operands if o in homes))
            for i, operand in enumerate(operands):
                if operand not in homes or i in rule.unread:
                    continue
                match = rule.match(rule.operands[i], homes[operand][1], self.ranks)
                if isinstance(match, Split) and rule.kinds[match.factor] is Kind.PASS:
                    homes[node] = match, rule.result_placement(0, match), names
                    break
        return homes
