"""The key of a Dynamo graph: equal exactly for graphs that capture makes the same Program of.

It says every node with its op, arguments, module and source line, the inputs' names, kinds, types
and which of them share memory, the values of constants, and the symbols of sizes with their ranges
and values. Names of nodes and symbols do not count: inputs and nodes go by their number, symbols by
the order in which they appear.

Invariant: code that runs while a graph is traced is torch's or rolemesh's, whose versions are in
every key (`rolemesh.compiler.cache.state`). A graph that calls other code is refused.
"""

from __future__ import annotations

import hashlib
import types
from collections.abc import Sequence

import sympy
import torch
from torch import fx
from torch._ops import OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from rolemesh.compiler.cache.text import NotCacheableError, digest, plain_text
from rolemesh.compiler.capture.sources import SourceName, module_path, source_line

__all__ = ["graph_key"]

_NAMESPACES = ("aten", "prims", "rolemesh", "npu", "_c10d_functional")
"""Namespaces of ops whose code is torch's, its plug-in's or rolemesh's."""

_MODULES = ("torch", "_operator", "operator", "builtins", "math")
_PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer, FakeTensor)
_METHODS = frozenset(dir(torch.Tensor)) | frozenset(dir(torch.SymInt)) | frozenset(dir(int))


def graph_key(
    gm: fx.GraphModule, example_inputs: Sequence[object], names: Sequence[SourceName]
) -> str:
    """The key of a graph.

    Args:
        gm: Dynamo's graph.
        example_inputs: Its inputs; FakeTensors will do.
        names: Their names and kinds.

    Raises:
        NotCacheableError: If something decides the Program that a key cannot say.
    """
    writer = _Writer()
    writer.inputs(example_inputs, names)
    writer.graph(gm)
    writer.symbols()
    return digest(*writer.parts)


class _Writer:
    """Collects the texts of one graph."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self._symbols: dict[sympy.Symbol, sympy.Symbol] = {}
        self._env: object = None

    def inputs(self, values: Sequence[object], names: Sequence[SourceName]) -> None:
        memory: dict[int, int] = {}
        for index, (value, (name, kind)) in enumerate(zip(values, names, strict=True)):
            text = self._value(value)
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()._cdata
                text += f" memory of {memory.setdefault(storage, index)}"
                text += f" from {self._size(value.storage_offset())}"
            self.parts.append(f"input {plain_text((name, kind))} {text}")

    def graph(self, gm: torch.nn.Module) -> None:
        """Every node, with the graphs and constants that it refers to."""
        assert isinstance(gm, fx.GraphModule)
        numbers: dict[fx.Node, int] = {}
        for node in gm.graph.nodes:
            numbers[node] = len(numbers)
            if node.op == "placeholder":
                self.parts.append("placeholder")
                continue
            if node.op == "get_attr":
                self._attribute(gm, str(node.target))
                continue
            target = _target(node)
            arguments = self._argument((node.args, dict(node.kwargs)), numbers)
            place = module_path(node.meta.get("nn_module_stack"))
            line = source_line(node.meta.get("stack_trace"))
            self.parts.append(f"{node.op} {target} {arguments} {place} {line}")
        self.parts.append("end")

    def symbols(self) -> None:
        """The symbols met, in order of appearance: ranges, and values in the example."""
        for symbol in self._symbols:
            bounds = self._env.var_to_range[symbol]  # type: ignore[attr-defined]
            hint = self._env.optimization_hint(symbol)  # type: ignore[attr-defined]
            self.parts.append(f"symbol {bounds.lower} {bounds.upper} {hint}")

    def _attribute(self, gm: fx.GraphModule, name: str) -> None:
        value: object = gm
        for part in name.split("."):
            value = getattr(value, part)
        if isinstance(value, fx.GraphModule):
            self.parts.append("graph")
            self.graph(value)
        elif isinstance(value, torch.Tensor):
            self.parts.append(f"constant {self._value(value)} {_contents(value)}")
        else:
            raise NotCacheableError(f"{name} is a {type(value).__name__}")

    def _argument(self, value: object, numbers: dict[fx.Node, int]) -> str:
        match value:
            case fx.Node():
                return f"%{numbers[value]}"
            case torch.SymInt():
                return self._size(value)
            case tuple() | list():
                items = ",".join(self._argument(item, numbers) for item in value)
                return f"({items})" if isinstance(value, tuple) else f"[{items}]"
            case dict():
                items = ",".join(
                    f"{plain_text(key)}={self._argument(item, numbers)}"
                    for key, item in value.items()
                )
                return f"{{{items}}}"
            case slice():
                return f"slice{self._argument((value.start, value.stop, value.step), numbers)}"
        return plain_text(value)

    def _value(self, value: object) -> str:
        """An input or a constant, without its contents."""
        if isinstance(value, torch.SymInt):
            return self._size(value)
        if not isinstance(value, torch.Tensor):
            return plain_text(value)
        if type(value) not in _PLAIN_TENSORS or value.layout is not torch.strided:
            raise NotCacheableError(f"an input is a {type(value).__name__}")
        kept = isinstance(value, torch.nn.Parameter)
        flags = (kept, value.requires_grad, value.is_conj(), value.is_neg(), value.is_inference())
        sizes = ",".join(map(self._size, (*value.shape, *value.stride())))
        return f"{value.ndim} {sizes} {value.dtype} {value.device} {flags}"

    def _size(self, size: int | torch.SymInt) -> str:
        if isinstance(size, int):
            return str(size)
        if free_unbacked_symbols(size):
            raise NotCacheableError("a size depends on data")
        formula = size.node.expr
        self._env = size.node.shape_env
        for symbol in sorted(formula.free_symbols, key=str):
            made = sympy.Symbol(f"n{len(self._symbols)}", integer=True, positive=True)
            self._symbols.setdefault(symbol, made)
        return str(formula.xreplace(self._symbols))


def _contents(value: torch.Tensor) -> str:
    if isinstance(value, FakeTensor):
        raise NotCacheableError("a constant has no values")
    plain = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(plain.numpy().tobytes()).hexdigest()


def _target(node: fx.Node) -> str:
    """The op of a node, by a name that means the same in every process."""
    target = node.target
    if node.op == "output":
        return ""
    if node.op == "call_method":
        if str(target) not in _METHODS:
            raise NotCacheableError(f"method {target} is not one of tensors")
        return str(target)
    if node.op == "call_function":
        if isinstance(target, OpOverload | OpOverloadPacket):
            if str(target).partition(".")[0] not in _NAMESPACES:
                raise NotCacheableError(f"op {target} is of another library")
            return str(target)
        if target is torch.ops.higher_order.invoke_subgraph:
            return "invoke_subgraph"  # its graph is an attribute
        found = _function(target)
        if found:
            return found
    raise NotCacheableError(f"{node.op} {target} is code of no known version")


def _function(target: object) -> str:
    """The name of a function of torch or Python; empty for another."""
    module = getattr(target, "__module__", None)
    name = getattr(target, "__qualname__", "")
    if module is None and isinstance(
        target, types.MethodDescriptorType | types.BuiltinFunctionType
    ):
        owner = getattr(target, "__objclass__", None) or getattr(target, "__self__", None)
        module = getattr(owner, "__module__", None) or getattr(owner, "__name__", "torch")
    if str(module).partition(".")[0] not in _MODULES or "<locals>" in name or "<lambda>" in name:
        return ""
    return f"{module}.{name}"
