"""Checks of what is under way: started collectives, and the buffers that they receive into."""

from __future__ import annotations

from torch import fx

from rolemesh.compiler.ir import dialect
from rolemesh.compiler.ir.program import Program, tensor_type
from rolemesh.passes.faults import fail
from rolemesh.passes.prefetch import last_read

__all__ = ["check_slots", "check_waits"]


def check_slots(program: Program) -> None:
    """A pooled buffer has values of one type, each of which is read before the next comes.

    Raises:
        RolemeshError: RM016 if not.
    """
    position = {node: index for index, node in enumerate(program.graph.nodes)}
    tenants: dict[object, fx.Node] = {}
    for node in program.ops:
        if node.target is not dialect.BROADCAST_START:
            continue
        slot = node.kwargs["slot"]
        earlier = tenants.get(slot)
        tenants[slot] = node
        if earlier is None:
            continue
        if tensor_type(earlier) != tensor_type(node):
            fail(program, node, f"reuses buffer {slot} for another type", "a buffer has one type")
        if last_read(earlier, position) >= position[node]:
            fail(
                program,
                node,
                f"receives into buffer {slot} before %{earlier.name} was read for the last time",
                "the earlier weight would be overwritten while it is in use",
            )


def check_waits(program: Program) -> None:
    """What is started is waited for once, and nothing else reads it.

    Ranks issue the collectives of a group in the order of the starts, which one text gives to all;
    waiting in another order would be waiting for the later one of two.

    Raises:
        RolemeshError: RM016 if not.
    """
    number: dict[tuple[str, ...], int] = {}
    waited: dict[tuple[str, ...], tuple[int, fx.Node]] = {}
    starts: dict[fx.Node, tuple[tuple[str, ...], int]] = {}
    for node in program.ops:
        if dialect.is_start(node):
            names = node.kwargs["axes"]
            assert isinstance(names, tuple)
            axes = tuple(map(str, names))
            number[axes] = number.get(axes, 0) + 1
            starts[node] = axes, number[axes]
            readers = list(node.users)
            if len(readers) != 1 or readers[0].target is not dialect.WAIT:
                fail(
                    program,
                    node,
                    f"is read by {', '.join(f'%{reader.name}' for reader in readers) or 'nothing'}",
                    "its result is there once one wait has ended it",
                )
        elif node.target is dialect.WAIT:
            (start,) = node.all_input_nodes
            if program.layouts[node] != program.layouts[start]:
                fail(program, node, "has another layout than what it waits for", "it is the same")
            if start.target is dialect.BROADCAST_START:
                continue  # weights that come ahead are waited for where they are used
            axes, position = starts[start]
            later, other = waited.get(axes, (0, node))
            if later > position:
                fail(
                    program,
                    node,
                    f"waits for %{start.name} after %{other.name}, which was started later",
                    "a group runs its collectives in the order they are started in",
                )
            waited[axes] = position, node
