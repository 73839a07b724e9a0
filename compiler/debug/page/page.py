"""The page of a run: one HTML file that needs nothing else, neither a server nor a network.

The folder `assets` holds what it is made of as ordinary files. `page.html` names them where they
belong, in the attribute `data-from` of an element; here each such element gets the file's text. The
element that names `data` gets the run: `page_data` as JSON, deflated, in base64, which the browser
inflates by itself.

Torch is not imported. The same run gives the same bytes.
"""

from __future__ import annotations

import base64
import json
import re
import zlib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from rolemesh.compiler.debug.page.page_data import page_data
from rolemesh.compiler.dump.reader import RecordedProgram, Run
from rolemesh.compiler.ir.errors import RolemeshError

__all__ = ["page_html", "write_page"]

_FROM = re.compile(r' data-from="([^"]+)">')
_DATA = "data"


def page_html(run: Run, programs: Sequence[RecordedProgram] | None = None) -> str:
    """The page.

    Args:
        run: The run.
        programs: Those of its programs to show; all if None.

    Raises:
        RolemeshError: RM035 if the run cannot be read, RM018 if there is no program in it.
    """
    shown = run.programs if programs is None else programs
    if not any(program.entry["stages"] for program in shown):
        raise RolemeshError(
            "RM018",
            what="there is nothing to show",
            where=str(run.folder),
            why="no program has a stage in this run",
            fix="compile a model with option dump, or with `rolemesh dump`",
        )
    index = run.index
    wrote = f"rolemesh {index['rolemesh']}, torch {index['torch']}" if "torch" in index else None
    data = page_data(shown, run.folder.name or str(run.folder), wrote)
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    encoded = base64.b64encode(zlib.compress(text.encode(), 9)).decode()
    folder = resources.files("rolemesh.compiler.debug.page") / "assets"

    def part(match: re.Match[str]) -> str:
        name = match[1]
        content = encoded if name == _DATA else (folder / name).read_text(encoding="utf-8")
        return f">{content}"

    return _FROM.sub(part, (folder / "page.html").read_text(encoding="utf-8"))


def write_page(
    path: str | Path, run: Run, programs: Sequence[RecordedProgram] | None = None
) -> int:
    """Write the page to a file.

    Args:
        path: The file; its folder is made.
        run: The run.
        programs: Those of its programs to show; all if None.

    Returns:
        Its size in bytes.

    Raises:
        RolemeshError: RM035 or RM018 as `page_html` says, RM036 if the file cannot be written.
    """
    content = page_html(run, programs).encode()
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(content)
    except OSError as error:
        raise RolemeshError(
            "RM036",
            what=f"cannot write the page {str(path)!r}",
            where="rolemesh html",
            why=f"{type(error).__name__}: {error}",
            fix="name a file that this process can write with -o",
        ) from error
    return len(content)
