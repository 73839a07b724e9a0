"""What every command keeps to: quick help, usage errors, pipes, pagers, colour, JSON, Ctrl-C.

A command that is added is tested here too; one that prints JSON needs a line in `READS`.
"""

from __future__ import annotations

import argparse
import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.compiler.recorded import record

from rolemesh.compiler.cli import conventions
from rolemesh.compiler.cli.main import main, make_parser

pytestmark = pytest.mark.xdist_group("recorded")

READS: dict[str, list[str]] = {
    "show": ["{run}"],
    "diff": ["{run}", "--program", "prefill", "--to-program", "decode"],
    "explain": ["{run}", "lm_head.weight", "--program", "decode"],
    "ledger": ["{run}", "--program", "decode"],
    "trace": ["{run}", "--program", "decode"],
    "html": ["{run}", "--out", "{tmp}/page.html"],
    "doctor": [],
}
"""Commands with --json that read a run, or nothing, with arguments that make them answer."""
TESTED_APART = {"dump", "check", "compare", "bisect", "reshard", "verify"}
"""Those that compile a model, or read a checkpoint; their JSON is tested with them."""


def subcommands() -> dict[str, argparse.ArgumentParser]:
    (found,) = [a for a in make_parser()._actions if isinstance(a, argparse._SubParsersAction)]
    return dict(found.choices)


NAMES = sorted(subcommands())


def options(parser: argparse.ArgumentParser) -> list[str]:
    return [o for action in parser._actions for o in action.option_strings if o.startswith("--")]


@pytest.fixture(scope="module")
def run() -> str:
    return str(record("hf:llama", "pd_mixed")[0])


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "rolemesh.compiler.cli.main", *arguments]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


# --------------------------------------------------------------------------------------------------
# Help and usage errors


def test_help_version_and_usage_errors_import_nothing_of_others() -> None:
    calls = [["--help"], ["--version"], ["chek"], [], *([name, "--help"] for name in NAMES)]
    calls += [[name, "--nonsense"] for name in NAMES]
    script = (
        "import sys\n"
        "before = set(sys.modules)\n"
        "from rolemesh.compiler.cli.main import main\n"
        f"for arguments in {calls!r}:\n"
        "    try: main(arguments)\n"
        "    except SystemExit as stop: assert stop.code in (0, 2)\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print('others:', sorted(new - set(sys.stdlib_module_names) - {'rolemesh'}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "others: []"


@pytest.mark.parametrize("name", NAMES)
def test_every_option_that_is_misspelt_is_recognised(
    capsys: pytest.CaptureFixture[str], name: str
) -> None:
    for option in options(subcommands()[name]):
        message = refused(capsys, name, f"{option}{option[-1]}")
        assert message.endswith(f"; did you mean {option}?\n")
        assert message.startswith(f"usage: rolemesh {name} ")


def test_misspelt_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for name in NAMES:
        assert f"; did you mean {name}?" in refused(capsys, f"{name}{name[-1]}")
    assert "; did you mean --version?" in refused(capsys, "--verison")


def test_misspelt_choices(capsys: pytest.CaptureFixture[str]) -> None:
    for name, parser in subcommands().items():
        positionals = [a for a in parser._actions if not a.option_strings]
        for action in parser._actions:
            for choice in action.choices or ():
                wrong = f"{choice}{str(choice)[-1]}"
                words = [action.option_strings[-1], wrong] if action.option_strings else [wrong]
                others = ["x" for a in positionals if a is not action and a.nargs is None]
                message = refused(capsys, name, *others, *words)
                assert f"; did you mean {choice}?" in message


@pytest.mark.parametrize("name", NAMES)
def test_help_has_examples_that_parse(capsys: pytest.CaptureFixture[str], name: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "exit codes:" in text
    found = list(examples(text))
    assert any(words[0] == name for words in found)
    for words in found:
        parsed = make_parser().parse_args(words)
        assert callable(parsed.command)


def examples(text: str) -> Iterator[list[str]]:
    """The arguments of every `rolemesh` in the examples of a help, also behind a pipe."""
    block = text.partition("\nexamples:\n")[2].partition("\n\n")[0]
    for line in block.replace("\\\n", " ").splitlines():
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), "|"]:
            if word in ("|", ">", "&&", ";"):
                if words and words[0] == "rolemesh":
                    yield words[1:]
                words = []
            else:
                words.append(word)


# --------------------------------------------------------------------------------------------------
# What is read, and what comes back


def test_every_command_with_json_is_tested() -> None:
    with_json = {name for name, parser in subcommands().items() if "--json" in options(parser)}
    assert with_json - TESTED_APART == set(READS)


@pytest.mark.parametrize("name", sorted(READS))
def test_json(capsys: pytest.CaptureFixture[str], run: str, tmp_path: Path, name: str) -> None:
    arguments = [word.format(run=run, tmp=tmp_path) for word in READS[name]]
    code = main([name, *arguments, "--json"])
    assert code in (0, 1)
    found = json.loads(capsys.readouterr().out)
    assert found["schema_version"] == 1


@pytest.mark.parametrize("name", [n for n in READS if "{run}" in READS[n]])
def test_a_run_that_is_not_there_is_bad_input(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str
) -> None:
    arguments = [word.format(run=tmp_path / "none", tmp=tmp_path) for word in READS[name]]
    assert main([name, *arguments]) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "[RM035]" in captured.err
    assert str(tmp_path / "none") in captured.err


def test_reading_a_run_loads_no_torch(run: str, tmp_path: Path) -> None:
    calls = [
        [name, *(word.format(run=run, tmp=tmp_path) for word in words)]
        for name, words in READS.items()
        if "{run}" in words
    ]
    calls.append(["export", run, "--format", "tlparse"])
    script = (
        "import sys\n"
        "from rolemesh.compiler.cli.main import main\n"
        f"for arguments in {calls!r}:\n"
        "    assert main(arguments) in (0, 1)\n"
        "    assert 'torch' not in sys.modules, arguments\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_interrupted_while_it_reads_is_130() -> None:
    process = subprocess.Popen(
        command("show", "-"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdin is not None
    # More than a pipe holds: once all of it is written, the command is reading.
    process.stdin.write(b" " * 1_000_000)
    process.stdin.flush()
    process.send_signal(signal.SIGINT)
    process.stdin = None  # still open, and not for communicate() to close
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == b""
    assert err == b"interrupted\n"


# --------------------------------------------------------------------------------------------------
# Pipes and terminals


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["check", "--help"],
        ["--version"],
        ["completion", "bash"],
        ["show", "{run}"],
        ["show", "{run}", "--program", "decode", "--json"],
        ["export", "{run}", "--format", "model-explorer"],
    ],
)
def test_a_closed_pipe_is_no_error(run: str, arguments: list[str]) -> None:
    # Without a buffer Python would meet the closed pipe earlier, where argparse ignores it.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            command(*(word.format(run=run) for word in arguments)),
            stdout=writing,
            stderr=subprocess.PIPE,
            env=environment,
            check=False,
            timeout=60,
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


def test_head_in_a_real_shell(run: str) -> None:
    show = shlex.join(command("show", run, "--program", "decode", "--name", "*"))
    script = f"set -o pipefail; {show} | head -1"
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"pd_mixed/decode  \d{3}_verify  tp=4\n", done.stdout)


def on_terminal(arguments: list[str], lines: int = 500, **env: str) -> str:
    """What a command writes to a terminal of that many lines."""
    environment = {k: v for k, v in os.environ.items() if k != "NO_COLOR"}
    environment |= {"LINES": str(lines), "COLUMNS": "120", **env}
    outer, inner = pty.openpty()
    try:
        process = subprocess.Popen(
            command(*arguments), stdin=subprocess.DEVNULL, stdout=inner, stderr=subprocess.PIPE,
            env=environment,
        )  # fmt: skip
    finally:
        os.close(inner)
    parts = []
    try:
        while part := os.read(outer, 1 << 16):
            parts.append(part)
    except OSError:
        pass  # how Linux says that nobody holds the terminal any more
    finally:
        os.close(outer)
    assert process.wait(timeout=60) == 0
    assert process.stderr is not None
    assert process.stderr.read() == b""
    return b"".join(parts).decode().replace("\r\n", "\n")


def test_a_pager_where_it_is_needed(run: str) -> None:
    show = ["show", run, "--program", "decode", "--color", "never"]
    pager = "sed 's/^/PAGED /'"
    plain = on_terminal(show, lines=500, PAGER=pager)
    assert "PAGED" not in plain
    paged = on_terminal(show, lines=10, PAGER=pager)
    assert paged.splitlines() == [f"PAGED {line}" for line in plain.splitlines()]
    assert on_terminal(show, lines=10, PAGER="no-such-pager 2> /dev/null") == plain
    piped = subprocess.run(
        command(*show), capture_output=True, text=True, check=True, timeout=60,
        env={**os.environ, "LINES": "10", "PAGER": pager},
    ).stdout  # fmt: skip
    assert piped == plain


def test_colour_on_a_terminal_unless_it_is_refused(run: str) -> None:
    show = ["show", run]
    assert "\x1b[36m" in on_terminal(show)
    assert "\x1b" not in on_terminal(show, NO_COLOR="1")
    assert "\x1b" not in on_terminal([*show, "--color", "never"])
    assert "\x1b[36m" in on_terminal([*show, "--color", "always"], NO_COLOR="1")
    assert "\x1b[36m" in on_terminal(show, NO_COLOR="")  # no-color.org: if it is not empty


@pytest.mark.parametrize(
    "name", [n for n, parser in subcommands().items() if "--color" in options(parser)]
)
def test_colour_into_a_pipe_only_if_asked_for(
    capsys: pytest.CaptureFixture[str], run: str, tmp_path: Path, name: str
) -> None:
    arguments = [word.format(run=run, tmp=tmp_path) for word in READS[name]]
    main([name, *arguments])
    plain = capsys.readouterr().out
    main([name, *arguments, "--color", "always"])
    painted = capsys.readouterr().out
    assert plain
    assert "\x1b[" in painted
    assert re.sub(r"\x1b\[[\d;]*m", "", painted) == plain


@pytest.mark.parametrize("patient", [False, True])
def test_progress_is_said_once_it_takes_a_second(
    patient: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(conventions.time, "monotonic", lambda: now)
    progress = conventions.Progress(patient=patient)
    progress("the first")
    assert capsys.readouterr().err == ""
    now = 1.5
    progress("the second")
    said = capsys.readouterr().err
    assert ("the first" in said) is not patient
    assert said.endswith("rolemesh: the second ...\n")
