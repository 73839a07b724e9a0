"""What differs between two recorded stages: nodes, layouts, collectives, bytes and memory.

The stages may be two of one program, of two ranks, of two runs, or of two roles or phases; nodes
are matched by `compiler.debug.matching`. A stage has no difference from itself.

Two phases have other numbers of tokens, and so other sizes almost everywhere. Where the formulas of
both stages know B and T, a size that is the same multiple of B, T or a rank's part of them in both
is said to differ in tokens only, and told apart from what else differs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import zip_longest
from typing import Any

from rolemesh.compiler.debug.diff.matching import Matching, is_inserted, match
from rolemesh.compiler.debug.explain.decided import placement_words
from rolemesh.compiler.debug.memory import memory_of
from rolemesh.compiler.debug.sizes import sizes_of
from rolemesh.compiler.dump.reader import Node, Stage
from rolemesh.compiler.memory import MemoryAnalysis

__all__ = ["Change", "Difference", "Kind", "Traffic", "difference"]


class Kind(Enum):
    """How a node differs.

    `DECIDED` is another choice of propagation that leaves the result's layout as it was, and
    `TOKENS` a node that differs in the number of tokens only.
    """

    ADDED = "added"
    REMOVED = "removed"
    MOVED = "moved"
    CHANGED = "changed"
    RESHARDED = "resharded"
    DECIDED = "decided"
    TOKENS = "tokens"


@dataclass(frozen=True)
class Change:
    """One difference of one node.

    Attributes:
        kind: How it differs.
        node: Its name in the first stage; in the second, if it was added.
        other: Its partner's name in the second stage, if it has one.
        module: Module path.
        op: Its op; of a changed op, the one before.
        what: What of it differs: `op`, `argument 1`, `result`; of a layout, how, by mesh axis.
        before: That in the first stage.
        after: That in the second.
    """

    kind: Kind
    node: str
    other: str
    module: str
    op: str
    what: str = ""
    before: str = ""
    after: str = ""


@dataclass(frozen=True)
class Traffic:
    """Collectives of one op over the same axes.

    Attributes:
        count: How many.
        received: Bytes a rank receives in them.
    """

    count: int = 0
    received: int = 0


@dataclass(frozen=True)
class Difference:
    """All that differs between two stages.

    Attributes:
        left: The first stage.
        right: The second.
        changes: Differences of nodes, in the order of the first stage; added ones come last.
        traffic: By op and axes, the collectives of both, where there are any.
        memory: What a rank holds; None for a stage before partitioning.
        meshes: Axis sizes of both.
        placed: Whether values have layouts yet, in both.
        sizes: B, T and the ranks of each mesh axis, of both, as far as they are known.
    """

    left: Stage
    right: Stage
    changes: tuple[Change, ...]
    traffic: Mapping[str, tuple[Traffic, Traffic]]
    memory: tuple[MemoryAnalysis | None, MemoryAnalysis | None]
    meshes: tuple[Mapping[str, int], Mapping[str, int]]
    placed: tuple[bool, bool]
    sizes: tuple[Mapping[str, int], Mapping[str, int]]

    def __bool__(self) -> bool:
        pairs = (*self.traffic.values(), self.memory, self.meshes, self.placed)
        return bool(self.changes) or any(left != right for left, right in pairs)

    @property
    def received(self) -> tuple[int, int]:
        """Bytes a rank receives in all collectives, in both."""
        left, right = (
            sum(pair[side].received for pair in self.traffic.values()) for side in (0, 1)
        )
        return left, right


def difference(
    left: Stage,
    right: Stage,
    *,
    one_program: bool = False,
    sizes: tuple[Mapping[str, int], Mapping[str, int]] | None = None,
) -> Difference:
    """What differs between two stages.

    Args:
        left: The first.
        right: The second.
        one_program: Whether both are stages of one program, whose nodes keep their names.
        sizes: B, T and the ranks of each mesh axis, of both; by default what the stages say, which
            do so once they are partitioned.
    """
    sizes = sizes or (left.data.get("sizes", {}), right.data.get("sizes", {}))
    matching = match(left, right, one_program=one_program, same_sizes=sizes[0] == sizes[1])
    changes = tuple(_Comparison(left, right, matching, _Sizes(left, right, sizes)).changes())
    traffic = (_traffic(left), _traffic(right))
    return Difference(
        left,
        right,
        changes,
        {
            key: (traffic[0].get(key, Traffic()), traffic[1].get(key, Traffic()))
            for key in dict.fromkeys([*traffic[0], *traffic[1]])
        },
        (memory_of(left), memory_of(right)),
        (left.mesh, right.mesh),
        (_is_placed(left), _is_placed(right)),
        sizes,
    )


def _is_placed(stage: Stage) -> bool:
    return any(node.layouts for node in stage.nodes.values())


def _traffic(stage: Stage) -> dict[str, Traffic]:
    found: dict[str, Traffic] = {}
    for node in stage.nodes.values():
        moved = node.collective
        if moved is not None:
            key = f"{moved['op']} {','.join(moved['axes'])}"
            old = found.get(key, Traffic())
            found[key] = Traffic(old.count + 1, old.received + int(moved["bytes"]))
    return found


class _Comparison:
    """The differences of matched nodes, and those without a partner."""

    def __init__(self, left: Stage, right: Stage, matching: Matching, sizes: _Sizes) -> None:
        self.left, self.right = left, right
        self.pairs = matching.pairs
        self.moved = matching.moved
        self.axes = [*dict.fromkeys([*left.mesh, *right.mesh])]
        self.partners = {other: name for name, other in self.pairs.items()}
        self.sizes = sizes

    def changes(self) -> Iterator[Change]:
        for name, node in self.left.nodes.items():
            other = self.right.nodes.get(self.pairs.get(name, ""))
            if other is None:
                kind = ", ".join(node.kinds)
                yield Change(Kind.REMOVED, name, "", node.module, node.op, before=kind)
            else:
                yield from self._of_pair(node, other)
        for name, node in self.right.nodes.items():
            if name not in self.partners:
                kind = ", ".join(node.kinds)
                yield Change(Kind.ADDED, name, "", node.module, node.op, after=kind)
        yield from self._signature()

    def _of_pair(self, left: Node, right: Node) -> Iterator[Change]:
        def change(kind: Kind, what: str = "", before: str = "", after: str = "") -> Change:
            return Change(kind, left.name, right.name, left.module, left.op, what, before, after)

        if left.name in self.moved:
            yield change(Kind.MOVED)
        types = [[_type(value) for value in node.data["types"]] for node in (left, right)]
        results = self.sizes.compare(*types)
        if results == "different":
            yield change(Kind.CHANGED, "result", *(", ".join(map(_text, side)) for side in types))
        # A plain number among the arguments is a number of tokens only if the result has such.
        follows = ("same", "tokens") if results == "tokens" else ("same",)
        tokens = results == "tokens"
        for what, before, after in self._contents(left, right):
            found = self.sizes.compare(before, after)
            if found not in follows:
                yield change(Kind.CHANGED, what, _text(before), _text(after))
            tokens |= found == "tokens"
        layouts = self._layouts(self.left, left), self._layouts(self.right, right)
        placed = self.sizes.compare(*layouts) if all(layouts) else "same"
        if placed == "different":
            before, after = (", ".join(node.kinds) for node in (left, right))
            yield change(Kind.RESHARDED, self._moves(*layouts), before, after)
        elif left.decision is not None and right.decision is not None:
            chosen = [", ".join(given["choices"]) for given in (left.decision, right.decision)]
            if chosen[0] != chosen[1]:
                yield change(Kind.DECIDED, "choice", *chosen)
        if tokens or placed == "tokens":
            yield change(Kind.TOKENS)

    def _layouts(self, stage: Stage, node: Node) -> list[list[Any]]:
        """Layouts over the axes of both meshes; nodes that they name, as the second names them."""
        found = []
        for layout in node.layouts:
            by_axis = dict(zip(stage.mesh, layout, strict=True))
            placements = [by_axis.get(axis, "replicated") for axis in self.axes]
            if stage is self.left:
                placements = [self._placement(placement) for placement in placements]
            found.append(placements)
        return found

    def _placement(self, placement: Any) -> Any:
        if not isinstance(placement, dict) or "routed" not in placement:
            return placement
        key, *rest = placement["routed"]
        words = [self.pairs.get(word, word) for word in key.split(":")]
        return {"routed": [":".join(words), *rest]}

    def _moves(self, before: list[list[Any]], after: list[list[Any]]) -> str:
        """How layouts differ, in words, by axis."""
        found: dict[str, None] = {}
        for layouts in zip(before, after, strict=False):
            for axis, was, is_now in zip(self.axes, *layouts, strict=True):
                if self.sizes.compare(was, is_now) == "different":
                    words = placement_words(was), placement_words(is_now)
                    found[f"{axis}: {words[0]} -> {words[1]}"] = None
        return "; ".join(found)

    def _contents(self, left: Node, right: Node) -> Iterator[tuple[str, Any, Any]]:
        """Ops and arguments; those of another op have another meaning."""
        if left.op != right.op:
            yield "op", left.op, right.op
            return
        before, after = (dict(_named_arguments(node)) for node in (left, right))
        for name in dict.fromkeys([*before, *after]):
            values = before.get(name), after.get(name)
            if not (_is_own_shape(left, values[0]) and _is_own_shape(right, values[1])):
                yield from self._argument(name, *values)

    def _argument(self, name: str, left: Any, right: Any) -> Iterator[tuple[str, Any, Any]]:
        sides = [value.get("node") if isinstance(value, dict) else None for value in (left, right)]
        if sides[0] is not None and sides[1] is not None:
            before = self._read(self.left, sides[0], self.pairs)
            after = self._read(self.right, sides[1], self.partners)
            if self.pairs.get(before, "") != after:
                ops = self.left.nodes[before].op, self.right.nodes[after].op
                yield f"operand of {name}", f"%{before} ({ops[0]})", f"%{after} ({ops[1]})"
        elif isinstance(left, list) and isinstance(right, list) and _has_nodes([left, right]):
            for index, pair in enumerate(zip_longest(left, right)):
                yield from self._argument(f"{name}[{index}]", *pair)
        else:
            yield name, left, right

    def _read(self, stage: Stage, name: str, partners: Mapping[str, str]) -> str:
        """The value that an operand is, before what only one of the stages inserts to bring it."""
        while name not in partners and is_inserted(stage.nodes[name]):
            name = stage.nodes[name].operands[0]
        return name

    def _signature(self) -> Iterator[Change]:
        """Kinds of inputs, and what is returned."""
        kinds = [
            {entry["node"]: [entry["kind"], entry.get("mutated", False)] for entry in head}
            for head in (self.left.head["inputs"], self.right.head["inputs"])
        ]
        for name, was in kinds[0].items():
            other = self.pairs.get(name, "")
            if other and was != kinds[1][other]:
                texts = [
                    f"{what}{', updated' if new else ''}" for what, new in (was, kinds[1][other])
                ]
                yield Change(Kind.CHANGED, name, other, "", "input", "kind", *texts)
        outputs = _outputs(self.left), _outputs(self.right)
        for name in dict.fromkeys([*outputs[0], *outputs[1]]):
            if name not in outputs[0] or name not in outputs[1]:
                kind = Kind.REMOVED if name in outputs[0] else Kind.ADDED
                yield Change(kind, name, "", "", "output")
                continue
            for what, before, after in self._argument("it", outputs[0][name], outputs[1][name]):
                if before != after:
                    shown = _text(before), _text(after)
                    yield Change(Kind.CHANGED, name, name, "", "output", what, *shown)


def _outputs(stage: Stage) -> dict[str, Any]:
    """What a program returns: new values of inputs by the inputs' names, and results by number."""
    found: dict[str, Any] = {}
    results = 0
    for entry in stage.head["outputs"]:
        index = entry.get("mutates")
        name = f"result {results}" if index is None else stage.head["inputs"][index]["name"]
        results += index is None
        found[str(name)] = entry["value"]
    return found


def _named_arguments(node: Node) -> Iterator[tuple[str, Any]]:
    for index, value in enumerate(node.data.get("args", [])):
        yield f"argument {index}", value
    yield from node.data.get("kwargs", {}).items()


def _is_own_shape(node: Node, value: Any) -> bool:
    """Whether an argument says the result's shape, logical or local: its type and layout do too."""
    if not isinstance(value, list) or not value:
        return False
    shapes = [value["shape"] for value in node.data["types"]] + node.data.get("local", [])
    return [_plain(size) for size in value] in shapes


def _plain(size: Any) -> Any:
    """A size as shapes have it; see `compiler.ir.serial_values`."""
    return size["dim"] if isinstance(size, dict) and "dim" in size else size


def _has_nodes(value: Any) -> bool:
    if isinstance(value, list):
        return any(map(_has_nodes, value))
    return isinstance(value, dict) and "node" in value


def _type(value: Mapping[str, Any]) -> list[Any]:
    return [value["dtype"], *value["shape"]]


def _text(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, dict):
        ((kind, inner),) = value.items()
        return f"%{inner}" if kind == "node" else f"{kind} {_text(inner)}"
    return "none" if value is None else str(value)


_FIXED: Mapping[str, int] = {"shard": 1, "segmented": 1, "routed": 2}
"""How many entries of a placement come before its sizes; see `compiler.ir.serial_values`."""


class _Sizes:
    """Whether two sizes are the same for the tokens of each stage."""

    def __init__(self, left: Stage, right: Stage, known: Sequence[Mapping[str, int]]) -> None:
        self.value = sizes_of(left), sizes_of(right)
        self.counts: list[tuple[int, int]] = []
        if all("B" in sizes and "T" in sizes for sizes in known):
            before, after = (_counts(sizes) for sizes in known)
            self.counts = [(before[key], after[key]) for key in before.keys() & after.keys()]

    def compare(self, left: Any, right: Any) -> str:
        """`same`, `tokens` if what differs are sizes that follow the tokens, else `different`."""
        if left == right:
            return "same"
        if isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
            found = {self.compare(*pair) for pair in zip(left, right, strict=True)}
            return (
                "different" if "different" in found else "tokens" if "tokens" in found else "same"
            )
        if isinstance(left, dict) and isinstance(right, dict) and left.keys() == right.keys():
            ((kind, before),), (after,) = left.items(), right.values()
            fixed = _FIXED.get(kind, 0)
            if fixed and before[:fixed] != after[:fixed]:
                return "different"
            return self.compare(before, after)
        left, right = _plain(left), _plain(right)
        try:
            sizes = self.value[0](left), self.value[1](right)
        except (ValueError, SyntaxError, TypeError):
            return "different"
        if sizes[0] == sizes[1]:
            return "same"
        follows = any(
            sizes[0] % before == sizes[1] % after == 0 and sizes[0] // before == sizes[1] // after
            for before, after in self.counts
        )
        return "tokens" if follows else "different"


def _counts(sizes: Mapping[str, int]) -> dict[str, int]:
    """What follows the tokens: all of them or a rank's part, of one sequence or of all."""
    batch, tokens = sizes["B"], sizes["T"]
    found = {"B": batch, "T": tokens, "B*T": batch * tokens}
    for axis, ranks in sizes.items():
        if axis not in ("B", "T"):
            parts = {f"{name}/{axis}": -(-found[name] // ranks) for name in ("B", "T", "B*T")}
            found |= parts
            found[f"B/{axis}*T"] = parts[f"B/{axis}"] * tokens
            found[f"B*T/{axis}, by sequence"] = batch * parts[f"T/{axis}"]
    return found
