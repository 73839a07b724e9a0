"""What the scripts that `rolemesh bisect` writes run, and the scripts."""

from __future__ import annotations

import textwrap
from pathlib import Path

from rolemesh.compiler.debug.bisect.op_sources import loading_lines
from rolemesh.compiler.debug.bisect.replay import Replay, load_replay
from rolemesh.compiler.debug.bisect.repro import KIND, Repro, load_repro
from rolemesh.compiler.debug.compare.compare_report import gap_text
from rolemesh.compiler.debug.compare.reports import error_text
from rolemesh.compiler.dump.files import load_json, require_kind, unreadable
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.text import program_text

__all__ = ["reproduce", "write_script"]

_SCRIPT = '''\
"""{title}

Written by:

    {command}

{what}
It exits with 1 as long as that is so, and with 0 once it is not. The Programs and values are in
{data}.

{programs}
"""

{imports}

{runs}if __name__ == "__main__":
    found, text = reproduce(Path(__file__).with_name("{data}"))
    print(text)
    sys.exit(found)
'''

_DIFFERS = """\
The script runs a few ops as one device runs them and as they are after the pass, from the same
values, and compares the results."""
_RAISES = """\
The script runs the pass, and those that it needs, on the part of the program that it fails on."""


def reproduce(path: Path) -> tuple[bool, str]:
    """Reproduce a fault.

    Args:
        path: The data file of a script.

    Returns:
        Whether the fault is there, and a sentence about it.

    Raises:
        RolemeshError: RM035 if the file cannot be read, or holds something else.
    """
    data = load_json(path)
    require_kind(data, KIND, path)
    try:
        found = load_replay(data) if "passes" in data else load_repro(data)
    except (KeyError, TypeError, ValueError) as error:
        raise unreadable(path, f"{type(error).__name__}: {error}") from error
    return _replay(found) if isinstance(found, Replay) else _compare(found)


def _replay(replay: Replay) -> tuple[bool, str]:
    try:
        replay.run()
    except Exception as error:  # noqa: BLE001 - what is to be reproduced
        return True, f"{replay.stage} raises {error_text(error)}"
    return False, f"{replay.stage} raises nothing"


def _compare(repro: Repro) -> tuple[bool, str]:
    what = f"%{repro.target} after {repro.stage}"
    try:
        found = repro.measure()
    except Exception as error:  # noqa: BLE001 - what is to be reproduced
        return True, f"{what} raises {error_text(error)}"
    if found.equal:
        return False, f"{what} is equal to the single device"
    return True, f"{what} differs from the single device: {gap_text(found)}"


def write_script(fault: Repro | Replay, path: Path, title: str, command: str) -> Path:
    """Write a script that reproduces a fault, and its data next to it.

    Args:
        fault: The fault by itself.
        path: The script.
        title: What it shows, one line.
        command: The command line that found it.

    Returns:
        The data file.

    Raises:
        RolemeshError: RM018 if a file cannot be written.
    """
    data = path.with_suffix(".json")
    text = _script(fault, data.name, title, command)
    try:
        fault.write(data)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RolemeshError(
            "RM018",
            what=f"cannot write {str(path)!r} and {data.name!r}",
            where="option --out",
            why=f"{type(error).__name__}: {error.strerror}",
            fix="name a file in a folder that exists",
        ) from error
    return data


def _script(fault: Repro | Replay, data: str, title: str, command: str) -> str:
    if isinstance(fault, Repro):
        parts = {"On one device:": fault.before, f"After {fault.stage}:": fault.after}
        what = _DIFFERS
    else:
        parts, what = {f"Before {fault.stage}:": fault.program}, _RAISES
    programs = "\n\n".join(
        f"{label}\n\n{textwrap.indent(program_text(program), '    ')}"
        for label, program in parts.items()
    )
    loads = loading_lines(*parts.values())
    runs = [line for line in loads if line.startswith("runpy.")]
    standard = sorted([*(["import runpy"] if runs else []), "import sys"])
    ours = "from rolemesh.compiler.debug.bisect.reproduce import reproduce"
    others = [line for line in loads if line not in runs]
    imports = [*standard, "from pathlib import Path", "", *others, ours]
    text = _SCRIPT.format(
        title=_quoted(f"{title[0].upper()}{title[1:]}."),
        command=_quoted(command),
        what=what,
        data=data,
        programs=_quoted(programs.rstrip()),
        imports="\n".join(imports),
        runs="".join(f"{line}\n\n" for line in runs),
    )
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def _quoted(text: str) -> str:
    """Text that may stand in a docstring."""
    return text.replace("\\", "\\\\").replace('"""', "'''")
