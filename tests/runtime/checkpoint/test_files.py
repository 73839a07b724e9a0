"""Headers: what a checkpoint holds is read exactly, and every way to break one is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.tensor import TensorType
from rolemesh.runtime.checkpoint.files import open_checkpoint

TENSORS = {
    "a.weight": torch.arange(15.0).reshape(3, 5).bfloat16(),
    "b": torch.arange(7),
    "scale": torch.tensor(0.5),
    "none": torch.zeros(0, 4),
}


def split(folder: Path) -> Path:
    """A checkpoint of two files with an index."""
    names = {"one.safetensors": ["a.weight", "scale"], "two.safetensors": ["b", "none"]}
    for file, inside in names.items():
        save_file({name: TENSORS[name] for name in inside}, folder / file)
    index = {"weight_map": {name: file for file, inside in names.items() for name in inside}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def edit_index(folder: Path, edit: Callable[[dict[str, str]], object]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index["weight_map"])
    path.write_text(json.dumps(index))


def write(path: Path, header: object, data: bytes = b"") -> None:
    """A file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def refused(path: Path) -> str:
    with pytest.raises(RolemeshError) as caught:
        open_checkpoint(path)
    assert caught.value.code == "RM032"
    return str(caught.value)


@pytest.mark.parametrize("form", ["file", "folder", "index", "split folder"])
def test_every_form_is_read(tmp_path: Path, form: str) -> None:
    if form in ("file", "folder"):
        save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    else:
        split(tmp_path)
    names = {"file": "model.safetensors", "index": "model.safetensors.index.json"}
    checkpoint = open_checkpoint(tmp_path / names.get(form, ""))
    assert checkpoint.entries.keys() == TENSORS.keys()
    for name, entry in checkpoint.entries.items():
        expected = TENSORS[name]
        assert entry.type == TensorType(tuple(expected.shape), expected.dtype)
        raw = Path(entry.file).read_bytes()[entry.start : entry.start + entry.type.nbytes]
        values = torch.frombuffer(bytearray(raw or b"-"), dtype=torch.uint8)[: len(raw)]
        assert torch.equal(values.view(expected.dtype).view(expected.shape), expected)


def test_no_checkpoint(tmp_path: Path) -> None:
    assert f"no checkpoint at {tmp_path}/absent" in refused(tmp_path / "absent")
    save_file(TENSORS, tmp_path / "other.safetensors")
    text = refused(tmp_path)
    assert "the folder has other.safetensors" in text
    assert "it has neither model.safetensors nor model.safetensors.index.json" in text
    assert "give a .safetensors file" in text


def test_truncated_data_names_the_tensors_that_are_cut(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"first": torch.zeros(4), "last": torch.ones(6)}, file)
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-1])
    text = refused(file)
    assert f"the checkpoint {file} cannot be read" in text
    assert f"model.safetensors: truncated: last ends at byte {size}, the file at {size - 1}" in text
    assert "first ends" not in text
    assert "download or write the checkpoint again" in text


def test_truncated_header(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file(TENSORS, file)
    whole = file.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    file.write_bytes(whole[:50])
    assert f"truncated: its header ends at byte {end}, the file at 50" in refused(file)
    file.write_bytes(whole[:5])
    assert "truncated: it has 5 bytes" in refused(file)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (b"{nonsense", "its header is not valid"),
        (b"\xff\xff", "its header is not valid"),
        (b"[1]", "its header is not a mapping"),
        (b'{"x": {}, "x": {}}', "its header is not valid: x occurs twice"),
        ({"x": 3}, "x: it needs a dtype, a shape and two data_offsets"),
        ({"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, "x: it needs a dtype"),
        ({"x": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, "x: torch has no dtype F4"),
        (
            {"x": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 20]}},
            "x: f32[2, 3] takes 24 bytes, its data_offsets hold 20",
        ),
        (
            {
                "x": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
                "y": {"dtype": "U8", "shape": [3], "data_offsets": [2, 5]},
            },
            "x and y share bytes",
        ),
    ],
)
def test_malformed_header(tmp_path: Path, header: object, expected: str) -> None:
    write(tmp_path / "model.safetensors", header, bytes(64))
    assert f"model.safetensors: {expected}" in refused(tmp_path)


def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    with mock.patch.object(Path, "open", side_effect=PermissionError(13, "Permission denied")):
        assert "Permission denied" in refused(tmp_path)


def test_text_file_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "model.safetensors: not a safetensors file" in refused(tmp_path)


def test_all_problems_of_an_index_are_listed(tmp_path: Path) -> None:
    split(tmp_path)
    save_file({"b": torch.zeros(2)}, tmp_path / "three.safetensors")

    def edit(files: dict[str, str]) -> None:
        files["ghost"] = "one.safetensors"
        files["other"] = "three.safetensors"
        files["lost"] = "absent.safetensors"

    edit_index(tmp_path, edit)
    text = refused(tmp_path)
    assert "absent.safetensors: the index names it, but it does not exist" in text
    assert "one.safetensors: ghost is not in it, although the index says so" in text
    assert "three.safetensors: other is not in it" in text
    assert "two.safetensors: b is in three.safetensors too" in text
    assert "lost is not in it" not in text, "its file is missing, which is said already"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "it is not valid"),
        ("[]", "it is not a mapping"),
        ("{}", "no weight_map from tensor names to file names"),
        ('{"weight_map": {"a": 1}}', "no weight_map from tensor names to file names"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "it is not valid: a occurs twice"),
    ],
)
def test_malformed_index(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert f"model.safetensors.index.json: {expected}" in refused(tmp_path)


def test_many_problems_are_cut_short(tmp_path: Path) -> None:
    header = {f"x{i}": {} for i in range(50)}
    write(tmp_path / "model.safetensors", header)
    text = refused(tmp_path)
    assert "x19" in text
    assert "x20" not in text
    assert "and 30 more" in text
