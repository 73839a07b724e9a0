"""Manifests: their invariants, their canonical JSON, and what is refused when one is read."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.conftest import Golden
from tests.manifests import one, random_manifest

from rolemesh.compiler.ir.boxes import Distribution, distribute
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.manifest import Manifest, Part, Region, StoredTensor
from rolemesh.compiler.ir.manifest_json import decode_manifest, digest, encode_manifest
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.placement import REPLICATE, Owner, Segment, Segmented, Shard

GRID = Mesh({"dp": 2, "tp": 2})


def small() -> Manifest:
    """A tied embedding, packed features, a factor of a dim, an owned bias, and boxes alone."""
    table = distribute(Layout((REPLICATE, Shard(0, 1, 5))), (5, 4), GRID)
    packing = Segmented(0, (Segment(4, 1, 4), Segment(2, 1, 1, 2)))
    packed = distribute(Layout((REPLICATE, packing)), (6, 4), GRID)
    halves = distribute(Layout((Shard(1, 1, 4), Shard(0, 2, 2))), (4, 4), GRID)
    owned = distribute(Layout((Owner(1), REPLICATE)), (), GRID)
    loose = Distribution((5, 4), None, table.held)
    parts = (Part("q", 0, 0, 4), Part("k", 0, 4, 2))
    return Manifest(
        GRID,
        {
            "embed": StoredTensor(torch.bfloat16, table, ("lm_head",)),
            "gate_up": StoredTensor(torch.float32, halves),
            "qk": StoredTensor(torch.float32, packed, parts=parts),
            "scale": StoredTensor(torch.float8_e4m3fn, owned),
            "loose": StoredTensor(torch.float32, loose),
        },
        "pd_mixed",
        7,
    )


def test_golden(golden: Golden) -> None:
    data = encode_manifest(small())
    # A distribution and a tensor a line, so that people can review it.
    text = re.sub(r'(?=\{"held"|"[a-z_]+":\{"aliases"|"generation")', "\n", data.decode())
    golden("manifest", text)
    assert decode_manifest(data) == small()
    assert decode_manifest(text.encode()) == small()


@given(st.data(), st.lists(st.lists(st.integers(0, 6), max_size=3).map(tuple), max_size=3))
def test_what_is_read_is_what_was_written(
    data: st.DataObject, shapes: list[tuple[int, ...]]
) -> None:
    manifest = random_manifest(lambda options: data.draw(st.sampled_from(options)), shapes)
    written = encode_manifest(manifest)
    found = decode_manifest(written)
    assert found == manifest
    assert encode_manifest(found) == written
    assert json.loads(written)["digest"] == digest(manifest)


def test_the_order_of_tensors_does_not_matter() -> None:
    turned = Manifest(GRID, dict(reversed(small().tensors.items())), "pd_mixed", 7)
    assert encode_manifest(turned) == encode_manifest(small())


def test_every_field_is_in_the_digest() -> None:
    found = small()
    others = [
        Manifest(GRID, found.tensors, "pd_mixed", 8),
        Manifest(GRID, found.tensors, "decode", 7),
        Manifest(Mesh({"dp": 2, "ep": 2}), found.tensors, "pd_mixed", 7),
        *(
            Manifest(GRID, {n: t for n, t in found.tensors.items() if n != lacking}, "pd_mixed", 7)
            for lacking in found.tensors
        ),
    ]
    assert len({digest(manifest) for manifest in (found, *others)}) == 1 + len(others)


def test_names_of_tensors_aliases_and_parts_are_found() -> None:
    found = small()
    assert found.find("lm_head") == Region("embed", None)
    assert found.find("k") == Region("qk", Part("k", 0, 4, 2))
    assert found.find("v") is None


def test_bytes_of_ranks() -> None:
    # Rows 3 and 2 of 4 bf16 and of 4 f32, a quarter of 64 bytes, q and k as f32, one float8.
    assert small().rank_bytes == (
        24 + 48 + 16 + 64,
        16 + 32 + 16 + 64,
        24 + 48 + 16 + 64 + 1,
        16 + 32 + 16 + 64 + 1,
    )


FIVE = distribute(Layout((REPLICATE, Shard(0, 1, 5))), (5,), GRID)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: Manifest(GRID, {}, generation=-1), "generations count from 0"),
        (
            lambda: Manifest(Mesh({"tp": 2}), {"w": StoredTensor(torch.float32, FIVE)}),
            "w has boxes for 4 ranks",
        ),
        (
            lambda: Manifest(
                GRID,
                {
                    "w": StoredTensor(torch.float32, FIVE),
                    "v": StoredTensor(torch.float32, FIVE, ("w",)),
                },
            ),
            "two tensors have the name w",
        ),
        *(
            (
                lambda parts=parts: Manifest(
                    GRID, {"w": StoredTensor(torch.float32, FIVE, (), parts)}
                ),
                "the parts of w do not make up the tensor",
            )
            for parts in (
                (Part("a", 0, 0, 4),),
                (Part("a", 1, 0, 5),),
                (Part("a", 0, 0, 3), Part("b", 0, 2, 3)),
                (Part("a", 0, 0, 5), Part("b", 0, 5, 0)),
            )
        ),
    ],
)
def test_a_broken_invariant_is_refused(make: Callable[[], Manifest], expected: str) -> None:
    with pytest.raises(RolemeshError, match=expected) as raised:
        make()
    assert raised.value.code == "RM038"


def edited(change: Callable[[dict[str, Any]], object]) -> bytes:
    """The small manifest with a change, and the digest that belongs to it."""
    body = json.loads(encode_manifest(small()))
    del body["digest"]
    change(body)
    text = json.dumps(body, sort_keys=True, separators=(",", ":")) + "\n"
    body["digest"] = hashlib.sha256(text.encode()).hexdigest()
    return json.dumps(body).encode()


def test_an_edit_with_its_digest_is_read() -> None:
    assert decode_manifest(edited(lambda body: body.update(role="decode"))).role == "decode"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda b: b.update(schema=2), "its schema is 2; this version reads 1"),
        (lambda b: b.update(schema=True), "its schema is True"),
        (lambda b: b.pop("schema"), "its schema is None"),
        (lambda b: b.update(extra=1), "no object with the members"),
        (lambda b: b.pop("role"), "no object with the members"),
        (lambda b: b.update(generation=True), "generation: True is no number"),
        (lambda b: b.update(generation=1.5), "1.5 is no integer"),
        (lambda b: b.update(generation=float("inf")), "Infinity is no integer"),
        (lambda b: b.update(role=3), "role: 3 is no text"),
        (lambda b: b.update(mesh=[["dp", 2], ["dp", 2]]), "the mesh has an axis twice"),
        (lambda b: b.update(mesh=[["dp", 0], ["tp", 4]]), "RM015"),
        (lambda b: b.update(mesh=[["dp", 2], ["tp", 3]]), "no array of 6"),
        (
            lambda b: b["tensors"]["qk"].update(dtype="float3"),
            "torch has no dtype 'float3', which qk",
        ),
        (lambda b: b["tensors"]["qk"].update(dtype="nn"), "torch has no dtype 'nn'"),
        (lambda b: b["tensors"]["qk"].update(distribution=9), "qk has distribution 9 of 5"),
        (lambda b: b["tensors"]["qk"].update(parts=[["q", 0, 0, 4]]), "the parts of qk do not"),
        (lambda b: b["tensors"]["qk"].update(aliases=["embed"]), "two tensors have the name"),
        (lambda b: b["distributions"][0].update(shape=[5, 5]), "the boxes of rank 0 are"),
        (lambda b: b["distributions"][0]["held"][2].clear(), "the boxes of rank 2 are"),
        (lambda b: b["distributions"][0]["layout"].pop(), "no array of 2"),
        (lambda b: b["distributions"][0].update(layout=["replicated", "x"]), "'x' is no placement"),
        (
            lambda b: b["distributions"][0].update(layout=[{"owner": 2}] * 2),
            "names a rank of an axis",
        ),
        (lambda b: b["distributions"][0].update(layout=[{"shard": [4, 1, 5]}] * 2), "RM009"),
        *(
            (
                lambda b, run=run: b["distributions"][2]["held"][0][0]["runs"][0].append(run),
                "lie outside the tensor of shape [5, 4], outside the local one",
            )
            for run in ([2, 1, 3], [3, 1, 3], [3, 3, 0], [3, 0, 3])
        ),
    ],
)
def test_what_is_no_manifest_is_refused(
    change: Callable[[dict[str, Any]], object], expected: str
) -> None:
    with pytest.raises(RolemeshError) as raised:
        decode_manifest(edited(change), "here.json")
    assert raised.value.code == "RM038"
    assert expected in str(raised.value)
    assert "here.json" in str(raised.value)


def test_every_flipped_byte_is_detected() -> None:
    data = encode_manifest(one(Mesh({"tp": 2}), Layout((Shard(0, 1, 3),)), (3,)))
    for position in range(len(data) - 1):  # the last is the newline
        for bit in (0, 3, 6):
            damaged = bytearray(data)
            damaged[position] ^= 1 << bit
            with pytest.raises(RolemeshError, match="RM038"):
                decode_manifest(bytes(damaged))
    for length in range(len(data) - 1):
        with pytest.raises(RolemeshError, match="RM038"):
            decode_manifest(data[:length])


@pytest.mark.parametrize("text", ["[]", "3", "", '{"schema":1,"schema":1}', "[" * 100_000, "\xff"])
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises(RolemeshError, match="the manifest cannot be read"):
        decode_manifest(text.encode("latin-1"))
