"""`constrain`: nothing in eager PyTorch, a node that carries the spec in a captured graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._functorch.aot_autograd import aot_module_simplified, make_boxed_func

from rolemesh.compiler.annotate import constrain, constraint_of
from rolemesh.compiler.capture.entry import reference_executor
from rolemesh.compiler.capture.tracing import trace
from rolemesh.compiler.ir.program import Program, origin
from rolemesh.compiler.ir.spec import P
from rolemesh.passes.canonicalise import Canonicalise

SPEC = P(("dp", "tp"), None, units={0: 4})


class Annotated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 4)
        self.spec = P(None, "tp")

    def forward(self, x: Tensor, axis: str) -> Tensor:
        x = self.up(constrain(x, SPEC))
        x = constrain(x, P(axis, units={0: 2}))
        return constrain(x, self.spec)


def specs(program: Program) -> list[P]:
    return [spec for node in program.ops if (spec := constraint_of(node)) is not None]


def test_eager_pytorch_gets_the_tensor_itself() -> None:
    x = torch.ones(8, 4)
    assert constrain(x, SPEC) is x


def test_constraints_survive_capture_and_canonicalise() -> None:
    model = Annotated().requires_grad_(False)
    x = torch.rand(8, 4)
    traced = trace(model, x, "tp")
    expected = [SPEC, P("tp", units={0: 2}), P(None, "tp")]
    assert specs(traced.program) == expected
    assert specs(Canonicalise().apply(traced.program)) == expected
    got = traced.entry.call(reference_executor, x, "tp")
    assert torch.equal(got, model(x, "tp"))


def test_a_constraint_says_where_the_model_asks_for_it() -> None:
    program = trace(Annotated().requires_grad_(False), torch.rand(8, 4), "tp").program
    node = next(node for node in program.ops if constraint_of(node) is not None)
    assert origin(node).source.startswith("test_annotate.py:")


def test_gradients_pass_and_are_constrained_alike() -> None:
    graphs: list[str] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        def keep(module: torch.fx.GraphModule, _: object) -> Callable[..., object]:
            graphs.append(str(module.graph))
            return make_boxed_func(module)

        return aot_module_simplified(gm, inputs, fw_compiler=keep, bw_compiler=keep)

    model = Annotated()
    x = torch.rand(8, 4)
    torch.compile(model, backend=backend, fullgraph=True)(x, "tp").sum().backward()
    got = model.up.weight.grad
    model.up.weight.grad = None
    model(x, "tp").sum().backward()
    torch.testing.assert_close(got, model.up.weight.grad)
    assert graphs[1].count("rolemesh.constrain") == 2  # x itself needs no gradient
    assert "P('tp', units={0: 2})" in graphs[1]


def test_the_op_passes_pytorchs_checks() -> None:
    torch.library.opcheck(
        torch.ops.rolemesh.constrain.default,
        (torch.rand(3, 2).t().requires_grad_(), str(SPEC)),
    )
