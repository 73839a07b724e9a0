"""The inductor target: the bound graph compiled by torch's own compiler, collectives included.

Over gloo most collectives become exchanges between all pairs of ranks (`lowering/direct.py`).

The graph ends with copies of new values into its inputs. Inductor drops those, and the functional
copies before them, where only some rows are written (its pass `reinplace`).

Inductor plans the memory of intermediate values, received weights among them, so graphs are bound
without a pool (it cannot take collectives that write into a given buffer).

Layers of a deep model are compiled once for each kind (`lowering/pieces.py`), which is many times
faster than all of them as one graph. What they compute first and last does not fuse with the layers
before and after, and memory is planned for one layer; so graphs of few layers are compiled whole.

AOTAutograd traces the graph once more, but has nothing to do around it: the graph writes its inputs
itself, and what it returns is memory of its own. So inductor's code is called without AOTAutograd's
wrappers, and another process can take it from torch's cache by its key alone (`reload_inductor`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._guards import TracingContext, tracing
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.lowering.composite.define import define_composite_ops, inlined
from rolemesh.lowering.direct import exchange_directly, position_on_gloo
from rolemesh.lowering.flatten import as_fake, fake_mode_of, flatten
from rolemesh.lowering.pieces import Code, Piece, Steps, pieces_of
from rolemesh.lowering.routed_ops import define_routed_ops, order_with_collectives
from rolemesh.lowering.signature import Signature
from rolemesh.lowering.sizes import Example
from rolemesh.lowering.write_back import copy_back

__all__ = ["InductorOptions", "InductorProgram", "lower_inductor", "reload_inductor"]


@dataclass(frozen=True)
class InductorOptions:
    """Options of the target `inductor`.

    Attributes:
        repeats: Fewest equal layers in a row that are compiled as one and called for each; below,
            a graph is compiled whole.
    """

    repeats: int = 12

    def __post_init__(self) -> None:
        if type(self.repeats) is not int or self.repeats < 2:
            raise RolemeshError(
                "RM018",
                what=f"option 'repeats' of target 'inductor' is {self.repeats!r}",
                where="option target_options",
                why="it is the fewest equal layers to compile as one, 2 or more",
                fix="pass a whole number from 2 on, a large one to compile every graph whole",
            )


@dataclass(frozen=True)
class InductorProgram:
    """A compiled graph; runs without gradients.

    Attributes:
        codes: Compiled code, one for each piece of the graph.
        steps: How they are called; None if there is one piece, all of the graph.
        signature: Says which inputs the graph updates.
        kept: Indices of the outputs that the pieces return.
        saved: What `reload_inductor` needs to load it in another process; None if it cannot.
    """

    codes: Sequence[Code]
    steps: Steps | None
    signature: Signature
    kept: Sequence[int]
    saved: Mapping[str, object] | None

    def __call__(self, *args: torch.Tensor | int) -> tuple[torch.Tensor | None, ...]:
        """Run the graph on local tensors, and the values of symbols."""
        with torch.no_grad():
            if self.steps is None:
                values = self.codes[0]([*args])
            else:
                values = self.steps.run(self.codes, [*args])
            return self.signature.all_outputs(self.kept, values, args)


def lower_inductor(
    module: fx.GraphModule,
    example_inputs: Sequence[Example],
    signature: Signature,
    options: object = None,
) -> InductorProgram:
    """Compile a bound graph.

    Args:
        module: A bound graph.
        example_inputs: Local tensors, fake or real, with the shapes to compile for.
        signature: Says which inputs the graph updates.
        options: An `InductorOptions`; None for the default.

    Raises:
        ValueError: If the graph was bound with a pool.
    """
    if next(module.buffers(), None) is not None:
        raise ValueError("bind without a pool for the inductor target: it plans memory itself")
    chosen = InductorOptions() if options is None else options
    assert isinstance(chosen, InductorOptions)
    order_with_collectives()
    fakes = as_fake(example_inputs, _static_mode())
    flat = flatten(module, fakes, inlined())
    exchange_directly(flat.graph, position_on_gloo)
    kept = copy_back(flat.graph, signature.mutated)
    split = pieces_of(flat, chosen.repeats)
    flat.recompile()
    pieces, steps = split or ([Piece(flat, fakes)], None)
    compiled = [_compile(piece) for piece in pieces]
    keys = [getattr(code, "_fx_graph_cache_key", None) for code in compiled]
    saved = None if None in keys else {"keys": keys, "kept": kept, "steps": steps and steps.saved()}
    return InductorProgram(compiled, steps, signature, kept, saved)


def _compile(piece: Piece) -> Code:
    """Compile one graph, to inductor's `OutputCode` if AOTAutograd has nothing to do around it."""
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner
    from torch.utils._python_dispatch import _disable_current_modes

    inner: list[Any] = []

    def compile_inner(*args: Any, **kwargs: Any) -> Any:
        code = compile_fx_inner(*args, **kwargs)
        if _is_plain(TracingContext.get().fw_metadata):
            inner.append(code)
        return code

    graph = piece.module.graph
    with (
        torch.no_grad(),
        _disable_current_modes(),
        torch._functorch.config.patch(enable_autograd_cache=False),  # it would not call the above
        # It would put each wait right behind its start, and what runs between them after that.
        torch._inductor.config.patch(reorder_for_peak_memory=not _overlaps(graph)),
        torch._inductor.config.patch(_asserts(graph)),
    ):
        compiled: Any = compile_fx(piece.module, piece.examples, inner_compile=compile_inner)
    return inner[0] if inner else lambda args: compiled(*args)


def reload_inductor(
    saved: Mapping[str, object], example_inputs: Sequence[Example], signature: Signature
) -> InductorProgram | None:
    """Load what another process compiled from torch's cache of inductor's code.

    Args:
        saved: What `InductorProgram.saved` was there.
        example_inputs: As for `lower_inductor`; of tensors nothing is used.
        signature: As for `lower_inductor`.

    Returns:
        The program; None if torch's cache has it no more, or its guards on sizes do not hold.
    """
    keys, kept, steps = saved["keys"], saved["kept"], saved["steps"]
    assert isinstance(keys, list)
    assert isinstance(kept, list)
    assert isinstance(steps, dict | None)
    define_composite_ops()
    define_routed_ops()
    codes: list[Code] = []
    for key in keys:
        code = _reload(key, example_inputs)
        if code is None:
            return None
        codes.append(code)
    return InductorProgram(codes, Steps.of(steps) if steps else None, signature, kept, saved)


def _reload(key: str, example_inputs: Sequence[Example]) -> Code | None:
    from torch._inductor import config
    from torch._inductor.codecache import FxGraphCache
    from torch._inductor.output_code import CompiledFxGraphConstants
    from torch._inductor.utils import BoxedBool
    from torch.utils._python_dispatch import _disable_current_modes

    symbols = [x for x in example_inputs if isinstance(x, torch.SymInt)]
    constants = CompiledFxGraphConstants()
    context = TracingContext(fake_mode_of(example_inputs) or _static_mode())
    with tracing(context), _disable_current_modes():
        code, _ = FxGraphCache.load_with_key(
            key, [], symbols, config.fx_graph_cache, None, is_backward=False, constants=constants
        )
        if code is None:
            return None
        code._fx_graph_cache_key = key
        cudagraphs = BoxedBool(config.triton.cudagraphs)
        code.post_compile(symbols, constants, {"cudagraphs": cudagraphs, "is_backward": False})
    loaded: Code = code
    return loaded


def _overlaps(graph: fx.Graph) -> bool:
    """Whether anything runs between the start of a collective and the wait for it."""
    wait = torch.ops._c10d_functional.wait_tensor.default
    waits = graph.find_nodes(op="call_function", target=wait)
    return any(node.prev is not node.args[0] for node in waits)


def _static_mode() -> FakeTensorMode:
    """A mode for tensors of plain sizes, under which torch keeps what inductor compiles."""
    return FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(), static_shapes=True)


def _asserts(graph: fx.Graph) -> dict[str, bool]:
    """Inductor's options for checks of sizes and alignment at each call.

    Inputs are shards of the sizes that the graph was made for, or were guarded by Dynamo; torch's
    own ops and ours return what they say. Ops of others are not trusted, and cost their checks.
    """
    targets = {node.target for node in graph.nodes}
    others = [x for x in targets if isinstance(x, OpOverload) and x.namespace not in _TRUSTED]
    return dict.fromkeys(("size_asserts", "alignment_asserts"), bool(others))


_TRUSTED = ("aten", "prims", "_c10d_functional", "rolemesh")
"""Namespaces of ops whose results have the sizes and strides that their shape functions say."""


def _is_plain(metadata: Any) -> bool:
    """Whether the code that AOTAutograd compiles is all that it runs at a call."""
    return not (
        metadata.mutated_inp_runtime_indices
        or metadata.num_outputs_aliased
        or metadata.num_intermediate_bases
        or metadata.tokens
        or metadata.is_rng_op_functionalized
        or metadata.grad_enabled_mutation is not None
    )
