"""Checks a sharding rule against the op itself.

For one call on real tensors and one choice per mesh axis, operands are laid out as the rule says
(pads poisoned with NaN, partial operands cut into random summands), every rank runs the localised
call, and the assembled results must be those of the whole op.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from tests.passes.rules.routing import Owners, grouped, take
from tests.passes.rules.rule_line import rule_line

from rolemesh.compiler.ir.dialect import (
    ADD_ROWS,
    EXPERTS,
    EXPERTS_BACKWARD,
    GROUPED_BACKWARD,
    GROUPED_SUMS,
    PICK,
    TAKE,
    TRIL,
    TRIU,
    MeshOp,
)
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.placement import (
    REPLICATE,
    Partial,
    Routed,
    Shard,
    ceil_div,
    same_placement,
)
from rolemesh.compiler.ir.rule import (
    Choice,
    Kind,
    Linear,
    Lookup,
    OpCall,
    Route,
    Rule,
    Split,
    Whole,
)
from rolemesh.compiler.ir.tensor import TensorType
from rolemesh.lowering import chunks
from rolemesh.passes.rules.registry import LocalCall, Rules

__all__ = [
    "Handle",
    "check_choice",
    "check_op",
    "choices_of",
    "make_call",
    "run_mesh_op",
    "tensors_in",
]

Target = torch._ops.OpOverload


@dataclass(frozen=True, eq=False)
class Handle:
    """Stands for an operand while a call is localised, as a graph node does in a Program."""

    index: int


def tensors_in(value: object) -> list[torch.Tensor]:
    """All tensors in nested lists, tuples and dictionaries, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in tensors_in(item)]
    return []


def _replace(value: object, kind: type, change: Callable[[object], object]) -> object:
    if isinstance(value, kind):
        return change(value)
    if type(value) in (list, tuple):
        assert isinstance(value, list | tuple)
        return type(value)([_replace(item, kind, change) for item in value])
    if isinstance(value, dict):
        return {key: _replace(item, kind, change) for key, item in value.items()}
    return value


def _type(tensor: object) -> TensorType:
    assert isinstance(tensor, torch.Tensor)
    return TensorType(tuple(tensor.shape), tensor.dtype)


def make_call(
    target: Target, args: Sequence[object], kwargs: dict[str, object] | None = None
) -> tuple[OpCall, list[torch.Tensor]]:
    """Run an op on real tensors; give the call as rules see it, and the results."""
    kwargs = kwargs or {}
    outputs = tensors_in(target(*args, **kwargs))
    abstract = _replace(tuple(args), torch.Tensor, _type)
    abstract_kwargs = _replace(kwargs, torch.Tensor, _type)
    assert isinstance(abstract, tuple)
    assert isinstance(abstract_kwargs, dict)
    operands = tuple(_type(tensor) for tensor in tensors_in([list(args), kwargs]))
    results = tuple(_type(tensor) for tensor in outputs)
    return OpCall(target, abstract, abstract_kwargs, operands, results), outputs


def choices_of(rule: Rule, ranks: int) -> list[Choice]:
    """Every kind of choice an axis of `ranks` may take: whole factors, sub-factors, patterns."""
    found: list[Choice] = []
    for factor, (size, kind) in enumerate(zip(rule.sizes, rule.kinds, strict=True)):
        if kind not in (Kind.PASS, Kind.REDUCE) or size < 1:
            continue
        if rule.select is not None and factor == rule.select.factor:
            found.append(Lookup(factor, 1, size, "picks"))
            continue
        divisors = [n for n in range(2, size) if size % n == 0]
        units = [(1, size)]
        units += [(1, n) for n in divisors[:1]]
        units += [(n, size // n) for n in divisors[-1:]]
        units += [
            (a, n) for a in divisors for n in divisors if size % (a * n) == 0 and a * n < size
        ][:1]
        for outer, n in units:
            if kind is Kind.REDUCE and rule.reduction == "avg" and n % ranks:
                continue  # the core refuses it: chunks of different sizes have no common average
            found.append(Split(factor, outer, n))
        if rule.reduction != "avg" or kind is Kind.PASS:
            found.append(Route("rows", factor, 1, size))
    found.extend(Linear(pattern, "sum") for pattern in range(len(rule.linear)))
    return found


def check_op(
    rules: Rules,
    target: Target,
    args: Sequence[object],
    kwargs: dict[str, object] | None = None,
    *,
    expect: str | None = None,
    ranks: Sequence[int] = (2, 3, 4),
    axes2: bool = True,
    limit: int = 10,
) -> int:
    """Check all choices of one call on one axis, and combinations on a 2x2 mesh.

    Args:
        rules: The tables under test.
        target: The op.
        args: Positional arguments.
        kwargs: Keyword arguments.
        expect: What `rule_line` must give, if given.
        ranks: Sizes of the single axis.
        axes2: Whether to check pairs of choices on two axes too.
        limit: At most so many pairs, beyond those that split one factor jointly.

    Returns:
        Number of combinations checked.
    """
    call, outputs = make_call(target, args, kwargs)
    assert rules.covers(target), f"no rule for {target}"
    rule = rules.rule(call)
    _check_form(rule, call)
    if expect is not None:
        assert rule_line(rule) == expect, f"{target}: rule is\n  {rule_line(rule)}\nnot\n  {expect}"
    combinations: list[tuple[Mesh, tuple[Choice, ...]]] = []
    for size in ranks:
        mesh = Mesh({"tp": size})
        combinations += [(mesh, (choice,)) for choice in (Whole(), *choices_of(rule, size))]
    if axes2:
        mesh = Mesh({"dp": 2, "tp": 2})
        combinations += [(mesh, pair) for pair in _pairs(rule, limit)]
    checked = 0
    for mesh, choices in combinations:
        if any(_is_boolean_sum(rule, call, choice) for choice in choices):
            continue
        try:
            _check(rules, call, rule, args, kwargs or {}, outputs, choices, mesh)
            checked += 1
        except RolemeshError as error:
            # Two axes may ask for overlapping digits of one dim; a single axis never does.
            if len(choices) == 1 or error.code != "RM021":
                raise
    return checked


def check_choice(
    rules: Rules,
    target: Target,
    args: Sequence[object],
    kwargs: dict[str, object] | None,
    choices: Choice | Sequence[Choice],
    mesh: Mesh | int,
) -> None:
    """Check one choice per mesh axis; a number of ranks stands for a mesh of one axis."""
    if isinstance(mesh, int):
        mesh = Mesh({"tp": mesh})
    if isinstance(choices, Whole | Split | Linear | Lookup | Route):
        choices = (choices,)
    call, outputs = make_call(target, args, kwargs)
    rule = rules.rule(call)
    _check(rules, call, rule, args, kwargs or {}, outputs, tuple(choices), mesh)


def _check_form(rule: Rule, call: OpCall) -> None:
    """Factors of each dim make up its extent, no dim has a factor twice, tables align."""
    assert len(rule.operands) == len(call.operands), f"{call.target}: {len(rule.operands)} operands"
    assert len(rule.results) == len(call.results), f"{call.target}: {len(rule.results)} results"
    assert all(len(pattern) == len(call.operands) for pattern in rule.linear)
    values = [
        *zip(rule.operands, call.operands, strict=True),
        *zip(rule.results, call.results, strict=True),
    ]
    for index, (dims, value) in enumerate(values):
        assert len(dims) == value.ndim, f"{call.target}: {dims} for {value}"
        used = [factor for factors in dims for factor in factors]
        assert len(used) == len(set(used)), f"{call.target}: a factor twice in {dims}"
        is_operand = index < len(rule.operands)
        for factors, extent in zip(dims, value.shape, strict=True):
            size = math.prod(rule.sizes[factor] for factor in factors)
            # An operand dim without factors stays whole; in a result it must be a broadcast one.
            assert size == extent or (is_operand and not factors), (
                f"{call.target}: {dims} for {value}"
            )


def _pairs(rule: Rule, limit: int) -> Iterator[tuple[Choice, Choice]]:
    choices = choices_of(rule, 2)
    plain = [
        c
        for c in choices
        if isinstance(c, Split | Lookup) and c.outer == 1 and c.size == rule.sizes[c.factor]
    ]
    for choice in plain:
        # An average over both axes jointly needs chunks of one size, as it does over one axis.
        if rule.reduction != "avg" or rule.kinds[choice.factor] is Kind.PASS or not choice.size % 4:
            yield choice, choice
    rest = [pair for pair in itertools.product(choices, choices) if pair[0] != pair[1]]
    # Seeded, so that a failure repeats; a sample, because the product grows with the square.
    yield from random.Random(0).sample(rest, min(limit, len(rest)))


def _is_boolean_sum(rule: Rule, call: OpCall, choice: Choice) -> bool:
    """Booleans are never partial: they have no sum."""
    return isinstance(choice, Linear) and any(
        partial and value.dtype is torch.bool
        for partial, value in zip(rule.linear[choice.pattern], call.operands, strict=True)
    )


def _layouts(
    rule: Rule, choices: Sequence[Choice]
) -> tuple[tuple[Layout | None, ...], tuple[Layout, ...]]:
    operands: list[Layout | None] = []
    for index in range(len(rule.operands)):
        placements = [rule.operand_placement(index, choice) for choice in choices]
        if index in rule.unread:
            operands.append(None)
        else:
            operands.append(Layout(tuple(p for p in placements if p is not None)))
    results = tuple(
        Layout(tuple(rule.result_placement(index, choice) for choice in choices))
        for index in range(len(rule.results))
    )
    return tuple(operands), results


def _summands(x: torch.Tensor, parts: int, seed: int) -> list[torch.Tensor]:
    """Tensors that add up to `x`, none of which resembles it."""
    generator = torch.Generator().manual_seed(seed)
    if x.is_floating_point():
        found = [torch.randn(x.shape, generator=generator).to(x.dtype) for _ in range(parts - 1)]
    else:
        found = [
            torch.randint(-9, 9, x.shape, generator=generator).to(x.dtype) for _ in range(parts - 1)
        ]
    return [*found, x - sum(found)] if found else [x]


def _identity(reduction: str, dtype: torch.dtype) -> float:
    if reduction in ("sum", "avg"):
        return 0
    if dtype is torch.bool:
        return reduction == "min"
    limits = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    return limits.min if reduction == "max" else limits.max


def _scatter(
    x: torch.Tensor, layout: Layout, mesh: Mesh, fill: dict[int, float], seed: int
) -> list[torch.Tensor]:
    """Local tensors of an operand; `fill` gives the pads of the shards on some axes a value."""
    partial = [i for i, p in enumerate(layout.placements) if isinstance(p, Partial)]
    parts = math.prod(mesh.sizes[i] for i in partial)
    whole = Layout(tuple(REPLICATE if isinstance(p, Partial) else p for p in layout.placements))
    scattered = []
    for summand in _summands(x, parts, seed):
        locals_ = chunks.poison_pads(chunks.scatter(summand, whole, mesh), whole, mesh)
        scattered.append([_fill(v, whole, mesh, rank, fill) for rank, v in enumerate(locals_)])
    found = []
    for rank in range(mesh.size):
        index = 0
        for axis in partial:
            index = index * mesh.sizes[axis] + mesh.coordinate(rank)[axis]
        found.append(scattered[index][rank])
    return found


def _fill(
    local: torch.Tensor, layout: Layout, mesh: Mesh, rank: int, fill: dict[int, float]
) -> torch.Tensor:
    """What partition does with `mesh.mask_pad` before a reduction over a padded factor."""
    layout = layout.canonical(mesh)
    for axis, value in fill.items():
        axes = layout.joint_axes(axis)
        placement = layout.placements[axis]
        if not isinstance(placement, Shard) or axes[0] != axis:
            continue
        parts, position = _position(axes, mesh, rank)
        shard = placement if len(axes) > 1 else layout.local_shard(axis, mesh)
        local = chunks.fill_pads(local, shard, parts, position, value)
    return local


def _position(axes: Iterable[int], mesh: Mesh, rank: int) -> tuple[int, int]:
    parts, position = 1, 0
    for axis in axes:
        parts *= mesh.sizes[axis]
        position = position * mesh.sizes[axis] + mesh.coordinate(rank)[axis]
    return parts, position


def _check(
    rules: Rules,
    call: OpCall,
    rule: Rule,
    args: Sequence[object],
    kwargs: dict[str, object],
    outputs: Sequence[torch.Tensor],
    choices: tuple[Choice, ...],
    mesh: Mesh,
) -> None:
    where = f"{call.target} [{mesh}] {choices}"
    operand_layouts, result_layouts = _layouts(rule, choices)
    for layout, value in [
        *zip(operand_layouts, call.operands, strict=True),
        *zip(result_layouts, call.results, strict=True),
    ]:
        if layout is not None:
            layout.check(value.shape, mesh)
    _check_match(rule, call, choices, mesh, where)
    reduced = [
        axis
        for axis, choice in enumerate(choices)
        if isinstance(choice, Split | Route) and rule.kinds[choice.factor] is Kind.REDUCE
    ]
    wholes = tensors_in([list(args), kwargs])
    owners = Owners(rule, choices, mesh, wholes)
    locals_: list[list[torch.Tensor]] = []
    for whole, layout in zip(wholes, operand_layouts, strict=True):
        if layout is None:  # arrives in any layout: here one whose shape and values are of no use
            nothing = float("nan") if whole.is_floating_point() else 0
            locals_.append([whole.new_full((1,) * whole.ndim, nothing)] * mesh.size)
        else:
            fill = dict.fromkeys(reduced, _identity(rule.reduction, whole.dtype))
            found = _scatter(whole, layout, mesh, fill, seed=len(locals_))
            # Rows of other ranks, which may hold anything; but integers must be valid indices.
            if reduced or whole.is_floating_point():
                nothing = fill[reduced[0]] if reduced else float("nan")
                found = owners.apply(found, layout, whole.shape, nothing)
            locals_.append(found)

    counter = itertools.count()
    handles = _replace([list(args), kwargs], torch.Tensor, lambda _: Handle(next(counter)))
    assert isinstance(handles, list)
    local = LocalCall(
        call, rule, choices, mesh, tuple(handles[0]), handles[1], operand_layouts, result_layouts
    )
    target, local_args, local_kwargs = rules.localize(local)
    per_rank: list[list[torch.Tensor]] = []
    for rank in range(mesh.size):

        def tensor_of(handle: object, rank: int = rank) -> torch.Tensor:
            assert isinstance(handle, Handle)
            return locals_[handle.index][rank]

        run_args = _replace(tuple(local_args), Handle, tensor_of)
        run_kwargs = _replace(local_kwargs, Handle, tensor_of)
        assert isinstance(run_args, tuple)
        assert isinstance(run_kwargs, dict)
        if isinstance(target, MeshOp):
            found = run_mesh_op(target, run_args, run_kwargs, mesh, rank)
            per_rank.append(tensors_in(found))
        else:
            per_rank.append(tensors_in(target(*run_args, **run_kwargs)))

    for index, (whole, layout) in enumerate(zip(outputs, result_layouts, strict=True)):
        values = [found[index] for found in per_rank]
        expected_shape = layout.local_shape(whole.shape, mesh)
        for value in values:
            assert tuple(value.shape) == expected_shape, f"{where}: {value.shape} {expected_shape}"
            assert value.dtype == whole.dtype, f"{where}: {value.dtype} instead of {whole.dtype}"
        extent = max((size for value in call.operands for size in value.shape), default=0)
        _check_integer_pads(values, whole, layout, extent, where)
        values, layout = owners.masked(values, layout, whole.shape)
        result = chunks.assemble(values, layout, whole.shape, mesh)
        partial = any(isinstance(p, Partial) for p in layout.placements)
        low = any(value.dtype.itemsize < 4 for value in (*call.operands, *call.results))
        _compare(result, whole, partial, low, where)


def _check_match(
    rule: Rule, call: OpCall, choices: tuple[Choice, ...], mesh: Mesh, where: str
) -> None:
    """A placement that a choice gives leads back to the same choice, evenly cut ones excepted."""
    for choice, ranks in zip(choices, mesh.sizes, strict=True):
        if isinstance(choice, Whole | Linear):
            continue
        values = [(rule.operands[i], rule.operand_placement(i, choice), value.shape)
                  for i, value in enumerate(call.operands)]  # fmt: skip
        values += [(rule.results[i], rule.result_placement(i, choice), value.shape)
                   for i, value in enumerate(call.results)]  # fmt: skip
        for dims, placement, shape in values:
            if isinstance(placement, Routed) and isinstance(choice, Route):
                again = rule.match(dims, placement, ranks)
                # Another factor of extent one may be the one that is found: the same rows.
                assert isinstance(again, Route), f"{where}: {placement}"
                assert rule._place(dims, again) == placement, f"{where}: {placement}"
            if not isinstance(placement, Shard):
                continue
            found = rule.match(dims, placement, ranks)
            assert isinstance(found, Split), f"{where}: {placement} of {dims} matches nothing"
            again = rule._place(dims, found)
            assert same_placement(again, placement, shape, ranks), f"{where}: {placement} {found}"


def _check_integer_pads(
    values: Sequence[torch.Tensor], whole: torch.Tensor, layout: Layout, extent: int, where: str
) -> None:
    """Pads of integers must be valid indices; a partial value has no meaning before its sum.

    An index into a dim that is whole (argmax, sort) may be any, whatever the real elements are.
    """
    partial = any(isinstance(p, Partial) for p in layout.placements)
    if whole.dtype in (torch.int64, torch.int32) and whole.numel() and not partial:
        low, high = min(0, int(whole.min())), max(extent - 1, int(whole.max()))
        for value in values:
            assert value.min() >= low, f"{where}: a pad below every real element"
            assert value.max() <= high, f"{where}: a pad above every real element"


def _compare(
    result: torch.Tensor, whole: torch.Tensor, partial: bool, low: bool, where: str
) -> None:
    tolerance: dict[str, float] = {}
    if partial and whole.is_floating_point():
        tolerance = {"rtol": 5e-2, "atol": 0.15} if low else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(
        result, whole, equal_nan=True, msg=lambda text: f"{where}: {text}", **tolerance
    )


def run_mesh_op(
    op: MeshOp, args: Sequence[object], kwargs: dict[str, object], mesh: Mesh, rank: int
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Run a mesh op that needs no traffic, by its definition in the dialect's table."""
    names = kwargs["axes"]
    assert isinstance(names, tuple)
    parts, position = _position((mesh.index(str(name)) for name in names), mesh, rank)
    if op in (TRIL, TRIU):
        x, diagonal = args[0], args[1] if len(args) > 1 else 0
        shard = kwargs["shard"]
        assert isinstance(x, torch.Tensor)
        assert isinstance(diagonal, int)
        assert isinstance(shard, Shard)
        units = ceil_div(shard.size, parts)
        inner = x.shape[shard.dim] // (shard.outer * units)
        rows = chunks.cut(
            torch.arange(shard.outer * shard.size * inner),
            Shard(0, shard.outer, shard.size),
            parts,
        )[position]
        above = torch.arange(x.shape[-1]) - rows[:, None] - diagonal
        keep = above <= 0 if op is TRIL else above >= 0
        return torch.where(keep, x, torch.zeros((), dtype=x.dtype))
    if op is ADD_ROWS:
        rows, ids, size, shard = args[0], args[1], kwargs["size"], kwargs["shard"]
        assert isinstance(rows, torch.Tensor)
        assert isinstance(ids, torch.Tensor)
        assert isinstance(size, int)
        assert isinstance(shard, Shard)
        flat = rows.reshape(-1, rows.shape[-1]) * (ids != kwargs["padding"]).reshape(-1, 1)
        whole = rows.new_zeros(size, rows.shape[-1]).index_add(0, ids.reshape(-1), flat)
        return chunks.cut(whole, shard, parts)[position]
    if op is TAKE:
        table, ids = args[0], args[1]
        dim, size = kwargs["dim"], kwargs["size"]
        assert isinstance(table, torch.Tensor)
        assert isinstance(ids, torch.Tensor)
        assert isinstance(dim, int)
        assert isinstance(size, int)
        # Rows of other ranks hold unspecified values: whoever reads them must see it.
        nothing = float("nan") if table.is_floating_point() else None
        fill = 0 if kwargs.get("fill_zero", False) else nothing
        return take(table, ids, dim, size, position, fill)
    if op is PICK:
        x, ids, dim = args[0], args[1], kwargs["dim"]
        assert isinstance(x, torch.Tensor)
        assert isinstance(ids, torch.Tensor)
        assert isinstance(dim, int)
        lower = position * x.shape[dim]
        places = torch.arange(lower, lower + x.shape[dim])
        hits = ids.unsqueeze(dim) == places.reshape(-1, *[1] * (x.ndim - dim))
        other = [slice(0, n) if k != dim else slice(None) for k, n in enumerate(ids.shape)]
        wide = x[tuple(other)].unsqueeze(dim + 1)
        return torch.where(hits, wide, 0).sum(dim).to(x.dtype)
    if op in (GROUPED_BACKWARD, GROUPED_SUMS):
        return grouped(op is GROUPED_SUMS, tensors_in(args), parts, position)
    if op in (EXPERTS, EXPERTS_BACKWARD):
        *before, ids, weights, up = args[: 4 if op is EXPERTS else 5]
        size = kwargs["size"]
        assert isinstance(ids, torch.Tensor)
        assert isinstance(up, torch.Tensor)
        assert isinstance(size, int)
        own = torch.where(ids < size, ids - position * up.shape[0], -1)
        whole = getattr(torch.ops.rolemesh, op.name)
        return whole(*before, own, weights, up, *args[len(before) + 3 :])
    raise NotImplementedError(f"{op} in the rule harness")
