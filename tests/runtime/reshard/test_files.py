"""Manifest files: whole or not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.manifests import one

import rolemesh
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.manifest_json import encode_manifest
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.placement import REPLICATE, Shard

LINE = Mesh({"tp": 2})
FIRST = one(LINE, Layout((Shard(0, 1, 3),)), (3,))
SECOND = one(LINE, Layout((REPLICATE,)), (3,))


def test_a_file_is_the_canonical_json(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    rolemesh.write_manifest(FIRST, path)
    assert path.read_bytes() == encode_manifest(FIRST)
    assert rolemesh.read_manifest(path) == FIRST
    rolemesh.write_manifest(SECOND, path)
    assert rolemesh.read_manifest(path) == SECOND
    assert [file.name for file in tmp_path.iterdir()] == ["manifest.json"]


def test_a_failure_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "manifest.json"
    rolemesh.write_manifest(FIRST, path)

    def full(_: int) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(rolemesh.RolemeshError, match=r"RM038(.|\n)*the disk is full"):
        rolemesh.write_manifest(SECOND, path)
    assert rolemesh.read_manifest(path) == FIRST
    assert [file.name for file in tmp_path.iterdir()] == ["manifest.json"]


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    with pytest.raises(rolemesh.RolemeshError, match=r"RM038(.|\n)*none\.json cannot be read"):
        rolemesh.read_manifest(tmp_path / "none.json")
    with pytest.raises(rolemesh.RolemeshError, match=r"RM038(.|\n)*cannot be written"):
        rolemesh.write_manifest(FIRST, tmp_path / "none" / "manifest.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(rolemesh.RolemeshError, match=r"RM038(.|\n)*bad\.json"):
        rolemesh.read_manifest(tmp_path / "bad.json")
