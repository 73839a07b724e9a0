"""Capture: one Dynamo graph through AOTAutograd to a `Program`.

AOTAutograd makes the graph functional and lowers it to ATen: new values of mutated inputs become
its first outputs. The Program that comes out

* has tensors only among its inputs and outputs; symbolic sizes are `Dim`s, and no guard is added
  for them. A run reads a size's symbols from the shapes of inputs; one that no shape has is an
  input of type `i64[]`, as are integers that only take part in arithmetic with tensors
  (`rolemesh.compiler.capture.scalars`);
* has placeholders only where tensors come in: constants that the model's code creates are
  CONSTANT inputs, last among the inputs, and their values are kept by `Captured`;
* carries plain types (`meta["type"]`) and origins (`meta["origin"]`), and no FakeTensors, so that
  nothing can recompute, or come to depend on, the tracer's view of a value;
* has no random op, no size that depends on data and no gradient; these are refused with the op,
  its module and its source line. Assertions on values are dropped.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._functorch.aot_autograd import aot_module_simplified, make_boxed_func
from torch._guards import TracingContext
from torch._ops import OpOverload
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from rolemesh.compiler.capture.alike import NotAlikeError
from rolemesh.compiler.capture.bodies import inline, tracing_calls
from rolemesh.compiler.capture.editing import tensors
from rolemesh.compiler.capture.entry import (
    Captured,
    Cut,
    Executor,
    Fixed,
    Integer,
    Size,
    Slot,
    Weight,
    cut_rows,
    reference_executor,
)
from rolemesh.compiler.capture.epilogue import simple_epilogue, with_epilogue
from rolemesh.compiler.capture.fixed_sizes import fix_sizes
from rolemesh.compiler.capture.outline import outline
from rolemesh.compiler.capture.regions import Marks
from rolemesh.compiler.capture.scalars import FORMS, tensor_forms
from rolemesh.compiler.capture.sizes import CapturedSizes
from rolemesh.compiler.capture.sources import (
    SourceName,
    current_frame,
    input_names,
    module_path,
    placeholder_sources,
    source_line,
)
from rolemesh.compiler.ir.dims import Dim
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.nodes import add_call
from rolemesh.compiler.ir.program import Input, InputKind, Origin, Output, Program
from rolemesh.compiler.ir.tensor import TensorType

__all__ = ["Builder", "capture", "check_calling_convention"]

_NOT_A_TENSOR = TensorType((0,), torch.uint8)
"""Type of an entry that is no tensor (None, an integer) among the results of an op."""

_INTEGER = TensorType((), torch.int64)
_SCALARS = (torch.SymInt, torch.SymFloat, torch.SymBool, bool, int, float)
_DROPOUT_ARGUMENTS = ("dropout_p", "p")


def capture(
    gm: fx.GraphModule,
    example_inputs: Sequence[object],
    *,
    name: str = "program",
    executor: Executor = reference_executor,
    marks: Marks | None = None,
) -> tuple[Captured, Callable[..., object]]:
    """Turn what Dynamo hands a backend into a Program and a callable to give back to Dynamo.

    Args:
        gm: Dynamo's graph.
        example_inputs: Its inputs; FakeTensors will do.
        name: Name of the Program.
        executor: What runs the captured graph by default.
        marks: Those of the model's repeated layers.

    Returns:
        The captured graph, and the compiled function that Dynamo calls. That function delegates
        to the executor in force at each call.

    Raises:
        RolemeshError: RM011, RM012, RM017, or RM023 for a graph that cannot be a Program.
        NotAlikeError: If repeated layers have to be traced each by itself.
    """
    names = input_names(placeholder_sources(gm.graph), example_inputs, current_frame())
    _refuse_gradients(names, example_inputs)
    found: list[Captured] = []
    outlined = outline(gm, marks)

    def compile_inference(
        gm: fx.GraphModule, example_inputs: Sequence[object]
    ) -> Callable[..., object]:
        graph = gm.graph
        metadata = TracingContext.get().fw_metadata
        assert metadata is not None
        placeholders = graph.find_nodes(op="placeholder")
        check_calling_convention([names[index] for index in outlined.kept], placeholders, metadata)
        mutated = [outlined.kept[index] for index in metadata.mutated_inp_runtime_indices]
        inlined = inline(graph, outlined, len(mutated))
        mutated += inlined.written
        fix_sizes(graph)
        places = {**dict(zip(placeholders, outlined.kept, strict=True)), **inlined.inputs}
        captured = Builder(gm, names, places, mutated).captured(name, executor)
        found.append(captured)
        return make_boxed_func(lambda *flat: captured.run(flat))

    with tracing_calls(outlined):
        compiled = aot_module_simplified(
            outlined.module,
            [example_inputs[index] for index in outlined.kept],
            fw_compiler=compile_inference,
        )
    (captured,) = found
    epilogue = simple_epilogue(TracingContext.get(), captured)
    if epilogue is not None:
        return captured, with_epilogue(captured, epilogue)
    if outlined.calls:
        raise NotAlikeError("AOTAutograd does more at each call than copy to mutated inputs")
    return captured, compiled


def _refuse_gradients(names: Sequence[SourceName], values: Sequence[object]) -> None:
    if not torch.is_grad_enabled():
        return
    wanting = [
        entry.name
        for entry, value in zip(names, values, strict=True)
        if isinstance(value, Tensor) and value.requires_grad
    ]
    if wanting:
        more = f" and {len(wanting) - 1} more" if len(wanting) > 1 else ""
        raise RolemeshError(
            "RM017",
            "an inference graph was captured with gradients enabled",
            where=f"{wanting[0]}{more}",
            why="these inputs require gradients, so the graph would keep what backward needs",
            fix="call the model under torch.no_grad() or torch.inference_mode(), or call "
            "model.requires_grad_(False)",
        )


class Builder:
    """Copies one AOTAutograd graph into a Program's graph.

    Args:
        module: AOTAutograd's graph.
        names: Names and kinds of Dynamo's inputs.
        places: For each placeholder, which of these it is, or the weight of a repeated layer.
        mutated: Those whose new values the graph returns first, in order.
        gradients: Those whose gradients it returns last, in order; None for one that has none.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        names: Sequence[SourceName],
        places: Mapping[fx.Node, int | Weight],
        mutated: Sequence[int],
        gradients: Sequence[int | None] = (),
    ) -> None:
        self._module = module
        self._names = names
        self._places = places
        self._mutated = mutated
        self._gradients = gradients
        self._integers = tensor_forms(module.graph)
        self._graph = fx.Graph()
        self._values: dict[fx.Node, object] = {}
        # By the identity of the traced value, which the nodes of one body have in common.
        self._types: dict[int, TensorType | tuple[TensorType, ...]] = {}
        self._inputs: list[Input] = []
        self._tensor_inputs: list[int | Weight] = []
        self._constants: list[Tensor] = []
        self._sizes = CapturedSizes()

    def captured(self, name: str, executor: Executor) -> Captured:
        """The Program of the graph, with what runs it.

        Args:
            name: Name of the Program.
            executor: What runs it by default.
        """
        source = self._module.graph
        placeholders = source.find_nodes(op="placeholder")
        self._sizes.name_symbols(
            [
                (node.meta["val"], self._name(self._places[node]).kind is InputKind.USER)
                for node in placeholders
            ]
        )
        for node in placeholders:
            self._add_placeholder(node)
        for node in source.find_nodes(op="get_attr"):
            self._add_constant(node)
        for node in source.nodes:
            if node.op == "call_function":
                self._add_op(node)
        slots, results, outputs = self._outputs(source.output_node())
        self._graph.output(tuple(results))
        program = Program(
            name,
            self._graph,
            tuple(self._inputs),
            tuple(outputs),
            history=("capture",),
            scope=self._sizes.scope,
        )
        return Captured(
            program, tuple(self._constants), executor, tuple(self._tensor_inputs), slots
        )

    def _name(self, place: int | Weight) -> SourceName:
        if isinstance(place, int):
            return self._names[place]
        is_parameter = isinstance(place.tensor, torch.nn.Parameter)
        return SourceName(place.name, InputKind.PARAMETER if is_parameter else InputKind.BUFFER)

    def _add_placeholder(self, node: fx.Node) -> None:
        value = node.meta["val"]
        place = self._places[node]
        name, kind = self._name(place)
        if node in self._integers:
            self._values[node] = self._placeholder(name, _INTEGER)
        elif isinstance(value, Tensor):
            self._values[node] = self._placeholder(name, self._type(value, node))
            self._sizes.found_in(value, len(self._inputs))
        elif isinstance(value, torch.SymInt) and self._sizes.is_read_from(value):
            self._values[node] = self._number(value, node)
            self._placeholder(name, _INTEGER)
            self._sizes.found_in(value, len(self._inputs))
        else:
            self._values[node] = self._number(value, node)
            return
        self._inputs.append(Input(name, kind, place in self._mutated))
        self._tensor_inputs.append(place)

    def _add_constant(self, node: fx.Node) -> None:
        value = getattr(self._module, str(node.target))
        if not isinstance(value, Tensor):
            raise RolemeshError(
                "RM023",
                "a higher-order op was captured",
                where=_where(next(iter(node.users), node)),
                why="its body is a graph of its own, which a Program does not hold",
                fix="replace control flow such as torch.cond by tensor ops such as torch.where",
            )
        name = f"constant{len(self._constants)}"
        self._values[node] = self._placeholder(name, self._type(value, node))
        self._inputs.append(Input(name, InputKind.CONSTANT))
        self._constants.append(value)

    def _placeholder(self, name: str, tensor_type: TensorType) -> fx.Node:
        # FX makes the name an identifier, and unique.
        node = self._graph.create_node("placeholder", name, name=name)
        node.meta["type"] = tensor_type
        return node

    def _add_op(self, node: fx.Node) -> None:
        value = node.meta.get("val")
        if node in self._integers:
            self._copy(node, FORMS[node.target], _INTEGER)
            return
        if isinstance(value, _SCALARS):
            self._values[node] = self._number(value, node)
            return
        if value is None or (not node.users and _is_refused(node)) or node.target is cut_rows:
            return  # an assertion, dead, or done when the Program has run
        known = self._types.get(id(value))
        if known is None:
            _refuse_op(node, value)
            if isinstance(value, list | tuple):
                known = tuple(self._type(item, node) for item in value)
            else:
                known = self._type(value, node)
            self._types[id(value)] = known
        self._copy(node, node.target, known)

    def _copy(
        self, node: fx.Node, target: fx.node.Target, meta: TensorType | tuple[TensorType, ...]
    ) -> None:
        copy = add_call(
            self._graph,
            target,
            fx.map_arg(node.args, self._value),
            fx.map_arg(node.kwargs, self._value),
            name=node.name,
        )
        copy.meta["type"] = meta
        copy.meta["origin"] = self._origin(node)
        self._values[node] = copy

    def _type(self, value: object, node: fx.Node) -> TensorType:
        if not isinstance(value, Tensor):
            return _NOT_A_TENSOR
        return TensorType(tuple(self._size(size, node) for size in value.shape), value.dtype)

    def _size(self, size: int | torch.SymInt, node: fx.Node) -> int:
        if isinstance(size, int):
            return size
        if free_unbacked_symbols(size):
            raise _data_dependent(node)
        return self._sizes.size(size)

    def _number(self, value: object, node: fx.Node) -> object:
        """A plain or symbolic number; a symbolic float or boolean is specialised, with a guard."""
        if isinstance(value, torch.SymInt):
            return self._size(value, node)
        if isinstance(value, torch.SymFloat | torch.SymBool):
            if free_unbacked_symbols(value):
                raise _data_dependent(node)
            return bool(value) if isinstance(value, torch.SymBool) else float(value)
        return value

    def _value(self, node: fx.Node) -> Any:  # FX's Argument: a node or a number
        return self._values[node]

    def _origin(self, node: fx.Node) -> Origin:
        """Where a node comes from; for one that AOTAutograd added, where its operand does."""
        stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
        module = module_path(stack)
        source = source_line(node.meta.get("stack_trace"))
        if not (module or source):
            for operand in node.all_input_nodes:
                copied = self._values[operand]
                if isinstance(copied, fx.Node) and "origin" in copied.meta:
                    return copied.meta["origin"]
        return Origin(module, source)

    def _outputs(self, node: fx.Node) -> tuple[tuple[Slot, ...], list[fx.Node], list[Output]]:
        """AOTAutograd returns new values of mutated inputs, the model's results, gradients."""
        slots: list[Slot] = []
        results: list[fx.Node] = []
        outputs: list[Output] = []
        returned = node.args[0]
        assert isinstance(returned, list | tuple)
        positions = {place: position for position, place in enumerate(self._tensor_inputs)}
        count = len(returned) - len(self._gradients)
        for index, item in enumerate(returned[:count]):
            if isinstance(item, fx.Node) and item.target is cut_rows:
                unit, *parts = item.args
                assert isinstance(unit, int)
                slots.append(Cut(unit, tuple(range(len(results), len(results) + len(parts)))))
                results += [self._value(part) for part in parts if isinstance(part, fx.Node)]
                outputs += [Output() for _ in parts]
                continue
            value = self._values[item] if isinstance(item, fx.Node) else item
            if not isinstance(value, fx.Node):
                slots.append(Size(value) if isinstance(value, Dim) else Fixed(value))
                continue
            slots.append(Integer(len(results)) if item in self._integers else len(results))
            results.append(value)
            target = positions[self._mutated[index]] if index < len(self._mutated) else None
            outputs.append(Output(mutates=target))
        for place, item in zip(self._gradients, returned[count:], strict=True):
            if place is not None and isinstance(item, fx.Node):
                results.append(self._value(item))
                outputs.append(Output(gradient_of=positions[place]))
        return tuple(slots), results, outputs


def check_calling_convention(
    names: Sequence[SourceName], placeholders: Sequence[fx.Node], metadata: object
) -> None:
    """Refuse what makes AOTAutograd's inputs or outputs other than Dynamo's."""
    why = ""
    infos = getattr(metadata, "input_info", ())
    moved = [i for i, info in enumerate(infos) if info.mutates_metadata]
    if len(placeholders) != len(names):
        why = "two inputs share memory and one is written, or an input is a tensor subclass"
    elif moved:
        why = f"the shape or strides of input {names[moved[0]].name} are changed in place"
    elif getattr(metadata, "tokens", None):
        why = "it contains ops with side effects that must stay in order"
    if why:
        raise RolemeshError(
            "RM023",
            "this graph is not a function of its inputs",
            where=f"graph with inputs {', '.join(entry.name for entry in names[:4])}, ...",
            why=why,
            fix="give each input memory of its own and keep such ops out of the compiled part",
        )


def _refuse_op(node: fx.Node, value: object) -> None:
    """Refuse what cannot be an op of a Program.

    Raises:
        RolemeshError: RM011, RM012 or RM023.
    """
    target = node.target
    if target is not operator.getitem and not isinstance(target, OpOverload):
        raise RolemeshError(
            "RM023",
            f"{node.target} is not an ATen op",
            where=_where(node),
            why="a Program holds ATen ops and custom ops with a schema",
            fix="keep it out of the compiled part",
        )
    if any(free_unbacked_symbols(item) for item in tensors(value)) or _reads_data(node):
        raise _data_dependent(node)
    if _is_random(node):
        raise RolemeshError(
            "RM012",
            f"random op {target} in an inference graph",
            where=_where(node),
            why="ranks would draw different numbers for one value",
            fix="call model.eval() if this is dropout; else draw the numbers outside the model and "
            "pass them in",
        )


def _is_refused(node: fx.Node) -> bool:
    return _is_random(node) or _reads_data(node)


def _is_random(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, OpOverload):
        return False
    if torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    # Fused attention is random only by its dropout.
    for position, argument in enumerate(target._schema.arguments):
        if argument.name in _DROPOUT_ARGUMENTS:
            given = node.args[position] if position < len(node.args) else argument.default_value
            return bool(node.kwargs.get(argument.name, given) != 0.0)
    return True


def _reads_data(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, OpOverload) and torch.Tag.data_dependent_output in target.tags


def _data_dependent(node: fx.Node) -> RolemeshError:
    return RolemeshError(
        "RM011",
        f"the result of {node.target} has a size or value that depends on data",
        where=_where(node),
        why="a Program has fixed sizes, and ranks would disagree about others",
        fix="use a form with a fixed size, such as torch.where or a mask",
    )


def _where(node: fx.Node) -> str:
    """Op, module and source line of a captured node."""
    place = [str(node.target)]
    module = module_path(node.meta.get("nn_module_stack"))
    if module:
        place.append(f"in {module}")
    line = source_line(node.meta.get("stack_trace"))
    if line:
        place.append(f"at {line}")
    return " ".join(place)
