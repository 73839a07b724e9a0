"""Layout constraints in a graph: what `rolemesh.constrain` leaves for the passes.

A constraint is a node of the custom op `rolemesh::constrain(Tensor x, str spec) -> Tensor`, whose
value is `x`; `spec` is the text of a `P`. The op itself is registered with PyTorch in
`rolemesh.compiler.annotate`.
"""

from __future__ import annotations

import ast

from torch import fx
from torch._ops import OpOverload

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.program import Program, origin, tensor_types
from rolemesh.compiler.ir.spec import P

__all__ = ["CONSTRAIN", "constraint_of", "parse_spec", "pinned_values", "spec_text"]

CONSTRAIN = "rolemesh::constrain"
"""Qualified name of the op."""


def constraint_of(node: fx.Node) -> P | None:
    """The layout that a node is constrained to; None for a node that is no constraint.

    Raises:
        RolemeshError: RM014, if the node carries a text that is no spec.
    """
    target = node.target
    if not isinstance(target, OpOverload) or target._schema.name != CONSTRAIN:
        return None
    spec = node.args[1] if len(node.args) > 1 else node.kwargs["spec"]
    where = origin(node)
    return parse_spec(str(spec), f"constraint in {where.module or 'the model'} {where.source}")


def spec_text(spec: P) -> str:
    """A spec as text, for example `P('tp', None, units={0: 16})`; `parse_spec` reads it."""
    return str(spec)


def parse_spec(text: str, where: str = "") -> P:
    """The spec that `spec_text` wrote, or that a user wrote in the same form.

    Args:
        text: A call of `P` with literal arguments.
        where: What the text belongs to, for the error.

    Raises:
        RolemeshError: RM014, if the text is anything else.
    """
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)):
            raise ValueError("not a call of P")
        if call.func.id != "P":
            raise ValueError(f"calls {call.func.id}")
        entries = [ast.literal_eval(argument) for argument in call.args]
        options = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
    except (ValueError, SyntaxError) as error:
        raise _malformed(text, where, str(error)) from None
    numbers = {option: options.pop(option, {}) for option in ("units", "parts")}
    if options:
        raise _malformed(text, where, f"P has no option {next(iter(options))!r}")
    for entry in entries:
        if not _is_entry(entry):
            raise _malformed(text, where, f"{entry!r} is no axis name, tuple of names or None")
    for option, given in numbers.items():
        if not isinstance(given, dict) or not all(
            isinstance(number, int) for pair in given.items() for number in pair
        ):
            raise _malformed(text, where, f"{option} maps dims to numbers of {option}")
    return P(*entries, **numbers)


def _is_entry(entry: object) -> bool:
    if isinstance(entry, tuple):
        return all(isinstance(axis, str) for axis in entry)
    return entry is None or isinstance(entry, str)


def _malformed(text: str, where: str, why: str) -> RolemeshError:
    return RolemeshError(
        "RM014",
        f"{text!r} is no layout spec",
        where=where,
        why=why,
        fix="write one entry per dim, for example P('tp', None) or P(('dp', 'tp'), units={0: 16})",
    )


def pinned_values(program: Program) -> dict[fx.Node, Layout]:
    """Layouts that results must have: of mutated inputs, of pinned outputs, of constraints."""
    pins: dict[fx.Node, Layout] = {}
    for index, (value, output) in enumerate(zip(program.results, program.outputs, strict=True)):
        if isinstance(value, fx.Node) and value.op == "call_function":
            if output.mutates is not None:
                pins[value] = program.layout(program.placeholders[output.mutates])
            elif index in program.pinned and not program.pinned[index].is_replicated:
                pins[value] = program.pinned[index]
    for node in program.ops:
        spec = constraint_of(node)
        if spec is not None:
            name = f"the value constrained in {origin(node).module or 'the model'}"
            pins[node] = spec.layout(tensor_types(node)[0].shape, program.the_mesh, name)
    return pins
