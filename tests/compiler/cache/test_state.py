"""What keys say about versions: a changed file is another version."""

from __future__ import annotations

from pathlib import Path

from rolemesh.compiler.cache.state import files_digest, source_digest


def test_every_change_of_a_source_file_counts(tmp_path: Path) -> None:
    (tmp_path / "rules").mkdir()
    rule = tmp_path / "rules" / "matmul.py"
    rule.write_text("a = 1\n")
    found = [files_digest(str(tmp_path))]
    rule.write_text("a = 2\n")
    found.append(files_digest(str(tmp_path)))
    rule.rename(tmp_path / "matmul.py")
    found.append(files_digest(str(tmp_path)))
    (tmp_path / "other.py").write_text("")
    found.append(files_digest(str(tmp_path)))
    assert len(set(found)) == len(found)
    (tmp_path / "notes.txt").write_text("not code")
    assert files_digest(str(tmp_path)) == found[-1]


def test_rolemesh_itself_is_read(repository: Path) -> None:
    assert len(source_digest()) == 64
    assert files_digest(str(repository / "passes")) != files_digest(str(repository / "lowering"))
