"""`rolemesh show` of an artefact: its key, field by field, and its programs."""

from __future__ import annotations

import json

from tests.compiler.artefact.small import lowered

import rolemesh
from rolemesh.compiler.artefact.folder import read_folder
from rolemesh.compiler.cli.main import main


def test_the_key_and_the_programs(tmp_path, capsys):
    path = tmp_path / "artefact"
    rolemesh.save([lowered(), lowered(symbolic=True)], path)
    assert main(["show", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    fields = [line.split(maxsplit=1) for line in lines]
    assert fields[0] == ["digest", read_folder(path).digest[:16]]
    assert ["options.mesh", "[['tp', 2]]"] in fields
    assert ["target", "eager"] in fields
    first, second = lines[-2:]
    assert first.startswith("program    Model ")
    assert second.startswith("program_2  Model ")
    assert main(["show", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["key"]["options.mesh"] == [["tp", 2]]
    mesh_ops = found["programs"][0]["mesh_ops"]
    ops = [node.target for node in lowered().sharded.program.ops]
    assert mesh_ops == {name: [*map(str, ops)].count(name) for name in mesh_ops}
    assert sum(mesh_ops.values()) == sum(str(op).startswith("mesh.") for op in ops) > 0
    assert found["programs"][0]["ops"] == len(ops)
    assert found["programs"][0]["rank_bytes"] == [7 * (6 + 6) * 4] * 2


def test_a_damaged_one_is_refused(tmp_path, capsys):
    path = tmp_path / "artefact"
    rolemesh.save(lowered(), path)
    (path / "program/partitioned.json").write_text("{}")
    assert main(["show", str(path)]) == 3
    assert "[RM042] an artefact cannot be read" in capsys.readouterr().err
    assert main(["show", str(path), "--stage", "verify"]) == 3  # it has no stages
    assert "[RM035]" in capsys.readouterr().err
