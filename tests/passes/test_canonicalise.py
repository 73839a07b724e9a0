"""Canonicalise: golden listings of the rewrites, and numerics before and after."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from rolemesh.compiler.capture.entry import run_graph
from rolemesh.compiler.capture.tracing import trace
from rolemesh.compiler.ir.program import Program, origin, tensor_types
from rolemesh.compiler.models.tiny_models import tiny_config, tiny_model
from rolemesh.passes.base import Pass
from rolemesh.passes.canonicalise import Canonicalise

aten = torch.ops.aten
CANONICALISE: Pass = Canonicalise()


def listing(program: Program) -> str:
    """One line a node: name, types, op and arguments."""
    lines = []
    for node, entry in zip(program.placeholders, program.inputs, strict=True):
        lines.append(f"%{node.name}: {tensor_types(node)[0]} = {entry.kind.value} {entry.name}")
    for node in program.ops:
        types = ", ".join(map(str, tensor_types(node)))
        given = [text(arg) for arg in node.args]
        given += [f"{name}={text(arg)}" for name, arg in node.kwargs.items() if name != "device"]
        target = str(node.target) if node.target.__class__.__name__ == "OpOverload" else "getitem"
        lines.append(f"%{node.name}: {types} = {target}({', '.join(given)})")
    results = ", ".join(map(text, program.results))
    return "\n".join([*lines, f"return {results}"])


def text(arg: object) -> str:
    if isinstance(arg, fx.Node):
        return f"%{arg.name}"
    if isinstance(arg, list | tuple):
        return f"[{', '.join(map(text, arg))}]"
    return repr(arg)


def canonical(function: Callable[..., object], *args: object) -> Program:
    """The canonical program of a function, checked: runs alike, is a fixed point, is typed."""
    traced = trace(function, *args)
    before = traced.program
    snapshot = listing(before)
    after = CANONICALISE.apply(before)
    assert listing(before) == snapshot
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    check(before, after, [*tensors, *traced.entry.captured.constants])
    return after


def check(before: Program, after: Program, inputs: list[Tensor]) -> None:
    assert after.history == (*before.history, "canonicalise")
    assert after.inputs == before.inputs
    assert after.outputs == before.outputs
    assert listing(CANONICALISE.apply(after)) == listing(after)
    shapes = Recorder(after.graph).run(*inputs)
    for got, want in zip(shapes, run_graph(before.graph, inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


class Recorder(fx.Interpreter):
    """Runs a graph and checks every node's type against the value."""

    def __init__(self, graph: fx.Graph) -> None:
        super().__init__(nn.Module(), graph=graph)

    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        if n.op == "call_function":
            values = value if isinstance(value, list | tuple) else (value,)
            found = [(tuple(item.shape), item.dtype) for item in values]
            assert found == [tuple(kind) for kind in tensor_types(n)], n
            assert origin(n).source, n
        return value


def targets(program: Program) -> list[str]:
    return [str(node.target).removeprefix("aten.") for node in program.ops]


def test_matrix_products_with_an_addend(golden: Callable[[str, str], None]) -> None:
    def f(b: Tensor, x: Tensor, y: Tensor, xs: Tensor, ys: Tensor) -> tuple[Tensor, ...]:
        return (
            torch.addmm(b, x, y),
            torch.addmm(b, x, y, beta=0.5, alpha=2),
            torch.addmm(b, x, y, beta=0),
            torch.baddbmm(b, xs, ys, alpha=0.25),
            torch.addbmm(b, xs, ys, beta=2),
        )

    shapes = (5,), (3, 4), (4, 5), (2, 3, 4), (2, 4, 5)
    program = canonical(f, *(torch.rand(shape) for shape in shapes))
    golden("matrix_products", listing(program))


def test_causal_attention_gets_a_mask(golden: Callable[[str, str], None]) -> None:
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attend = nn.functional.scaled_dot_product_attention
        return attend(attend(q, k, v, is_causal=True), k, v, is_causal=True)

    q, k, v = (torch.rand(2, 2, rows, 8) for rows in (5, 7, 7))
    program = canonical(f, q, k, v)
    golden("causal_attention", listing(program))
    mask = next(node for node in program.ops if node.target is aten.le.Tensor)
    assert "query rows" in origin(mask).reason


@pytest.mark.parametrize(("rows", "columns"), [(5, 5), (3, 6), (6, 3), (1, 4)])
def test_the_mask_is_the_ops_own(rows: int, columns: int) -> None:
    def f(q: Tensor, k: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, k, is_causal=True)

    canonical(f, torch.rand(1, 2, rows, 8), torch.rand(1, 2, columns, 8))


@pytest.mark.parametrize("features", [(), (3,), (2, 3)])
def test_rows_added_into_zeros_are_a_sum_by_ids(features: tuple[int, ...]) -> None:
    def f(table: Tensor, rows: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        zeros = table.new_zeros(7, *features)
        added = aten.index_put.default(zeros, [ids], rows, True)
        return added, aten.index_put.default(table, [ids], rows, True), zeros.index_put([ids], rows)

    ids = torch.tensor([[2, 0, -1], [2, 5, 2]])
    program = canonical(f, torch.rand(7, *features), torch.rand(2, 3, *features), ids)
    found = Counter(targets(program))
    assert found["embedding_dense_backward.default"] == 1
    assert found["index_put.default"] == 2


def test_the_gradient_of_causal_attention_has_the_same_mask() -> None:
    op = "_scaled_dot_product_flash_attention_for_cpu"

    def f(q: Tensor, k: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        out, lse = getattr(aten, op).default(q, k, k, 0.0, True)
        backward = getattr(aten, f"{op}_backward").default
        return out, *backward(grad, q, k, k, out, lse, 0.0, True)

    q, k = torch.rand(1, 2, 5, 8), torch.rand(1, 2, 7, 8)
    program = canonical(f, q, k, torch.rand(1, 2, 5, 8))
    masks = [node.kwargs["attn_mask"] for node in program.ops if "dot_product" in str(node.target)]
    assert len(masks) == 2
    assert masks[0] is masks[1]


def test_attention_with_a_mask_or_without_stays() -> None:
    def f(q: Tensor, mask: Tensor) -> Tensor:
        attend = nn.functional.scaled_dot_product_attention
        return attend(q, q, q) + attend(q, q, q, attn_mask=mask)

    program = canonical(f, torch.rand(1, 2, 4, 8), torch.rand(4, 4))
    op = "_scaled_dot_product_flash_attention_for_cpu.default"
    assert Counter(targets(program)) == {op: 2, "<built-in function getitem>": 2, "add.Tensor": 1}


def test_ops_without_effect_go(golden: Callable[[str, str], None]) -> None:
    def f(x: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach()[:, :].view(4, 6).expand(4, 6).squeeze(0)
        x = nn.functional.pad(x.clone().repeat(1, 1), (0, 0)) * 1.0
        x = x.transpose(0, 1).contiguous().view(24) / 1
        return x.reshape(2, -1) + torch.tensor([2.0]), (n + 0) * 1 - 0 + n

    program = canonical(f, torch.rand(4, 6), torch.tensor([2, 3]))
    golden("without_effect", listing(program))


def test_adding_a_float_zero_stays() -> None:
    x = torch.tensor([-0.0])
    program = canonical(lambda x: (x + 0.0) * 2, x)
    assert targets(program) == ["add.Tensor", "mul.Tensor"]
    (got,) = run_graph(program.graph, [x])
    assert not torch.signbit(got)


def test_a_pad_that_moves_elements_stays() -> None:
    program = canonical(lambda x: nn.functional.pad(x, (1, -1)) * 2, torch.rand(4))
    assert targets(program) == ["constant_pad_nd.default", "mul.Tensor"]


def test_a_copy_with_a_format_that_another_op_relies_on_stays() -> None:
    def f(x: Tensor) -> Tensor:
        return torch.view_as_complex(x.transpose(0, 1).contiguous()).abs()

    assert "clone.default" in targets(canonical(f, torch.rand(2, 3, 2)))


def test_results_keep_memory_of_their_own() -> None:
    def f(x: Tensor) -> tuple[Tensor, ...]:
        y = x + 1
        return x.clone(), y, y.clone(), x.clone().view(-1), x + 1

    x = torch.rand(2, 3)
    program = canonical(f, x)
    memory = {value.untyped_storage().data_ptr() for value in run_graph(program.graph, [x])}
    assert len(memory) == 5
    assert x.untyped_storage().data_ptr() not in memory


def test_a_new_value_of_an_input_needs_no_memory_of_its_own() -> None:
    def f(state: Tensor, x: Tensor) -> Tensor:
        state.copy_(x)
        return state.sum()

    program = canonical(f, torch.zeros(2, 3), torch.rand(3, dtype=torch.float64))
    assert targets(program) == ["_to_copy.default", "expand.default", "sum.default"]


def test_a_copy_that_is_a_result_is_a_copy() -> None:
    def f(state: Tensor, x: Tensor) -> Tensor:
        state.copy_(x)
        return state.view(-1).clone()

    x = torch.rand(2, 3)
    program = canonical(f, torch.zeros(2, 3), x)
    _, result = run_graph(program.graph, [torch.zeros(2, 3), x])
    assert result.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


def test_equal_ops_are_one(golden: Callable[[str, str], None]) -> None:
    def f(x: Tensor) -> Tensor:
        for _ in range(2):
            rows = torch.arange(3).view(3, 1)
            columns = torch.arange(3)
            first, second = torch.where(columns <= rows, x, float("-inf")).softmax(-1).split([1, 2])
            x = x + torch.cat([second, first]) ** 2
        return x

    golden("equal_ops", listing(canonical(f, torch.rand(3, 3))))


def test_equal_numbers_of_other_types_are_other_ops() -> None:
    def f(x: Tensor) -> Tensor:
        return torch.full((2,), 1) + torch.full((2,), True) + x * 0.0 + x * -0.0

    assert Counter(targets(canonical(f, torch.rand(2)))) == {
        "full.default": 2,
        "add.Tensor": 3,
        "mul.Tensor": 2,
    }


def test_dead_ops_and_assertions_go() -> None:
    def f(x: Tensor) -> Tensor:
        torch._assert_async(x.sum() > 0)
        x.cos()
        return x.sin()

    assert targets(canonical(f, torch.rand(2))) == ["sin.default"]


def test_inputs_that_nobody_uses_stay() -> None:
    program = canonical(lambda x, y: (x * 2, y[:].shape)[0], torch.rand(2), torch.rand(3))
    assert len(program.placeholders) == len(program.inputs)


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("deepseek_v32", {"layers": 2}),
        ("gpt_oss", {"layers": 1, "attn": "eager"}),
        ("qwen3_moe", {"layers": 1, "experts": "grouped_mm"}),
        ("bloom", {"layers": 1}),
        ("llama", {"layers": 1}),
    ],
)
def test_language_models(model_type: str, options: dict[str, object]) -> None:
    pytest.importorskip("transformers")
    model = tiny_model(tiny_config(model_type, **options))
    ids = torch.randint(3, 90, (2, 6))
    traced = trace(model, ids, use_cache=False)
    before, after = traced.program, CANONICALISE.apply(traced.program)

    def both(captured: object, inputs: list[Tensor]) -> list[Tensor]:
        check(before, after, inputs)
        return run_graph(after.graph, inputs)

    got = traced.entry.call(both, ids, use_cache=False)
    with torch.no_grad():
        torch.testing.assert_close(got.logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    gone = {"view.default", "_unsafe_view.default", "addmm.default", "alias.default"}
    assert not gone & set(targets(after))
    assert len(list(after.ops)) < len(list(before.ops)) * 1.1


def test_rows_scattered_by_a_mask_become_a_choice() -> None:
    def f(x: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
        return x.masked_scatter(mask[..., None], rows)

    mask = torch.tensor([[False, True, True, False, False], [True, False, False, False, True]])
    x, rows = torch.rand(2, 5, 3), torch.rand(2, 2, 3)
    program = canonical(f, x, mask, rows)
    assert "masked_scatter.default" not in targets(program)
    assert targets(program)[-1] == "where.self"
    # A mask of its own for every feature is no choice between rows.
    program = canonical(lambda x, mask, y: x.masked_scatter(mask, y), x, x > 0.5, torch.rand(30))
    assert "masked_scatter.default" in targets(program)
