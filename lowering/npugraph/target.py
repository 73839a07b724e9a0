"""The target `npugraph_ex`: a bound graph captured once per shape and replayed, through torchair.

    bound graph -> flat ATen -> fused composite ops -> writes in place -> torchair's capture mode

GE has no part in it: the ops of the flat graph run as they are, collectives among them, without
Python and without launch overhead. Composite ops become Ascend's fused ones, or plain ones. With
CANN, `torch.npu.NPUGraph` records them; without, the stand-in of `lowering.npugraph.capture` does,
in offline NPU mode, on CPU tensors.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import fx
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.lowering.composite.define import decompositions
from rolemesh.lowering.flatten import Fake, as_fake, fake_mode_of, flatten
from rolemesh.lowering.ge.fusions.all import COMPOSITES, fuse
from rolemesh.lowering.ge.in_place import write_rows_in_place
from rolemesh.lowering.ge.loader import Torchair, coded_errors, load_torchair
from rolemesh.lowering.ge.target import mark_parameters, on_device
from rolemesh.lowering.npugraph.options import NpuGraphOptions
from rolemesh.lowering.npugraph.stand_in import install_capture
from rolemesh.lowering.npugraph.static_attention import define_static_attention
from rolemesh.lowering.signature import Signature
from rolemesh.lowering.sizes import Example
from rolemesh.lowering.write_back import copy_back

__all__ = ["Captured", "lower_npugraph"]


@dataclass(frozen=True, eq=False)
class Captured:
    """A graph that torchair captures on its first call, called with one tensor per input.

    torchair captures anew when a mutated input lies elsewhere than before. An input that moves
    therefore gets memory here, and is copied there and back.

    Attributes:
        signature: Inputs and outputs of the bound graph.
        fakes: Fake tensors like its inputs, and values of symbols; sizes that depend on symbols may
            be any.
        compiled: torchair's callable. It takes every input and returns the kept outputs.
        kept: Indices of the outputs that it returns; the others are inputs, updated in place.
        homes: By index of a mutated input, where it was in the first call.
        buffers: By index of a mutated input that has moved, its memory here.
    """

    signature: Signature
    fakes: tuple[Fake, ...]
    compiled: Callable[..., Sequence[torch.Tensor]]
    kept: tuple[int, ...]
    homes: dict[int, int] = field(default_factory=dict)
    buffers: dict[int, torch.Tensor] = field(default_factory=dict)

    def __call__(self, *args: torch.Tensor | int) -> tuple[torch.Tensor | None, ...]:
        """Run once.

        Args:
            *args: The local tensor of every input, then the value of every symbol. Mutated tensors
                are updated in place.

        Returns:
            The local tensor of every output; for the new value of an input, that input.

        Raises:
            RolemeshError: RM029 for inputs that the graph does not take.
        """
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        self._check(tensors, len(args) - len(tensors))
        homes: dict[int, torch.Tensor] = {}
        with torch.no_grad(), coded_errors(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"torchair\.")
            for position in self.signature.mutated.values():
                homes[position] = self._at_home(position, tensors[position])
            values = self.compiled(*(homes.get(index, arg) for index, arg in enumerate(args)))
            for position, home in homes.items():
                if home is not tensors[position]:
                    tensors[position].copy_(home)
        return self.signature.all_outputs(self.kept, values, tensors)

    def _at_home(self, position: int, tensor: torch.Tensor) -> torch.Tensor:
        home = self.homes.setdefault(position, tensor.data_ptr())
        if position not in self.buffers:
            if home == tensor.data_ptr():
                return tensor
            self.buffers[position] = torch.empty_like(tensor)
        return self.buffers[position].copy_(tensor)

    def _check(self, tensors: Sequence[torch.Tensor], symbols: int) -> None:
        fakes = [fake for fake in self.fakes if isinstance(fake, FakeTensor)]
        if len(tensors) != len(fakes):
            raise self._other(f"{len(tensors)} inputs", f"it takes {len(fakes)}")
        names = self.signature.symbols
        if symbols != len(names):
            raise self._other(f"the values of {symbols} symbols", f"it has {len(names)}: {names}")
        for entry, fake, tensor in zip(self.signature.inputs, fakes, tensors, strict=True):
            same = fake.ndim == tensor.ndim and all(
                _is_symbol(want) or want == got
                for want, got in zip(fake.shape, tensor.shape, strict=True)
            )
            if not same or fake.dtype != tensor.dtype:
                raise self._other(
                    f"{entry.name} of {tensor.dtype} {list(tensor.shape)}",
                    f"it was captured for {fake.dtype} {list(fake.shape)}",
                )

    def _other(self, got: str, why: str) -> RolemeshError:
        return RolemeshError(
            "RM029",
            what=f"a captured graph got {got}",
            where=f"graph {self.signature.name!r}",
            why=why,
            fix="call it with the tensors that it was lowered for, or lower it again",
        )


def _is_symbol(size: object) -> bool:
    return isinstance(size, torch.SymInt)


def lower_npugraph(
    module: fx.GraphModule,
    example_inputs: Sequence[Example],
    signature: Signature,
    options: object = None,
) -> Captured:
    """A callable that captures the graph on its first call and replays it afterwards.

    Args:
        module: A bound graph.
        example_inputs: Local tensors, fake or real, and the values of symbols; what depends on
            symbols is captured for each size that occurs.
        signature: Inputs and outputs.
        options: `NpuGraphOptions`; the defaults if None.

    Raises:
        RolemeshError: RM025 if torchair cannot be loaded, or this process converts for the CPU.
    """
    chosen = options if isinstance(options, NpuGraphOptions) else NpuGraphOptions()
    torchair = load_torchair("npu")
    if not torchair.cann:
        install_capture()
        define_static_attention()
    given = as_fake(example_inputs)
    graph = flatten(module, given)
    if not decompositions().keys().isdisjoint(node.target for node in graph.graph.nodes):
        fuse(graph.graph, str, fusions=COMPOSITES)
        graph.recompile()
        graph = flatten(graph, given, decompositions())
    write_rows_in_place(graph.graph, signature.mutated)
    kept = copy_back(graph.graph, signature.mutated)
    _place(graph.graph)
    graph.recompile()
    compiled = _compile(graph, on_device(given, "npu"), signature, chosen, torchair)
    return Captured(signature, tuple(given), compiled, tuple(kept))


def _place(graph: fx.Graph) -> None:
    """Let values lie on the NPU, and ops that make tensors make them there."""
    for node in graph.nodes:
        if node.op == "placeholder":
            node.target = node.name  # torchair takes one for the other
        if node.kwargs.get("device") is not None:
            node.update_kwarg("device", torch.device("npu"))
        value = node.meta.get("val")
        if isinstance(value, FakeTensor):
            (node.meta["val"],) = on_device([value], "npu")


def _compile(
    module: fx.GraphModule,
    fakes: Sequence[Fake],
    signature: Signature,
    options: NpuGraphOptions,
    torchair: Torchair,
) -> Callable[..., Sequence[torch.Tensor]]:
    config = torchair.module.CompilerConfig()
    config.mode = "npugraph_ex"
    config.experimental_config.frozen_parameter = options.frozen_parameters
    config.debug.aclgraph.enable_output_clone = options.clone_outputs
    # torchair's patterns make ops that only torch_npu has.
    config.experimental_config.pattern_fusion_pass = torchair.cann
    mark_parameters(fakes, signature)
    mode = fake_mode_of(fakes)
    # torchair runs ops that make tensors; without a device they can make only fake ones.
    nothing_runs = nullcontext() if torchair.cann or mode is None else mode
    with (
        coded_errors(),
        torch.no_grad(),
        _disable_current_modes(),
        tracing(TracingContext(mode)),
        warnings.catch_warnings(),
        nothing_runs,
    ):
        warnings.filterwarnings("ignore", module=r"torchair\.")
        compiled = torchair.module.get_compiler(config)(module, list(fakes))
    # Its own checks of inputs are of the first call only, and fail for symbolic sizes.
    compiled.runner._all_meta_tensor_input.clear()
    run: Callable[..., Sequence[torch.Tensor]] = compiled
    return run
