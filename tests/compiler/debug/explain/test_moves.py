"""Every inserted op of the programs, and its cause, which is found here without what was recorded.

From the partitioned graph: the value is what the mesh ops in a row start from, and the op that is
said to need it reads what they end in. From the decided Program: the op's rule and choice need the
layout, and `steps` between the two layouts gives these mesh ops.
"""

from __future__ import annotations

import dataclasses
import re

import pytest
from tests.compiler.debug.explain.explained import ALL, Case, Explained, explained
from torch import fx

from rolemesh.compiler.debug.explain.chains import Chain
from rolemesh.compiler.debug.explain.decided import WHOLE
from rolemesh.compiler.debug.explain.moves import Move
from rolemesh.compiler.ir import dialect
from rolemesh.compiler.ir.dialect import MeshOp
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.placement import REPLICATE, Routed
from rolemesh.compiler.ir.program import operand_nodes, origin, tensor_type
from rolemesh.compiler.ir.rule import Choice, Linear, Whole
from rolemesh.compiler.ir.serial_values import encode_placement
from rolemesh.passes.constraints import constraint_of
from rolemesh.passes.cost import CostTable, reshard_cost
from rolemesh.passes.partition import Partition
from rolemesh.passes.reshard import steps

pytestmark = pytest.mark.xdist_group("recorded")


def inserted(found: Explained) -> list[fx.Node]:
    """The mesh ops that partition inserted."""
    return [node for node in found.partitioned.ops if node.name not in found.nodes]


def move(found: Explained, name: str) -> Move:
    return found.moves.of(name, range(len(found.facts.axes)))


@pytest.mark.parametrize("case", ALL, ids=" ".join)
def test_every_inserted_op_has_its_true_cause(case: Case) -> None:
    found = explained(case)
    nodes = inserted(found)
    assert sum(isinstance(n.target, MeshOp) and n.target.communicates for n in nodes) >= 5
    for node in nodes:
        said = move(found, node.name)
        row = _row(found, node)
        assert said.value == row[0].name
        start = [n for n in row[1:] if n.target is not dialect.WAIT]
        value = found.nodes[said.value]
        assert [step.node for step in said.steps] == [n.name for n in row[1:]]
        assert said.steps[-1].kind == said.after
        readers = _readers(found, row[-1])
        if said.purpose == "marks":
            _is_marks(found, said, row, readers)
            continue
        source = found.decided.layouts[value][0]
        target = _needed(found, said, value)
        for side in said.sides:
            axis = found.decided.the_mesh.index(side.axis)
            assert side.before == encode_placement(source.placements[axis])
            assert side.after == encode_placement(target.placements[axis])
            assert side.before != side.after
            assert side.value.links[0].node == said.value
            assert side.value.links[0].placement == side.before
        assert said.user in readers
        mesh = found.decided.the_mesh
        expected = [s for s in steps(source, target, tensor_type(value).shape, mesh) if s.op]
        assert expected
        assert [n.target for n in start if n.target is not dialect.MASK_PAD] == [
            dialect.BROADCAST_START if step.op is dialect.BROADCAST else step.op
            for step in expected
        ]
        for made, step in zip(start, expected, strict=False):
            assert step.kwargs.items() <= made.kwargs.items()
        for other in said.also_for:
            assert other in readers


def _row(found: Explained, node: fx.Node) -> list[fx.Node]:
    """A value and the inserted ops from it on, through `node`, as long as they have one reader."""
    row = [node]
    while row[0].name not in found.nodes:
        row.insert(0, row[0].args[0])  # type: ignore[arg-type]
    while True:
        further = [
            user
            for user in row[-1].users
            if user.name not in found.nodes
            and user.args
            and user.args[0] is row[-1]
            and origin(user).user == origin(node).user
        ]
        if not further:
            return row
        row.append(further[0])


def _readers(found: Explained, node: fx.Node) -> set[str]:
    """The ops of the model that read a node, through inserted ops and constraints."""
    readers: set[str] = set()
    for user in node.users:
        if user.op == "output" or user.name in found.nodes:
            readers.add(user.name)
        else:
            readers |= _readers(found, user)
    for name in [found.nodes[n] for n in found.nodes if n in readers]:
        readers |= {o.name for o in name.all_input_nodes if constraint_of(o) is not None}
    return readers


def _needed(found: Explained, said: Move, value: fx.Node) -> Layout:
    """The layout that the op needs the value in, by its rule and choices."""
    decided = found.decided
    user = found.nodes[said.user]
    if said.purpose == "output":
        (index,) = [i for i, result in enumerate(decided.results) if result is value]
        return decided.output_layout(index)
    decision = decided.decisions[user]
    needs = [
        [decision.rule.operand_placement(i, choice) for choice in decision.choices]
        for i, operand in enumerate(operand_nodes(user))
        if operand is value
    ]
    layouts = {Layout(tuple(n for n in need if n is not None)) for need in needs}
    (layout,) = layouts - {decided.layouts[value][0]}
    return layout


def _is_marks(found: Explained, said: Move, row: list[fx.Node], readers: set[str]) -> None:
    """The marks are those of a routed value, which the rows' mask is put on."""
    (key,) = {
        placement.key
        for placement in found.decided.layouts[found.nodes[said.user]][0].placements
        if isinstance(placement, Routed)
    }
    assert key.split(":")[1] == said.value
    marks = next(n for n in row if n.target is dialect.OWNED_ROWS)
    assert marks.kwargs["by"] == key.split(":")[0]
    (mask,) = [user for user in row[-1].users if user.target is dialect.MASK_ROWS]
    assert move(found, mask.name).value == said.user
    assert readers


@pytest.mark.parametrize("case", ALL, ids=" ".join)
def test_the_op_that_a_value_is_moved_for_paid_for_it(case: Case) -> None:
    """What the chosen alternative says of traffic has the price of the move in it."""
    found = explained(case)
    mesh, paid = found.decided.the_mesh, 0
    for node in inserted(found):
        said = move(found, node.name)
        if said.purpose != "operand" or len(said.sides) != 1:
            continue
        (side,) = said.sides
        axis = mesh.index(side.axis)
        decision = side.user.links[0].decision
        assert decision is not None
        assert any(o.node == said.value and o.needs == side.after for o in decision.operands)
        if decision.stage == "propagate" and decision.alternatives:
            value = found.nodes[said.value]
            source = found.decided.layouts[value][0]
            target = _needed(found, said, value).placements[axis]
            split = [p for i, p in enumerate(source.placements) if i != axis and p != REPLICATE]
            nbytes = tensor_type(value).nbytes / (2 ** len(split))
            price = reshard_cost(
                source.placements[axis], target, nbytes, mesh.sizes[axis], CostTable()
            )
            chosen = decision.alternatives[0]
            assert chosen.choice == decision.choice
            assert chosen.price == min(entry.price for entry in decision.alternatives)
            assert chosen.moved >= round(float(price), 3) - 1e-3
            paid += price > 0
    # In `decode` nothing that reads a pending sum could be computed otherwise.
    assert bool(paid) == (case[1] != "decode")


O_PROJ = "attention output: split by heads of the input features"
NAMED: dict[tuple[str, str], list[tuple[str, str, str, str]]] = {
    ("prefill", "prefill"): [
        ("broadcast_start", r"\.o_proj", "attention output: whole on the rank", "computed whole"),
        ("wait", r"\.o_proj", "attention output: whole on the rank", "computed whole"),
        ("broadcast_start", r"\.q_b_proj", "query: whole on the rank", "computed whole"),
        ("all_gather", r"\.kv_a_layernorm", "tokens: by sequence", "cache: replicated"),
        ("all_gather", r"\.self_attn", "tokens: by sequence", "cache: replicated"),
        ("all_gather", r"\.indexer", "tokens: by sequence", "cache: replicated"),
        ("all_gather", "lm_head", "tokens: by sequence", "every rank returns the whole output"),
    ],
    ("decode", "decode"): [
        ("all_reduce", r"\.o_proj", "query: split by heads", "computed whole"),
        ("all_reduce", "embed_tokens", "embedding: split by rows", "computed whole"),
        ("all_reduce", r"\.down_proj", "mlp in: split by output features", "computed whole"),
        ("all_reduce", r"1\.mlp", "experts: split by rows", "computed whole"),
        ("all_gather", "lm_head", "lm_head: split by rows", "every rank returns"),
    ],
    ("pd_mixed", "decode"): [
        ("all_to_all", r"\.o_proj", "tokens: by batch", O_PROJ),
        ("reduce_scatter", r"\.o_proj", O_PROJ, "tokens: by batch"),
        ("all_gather", r"\.kv_a_layernorm", "tokens: by batch", "cache: replicated"),
        ("all_gather", r"\.indexer", "tokens: by batch", "cache: replicated"),
        ("all_gather", "embed_tokens", "tokens: by batch", "embedding: split by rows"),
        ("reduce_scatter", "embed_tokens", "embedding: split by rows", "tokens: by batch"),
        ("reduce_scatter", r"1\.mlp", "experts: split by rows", "tokens: by batch"),
        ("all_reduce", r"\.experts", "tokens: by batch", "experts: split by rows"),
        ("all_gather", "model.norm", "tokens: by batch", "lm_head: split by rows"),
    ],
    ("pd_mixed", "prefill"): [
        ("all_to_all", r"\.o_proj", "tokens: by sequence", O_PROJ),
        ("reduce_scatter", r"\.o_proj", O_PROJ, "tokens: by sequence"),
        ("all_gather", r"1\.mlp\.gate", "tokens: by sequence", "computed whole"),
    ],
    ("pd_mixed", "long prefill"): [
        ("all_gather", r"\.o_proj", O_PROJ, "tokens: by sequence"),
        ("all_gather", r"\.gate_proj", "mlp in: split by output features", "tokens: by sequence"),
        ("all_gather", r"\.indexer", "tokens: by sequence", "cache: replicated"),
        ("all_gather", "model.norm", "tokens: by sequence", "lm_head: split by rows"),
    ],
}
"""What docs/roles.md says: the op, its module, and what the layouts before and after come from."""


@pytest.mark.parametrize(
    ("role", "phase", "op", "module", "before", "after"),
    [(*program, *row) for program, rows in NAMED.items() for row in rows],
)
def test_collectives_of_the_roles(
    role: str, phase: str, op: str, module: str, before: str, after: str
) -> None:
    found = explained(("hf:deepseek_v32", role, phase, "tp=4"))
    named = [
        node.name
        for node in inserted(found)
        if str(node.target) == f"mesh.{op}" and re.search(f"{module}$", origin(node).module)
    ]
    assert named
    for name in named:
        (side,) = move(found, name).sides
        assert _end(side.value).startswith(before), name
        assert _end(side.user).startswith(after), name


def _end(chain: Chain) -> str:
    return chain.links[-1].text


def test_the_two_ways_through_the_output_projection_are_each_others_alternative() -> None:
    """Few tokens go to the weight, many have it brought: docs/roles.md."""
    for phase, first, second in (("prefill", "1", "0"), ("long prefill", "0", "1")):
        found = explained(("hf:deepseek_v32", "pd_mixed", phase, "tp=4"))
        (user,) = [
            node.name
            for node in found.nodes.values()
            if str(node.target) == "aten.mm.default"
            and origin(node).module == "model.layers.0.self_attn.o_proj"
        ]
        decision = found.chains.chain(user, 0).links[0].decision
        assert decision is not None
        order = [entry.follows for entry in decision.alternatives]
        assert order == [f"operand {first}", f"operand {second}", ""]
        assert decision.alternatives[0].ratio == 1
        assert all(entry.ratio is not None for entry in decision.alternatives)


@pytest.mark.parametrize("op", ["all_to_all", "reduce_scatter", "all_gather"])
def test_without_the_need_the_collective_is_not_there(op: str) -> None:
    """The op that is said to need a value is made to compute whole: then nobody needs it there."""
    found = explained(("hf:deepseek_v32", "pd_mixed", "prefill", "tp=4"))
    modules = {"all_gather": "kv_a_layernorm"}
    node = next(
        node
        for node in inserted(found)
        if str(node.target) == f"mesh.{op}"
        and origin(node).module == f"model.layers.0.self_attn.{modules.get(op, 'o_proj')}"
    )
    said = move(found, node.name)
    user, value = found.nodes[said.user], found.nodes[said.value]
    decided = found.decided
    old = decided.decisions[user]
    # A gather is needed by a whole choice, so that one is taken away; others by a split.
    choice = old.alternatives[0][0].choice if op == "all_gather" else Whole()
    decisions, layouts = dict(decided.decisions), dict(decided.layouts)
    changed: dict[fx.Node, Choice] = {user: choice}
    for other in decided.ops:
        linear = other in decisions and isinstance(decisions[other].choices[0], Linear)
        if linear and changed.keys() & set(other.all_input_nodes):
            changed[other] = Whole()  # no sum is pending any more
    for other, choice in changed.items():
        decisions[other] = dataclasses.replace(decisions[other], choices=(choice,))
        layouts[other] = (Layout((decisions[other].rule.result_placement(0, choice),)),)
    program = dataclasses.replace(decided, decisions=decisions, layouts=layouts)
    left = [
        (str(other.target), origin(other).value, origin(other).user)
        for other in Partition().apply(program).ops
    ]
    assert (f"mesh.{op}", value.name, user.name) not in left
    assert (f"mesh.{op}", value.name, user.name) in [
        (str(other.target), origin(other).value, origin(other).user)
        for other in found.partitioned.ops
    ]


def test_a_broadcast_is_told_as_one_move() -> None:
    found = explained(("hf:deepseek_v32", "prefill", "prefill", "tp=4"))
    names = list(found.moves.stage.nodes)
    for start in [n.name for n in inserted(found) if n.target is dialect.BROADCAST_START]:
        said = move(found, start)
        first, last = said.steps
        assert (first.node, last.op) == (start, "mesh.wait")
        assert first.slot
        assert first.collective is not None
        assert said.ahead == names.index(last.node) - names.index(start) - 1
        assert said.after == last.kind
        assert move(found, last.node) == said
        assert said.sides[0].after == WHOLE
