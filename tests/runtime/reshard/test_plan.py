"""Plans, carried out on numbered tensors between random manifests."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.manifests import carry_out, elements, one, random_manifest, scattered

from rolemesh.compiler.ir.boxes import Distribution, distribute
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.manifest import Manifest, Part, StoredTensor
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.placement import REPLICATE, Owner, Segment, Segmented, Shard
from rolemesh.runtime.reshard.plan import Plan, plan_reshard

EXTENTS = (1, 2, 3, 4, 5, 6, 8, 12)
TWO, FOUR = Mesh({"tp": 2}), Mesh({"tp": 4})


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Manifest, Manifest]:
    shapes = draw(
        st.lists(st.lists(st.sampled_from(EXTENTS), max_size=3).map(tuple), min_size=1, max_size=3)
    )
    first, second = (
        random_manifest(lambda options: draw(st.sampled_from(options)), shapes) for _ in range(2)
    )
    return first, second


def require_right(plan: Plan, source: Manifest, target: Manifest) -> None:
    """Carry a plan out: bit-equal, and as few bytes as can be."""
    found = carry_out(plan, source, target)
    have, need = scattered(source), scattered(target)
    least = 0
    for name, locals_ in need.items():
        for rank, local in enumerate(locals_):
            assert torch.equal(found[name][rank].nan_to_num(-1), local.nan_to_num(-1))
            process = plan.places.targets[rank]
            here = process in plan.places.sources
            own = elements(have[name][process]) if here else set()
            least += len(elements(local) - own) * local.element_size()
    assert plan.moved_bytes == least
    assert plan.moved_bytes + plan.kept_bytes == sum(target.rank_bytes)


@settings(max_examples=400)
@given(pairs(), st.sampled_from([8, 24, 200, 1 << 20]), st.integers(1, 4), st.data())
def test_a_plan_moves_every_element_once_and_as_few_bytes_as_can_be(
    pair: tuple[Manifest, Manifest], staging: int, node_size: int, data: st.DataObject
) -> None:
    source, target = pair
    processes: dict[int, int] | None = None
    if data.draw(st.booleans()):
        mine, theirs = (data.draw(st.permutations(range(m.mesh.size))) for m in (target, source))
        count = data.draw(st.integers(0, min(len(mine), len(theirs))))
        processes = dict(zip(mine[:count], theirs[:count], strict=True))
    options = {"processes": processes, "node_size": node_size, "staging": staging}
    plan = plan_reshard(source, target, **options)  # type: ignore[arg-type]
    require_right(plan, source, target)
    again = plan_reshard(source, target, **options)  # type: ignore[arg-type]
    assert again.digest == plan.digest


def test_neighbours_with_pads_between_are_two_moves() -> None:
    # Rank 1 has indices 3 and 4, a pad, and then 5 to 7.
    layout = Layout((Segmented(0, (Segment(5, 1, 5), Segment(3, 1, 0))),))
    padded, whole = one(TWO, layout, (8,)), one(TWO, Layout((REPLICATE,)), (8,))
    for source, target in ((padded, whole), (whole, padded)):
        for processes in (None, {}):
            require_right(plan_reshard(source, target, processes=processes), source, target)


@settings(max_examples=50)
@given(pairs())
def test_a_manifest_to_itself_moves_nothing(pair: tuple[Manifest, Manifest]) -> None:
    plan = plan_reshard(pair[0], pair[0])
    assert plan.moved_bytes == 0
    assert plan.staged_bytes == 0
    assert len(plan.steps) == 1


def senders(source: Manifest, target: Manifest, **options: int) -> list[tuple[int, int]]:
    plan = plan_reshard(source, target, **options)  # type: ignore[arg-type]
    pairs = [
        (int(a), int(b))
        for step in plan.steps
        for _, moves in plan.moves(step)
        for a, b in zip(moves.source, moves.target, strict=True)
    ]
    return sorted(pairs)


def test_replicas_are_taken_from_the_rank_itself_its_node_or_the_next_one() -> None:
    mesh = Mesh({"dp": 4, "tp": 2})
    source = one(mesh, Layout((REPLICATE, Shard(0, 1, 6))), (6,))
    whole = one(mesh, Layout((REPLICATE, REPLICATE)), (6,))
    # Half of it is there; the other half is on every second rank, the next one or one of the node.
    next_one = {0: 1, 1: 2, 2: 3, 3: 4, 4: 5, 5: 6, 6: 7, 7: 0}
    in_node = {0: 1, 1: 0, 2: 3, 3: 2, 4: 5, 5: 4, 6: 7, 7: 6}
    for size, other in ((8, next_one), (2, in_node)):
        found = senders(source, whole, node_size=size)
        assert {pair for pair in found if pair[0] != pair[1]} == {(b, a) for a, b in other.items()}
        assert {pair for pair in found if pair[0] == pair[1]} == {(r, r) for r in range(8)}


def test_one_source_serves_neighbouring_boxes_with_one_move() -> None:
    source = one(FOUR, Layout((Shard(0, 1, 8),)), (8, 3))
    target = one(TWO, Layout((Owner(1),)), (8, 3))
    assert senders(source, target) == [(0, 1), (1, 1), (2, 1), (3, 1)]
    assert senders(one(FOUR, Layout((Owner(2),)), (8, 3)), target) == [(2, 1)]


def test_tensors_that_lie_alike_share_a_table() -> None:
    before, after = (
        distribute(Layout((p,)), (8, 6), FOUR) for p in (Shard(0, 1, 8), Shard(1, 1, 6))
    )
    names = [f"layers.{n}.weight" for n in range(50)]
    source = Manifest(FOUR, {n: StoredTensor(torch.bfloat16, before) for n in names})
    target = Manifest(FOUR, {n: StoredTensor(torch.bfloat16, after) for n in names})
    plan = plan_reshard(source, target)
    assert len({id(transfer.table) for transfer in plan.transfers}) == 1
    assert len(plan.steps) == 1
    # Of a tensor, the first ranks send 16 bytes and receive 24: seven tensors fit in 300.
    narrow = plan_reshard(source, target, staging=300)
    assert narrow.staged_bytes == 280
    assert len(narrow.steps) == 8
    assert narrow.digest != plan.digest


def packed_pair() -> tuple[Manifest, Manifest]:
    """Gate and up by themselves on four ranks, and packed on two."""
    alone = distribute(Layout((Shard(0, 1, 5),)), (5, 3), FOUR)
    packing = Segmented(0, (Segment(5, 1, 5), Segment(5, 1, 0)))
    packed = distribute(Layout((packing,)), (10, 3), TWO)
    parts = (Part("gate", 0, 0, 5), Part("up", 0, 5, 5))
    return (
        Manifest(FOUR, {n: StoredTensor(torch.float32, alone) for n in ("gate", "up")}),
        Manifest(TWO, {"gate_up": StoredTensor(torch.float32, packed, parts=parts)}),
    )


def test_a_packed_tensor_is_filled_from_its_parts_and_gives_them() -> None:
    alone, packed = packed_pair()
    for source, target in ((alone, packed), (packed, alone)):
        plan = plan_reshard(source, target, staging=12)
        have = scattered(source)
        if source is alone:  # up follows gate
            have["up"] = [local + 15 for local in have["up"]]
        found = {
            n: [torch.full_like(t, torch.nan) for t in ts] for n, ts in scattered(target).items()
        }
        for transfer, moves in (pair for step in plan.steps for pair in plan.moves(step)):
            columns = (moves.source, moves.target, moves.source_at, moves.target_at, moves.size)
            for rank, to, take, put, size in zip(*(c.tolist() for c in columns), strict=True):
                pick, place = (
                    tuple(slice(a, a + n) for a, n in zip(at, size, strict=True))
                    for at in (take, put)
                )
                found[transfer.target][to][place] = have[transfer.source][rank][pick]
        need = scattered(target)
        if target is alone:
            need["up"] = [local + 15 for local in need["up"]]
        for name, locals_ in need.items():
            for mine, theirs in zip(found[name], locals_, strict=True):
                assert torch.equal(mine.nan_to_num(-1), theirs.nan_to_num(-1))
        assert plan.staged_bytes <= 12


def test_aliases_name_the_same_tensor() -> None:
    found = distribute(Layout((Shard(0, 1, 4),)), (4,), TWO)
    source = Manifest(TWO, {"head": StoredTensor(torch.float32, found, ("embed",))})
    target = Manifest(TWO, {"embed": StoredTensor(torch.float32, found)})
    (transfer,) = plan_reshard(source, target).transfers
    assert (transfer.source, transfer.target) == ("head", "embed")


def changed(manifest: Manifest, **fields: object) -> Manifest:
    return Manifest(manifest.mesh, {"w": dataclasses.replace(manifest.tensors["w"], **fields)})  # type: ignore[arg-type]


WHOLE = one(TWO, Layout((REPLICATE,)), (4, 3))
HALF = Distribution((4, 3), None, (distribute(Layout((Shard(0, 1, 4),)), (4, 3), TWO).held[0], ()))


@pytest.mark.parametrize(
    ("source", "target", "options", "parts"),
    [
        (
            WHOLE,
            one(FOUR, Layout((REPLICATE,)), (4, 3), "v"),
            {},
            ["the source has no tensor v", "f32[4, 3] on mesh tp=4", "mesh tp=2", "is called v"],
        ),
        (
            WHOLE,
            one(FOUR, Layout((REPLICATE,)), (3, 4)),
            {},
            ["w has another shape", "source w: f32[4, 3]; target: f32[3, 4]"],
        ),
        (
            WHOLE,
            changed(WHOLE, dtype=torch.bfloat16),
            {},
            ["w has another dtype", "source w: f32[4, 3]; target: bf16[4, 3]"],
        ),
        (
            changed(WHOLE, distribution=HALF),
            WHOLE,
            {},
            ["no rank of the source holds [2:4, 0:3] of w", "rank 0 of the target"],
        ),
        (
            changed(WHOLE, distribution=Distribution((4, 3), None, ((), ()))),
            WHOLE,
            {},
            ["no rank of the source holds [0:4, 0:3] of w"],
        ),
        (
            WHOLE,
            WHOLE,
            {"processes": {2: 0}},
            ["the target has no rank 2", "ranks 0 to 1, on mesh"],
        ),
        (WHOLE, WHOLE, {"processes": {0: 5}}, ["the source has no rank 5", "target rank 0 as"]),
        (WHOLE, WHOLE, {"processes": {0: 1, 1: 1}}, ["two ranks of the target are one process"]),
        (WHOLE, WHOLE, {"node_size": 0}, ["nodes of 0 processes"]),
        (WHOLE, WHOLE, {"staging": 3}, ["3 bytes of staging hold no element of w", "has 4 bytes"]),
    ],
)
def test_mismatches_name_the_tensor_and_both_sides(
    source: Manifest, target: Manifest, options: dict[str, int], parts: list[str]
) -> None:
    with pytest.raises(RolemeshError) as raised:
        plan_reshard(source, target, **options)  # type: ignore[arg-type]
    assert raised.value.code == "RM039"
    for part in parts:
        assert part in str(raised.value)


def test_a_part_that_is_missing_is_named() -> None:
    alone, packed = packed_pair()
    lacking = Manifest(alone.mesh, {"gate": alone.tensors["gate"]})
    with pytest.raises(RolemeshError, match=r"no tensor gate_up(.|\n)*is called up"):
        plan_reshard(lacking, packed)
