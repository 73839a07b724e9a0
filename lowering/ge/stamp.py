"""More repeats of what torchair has converted: copies of GE's ops.

In a graph that torchair is to convert, a call of a `Stamp` stands for repeats that follow two alike
ones. Its converter compares what torchair made of these two, op by op, and adds copies of the ops,
each of which reads what comes next where the two read different values: the value of the op at the
same distance, or the next input. `mark` says where the two begin.

Invariants:

* Copies are added only if the two are the same but for names and such operands.
* Names are those that torchair would give the ops.
* What torchair knows of a value besides its op (that views are still to be made of it) goes on to
  the values of the last copies.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rolemesh.lowering.ge.loader import Torchair

__all__ = ["Stamp", "UnlikeError", "mark"]


class UnlikeError(Exception):
    """What looked like repeats is not the same in GE, so that the graph is to be lowered whole."""


def mark() -> None:
    """Stands where a repeat begins; in GE, for how many ops there are before it."""


class Stamp:
    """Stands for repeats that are left out of a graph.

    It is called with a mapping: `first` and `second` are the marks of the two repeats before it;
    `input_N_K` is the Kth of the inputs that one repeat after the other reads in one place, and
    `result_N` a value of the second repeat.

    Args:
        repeats: How many repeats are left out.
        lengths: For each such place, how many inputs there are.
        results: For each `result_N`, the number of the repeat whose value is returned for it.
        renamed: What a node of torch is called some repeats later.
    """

    def __init__(
        self,
        repeats: int,
        lengths: Sequence[int],
        results: Sequence[int],
        renamed: Callable[[str, int], str],
    ) -> None:
        self.__name__ = "stamp"
        self.repeats = repeats
        self.lengths = lengths
        self.results = results
        self.renamed = renamed

    def __call__(self, given: Mapping[str, object]) -> list[object]:
        """Values with the sizes of the results."""
        return [given[f"result_{number}"] for number in range(len(self.results))]

    def register(self, torchair: Torchair) -> None:
        """Make it known to torchair."""
        register = torchair.module.register_fx_node_ge_converter
        register(mark)(_number_of_ops)
        register(self)(self.convert)

    def convert(self, given: Mapping[str, Any]) -> list[object]:
        """Add the ops to torchair's graph; the results.

        Raises:
            UnlikeError: If the two repeats are not alike.
        """
        rows = [
            [given[f"input_{number}_{k}"] for k in range(length)]
            for number, length in enumerate(self.lengths)
        ]
        follows = {x.tensor: y for row in rows for x, y in itertools.pairwise(row)}
        copying = _Copying(_graph(), given["first"], given["second"], follows)
        for repeat in range(self.repeats):
            copying.add(repeat, self.renamed)
        return [
            copying.value(given[f"result_{number}"], repeat)
            for number, repeat in enumerate(self.results)
        ]


def _graph() -> Any:
    """The graph that torchair is making."""
    from torchair.ge._ge_graph import get_default_ge_graph

    return get_default_ge_graph()


def _number_of_ops() -> int:
    return len(_graph().op)


class _Copying:
    """Copies of ops under way.

    Args:
        graph: torchair's graph.
        first: Number of ops before the first of the two repeats.
        second: Number of ops before the second.
        follows: By the name of an input, the one that the next repeat reads there.
    """

    def __init__(self, graph: Any, first: int, second: int, follows: Mapping[str, Any]) -> None:
        self.graph = graph
        self.names = [op.name for op in graph.op]
        self.place = {name: place for place, name in enumerate(self.names)}
        self.first = first
        self.period = second - first
        self.follows = follows
        self.used = {*self.names, *graph.op_name_list}
        # The first was converted before what reads its values: it is whole, and is what is copied.
        self.originals, others = graph.op[first:second], graph.op[second:]
        if len(self.originals) != len(others):
            raise UnlikeError("repeats are not as many ops in GE")
        self.operands = [self._operands(*pair) for pair in zip(self.originals, others, strict=True)]
        self.kept = [x for x in graph.must_keep_ops if self.place[x.node.name] >= second]

    def _operands(self, one: Any, other: Any) -> list[_Operand]:
        """What copies of an op read."""
        if one.type == "Data" or _plain(one) != _plain(other):
            raise UnlikeError(f"{one.name} and {other.name} are not alike")
        return [self._operand(*sources) for sources in zip(one.input, other.input, strict=True)]

    def _operand(self, one: str, other: str) -> _Operand:
        if one == other:
            return other
        if one in self.follows and self.follows[one].tensor == other:
            return self._later(self.graph.op[self.place[one.rpartition(":")[0]]], other)
        (source, _, number), (later, _, same) = one.rpartition(":"), other.rpartition(":")
        if number == same and self.place[later] - self.place[source] == self.period:
            return self.place[later], number
        raise UnlikeError(f"repeats read {one} and {other}")

    def _later(self, data: Any, name: str) -> list[str]:
        """The inputs of the copies."""
        found: list[str] = []
        while name in self.follows:
            value = self.follows[name]
            # What is known of an input changes with the views that a repeat takes of it.
            value.desc.attr[_META].CopyFrom(data.output_desc[0].attr[_META])
            name = value.tensor
            found.append(name)
        return found

    def add(self, repeat: int, renamed: Callable[[str, int], str]) -> None:
        """Add the copies of one repeat."""
        made = []
        for original, operands in zip(self.originals, self.operands, strict=True):
            copy = self.graph.op.add()
            copy.CopyFrom(original)
            copy.name = self._name(original.type)
            self.names.append(copy.name)
            for number, operand in enumerate(operands):
                copy.input[number] = self._source(operand, repeat)
            moved = [isinstance(operand, tuple) for operand in operands]
            descs = itertools.compress(copy.input_desc, moved)
            for desc in (*descs, *copy.output_desc):
                _rename(desc, lambda name: renamed(name, repeat + 2))
            made.append(copy)
        for value in self.kept:
            place = self.place[value.node.name] - self.first - self.period
            self.graph.dont_prune_me(type(value)(made[place], value.index))

    def _name(self, kind: str) -> str:
        """The name that torchair would give the next op of a type.

        It goes on from this number, so that the name need not be in its list, which it searches.
        """
        number = self.graph.op_name_idx_dict.get(kind, 0) + 1
        while f"{kind}_{number}" in self.used:
            number += 1
        self.graph.op_name_idx_dict[kind] = number
        return f"{kind}_{number}"

    def _source(self, operand: _Operand, repeat: int) -> str:
        if isinstance(operand, str):
            return operand
        if isinstance(operand, list):
            return operand[repeat]
        place, number = operand
        return f"{self.names[place + (repeat + 1) * self.period]}:{number}"

    def value(self, value: Any, repeat: int) -> Any:
        """What a repeat has in the place of a value of the second of the two.

        It has an op of its own, equal to the one in the graph: torchair labels what a converter
        returns, and the labels of the graph's are right.
        """
        if isinstance(value, list | tuple):
            return [self.value(part, repeat) for part in value]
        if not hasattr(value, "tensor"):
            return value  # of a tensor without elements, which is no part of the graph
        place = self.place[value.node.name]
        op = type(value.node)()
        if value.tensor in self.follows:
            later = self._later(value.node, value.tensor)[repeat]
            op.CopyFrom(self.graph.op[self.place[later.rpartition(":")[0]]])
        elif place >= self.first:
            op.CopyFrom(self.graph.op[place + (repeat + 1) * self.period])
        else:
            return value
        found = type(value)(op, value.index)
        vars(found).update({k: v for k, v in vars(value).items() if k not in vars(found)})
        return found


_Operand = str | list[str] | tuple[int, str]
"""What all repeats read, or the inputs that they read, or the place of the op that the second reads
and the number of its output."""


def _plain(op: Any) -> Any:
    """An op without names and operands, and without what is known of its values."""
    found = type(op)()
    found.CopyFrom(op)
    found.name = ""
    found.input[:] = [""] * len(found.input)
    for desc in (*found.input_desc, *found.output_desc):
        desc.attr.clear()
    return found


def _rename(desc: Any, renamed: Callable[[str], str]) -> None:
    """Name the node of torch that a value is of."""
    if _LABEL in desc.attr:
        name, separator, rest = desc.attr[_LABEL].s.decode().partition("-")
        desc.attr[_LABEL].s = f"{renamed(name)}{separator}{rest}".encode()


_LABEL = "_fx_tensor_name"
_META = "_meta"
