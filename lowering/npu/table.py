"""The form of a fused Ascend op, and the tables they are kept in.

A function computes one op in plain torch. Its parameters are those of the schema, which is the one
of torch_npu, letter by letter; a second function of the same parameters gives the results' shapes::

    def rms_norm_shape(input, gamma, epsilon=1e-06): ...


    @OPS.op(
        "npu_rms_norm(Tensor input, Tensor gamma, float epsilon=1e-06) -> (Tensor, Tensor)",
        ge="RmsNorm",
        shape=rms_norm_shape,
    )
    def rms_norm(input, gamma, epsilon=1e-06): ...

Both return what the schema says: a tensor, a tuple, or None for `()`. The shape function runs on
tensors without data, whose sizes may be symbols: it reads no values, and returns new tensors, made
by `new_empty`. The reference computes in fp32 inside, as the device does, and returns the dtypes
that the device returns.

An op that writes to arguments (`Tensor(a!)` in its schema) changes them in place. It also names the
schema of its functional variant, whose results are the op's own results, less those that are
arguments, followed by the new values of the arguments, in their order. The variant needs no
functions: it runs the op on copies.

An option that the reference does not have is refused by `refuse`, in both functions, so that an
unsupported call fails while it is traced. Values that no device takes fail in `torch._check`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from rolemesh.compiler.ir.errors import RolemeshError

__all__ = ["NpuOp", "NpuOpTable", "refuse"]

_Function = TypeVar("_Function", bound=Callable[..., object])


@dataclass(frozen=True)
class NpuOp:
    """One op of `torch.ops.npu`.

    Attributes:
        schema: Its schema, without the namespace.
        ge: Type of the GE op that torchair's converter makes of it.
        reference: Computes it.
        shape: Gives results without data.
        functional: Name of the functional variant, for an op that writes to arguments.
        aliases: Which result is which argument that the op has written to.
        writes: Arguments that the op writes to.
    """

    schema: str
    ge: str
    reference: Callable[..., object]
    shape: Callable[..., object]
    functional: str = ""
    aliases: Mapping[int, str] = field(default_factory=dict)
    writes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Its name, with the overload if it has one: `npu_rms_norm`."""
        return self.schema.partition("(")[0]


class NpuOpTable:
    """A family of ops, by name; filled by decorators while its module is imported."""

    def __init__(self) -> None:
        self.ops: dict[str, NpuOp] = {}

    def op(
        self,
        schema: str,
        *,
        ge: str,
        shape: Callable[..., object],
        functional: str = "",
        aliases: Mapping[int, str] | None = None,
    ) -> Callable[[_Function], _Function]:
        """Enter a function as the reference of an op.

        Args:
            schema: See `NpuOp`.
            ge: See `NpuOp`.
            shape: See `NpuOp`.
            functional: Schema of the functional variant, or the name of one that is entered
                already; for an op that writes to arguments only.
            aliases: Which result is which argument, if the op writes to arguments and its schema
                does not say so.

        Raises:
            ValueError: If parameters are not those of the schema, an op is entered twice, or an op
                that writes to arguments has no functional variant.
        """

        def enter(function: _Function) -> _Function:
            parsed = torch._C.parse_schema(f"npu::{schema}")
            names = [argument.name for argument in parsed.arguments]
            for taken in (function, shape):
                if list(inspect.signature(taken).parameters) != names:
                    raise ValueError(f"{taken.__name__} does not take the arguments of {schema}")
            written = tuple(a.name for a in parsed.arguments if _alias(a))
            found = dict(aliases or _aliases(parsed))
            op = NpuOp(
                schema,
                ge,
                function,
                shape,
                functional.partition("(")[0],
                found,
                written or tuple(found.values()),
            )
            if bool(op.writes) != bool(functional):
                raise ValueError(f"{schema}: a functional variant goes with arguments that change")
            self._enter(op)
            if functional not in self.ops and functional:
                if list(_arguments(functional)) != names:
                    raise ValueError(f"{functional} is no functional variant of {schema}")
                run, run_shape = _on_copies(function, op), _on_copies(shape, op)
                self._enter(NpuOp(functional, ge, run, run_shape))
            return function

        return enter

    def _enter(self, op: NpuOp) -> None:
        if op.name in self.ops:
            raise ValueError(f"{op.name} is in the table twice")
        self.ops[op.name] = op


def refuse(op: str, when: str = "", /, **options: object) -> None:
    """Refuse options that an op's reference does not have.

    Args:
        op: The op's name.
        when: The circumstances in which it does not have them, such as `with layout TND`.
        options: Options by name; one that is neither None nor False was asked for.

    Raises:
        RolemeshError: RM028 that names the first option that was asked for.
    """
    for name, value in options.items():
        if value is not None and value is not False:
            shown = "a tensor" if isinstance(value, torch.Tensor) else repr(value)
            raise RolemeshError(
                "RM028",
                what=f"{op} has no reference semantics for {name}={shown} {when}".rstrip(),
                where=f"torch.ops.npu.{op}",
                why="rolemesh computes this op itself where there is no NPU, without this option",
                fix="leave the option out, or run on an NPU with torch_npu",
            )


def _on_copies(function: Callable[..., object], op: NpuOp) -> Callable[..., object]:
    """The functional variant of a function that writes to arguments."""
    signature = inspect.signature(function)

    def functional(*args: object, **kwargs: object) -> object:
        bound = signature.bind(*args, **kwargs)
        copies = []
        for name in op.writes:
            value = bound.arguments[name]
            assert isinstance(value, torch.Tensor)
            bound.arguments[name] = value.clone()
            copies.append(bound.arguments[name])
        found = function(*bound.args, **bound.kwargs)
        results = () if found is None else found if isinstance(found, tuple) else (found,)
        given = [result for place, result in enumerate(results) if place not in op.aliases]
        return (*given, *copies) if len(given) + len(copies) > 1 else copies[0]

    return functional


def _aliases(schema: torch._C.FunctionSchema) -> dict[int, str]:
    """Which result is which argument, as a schema says."""
    by_letter = {_alias(argument): argument.name for argument in schema.arguments}
    letters = [_alias(result) for result in schema.returns]
    return {place: by_letter[letter] for place, letter in enumerate(letters) if letter}


def _alias(value: torch._C.Argument) -> frozenset[str]:
    """The letters that mark a value as one that is written to."""
    info = value.alias_info
    return frozenset(info.before_set) if info is not None and info.is_write else frozenset()


def _arguments(schema: str) -> list[str]:
    return [argument.name for argument in torch._C.parse_schema(f"npu::{schema}").arguments]
