"""The first page of a run directory, for people: `index.md`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["index_page"]


def index_page(index: Mapping[str, Any]) -> str:
    """The page that says what was compiled and which file holds what.

    Args:
        index: What `index.json` holds.
    """
    wrote = f"rolemesh {index['rolemesh']} with torch {index['torch']}"
    lines = ["# rolemesh run", "", f"{wrote} wrote it; schema version {index['schema_version']}."]
    if not index["programs"]:
        lines += ["", "Nothing has been compiled yet."]
    for program in index["programs"]:
        mesh = ", ".join(f"{axis}={size}" for axis, size in program.get("mesh", {}).items())
        lines += ["", f"## {program['id']}" + (f" on mesh {mesh}" if mesh else ""), ""]
        lines += ["| stage | ops | collectives | bytes a rank receives | files |"]
        lines += ["|---|---|---|---|---|"]
        for stage in program["stages"]:
            links = ", ".join(f"[{kind}]({stage[kind]['file']})" for kind in ("text", "json"))
            numbers = f"{stage['nodes']:,} | {stage['collectives']:,} | {stage['bytes']:,}"
            lines.append(f"| {stage['number']} {stage['pass']} | {numbers} | {links} |")
        if program.get("ge"):
            lines += ["", "| GE graph | files |", "|---|---|"]
            for graph in program["ge"]:
                links = ", ".join(f"[{kind}]({graph[kind]['file']})" for kind in ("text", "pbtxt"))
                lines.append(f"| rank {graph['rank']} | {links} |")
    commands = "`show`, `explain`, `diff`, `ledger`, `html`, `trace` and `export`"
    lines += ["", f"`rolemesh` {commands} read this folder."]
    return "\n".join(lines) + "\n"
