"""Products with a collective before or after them: both forms on all ranks, and near misses."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from tests.lowering.ge.fusions.forms import (
    Forms,
    both_forms,
    f,
    graph_text,
    run_both_on_ranks,
    same_values,
)
from torch import Tensor

from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.placement import Shard
from rolemesh.lowering.wires import pack_blocks, pack_chunks, unpack_blocks, unpack_gathered
from rolemesh.runtime.groups import stand_in_groups

BF16, F16 = torch.bfloat16, torch.float16
c10d = torch.ops._c10d_functional
K = 256
"""The smallest contracted dim that is documented."""

Function = Callable[..., object]


def reduce_scatter(wire: Tensor, ranks: int, op: str = "sum", group: str = "0") -> Tensor:
    return c10d.wait_tensor(c10d.reduce_scatter_tensor(wire, op, ranks, group))


def all_reduce(wire: Tensor, op: str = "sum", group: str = "0") -> Tensor:
    return c10d.wait_tensor(c10d.all_reduce(wire, op, group))


def all_gather(wire: Tensor, ranks: int, group: str = "0") -> Tensor:
    return c10d.wait_tensor(c10d.all_gather_into_tensor(wire, ranks, group))


def all_to_all(wire: Tensor, ranks: int, group: str = "0") -> Tensor:
    return c10d.wait_tensor(c10d.all_to_all_single(wire, [1] * ranks, [1] * ranks, group))


def forms_of(
    function: Function, *examples: Tensor, ranks: int = 4, within_limits: bool = True
) -> Forms:
    with stand_in_groups(Mesh({"tp": ranks}), 0):
        return both_forms(function, *examples, within_limits=within_limits)


def hits(function: Function, *examples: Tensor, ranks: int = 4, **options: bool) -> dict[str, int]:
    """How often each op was made, after a run of both forms on all ranks."""
    forms = forms_of(function, *examples, ranks=ranks, **options)
    noise = [[x + 0.25 * rank * x.abs() for x in examples] for rank in range(ranks)]
    for before, after in run_both_on_ranks([forms] * ranks, noise):
        same_values(before, after)
    return {name.removeprefix("npu_"): count for name, count in forms.made.items() if count}


def operands(rows: int, width: int = K, dtype: torch.dtype = BF16) -> tuple[Tensor, Tensor]:
    return f(rows, width, dtype=dtype), f(5, width, dtype=dtype)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("ranks", [2, 4])
def test_product_then_reduce_scatter(ranks: int, dtype: torch.dtype) -> None:
    def function(x: Tensor, w: Tensor) -> tuple[Tensor]:
        return (reduce_scatter(x @ w.t(), ranks) * 2,)

    given = operands(3 * ranks, dtype=dtype)
    assert hits(function, *given, ranks=ranks) == {"mm_reduce_scatter_base": 1}


def test_product_of_one_sequence_then_reduce_scatter_of_its_tokens() -> None:
    def function(x: Tensor, w: Tensor) -> tuple[Tensor]:
        y = torch.nn.functional.linear(x, w)
        wire = pack_chunks(y, shard=Shard(1, 1, 12), parts=4, moves=False)
        return (reduce_scatter(wire, 4),)

    x, w = operands(12)
    assert hits(function, x.view(1, 12, K), w) == {"mm_reduce_scatter_base": 1}


@pytest.mark.parametrize(("batch", "tokens"), [(3, 12), (1, 11), (2, 13)])
def test_packing_that_moves_rows_stays(batch: int, tokens: int) -> None:
    def function(x: Tensor, w: Tensor) -> tuple[Tensor]:
        y = torch.nn.functional.linear(x, w)
        wire = pack_chunks(y, shard=Shard(1, 1, tokens), parts=4, moves=False)
        return (reduce_scatter(wire, 4),)

    assert hits(function, f(batch, tokens, K, dtype=BF16), operands(1)[1]) == {}


@pytest.mark.parametrize("shape", [(3, K), (2, 3, K)])
def test_product_then_all_reduce(shape: tuple[int, ...]) -> None:
    def function(x: Tensor, w: Tensor) -> tuple[Tensor]:
        return (all_reduce(torch.nn.functional.linear(x, w)) + 1,)

    given = (f(*shape, dtype=BF16), operands(1)[1])
    assert hits(function, *given) == {"mm_all_reduce_base": 1}


def wire_is_a_step(x: Tensor, w: Tensor) -> tuple[Tensor]:
    return (all_reduce(torch.nn.functional.linear(x, w)) + 1,)


def operand_is_a_step(x: Tensor, w: Tensor) -> tuple[Tensor]:
    return (all_reduce(x.view(3, K) @ w.t()) + 1,)


def result_is_a_step(x: Tensor, w: Tensor) -> tuple[Tensor]:
    return (all_reduce((x[:, 0] * 2) @ w.t()).view(3, 1, 5),)


@pytest.mark.parametrize("function", [wire_is_a_step, operand_is_a_step, result_is_a_step])
def test_all_reduce_of_a_decode_step_is_beyond_the_documented_use(function: Function) -> None:
    given = (f(3, 1, K, dtype=BF16), operands(1)[1])
    assert hits(function, *given) == {}
    assert hits(function, *given, within_limits=False) == {"mm_all_reduce_base": 1}


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("shape", [(3, K), (1, 3, K)])
def test_all_gather_then_product(shape: tuple[int, ...], ranks: int) -> None:
    def function(x: Tensor, w: Tensor) -> tuple[Tensor]:
        shard = Shard(len(shape) - 2, 1, 3 * ranks)
        wire = all_gather(x, ranks)
        whole = unpack_gathered(wire, shard=shard, parts=ranks, dtype=BF16)
        return (whole.view(-1, K) @ w.t(),)

    given = (f(*shape, dtype=BF16), operands(1)[1])
    assert hits(function, *given, ranks=ranks) == {"all_gather_base_mm": 1}
    text = graph_text(forms_of(function, *given, ranks=ranks).after.graph)
    assert "gather_output=False" in text


def test_gathered_rows_serve_every_other_user() -> None:
    def function(x: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
        whole = all_gather(x, 4).view(-1, K)
        return whole @ gate.t(), whole @ up.t(), whole.sum(-1)

    given = (f(1, 3, K, dtype=BF16), operands(1)[1], f(7, K, dtype=BF16))
    assert hits(function, *given) == {"all_gather_base_mm": 1}
    text = graph_text(forms_of(function, *given).after.graph)
    assert "gather_output=True" in text
    assert "all_gather_into_tensor" not in text


def test_weight_that_is_computed_after_the_gather_needs_it_alone() -> None:
    def function(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        whole = all_gather(x, 4)
        late = w * 2
        return whole @ late.t(), whole + 1

    def alone(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        whole = all_gather(x, 4)
        late = w * 2
        return (whole @ late.t(),)

    assert hits(function, *operands(3)) == {}
    assert hits(alone, *operands(3)) == {"all_gather_base_mm": 1}


def test_gather_of_several_sequences_stays() -> None:
    def function(x: Tensor, w: Tensor) -> tuple[Tensor]:
        wire = all_gather(x, 4)
        whole = unpack_gathered(wire, shard=Shard(1, 1, 12), parts=4, dtype=BF16)
        return (whole.view(-1, K) @ w.t(),)

    def without_pads(x: Tensor, w: Tensor) -> tuple[Tensor]:
        wire = all_gather(x, 4)
        whole = unpack_gathered(wire, shard=Shard(0, 1, 11), parts=4, dtype=BF16)
        return (whole @ w.t(),)

    assert hits(function, f(2, 3, K, dtype=BF16), operands(1)[1]) == {}
    assert hits(without_pads, *operands(3)) == {}


def to_rows(x: Tensor, ranks: int, columns: int = 1) -> Tensor:
    """Rows of this rank with the columns of all."""
    wire = pack_blocks(x, shard=Shard(0, 1, x.shape[0]), parts=ranks)
    whole = Shard(columns, 1, x.shape[columns] * ranks)
    return unpack_blocks(all_to_all(wire, ranks), shard=whole, dtype=x.dtype)


@pytest.mark.parametrize("ranks", [2, 4])
def test_all_to_all_then_product(ranks: int) -> None:
    def function(x: Tensor, w: Tensor) -> tuple[Tensor]:
        return (to_rows(x, ranks) @ w.t(),)

    given = (f(3 * ranks, 6, dtype=BF16), f(5, 6 * ranks, dtype=BF16))
    assert hits(function, *given, ranks=ranks) == {"all_to_all_matmul": 1}


def test_all_to_all_of_heads_then_product() -> None:
    def function(x: Tensor, w: Tensor) -> tuple[Tensor]:
        return (to_rows(x, 4, columns=1).flatten(1) @ w.t(),)

    given = (f(12, 3, 2, dtype=BF16), f(5, 24, dtype=BF16))
    assert hits(function, *given) == {"all_to_all_matmul": 1}


def columns_to_rows(x: Tensor, w: Tensor) -> tuple[Tensor]:
    """The opposite exchange: rows of all ranks with the columns of this one."""
    wire = pack_blocks(x, shard=Shard(1, 1, 24), parts=4)
    return (unpack_blocks(all_to_all(wire, 4), shard=Shard(0, 1, 12), dtype=BF16) @ w[:, :6].t(),)


def out_of_order(x: Tensor, w: Tensor) -> tuple[Tensor]:
    parts = all_to_all(x.view(4, 3, 6), 4).unbind(0)
    return (torch.cat([parts[1], parts[0], parts[2], parts[3]], 1) @ w.t(),)


def repeated_part(x: Tensor, w: Tensor) -> tuple[Tensor]:
    parts = all_to_all(x.view(4, 3, 6), 4).unbind(0)
    return (torch.cat([parts[0], parts[1], parts[2], parts[2]], 1) @ w.t(),)


def needed_columns(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    columns = to_rows(x, 4)
    return columns @ w.t(), columns + 1


def uneven_parts(x: Tensor, w: Tensor) -> tuple[Tensor]:
    wire = c10d.all_to_all_single(x, [2, 4, 3, 3], [2, 4, 3, 3], "0")
    return (torch.cat(c10d.wait_tensor(wire).view(4, 3, 6).unbind(0), 1) @ w.t(),)


@pytest.mark.parametrize("function", [out_of_order, repeated_part, needed_columns])
def test_other_exchanges_before_a_product_stay(function: Function) -> None:
    assert hits(function, f(12, 6, dtype=BF16), f(5, 24, dtype=BF16)) == {}


def test_exchanges_whose_blocks_are_no_rows_stay() -> None:
    assert hits(columns_to_rows, f(3, 24, dtype=BF16), f(5, 24, dtype=BF16)) == {}
    forms = forms_of(uneven_parts, f(12, 6, dtype=BF16), f(5, 24, dtype=BF16))
    assert not any(forms.made.values())


def scatter_of_max(x: Tensor, w: Tensor) -> tuple[Tensor]:
    return (reduce_scatter(x @ w.t(), 4, "max"),)


def reduce_of_max(x: Tensor, w: Tensor) -> tuple[Tensor]:
    return (all_reduce(x @ w.t(), "max"),)


def needed_product(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    product = x @ w.t()
    return all_reduce(product), product + 1


def bias_between(x: Tensor, w: Tensor) -> tuple[Tensor]:
    return (all_reduce(x @ w.t() + 1),)


def transposed(x: Tensor, w: Tensor) -> tuple[Tensor]:
    return (all_reduce((x @ w.t()).t().contiguous()),)


def cast_between(x: Tensor, w: Tensor) -> tuple[Tensor]:
    return (all_reduce((x @ w.t()).float()),)


def in_parts_out_of_order(x: Tensor, w: Tensor) -> tuple[Tensor]:
    first, second = (x @ w.t()).chunk(2)
    return (reduce_scatter(torch.cat([second, first]), 4),)


def in_some_parts(x: Tensor, w: Tensor) -> tuple[Tensor]:
    first, second, _ = (x @ w.t()).chunk(3)
    return (reduce_scatter(torch.cat([first, second]), 4),)


@pytest.mark.parametrize(
    "function",
    [
        scatter_of_max,
        reduce_of_max,
        needed_product,
        bias_between,
        transposed,
        cast_between,
        in_parts_out_of_order,
        in_some_parts,
    ],
)
def test_near_misses_stay(function: Function) -> None:
    forms = forms_of(function, *operands(12))
    assert not any(forms.made.values())
    assert graph_text(forms.after.graph) == graph_text(forms.before.graph)


def scatter_of_product(x: Tensor, w: Tensor) -> tuple[Tensor]:
    return (reduce_scatter(x @ w.t(), 4),)


def product_of_gathered(x: Tensor, w: Tensor) -> tuple[Tensor]:
    return (all_gather(x, 4) @ w.t(),)


@pytest.mark.parametrize("function", [scatter_of_product, product_of_gathered])
def test_documented_sizes(function: Function) -> None:
    assert sum(forms_of(function, *operands(12)).made.values()) == 1
    assert sum(forms_of(function, *operands(12, 65534)).made.values()) == 1
    for width in (255, 65535):
        assert not any(forms_of(function, *operands(12, width)).made.values())
        forms = forms_of(function, *operands(12, width), within_limits=False)
        assert sum(forms.made.values()) == 1


def test_documented_numbers_of_ranks() -> None:
    def on(ranks: int) -> Sequence[Forms]:
        functions: Sequence[Function] = (
            lambda x, w: (reduce_scatter(x @ w.t(), ranks),),
            lambda x, w: (all_gather(x, ranks) @ w.t(),),
        )
        return [forms_of(function, *operands(24), ranks=ranks) for function in functions]

    assert all(sum(forms.made.values()) == 1 for forms in on(8))
    assert not any(sum(forms.made.values()) for forms in on(3))


@pytest.mark.parametrize("function", [scatter_of_product, product_of_gathered, wire_is_a_step])
def test_single_precision_stays(function: Function) -> None:
    forms = forms_of(function, *operands(12, dtype=torch.float32), within_limits=False)
    assert not any(forms.made.values())


def test_rows_that_ranks_do_not_divide_stay() -> None:
    # torch refuses such a reduce_scatter of dim 0, but not one of reshaped elements
    def function(x: Tensor, w: Tensor) -> tuple[Tensor]:
        return (reduce_scatter((x @ w.t()).view(-1), 4),)

    assert hits(function, f(6, K, dtype=BF16), f(6, K, dtype=BF16)) == {}


def test_one_group_for_all() -> None:
    def function(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        first = reduce_scatter(x @ w.t(), 2, group="first")
        return first, reduce_scatter(x @ w.t(), 2, group="second")

    with stand_in_groups(Mesh({"tp": 4, "dp": 2}), 0) as groups:
        names = groups.names

        def over_both(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
            first = reduce_scatter(x @ w.t(), 4, group=names["tp"])
            return first, reduce_scatter(x @ w.t(), 2, group=names["dp"])

        forms = both_forms(over_both, *operands(12))
        assert forms.made["npu_mm_reduce_scatter_base"] == 1
        forms = both_forms(over_both, *operands(12), within_limits=False)
        assert forms.made["npu_mm_reduce_scatter_base"] == 2
        hcom = {n.args[2] for n in forms.after.graph.nodes if "npu_mm" in str(n.target)}
        assert hcom == {f"group-{name}" for name in names.values()}


def test_text(golden: Callable[[str, str], None]) -> None:
    def layer(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor]:
        wire = all_gather(x, 4)
        whole = unpack_gathered(wire, shard=Shard(1, 1, 12), parts=4, dtype=BF16).view(-1, K)
        y = (whole @ gate.t()) * (whole @ up.t())
        product = (y @ down.t()).view(1, 12, 5)
        wire = pack_chunks(product, shard=Shard(1, 1, 12), parts=4, moves=False)
        return (reduce_scatter(wire, 4),)

    weights = [f(264, K, dtype=BF16), f(264, K, dtype=BF16), f(5, 264, dtype=BF16)]
    forms = forms_of(layer, f(1, 3, K, dtype=BF16), *weights)
    before, after = graph_text(forms.before.graph), graph_text(forms.after.graph)
    golden("matmul_collective", f"{before}\n\n-- fused\n\n{after}")
