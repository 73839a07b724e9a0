"""The first stage of a recorded program that a command finds bad, by binary search.

As with `git bisect run`, the command's exit code is its verdict: 0 is good, 125 cannot be told, any
other below 128 is bad, and the rest ends the search. Stages are supposed to be good up to some pass
and bad from there on.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rolemesh.compiler.dump.reader import RecordedProgram
from rolemesh.compiler.ir.errors import RolemeshError

__all__ = ["STAGE", "TEXT", "Verdict", "bisect_stages"]

STAGE, TEXT = "{stage}", "{text}"
"""What is replaced in a command: by the stage's JSON file, and by its text file."""
_SKIP, _ENDS = 125, 128


@dataclass(frozen=True)
class Verdict:
    """What was found.

    Attributes:
        stages: The first bad stage; several if the command could not tell them apart, none if no
            stage is bad.
        tried: The exit code for each stage that was tried, by its name, in order.
    """

    stages: tuple[str, ...]
    tried: dict[str, int]


def bisect_stages(
    program: RecordedProgram, command: str, progress: Callable[[str], None]
) -> Verdict:
    """Find the first bad stage.

    Args:
        program: The program.
        command: A command line for the shell, with `{stage}` or `{text}` in it.
        progress: Called with what is being done.

    Raises:
        RolemeshError: RM018 if the command does not say which stage it is to look at, or ends with
            a code that ends the search; RM035 if a file of the run directory is not as written.
    """
    if STAGE not in command and TEXT not in command:
        raise _bad_command(
            f"{command!r} names no stage", "it would be the same for each", f"put {STAGE} into it"
        )
    if program.loaded is not None:
        raise RolemeshError(
            "RM018",
            what="there is only one stage",
            where=str(program.folder),
            why="a search needs the stages of a run directory",
            fix="write one with `rolemesh dump`",
        )
    return _Search(program, command, progress).run()


class _Search:
    """One search."""

    def __init__(
        self, program: RecordedProgram, command: str, progress: Callable[[str], None]
    ) -> None:
        self.program = program
        self.command = command
        self.progress = progress
        self.names = program.stage_names
        self.tried: dict[str, int] = {}

    def run(self) -> Verdict:
        good, bad = -1, self._last_told()
        if bad is None or not self._is_bad(bad):
            return Verdict((), self.tried)
        while True:
            left = [n for n in range(good + 1, bad) if self.tried.get(self.names[n]) != _SKIP]
            if not left:
                return Verdict(self.names[good + 1 : bad + 1], self.tried)
            middle = left[len(left) // 2]
            verdict = self._verdict(middle)
            if verdict == 0:
                good = middle
            elif verdict != _SKIP:
                bad = middle

    def _last_told(self) -> int | None:
        """The last stage that the command can tell anything about."""
        numbers = reversed(range(len(self.names)))
        return next((number for number in numbers if self._verdict(number) != _SKIP), None)

    def _is_bad(self, number: int) -> bool:
        return self._verdict(number) != 0

    def _verdict(self, number: int) -> int:
        name = self.names[number]
        if name in self.tried:
            return self.tried[name]
        self.progress(f"trying {name}")
        self.program.stage(number)  # its files are as they were written
        entry = self.program.entry["stages"][number]
        command = self.command
        for mark, kind in ((STAGE, "json"), (TEXT, "text")):
            path: Path = self.program.folder / entry[kind]["file"]
            command = command.replace(mark, shlex.quote(str(path)))
        # Our stdout is for the result.
        code = subprocess.run(command, shell=True, stdout=sys.stderr, check=False).returncode
        if not 0 <= code < _ENDS:
            what = f"was ended by signal {-code}" if code < 0 else f"exited with {code}"
            raise _bad_command(
                f"the command {what} for {name}",
                "exit codes below 128 are verdicts; any other ends the search",
                "let it exit with 0 for good, 1 for bad, or 125 if it cannot tell",
            )
        self.tried[name] = code
        return code


def _bad_command(what: str, why: str, fix: str) -> RolemeshError:
    return RolemeshError("RM018", what=what, where="rolemesh bisect --command", why=why, fix=fix)
