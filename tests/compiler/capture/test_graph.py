"""From Dynamo's graph to a Program: names, types, mutations, constants, and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.compiler.capture.backends import capturing
from torch import Tensor, nn

from rolemesh.compiler.capture.entry import Captured, reference_executor
from rolemesh.compiler.capture.tracing import trace
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.program import InputKind, origin, tensor_type
from rolemesh.compiler.ir.tensor import TensorType

GLOBAL = torch.arange(3.0)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(3, 3)
        self.register_buffer("scale", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x) * self.scale


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("count", torch.zeros(()))
        self.plain = torch.ones(3)
        self.requires_grad_(False)

    def forward(self, ids: Tensor, *extra: Tensor, cache: dict[str, list[Tensor]]) -> Tensor:
        x = self.embed(ids) + self.plain + GLOBAL + extra[0] + torch.tensor([1.0, 2.0, 3.0])
        for layer in self.layers:
            x = layer(x)
        cache["k"][0].copy_(x)
        self.count.add_(1)
        return self.head(cache["k"][0])


def arguments() -> tuple[tuple[Tensor, ...], dict[str, dict[str, list[Tensor]]]]:
    return (torch.tensor([1, 4]), torch.ones(3)), {"cache": {"k": [torch.zeros(2, 3)]}}


def test_inputs_have_names_and_kinds() -> None:
    args, kwargs = arguments()
    program = trace(Net(), *args, **kwargs).program
    by_kind = {
        kind: sorted(entry.name for entry in program.inputs if entry.kind is kind)
        for kind in InputKind
    }
    assert by_kind == {
        InputKind.PARAMETER: [
            "embed.weight",  # the tied head is the same input
            "layers.0.up.bias",
            "layers.0.up.weight",
            "layers.1.up.bias",
            "layers.1.up.weight",
        ],
        InputKind.BUFFER: ["count", "layers.0.scale", "layers.1.scale", "plain"],
        InputKind.USER: ["GLOBAL", "cache['k'][0]", "extra[0]", "ids"],
        InputKind.CONSTANT: ["constant0"],
        InputKind.TANGENT: [],  # those of training steps
        InputKind.SAVED: [],
    }
    assert [tensor_type(node).shape for node in program.placeholders][-1] == (3,)
    assert len(program.placeholders) == len(program.inputs)
    assert program.inputs[-1].kind is InputKind.CONSTANT


def test_new_values_of_mutated_inputs_come_first() -> None:
    args, kwargs = arguments()
    program = trace(Net(), *args, **kwargs).program
    mutated = [index for index, entry in enumerate(program.inputs) if entry.mutated]
    assert [program.inputs[index].name for index in mutated] == ["cache['k'][0]", "count"]
    assert [output.mutates for output in program.outputs] == [*mutated, None]
    assert len(program.results) == 3


def test_the_captured_graph_computes_the_model() -> None:
    net = Net()
    args, kwargs = arguments()
    expected_args, expected_kwargs = arguments()
    expected = net(*expected_args, **expected_kwargs)
    count = net.count.clone()
    got = trace(net, *args, **kwargs).entry.call(reference_executor, *args, **kwargs)
    assert isinstance(got, Tensor)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(kwargs["cache"]["k"][0], expected_kwargs["cache"]["k"][0])
    assert net.count == count + 1


def test_nodes_carry_types_and_origins_and_nothing_else() -> None:
    args, kwargs = arguments()
    program = trace(Net(), *args, **kwargs).program
    for node in program.placeholders:
        assert set(node.meta) == {"type"}
    for node in program.ops:
        assert set(node.meta) == {"type", "origin"}
        assert isinstance(tensor_type(node), TensorType)
    product = next(n for n in program.ops if n.target is torch.ops.aten.addmm.default)
    assert tensor_type(product) == ((2, 3), torch.float32)
    assert origin(product).module == "layers.0.up"
    assert origin(product).source.startswith("test_graph.py:")
    assert {node.op for node in program.graph.nodes} == {"placeholder", "call_function", "output"}


def test_an_op_with_several_results_has_a_tuple_of_types() -> None:
    program = trace(lambda x: torch.topk(x, 2), torch.rand(4, 5)).program
    (topk,) = (node for node in program.ops if node.target is torch.ops.aten.topk.default)
    assert topk.meta["type"] == (
        TensorType((4, 2), torch.float32),
        TensorType((4, 2), torch.int64),
    )


def test_arguments_of_a_wrapped_forward_have_their_own_names() -> None:
    class Wrapped(nn.Module):
        def forward(self, hidden: Tensor, scale: Tensor) -> Tensor:
            return hidden * scale

    net = Wrapped()
    net.register_forward_hook(lambda module, args, output: output + 1)
    program = trace(net, torch.ones(2), scale=torch.ones(2)).program
    assert [entry.name for entry in program.inputs] == ["hidden", "scale"]
    assert [entry.name for entry in trace(nn.ReLU(), torch.ones(2)).program.inputs] == ["input"]


def test_symbolic_sizes_stay_symbols() -> None:
    found: list[Captured] = []

    def f(x: Tensor, n: int) -> tuple[Tensor, int]:
        return x.reshape(-1)[: n * 2] + x.shape[0], x.shape[0] * 2

    compiled = torch.compile(f, backend=capturing(found), dynamic=True, fullgraph=True)
    for rows, columns, n in ((4, 6, 3), (5, 3, 2), (7, 4, 9)):
        x = torch.rand(rows, columns)
        got, size = compiled(x, n)
        torch.testing.assert_close(got, f(x, n)[0])
        assert size == 2 * rows
    (captured,) = found  # one Program for all sizes
    program = captured.program
    # An integer that no shape has is read from an input of its own.
    assert [entry.name for entry in program.inputs] == ["x", "n"]
    assert [str(tensor_type(node)) for node in program.placeholders] == ["f32[s0, s1]", "i64[]"]
    assert program.scope is not None
    places = {str(symbol): place for symbol, place in program.scope.sources.items()}
    assert places == {"s0": (0, 0), "s1": (0, 1), "s2": (1, None)}
    values = program.values([torch.empty(5, 3), torch.tensor(2)])
    plain = program.at(values)
    assert [str(tensor_type(node)) for node in plain.placeholders] == ["f32[5, 3]", "i64[]"]
    for node in plain.ops:
        assert all(type(size) is int for size in tensor_type(node).shape)


def test_a_number_read_from_a_tensor_stays_a_tensor_where_pytorch_keeps_it_one() -> None:
    def f(x: Tensor) -> Tensor:
        return x * x.sum().item()

    entry = trace(f, torch.ones(2, 3)).entry
    x = torch.rand(2, 3)
    torch.testing.assert_close(entry.call(reference_executor, x), x * x.sum())


def branch(x: Tensor) -> Tensor:
    return x if x.sum() > 0 else -x


def truncated(x: Tensor) -> Tensor:
    return x[: int(x.sum().item())]


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (torch.nonzero, "aten.nonzero.default"),
        (lambda x: x[x > 0], "aten.index.Tensor"),
        (torch.unique, "unique"),
        (truncated, "aten._local_scalar_dense.default"),
        (branch, "data-dep"),
    ],
    ids=["nonzero", "mask", "unique", "item", "branch"],
)
def test_data_dependent_shapes_are_refused(function: Callable[[Tensor], Tensor], says: str) -> None:
    with pytest.raises(RolemeshError, match=r"^\[RM011\]") as caught:
        trace(function, torch.rand(2, 3))
    assert says in str(caught.value)
    assert caught.value.fix


def test_random_ops_are_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).requires_grad_(False)
    with pytest.raises(RolemeshError) as caught:
        trace(model, torch.rand(2, 3))
    assert str(caught.value) == (
        "[RM012] random op aten.native_dropout.default in an inference graph\n"
        "  where: aten.native_dropout.default in 1\n"
        "  why: ranks would draw different numbers for one value\n"
        "  fix: call model.eval() if this is dropout; else draw the numbers outside the model and "
        "pass them in"
    )
    assert trace(model.eval(), torch.rand(2, 3)).program.inputs


def test_attention_is_random_only_by_its_dropout() -> None:
    def attend(x: Tensor, p: float) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=p)

    x = torch.rand(1, 2, 4, 8)
    assert trace(attend, x, 0.0).program.inputs
    with pytest.raises(RolemeshError, match="RM012"):
        trace(attend, x, 0.5)


def test_a_random_value_that_nobody_uses_is_no_reason_to_refuse() -> None:
    def f(x: Tensor) -> Tensor:
        torch.rand(3)
        return x + 1

    assert trace(f, torch.rand(3)).program.inputs


def test_gradients_are_refused() -> None:
    model = nn.Linear(3, 3)
    with pytest.raises(RolemeshError, match=r"^\[RM017\]") as caught:
        trace(model, torch.rand(2, 3))
    assert caught.value.where == "weight and 1 more"
    assert "requires_grad_(False)" in caught.value.fix
    with pytest.raises(RolemeshError, match="RM017"):
        trace(lambda x: x + 1, torch.rand(3, requires_grad=True))
    with torch.no_grad():
        assert trace(model, torch.rand(2, 3)).program.inputs


def test_control_flow_ops_are_refused() -> None:
    def f(x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))

    with pytest.raises(RolemeshError, match=r"^\[RM023\] a higher-order op") as caught:
        trace(f, torch.rand(3))
    assert "torch.where" in caught.value.fix


def test_mutated_inputs_that_overlap_are_refused() -> None:
    def f(x: Tensor, y: Tensor) -> Tensor:
        x.add_(1)
        return x + y

    base = torch.zeros(4, 3)
    with pytest.raises(RolemeshError, match=r"^\[RM023\] this graph is not a function") as caught:
        trace(f, base[:2], base[1:3])
    assert "share memory" in caught.value.why


def test_users_of_torch_compile_see_the_error() -> None:
    compiled = torch.compile(nn.Dropout(0.5), backend=capturing([]), fullgraph=True)
    with pytest.raises(Exception, match=r"\[RM012\] random op") as caught:
        compiled(torch.rand(3))
    assert "fix: call model.eval()" in str(caught.value)
