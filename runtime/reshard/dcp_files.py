"""Files of torch.distributed.checkpoint: where tensors' bytes are, and how to make room for them.

A file is a sequence of what `torch.save` writes for one tensor, a zip archive whose data is stored
as it is; `.metadata` says where each begins. Here torch itself finds the data in an archive, and
writes archives with room for data: both without touching the data.
"""

from __future__ import annotations

import io
import math
import os
import pickle
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import IO, NamedTuple, cast

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.filesystem import (
    CURRENT_DCP_VERSION,
    FileSystemReader,
    _StorageInfo,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from rolemesh.runtime.reshard.checksums import bad_checkpoint

__all__ = [
    "METADATA",
    "Archive",
    "ChunkPlace",
    "archive",
    "chunk_places",
    "encode_metadata",
    "read_metadata",
]

METADATA = ".metadata"


class Archive(NamedTuple):
    """What `torch.save` writes for a tensor, with room for its data.

    Attributes:
        nbytes: Its bytes, with the data.
        data: Where in it the data belongs.
        parts: Everything else: places and bytes.
    """

    nbytes: int
    data: int
    parts: tuple[tuple[int, bytes], ...]


def read_metadata(folder: Path) -> Metadata:
    """The metadata of a checkpoint. torch unpickles it: give folders that you trust.

    Raises:
        RolemeshError: RM032 if it cannot be read.
    """
    try:
        found = FileSystemReader(folder).read_metadata()
    except Exception as error:
        raise bad_checkpoint(
            f"{folder / METADATA} cannot be read",
            where=str(folder / METADATA),
            why=f"{type(error).__name__}: {error}",
        ) from error
    if not isinstance(found, Metadata):
        raise bad_checkpoint(
            f"{folder / METADATA} cannot be read",
            where=str(folder / METADATA),
            why=f"it has a {type(found).__name__}, and no metadata of a checkpoint",
        )
    return found


def encode_metadata(
    tensors: Mapping[str, TensorStorageMetadata], places: Mapping[MetadataIndex, _StorageInfo]
) -> bytes:
    """The content of `.metadata`."""
    names = {name: (name,) for name in tensors}
    metadata = Metadata(dict(tensors), names, dict(places), None, CURRENT_DCP_VERSION)
    return pickle.dumps(metadata)


class ChunkPlace(NamedTuple):
    """Where a chunk's bytes are.

    Attributes:
        name: The tensor.
        chunk: The box of it.
        file: The file.
        at: Where in it the bytes begin.
    """

    name: str
    chunk: ChunkStorageMetadata
    file: str
    at: int


def chunk_places(folder: Path, metadata: Metadata) -> list[ChunkPlace]:
    """Where the chunks of a checkpoint are, in the order of its metadata.

    Raises:
        RolemeshError: RM032 if a chunk's archive is damaged, holds something else, or is not
            stored as it is.
    """
    storage, found = metadata.storage_data, []
    with ExitStack() as stack:
        archives = _Archives(folder, stack)
        stack.enter_context(FakeTensorMode())  # torch.load then reads everything but the data
        for name, entry in metadata.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                continue
            for chunk in entry.chunks:
                info = storage[MetadataIndex(name, chunk.offsets)]
                at = archives.data_of(name, entry.properties.dtype, chunk, info)
                found.append(ChunkPlace(name, chunk, info.relative_path, at))
    return found


class _Archives:
    """Finds the data in archives. Of archives that are alike but for the data, torch reads one."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder = folder
        self._stack = stack
        self._files: dict[str, io.FileIO] = {}
        self._known: dict[tuple[tuple[int, ...], torch.dtype, int], tuple[int, bytes]] = {}

    def data_of(
        self, name: str, dtype: torch.dtype, chunk: ChunkStorageMetadata, info: _StorageInfo
    ) -> int:
        """Where the bytes of a chunk begin in its file."""
        where = f"{self._folder / info.relative_path}: {name}, chunk at {list(chunk.offsets)}"
        if info.transform_descriptors:
            raise bad_checkpoint(
                f"{name} is stored transformed",
                where=where,
                why=f"its bytes went through {', '.join(info.transform_descriptors)}",
                fix="save the checkpoint without extensions",
            )
        key = tuple(chunk.sizes), dtype, info.length
        try:
            fetch = self._reader(info)
            at, head = self._known.get(key, (-1, b""))
            if at < 0 or not _alike(head, fetch(0, at)):
                tensor = _load(_Window(info.length, fetch))
                at = _offset(tensor)
                _check(tensor, *key, at)
                self._known[key] = at, fetch(0, at)
        except Exception as error:
            raise bad_checkpoint(
                f"{name} cannot be read",
                where=where,
                why=str(error).partition("\n")[0] or type(error).__name__,
                fix="copy or write the checkpoint again; save contiguous tensors",
            ) from error
        return info.offset + at

    def _reader(self, info: _StorageInfo) -> Callable[[int, int], bytes]:
        """Reads from an archive, which is all there."""
        if info.relative_path not in self._files:
            file = (self._folder / info.relative_path).open("rb", buffering=0)
            self._files[info.relative_path] = self._stack.enter_context(file)
        descriptor = self._files[info.relative_path].fileno()
        if info.offset + info.length > os.fstat(descriptor).st_size:
            raise ValueError(f"it ends at byte {info.offset + info.length}, the file before")
        return lambda at, count: os.pread(descriptor, count, info.offset + at)


def _check(
    tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, length: int, at: int
) -> None:
    if (tuple(tensor.shape), tensor.dtype) != (shape, dtype) or not tensor.is_contiguous():
        raise ValueError(
            f"the file has {list(tensor.shape)} of {tensor.dtype}, strides "
            f"{list(tensor.stride())}; the metadata says {list(shape)} of {dtype}, contiguous"
        )
    if at + tensor.numel() * tensor.element_size() > length:
        raise ValueError("its data ends outside of it")


def _alike(first: bytes, second: bytes) -> bool:
    """Whether what precedes the data of two archives is the same, but for the data's CRC.

    The CRC is at byte 14 of the header that precedes the data (APPNOTE.TXT of PKWARE, 4.3.7).
    """
    crc = first.rfind(b"PK\x03\x04") + 14
    return (first[:crc], first[crc + 4 :]) == (second[:crc], second[crc + 4 :])


class _Window(io.RawIOBase):
    """Bytes from somewhere, as a file.

    Args:
        length: How many there are.
        fetch: Gives some of them, from their place and number.
    """

    def __init__(self, length: int, fetch: Callable[[int, int], bytes]) -> None:
        self._length, self._fetch, self._at = length, fetch, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        self._at = base + offset
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override] # torch gives one
        data = self._fetch(self._at, max(0, min(len(buffer), self._length - self._at)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


class _Parts(io.RawIOBase):
    """A file that remembers what is written to it, and not how long the holes are."""

    def __init__(self) -> None:
        self.at, self.parts = 0, list[tuple[int, bytes]]()

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        assert whence != os.SEEK_END, "torch seeks forward, over the data"
        self.at = offset + (self.at if whence == os.SEEK_CUR else 0)
        return self.at

    def write(self, data: bytes | memoryview, /) -> int:  # type: ignore[override] # as torch does
        content = bytes(data)
        self.parts.append((self.at, content))
        self.at += len(content)
        return len(content)

    def fetch(self, at: int, count: int) -> bytes:
        """What a file with zeros in its holes has."""
        found = bytearray(count)
        for start, data in self.parts:
            low, high = max(start, at), min(start + len(data), at + count)
            if low < high:
                found[low - at : high - at] = data[low - start : high - start]
        return bytes(found)


@lru_cache(maxsize=4096)
def archive(shape: tuple[int, ...], dtype: torch.dtype) -> Archive:
    """What `torch.save` writes for a contiguous tensor, but for its data.

    Args:
        shape: The tensor's shape, with at least one element.
        dtype: Its dtype.
    """
    written = _Parts()
    with torch.serialization.skip_data():
        # The memory is never touched. torch asks for IO, and takes what has its methods.
        torch.save(torch.empty(shape, dtype=dtype), cast(IO[bytes], written))
    with FakeTensorMode():
        tensor = _load(_Window(written.at, written.fetch))
    at = _offset(tensor)
    after = at + math.prod(shape) * dtype.itemsize
    parts = (0, written.fetch(0, at)), (after, written.fetch(after, written.at - after))
    return Archive(written.at, at, parts)


def _offset(tensor: torch.Tensor) -> int:
    """Where the bytes of a tensor begin in what it was loaded from without its data."""
    at = tensor.untyped_storage()._checkpoint_offset
    assert at is not None, "torch says where it would have read"
    return at + int(tensor.storage_offset()) * tensor.element_size()


def _load(file: _Window) -> torch.Tensor:
    loaded = torch.load(cast(IO[bytes], file), weights_only=True)
    if not isinstance(loaded, torch.Tensor):
        raise TypeError(f"it holds a {type(loaded).__name__}, and no tensor")
    return loaded
