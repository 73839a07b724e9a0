"""`rolemesh::experts`: what the modules of `transformers` compute, and no more work than that."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers")

from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from rolemesh.compiler.integrate import integrate
from rolemesh.lowering.composite.define import define_composite_ops
from rolemesh.lowering.composite.experts import OP, experts_of_rank
from rolemesh.lowering.composite.gate import SWIGLU

E, H, INNER, K = 7, 12, 10, 3


@pytest.fixture(scope="module", autouse=True)
def _integrated() -> None:
    integrate("transformers")
    define_composite_ops()


def f(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def routes(tokens: int, experts: int = E) -> Tensor:
    """Different experts for each token; the last expert has none."""
    generator = torch.Generator().manual_seed(tokens)
    chosen = [torch.randperm(experts - 1, generator=generator)[:K] for _ in range(tokens)]
    return torch.stack(chosen) if chosen else torch.empty(0, K, dtype=torch.int64)


def tables(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return f(E, 2 * INNER, H, dtype=dtype), f(E, H, INNER, dtype=dtype)


def experts(hidden: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return torch.ops.rolemesh.experts(hidden, ids, weights, up, down, None, None, SWIGLU, False)


def module(kind: str, dtype: torch.dtype, inner: int = INNER) -> nn.Module:
    if kind == "mixtral":
        config = MixtralConfig(hidden_size=H, intermediate_size=inner, num_local_experts=E)
        made: nn.Module = MixtralExperts(config)
    else:
        made = GptOssExperts(
            GptOssConfig(hidden_size=H, intermediate_size=inner, num_local_experts=E)
        )
    for parameter in made.parameters():
        parameter.data = f(*parameter.shape, dtype=dtype)
    return made.requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 5, 33])
@pytest.mark.parametrize("inner", [INNER, 16])
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_modules_of_transformers(kind: str, inner: int, tokens: int, dtype: torch.dtype) -> None:
    """Tables of 10 features, and of 16, whose rows have the alignment of a grouped product."""
    layer = module(kind, dtype, inner)
    given = (f(tokens, H, dtype=dtype), routes(tokens), f(tokens, K, dtype=dtype).softmax(-1))
    layer.config._experts_implementation = "rolemesh"  # type: ignore[union-attr]
    found = layer(*given)
    layer.float().config._experts_implementation = "eager"  # type: ignore[union-attr]
    exact = layer(given[0].float(), given[1], given[2].float())
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    scale = exact.abs().max().item() if tokens else 1.0
    assert found.dtype is dtype
    torch.testing.assert_close(found.float(), exact, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_decomposition_computes_what_the_kernel_does(dtype: torch.dtype) -> None:
    ids = routes(5).masked_fill(torch.eye(5, K, dtype=torch.bool), -1)
    ids[4, 1] = E
    given = (f(5, H, dtype=dtype), ids, f(5, K), *tables(dtype))
    biases = (f(E, 2 * INNER, dtype=dtype), f(E, H, dtype=dtype))
    arguments = (*given, *biases, "mul(add(odd, 1), sigmoid(even))", False)
    found, want = OP.kernel(*arguments), OP.decomposition(*arguments)
    assert isinstance(want, Tensor)
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(found, want, rtol=tolerance, atol=tolerance)


def test_int32_ids_and_strided_operands() -> None:
    hidden, ids, weights = f(5, H), routes(5), f(5, K)
    want = experts(hidden, ids, weights, *tables())
    strided = (f(5, H).t().contiguous().t(), ids.int(), weights.t().contiguous().t())
    up, down = tables()
    found = experts(*strided, up.mT.contiguous().mT, down.mT.contiguous().mT)
    torch.testing.assert_close(found, want)


@pytest.mark.parametrize("parts", [2, 3, 4, 9])
def test_ranks_add_up(parts: int) -> None:
    """Pads of the tables are NaN: no id of another rank, or of no expert, falls on one."""
    hidden, ids, weights = f(5, H), routes(5), f(5, K)
    ids[1, 0], ids[2, 1] = E, -1
    want = experts(hidden, ids, weights, *tables())
    units = -(-E // parts)
    total = torch.zeros_like(want)
    for index in range(parts):
        held = []
        for table in tables():
            padded = torch.full((units * parts, *table.shape[1:]), float("nan"))
            padded[:E] = table
            held.append(padded[index * units : (index + 1) * units])
        total += experts_of_rank(
            hidden, ids, weights, *held, None, None, SWIGLU, False,
            size=E, parts=parts, index=index,
        )  # fmt: skip
    torch.testing.assert_close(total, want)


class Work(TorchDispatchMode):
    """Counts multiply-adds of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func._schema.name in ("aten::mm", "aten::_grouped_mm"):  # by groups: a row in one each
            self.count += args[0].shape[0] * args[0].shape[1] * args[1].shape[-1]
        return func(*args, **(kwargs or {}))


def work(ids: Tensor) -> int:
    with Work() as mode:
        OP.kernel(f(len(ids), H), ids, f(len(ids), K), *tables(), None, None, SWIGLU, False)
    return mode.count


def test_work_is_that_of_the_routes() -> None:
    """Two projections a route, whatever the number of experts; none for a route of another rank."""
    route = H * 2 * INNER + INNER * H
    for tokens in (1, 5, 33):
        assert work(routes(tokens)) == tokens * K * route
        ids = routes(tokens)
        ids[0] = E  # these three are elsewhere
        assert work(ids) == (tokens - 1) * K * route
        assert work(ids - 100) == 0
