"""Checksums of blocks: however they are fed, and whatever changes."""

from __future__ import annotations

import hashlib
import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.runtime.reshard.block_sums import BlockSum
from rolemesh.runtime.reshard.checksums import (
    CHECKSUMS,
    BlockHasher,
    Checksums,
    FileSums,
    read_checksums,
    sums_of,
    write_checksums,
)
from rolemesh.runtime.reshard.inputs import InputFile
from rolemesh.runtime.reshard.outputs import OutputFile

DATA = random.Random(1).randbytes(70_001)


def sum_of(data: bytes, *cuts: int) -> str:
    found = BlockSum()
    edges = [0, *sorted(cuts), len(data)]
    for start, stop in pairwise(edges):
        found.update(memoryview(data)[start:stop])
    return found.hexdigest()


def test_a_sum_is_that_of_the_formula() -> None:
    words = np.frombuffer(DATA.ljust(5 * 16384, b"\0"), "<u8").reshape(5, 2048)
    sums = np.concatenate([words.sum(0), words.sum(1)]).astype("<u8").tobytes()
    expected = hashlib.sha256(len(DATA).to_bytes(8, "little") + sums).hexdigest()
    assert sum_of(DATA) == expected


@given(st.lists(st.integers(0, len(DATA)), max_size=6))
def test_a_sum_does_not_depend_on_how_it_is_fed(cuts: list[int]) -> None:
    assert sum_of(DATA, *cuts) == sum_of(DATA)


@given(st.integers(0, len(DATA) - 1), st.integers(1, 255))
def test_every_change_of_a_byte_changes_the_sum(place: int, change: int) -> None:
    other = bytearray(DATA)
    other[place] ^= change
    assert sum_of(bytes(other)) != sum_of(DATA)


@pytest.mark.parametrize("length", [8, 64, 512, 4096, 16384])
def test_swapped_pieces_change_the_sum(length: int) -> None:
    first, second = DATA[:length], DATA[length : 2 * length]
    assert sum_of(second + first + DATA[2 * length :]) != sum_of(DATA)


def test_zeros_at_the_end_change_the_sum() -> None:
    assert sum_of(DATA + b"\0") != sum_of(DATA)
    assert sum_of(b"") != sum_of(b"\0")


@given(st.data())
def test_outputs_hash_what_is_in_the_file(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Written in any order, with gaps, and gone on with."""
    path = tmp_path_factory.getbasetemp() / "output"
    path.unlink(missing_ok=True)
    edges = sorted(data.draw(st.sets(st.integers(0, 4000), min_size=2, max_size=8)))
    pieces = [(a, DATA[a:b]) for a, b in pairwise(edges)]
    known, written = pieces[::3], [piece for n, piece in enumerate(pieces) if n % 3]
    if data.draw(st.booleans()):
        written = data.draw(st.permutations(written))
    first = OutputFile(path, 4100, known, block=512)
    stop = data.draw(st.integers(0, len(written)))
    for at, piece in written[:stop]:
        first.write(memoryview(piece), at)
    again = first
    if written == sorted(written):
        first.close()
        again = OutputFile(path, 4100, known, block=512)
        again.resume(max([at + len(piece) for at, piece in written[:stop]], default=0))
    for at, piece in written[stop:]:
        again.write(memoryview(piece), at)
    found = again.finish()
    again.close()
    expected = bytearray(4100)
    for at, piece in pieces:
        expected[at : at + len(piece)] = piece
    assert path.read_bytes() == expected
    assert found == sums_of(path, 512)


@given(st.lists(st.tuples(st.integers(0, 3000), st.integers(1, 1500)), max_size=6), st.data())
def test_a_damaged_byte_that_is_read_is_found_by_settling(
    tmp_path_factory: pytest.TempPathFactory,
    reads: list[tuple[int, int]],
    data: st.DataObject,
) -> None:
    path = tmp_path_factory.getbasetemp() / "input"
    path.write_bytes(DATA[:4500])
    sums = sums_of(path, 512)
    place = data.draw(st.integers(0, 4499))
    damaged = bytearray(DATA[:4500])
    damaged[place] ^= 32
    path.write_bytes(damaged)
    file = InputFile(path, sums, 512, lambda *_: "w")
    met = any(at <= place < at + length for at, length in reads)

    def read_all() -> None:
        for at, length in reads:
            file.read(memoryview(bytearray(length)), at)
        file.settle()
        assert not met
        file.sweep()

    with pytest.raises(RolemeshError, match=r"RM032(.|\n)*input is damaged") as raised:
        read_all()
    file.close()
    start = place // 512 * 512
    assert f"bytes {start} to {min(start + 511, 4499)}: w" in str(raised.value)


def test_the_file_of_checksums_is_checked_itself(tmp_path: Path) -> None:
    hasher = BlockHasher(1 << 14)
    hasher.feed(memoryview(DATA))
    found = Checksums(1 << 14, {"a": FileSums(len(DATA), hasher.finish())})
    write_checksums(tmp_path, found)
    assert read_checksums(tmp_path) == found
    path = tmp_path / CHECKSUMS
    whole = path.read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(RolemeshError, match=r"RM032(.|\n)*checksums\.json is damaged"):
            read_checksums(tmp_path)
    path.unlink()
    assert read_checksums(tmp_path) is None
    path.mkdir()
    with pytest.raises(RolemeshError, match=r"RM032(.|\n)*checksums\.json cannot be read"):
        read_checksums(tmp_path)


def test_torch_tensors_are_read_into(tmp_path: Path) -> None:
    tensor = torch.arange(50, dtype=torch.int16)
    (tmp_path / "a").write_bytes(tensor.numpy().tobytes())
    found = torch.empty_like(tensor)
    file = InputFile(tmp_path / "a", None, 512, lambda *_: "w")
    file.read(found.view(torch.uint8).numpy().data, 0)
    file.settle()
    file.sweep()
    file.close()
    assert torch.equal(found, tensor)
