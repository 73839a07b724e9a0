"""GE graphs in an artefact: what torchair converted for each rank, so that loading need not.

They are files as the target itself keeps them (`lowering.ge.cached`), each for one rank and with a
checksum and a key of its own: a graph whose file is damaged, or was made by another torchair, is
converted again, and its file is written anew. A rank that finds none adds its own.

Invariant: what is in these files is run, so only files of this user are taken.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path

from rolemesh.compiler.api import Compiled, Lowered, LoweredRanks
from rolemesh.compiler.artefact.folder import INDEX
from rolemesh.lowering.ge.cached import write_text
from rolemesh.lowering.ge.options import GeOptions
from rolemesh.runtime.rank import RankProgram

__all__ = ["graph_files", "graphs_in", "keep_graphs"]

_FOLDER = "ge"


def graphs_in(path: Path, name: str) -> Path | None:
    """The folder for GE graphs of a program, there or not; None if this process should use none.

    Args:
        path: The artefact; not there on ranks that another one sent it to.
        name: Name of the program.
    """
    folder = path / name / _FOLDER
    try:
        if not (path / INDEX).is_file():
            return None
        if folder.stat().st_uid == os.getuid():
            return folder
        problem = "they belong to another user"
    except FileNotFoundError:
        return folder
    except OSError as error:
        problem = f"{type(error).__name__}: {error}"
    warnings.warn(
        f"graphs in {folder} are not used, and converted again: {problem}",
        RuntimeWarning,
        stacklevel=2,
    )
    return None


def graph_files(path: Path, name: str) -> list[str]:
    """Names of the files with GE graphs of a program.

    Args:
        path: The artefact.
        name: Name of the program.
    """
    return sorted(file.name for file in (path / name / _FOLDER).glob("*.json"))


def keep_graphs(path: Path, name: str, item: Compiled | Lowered | LoweredRanks) -> None:
    """Put the GE graphs that were made of a program into the artefact, or warn that it cannot be.

    Args:
        path: The artefact.
        name: Name of the program.
        item: The program; what was not compiled yet has no graphs.
    """
    if isinstance(item, Lowered) or not isinstance(item.lowered.options, GeOptions):
        return
    folder = path / name / _FOLDER
    try:
        for files in _saved(item):
            for file, text in (files or {}).items():
                if not _has(folder / file, str(text)):
                    write_text(folder / file, str(text))
    except OSError as error:
        warnings.warn(
            f"graphs are not kept in {folder}: {type(error).__name__}: {error}",
            RuntimeWarning,
            stacklevel=3,
        )


def _has(file: Path, text: str) -> bool:
    return file.is_file() and file.read_bytes() == text.encode()


def _saved(item: Compiled | LoweredRanks) -> list[Mapping[str, object] | None]:
    if isinstance(item, LoweredRanks):
        return item.programs.first.saved
    program = item.programs.first
    assert isinstance(program, RankProgram), "training steps are not saved"
    return [program.saved]
