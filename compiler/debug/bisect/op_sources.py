"""Where the ops of a Program are defined that neither torch nor rolemesh brings.

A script that holds such a Program must load them first.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from importlib.machinery import PathFinder

import torch
from torch._library.custom_ops import OPDEFS

from rolemesh.compiler.ir.program import Program

__all__ = ["loading_lines"]


def loading_lines(*programs: Program) -> list[str]:
    """Lines of Python that define the custom ops of Programs, for a script without the model.

    An op that was defined in another way than by `torch.library.custom_op` is not found.
    """
    found: dict[str, None] = {}
    for program in programs:
        found.update(dict.fromkeys(_lines(program)))
    return sorted(found)


def _lines(program: Program) -> Iterator[str]:
    for node in program.ops:
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        definition = OPDEFS.get(node.target._schema.name)
        if definition is None:
            continue
        function = definition._init_fn
        file = inspect.getsourcefile(function)
        package = function.__module__.partition(".")[0]
        if package != "__main__" and PathFinder.find_spec(package) is not None:
            yield f"import {function.__module__}  # noqa: F401 - defines {definition._qualname}"
        elif file is not None:
            yield f"runpy.run_path({file!r})  # defines {definition._qualname}"
