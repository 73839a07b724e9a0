"""The GE target: a bound graph to a GE graph, as a callable.

    bound graph -> flat ATen -> writes in place -> fused ops -> decompositions -> torchair -> GE

Everything up to torchair is here and in the files beside this one; the conversion is torchair's own
`get_compiler`, with CANN and without (`lowering.ge.loader`).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import fx
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.utils._python_dispatch import _disable_current_modes

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.lowering.flatten import Fake, as_fake, fake_mode_of, flatten
from rolemesh.lowering.ge.cached import entry_of
from rolemesh.lowering.ge.convertible import conversion_error, refuse_unconvertible
from rolemesh.lowering.ge.decompositions import decomposition_table
from rolemesh.lowering.ge.files import write_files
from rolemesh.lowering.ge.fusions.all import fuse
from rolemesh.lowering.ge.gears import Gears
from rolemesh.lowering.ge.in_place import write_rows_in_place
from rolemesh.lowering.ge.lengthen import lengthen
from rolemesh.lowering.ge.loader import Torchair, coded_errors, load_torchair
from rolemesh.lowering.ge.options import GeOptions
from rolemesh.lowering.ge.shorten import shorten
from rolemesh.lowering.ge.stamp import UnlikeError
from rolemesh.lowering.signature import Signature
from rolemesh.lowering.sizes import Example
from rolemesh.lowering.write_back import copy_back, write_early
from rolemesh.passes.base import collection_paused

__all__ = [
    "Compiled",
    "Converted",
    "convert",
    "lower_ge",
    "mark_parameters",
    "on_device",
    "prepare",
]

Compiled = Callable[..., Sequence[torch.Tensor | None]]
"""torchair's callable: takes every input and returns the outputs of the prepared graph."""


@dataclass(frozen=True)
class Converted:
    """A graph that torchair has converted, called with one tensor per input.

    Attributes:
        signature: Inputs and outputs of the bound graph.
        compiled: torchair's callable. It takes every input and returns the kept outputs.
        kept: Indices of the outputs that it returns; the others are inputs, updated in place.
        gears: The sizes that dynamic dims may have.
        saved: The content of its file in a folder of compiled graphs (`lowering.ge.cached`), by the
            file's name; None if it cannot be kept.
    """

    signature: Signature
    compiled: Compiled
    kept: tuple[int, ...]
    gears: Gears
    saved: Mapping[str, str] | None

    def __call__(self, *args: torch.Tensor | int) -> tuple[torch.Tensor | None, ...]:
        """Run once.

        Args:
            *args: The local tensor of every input, then the value of every symbol. Mutated tensors
                are updated in place.

        Returns:
            The local tensor of every output; for the new value of an input, that input.
        """
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        self.gears.check(tensors)
        with torch.no_grad(), coded_errors():
            values = self.compiled(*args)
        return self.signature.all_outputs(self.kept, values, tensors)


def lower_ge(
    module: fx.GraphModule,
    example_inputs: Sequence[Example],
    signature: Signature,
    options: object = None,
) -> Converted:
    """A callable that runs the graph as a GE graph.

    Args:
        module: A bound graph.
        example_inputs: Local tensors, fake or real, with the shapes to convert for, and the values
            of symbols; dims that depend on symbols become dynamic dims.
        signature: Inputs and outputs.
        options: `GeOptions`; the defaults if None.

    Raises:
        RolemeshError: RM025 if torchair cannot be loaded, RM026 for ops that it cannot convert.
    """
    chosen = options if isinstance(options, GeOptions) else GeOptions()
    torchair = load_torchair(chosen.device)
    fakes = on_device(as_fake(example_inputs), torchair.device)
    gears = Gears.of(signature, fakes, chosen.dim_gears)
    entry = entry_of(module, fakes, signature, chosen, torchair)
    asked = chosen.dump is not None or chosen.export is not None  # files of the graph itself
    stored = None if entry is None or asked else entry.load(torchair)
    if entry is not None and stored is not None:
        saved = {entry.file: stored.text}
        return Converted(signature, stored.compiled, stored.kept, gears, saved)
    gears.set(fakes, torchair)
    # Nothing calls the graphs on the way, so no code is generated for them.
    with collection_paused(), _use_lazy_graph_module(True):
        try:
            compiled, kept = _compiled(module, fakes, signature, chosen, torchair)
        except UnlikeError:
            whole = replace(chosen, repeats=len(module.graph.nodes))
            compiled, kept = _compiled(module, fakes, signature, whole, torchair)
    write_files(compiled, signature, chosen)
    if entry is None:
        return Converted(signature, compiled, kept, gears, None)
    text = entry.text(compiled, kept, torchair)
    entry.store(text)
    return Converted(signature, compiled, kept, gears, {entry.file: text})


def _compiled(
    module: fx.GraphModule,
    fakes: Sequence[Fake],
    signature: Signature,
    options: GeOptions,
    torchair: Torchair,
) -> tuple[Compiled, tuple[int, ...]]:
    graph, kept = prepare(module, fakes, signature, options, torchair)
    return convert(graph, fakes, signature, options, torchair), kept


def on_device(fakes: Sequence[Fake], device: str) -> list[Fake]:
    """The same fake tensors on the device that graphs are converted for."""
    return [_like(fake, device) if isinstance(fake, FakeTensor) else fake for fake in fakes]


def _like(fake: FakeTensor, device: str) -> FakeTensor:
    if fake.device.type == device:
        return fake
    with fake.fake_mode:
        made = torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype, device=device)
    assert isinstance(made, FakeTensor)
    return made


def mark_parameters(fakes: Sequence[Fake], signature: Signature) -> None:
    """Tell torchair, which reads it off the fake tensors, which inputs are parameters."""
    for index in signature.parameters:
        fakes[index]._torchair_is_parameter = True  # type: ignore[union-attr]


def prepare(
    module: fx.GraphModule,
    fakes: Sequence[Fake],
    signature: Signature,
    options: GeOptions,
    torchair: Torchair,
) -> tuple[fx.GraphModule, tuple[int, ...]]:
    """The graph that is handed to torchair, and the indices of the outputs that it returns.

    Raises:
        RolemeshError: RM026 for ops that torchair cannot convert.
        UnlikeError: If repeats that looked alike are not, after rewriting.
    """
    _move(module.graph, torchair.device)
    short = shorten(module, fakes, signature.mutated, options.repeats)
    if short is None:
        return _rewritten(module, fakes, signature.mutated, options, torchair)
    examples = [fakes[index] for index in short.inputs]
    graph, kept = _rewritten(short.module, examples, short.mutated, options, torchair)
    return lengthen(short, graph, kept, fakes, torchair)


def _rewritten(
    module: fx.GraphModule,
    fakes: Sequence[Fake],
    mutated: Mapping[int, int],
    options: GeOptions,
    torchair: Torchair,
) -> tuple[fx.GraphModule, tuple[int, ...]]:
    flat = flatten(module, fakes)
    write_rows_in_place(flat.graph, mutated)
    if options.fuse:
        fuse(flat.graph, functools.partial(_hcom_name, device=torchair.device))
    _allow_copies(flat.graph)
    flat.recompile()
    final = flatten(flat, fakes, decomposition_table(torchair))
    refuse_unconvertible(final.graph)
    kept = copy_back(final.graph, mutated)
    write_early(final.graph)
    final.recompile()
    return final, tuple(kept)


def _hcom_name(name: str, device: str) -> str:
    """The name that a group of torch.distributed has in GE, as torchair names it."""
    group = dist.distributed_c10d._resolve_process_group(dist.distributed_c10d.GroupName(name))
    if torch.device(device) in group._device_types:
        backend = group._get_backend(torch.device(device))
        if hasattr(backend, "get_hccl_comm_name"):
            return str(backend.get_hccl_comm_name(dist.get_rank(), init_comm=True))
    ranks = ",".join(map(str, dist.get_process_group_ranks(group)))
    return f"tag={dist.distributed_c10d._get_group_tag(group)};rank_list={ranks}"


def _move(graph: fx.Graph, device: str) -> None:
    """Let ops that make tensors make them on `device`; the model was captured where it was."""
    for node in graph.nodes:
        given = node.kwargs.get("device")
        if given is not None and torch.device(given).type != device:
            node.update_kwarg("device", torch.device(device))


def _allow_copies(graph: fx.Graph) -> None:
    """Let views copy where another op now gives them another memory order; in GE there is none."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
        node.target = torch.ops.aten.reshape.default


def convert(
    module: fx.GraphModule,
    fakes: Sequence[Fake],
    signature: Signature,
    options: GeOptions,
    torchair: Torchair,
) -> Compiled:
    """Hand a prepared graph to torchair.

    Raises:
        RolemeshError: RM026 if a converter refuses its arguments.
    """
    config = torchair.module.CompilerConfig()
    config.experimental_config.frozen_parameter = options.frozen_parameters
    # Its optimiser of views compares sizes by value: the graph would be right for some sizes only.
    config.experimental_config.enable_view_optimize = not any(map(_is_dynamic, fakes))
    if options.frozen_parameters:
        mark_parameters(fakes, signature)
    context = TracingContext(fake_mode_of(fakes))
    try:
        with coded_errors(), torch.no_grad(), _disable_current_modes(), tracing(context):
            compiled = torchair.module.get_compiler(config)(module, list(fakes))
    except (RolemeshError, UnlikeError):
        raise
    except Exception as error:
        node = _blamed(module.graph, error)
        if node is None:
            raise
        raise conversion_error(node, error) from error
    _keep_collectives(compiled.runner.graph)
    return compiled


def _is_dynamic(fake: Fake) -> bool:
    sizes = fake.shape if isinstance(fake, FakeTensor) else [fake]
    return any(isinstance(size, torch.SymInt) for size in sizes)


def _keep_collectives(graph: Any) -> None:
    """Let a GE graph end only after all its collectives.

    GE drops what does not lead to a result. A rank may not need what it receives, because the chunk
    that it cuts off lies in the pads for example, but its partners need it to take part.
    """
    (end,) = (op for op in graph.op if op.type == "NetOutput")
    by_name = {op.name: op for op in graph.op}
    needed: set[str] = set()
    names = [end.name]
    while names:
        name = names.pop()
        if name not in needed:
            needed.add(name)
            names.extend(edge.rpartition(":")[0] for edge in by_name[name].input if edge)
    for op in graph.op:
        if "group" in op.attr and op.name not in needed:
            end.input.append(f"{op.name}:-1")


def _blamed(graph: fx.Graph, error: BaseException) -> fx.Node | None:
    """The node that fx's interpreter says it was executing."""
    found = re.search(r"While executing %(\w+)", str(error))
    if found is None:
        return None
    return next((node for node in graph.nodes if node.name == found.group(1)), None)
