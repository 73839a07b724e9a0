"""The folder of an artefact: any damage is seen, and it is replaced as a whole."""

from __future__ import annotations

import json
import shutil
import threading

import pytest
from tests.compiler.artefact.small import Model, lowered, saved

import rolemesh
from rolemesh.compiler.artefact import folder
from rolemesh.compiler.artefact.folder import CALLING, CAPTURED, CONSTANTS, MANIFEST, PARTITIONED
from rolemesh.compiler.artefact.load import open_artefact
from rolemesh.compiler.ir import atomic
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.runtime.reshard.files import read_manifest

FILES = (CALLING, CAPTURED, MANIFEST, PARTITIONED)


def test_files_and_what_they_hold(tmp_path):
    path = saved(tmp_path)
    assert sorted(p.name for p in (path / "program").iterdir()) == sorted(FILES)
    index = json.loads((path / "index.json").read_text())
    assert index["programs"] == ["program"]
    assert set(index["files"]) == {f"program/{name}" for name in FILES}
    found = read_manifest(path / "program" / MANIFEST)
    assert sorted(found.tensors) == ["down.weight", "up.weight"]
    assert [p.name for p in tmp_path.iterdir()] == ["artefact"]


@pytest.mark.parametrize("name", ["index.json", *(f"program/{name}" for name in FILES)])
def test_any_byte(name, tmp_path):
    path = saved(tmp_path)
    data = (path / name).read_bytes()
    for place in sorted({0, 1, len(data) // 3, len(data) // 2, len(data) - 2, len(data) - 1}):
        for bit in (1, 32):
            other = bytearray(data)
            other[place] ^= bit
            (path / name).write_bytes(other)
            with pytest.raises(RolemeshError) as caught:
                open_artefact(path, Model())
            assert caught.value.code == "RM042", (place, bit)
    for other in (data[:-1], data + b"\n", b""):
        (path / name).write_bytes(other)
        with pytest.raises(RolemeshError, match="RM042"):
            open_artefact(path, Model())
    (path / name).unlink()
    with pytest.raises(RolemeshError, match=r"RM042.*cannot be read(.|\n)*fix: save it again"):
        open_artefact(path, Model())


def test_an_index_of_another_format_or_with_foreign_files(tmp_path):
    path = saved(tmp_path)
    index = json.loads((path / "index.json").read_text())
    for change in ({"format": "rolemesh artefact 99"}, {"files": {"../x": {}}}, {"digest": "00"}):
        (path / "index.json").write_bytes(folder.canonical({**index, **change}))
        with pytest.raises(RolemeshError, match="RM042"):
            open_artefact(path, Model())
    (path / "index.json").write_text("[1]\n")
    with pytest.raises(RolemeshError, match="RM042"):
        open_artefact(path, Model())


def test_a_right_index_over_wrong_content(tmp_path):
    path = saved(tmp_path)
    files = folder.read_folder(path)
    contents = {**files.files, f"program/{PARTITIONED}": b'{"head": {}, "nodes": []}'}
    head = {"key": files.index["key"], "programs": files.index["programs"]}
    folder.write(path, head, contents)
    with pytest.raises(RolemeshError, match=r"RM042(.|\n)*its content makes no sense"):
        open_artefact(path, Model())


def test_the_same_artefact_is_not_written_again(tmp_path, monkeypatch):
    path = saved(tmp_path)
    monkeypatch.setattr(folder, "write_folder", None)
    rolemesh.save(lowered(), path)


def test_readers_see_one_or_the_other(tmp_path):
    path = saved(tmp_path)
    programs = [lowered(ranks=3), lowered()] * 2

    def write() -> None:
        for program in programs:
            rolemesh.save(program, path)

    writers = [threading.Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        seen.add(str(folder.read_folder(path).index["key"]["options"]["mesh"]))
    assert seen <= {"[['tp', 2]]", "[['tp', 3]]"}
    assert [p.name for p in tmp_path.iterdir()] == ["artefact"]


def test_a_file_system_that_cannot_swap(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "exchange", lambda *_: False)
    path = saved(tmp_path)
    rolemesh.save(lowered(ranks=3), path)
    assert folder.read_folder(path).index["key"]["options"]["mesh"] == [["tp", 3]]
    assert [p.name for p in tmp_path.iterdir()] == ["artefact"]


def test_other_things_are_not_replaced(tmp_path):
    path = tmp_path / "artefact"
    path.mkdir()
    (path / "notes.txt").write_text("mine")
    with pytest.raises(RolemeshError, match="it is there and is no artefact") as caught:
        rolemesh.save(lowered(), path)
    assert caught.value.code == "RM044"
    assert (path / "notes.txt").read_text() == "mine"
    shutil.rmtree(path)
    path.write_text("a file")
    with pytest.raises(RolemeshError, match="RM044"):
        rolemesh.save(lowered(), path)
    with pytest.raises(RolemeshError, match="RM044"):
        rolemesh.save(lowered(), path / "below a file")
    path.unlink()
    path.mkdir()
    rolemesh.save(lowered(), path)
    open_artefact(path, Model())


def test_names_of_programs(tmp_path):
    programs = [lowered(), lowered(symbolic=True), lowered()]
    rolemesh.save(programs, tmp_path / "artefact")
    found = sorted(p.name for p in (tmp_path / "artefact").iterdir())
    assert found == ["index.json", "program", "program_2", "program_3"]
    assert len(open_artefact(tmp_path / "artefact", Model())) == 3
    assert CONSTANTS not in {p.name for p in (tmp_path / "artefact/program").iterdir()}
