"""`rolemesh completion`: scripts that real shells accept, and a manual page that is up to date."""

from __future__ import annotations

import argparse
import shutil
import subprocess
from pathlib import Path

import pytest

from rolemesh.compiler.cli.main import main, make_parser


def printed(capsys: pytest.CaptureFixture[str], what: str) -> str:
    assert main(["completion", what]) == 0
    return capsys.readouterr().out


def subcommands() -> dict[str, argparse.ArgumentParser]:
    (found,) = [a for a in make_parser()._actions if isinstance(a, argparse._SubParsersAction)]
    return dict(found.choices)


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_scripts_know_every_command_and_shells_accept_them(
    capsys: pytest.CaptureFixture[str], shell: str
) -> None:
    script = printed(capsys, shell)
    for command in subcommands():
        assert command in script
    assert "tolerance" in script  # options of commands too
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=script, text=True, check=True, timeout=60)


def completed(script: str, *words: str) -> list[str]:
    """What bash offers for the last of the words."""
    line = (
        f"{script}\nCOMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; COMP_TYPE=9\n"
        f"_shtab_rolemesh rolemesh {words[-1] or repr('')} {words[-2]}\n"
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    run = subprocess.run(
        ["bash"], input=line, text=True, check=True, timeout=60, capture_output=True
    )
    return run.stdout.split()


def test_bash_completes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    script = printed(capsys, "bash")
    assert completed(script, "rolemesh", "che") == ["check"]
    assert completed(script, "rolemesh", "show", "--dep") == ["--depth"]
    assert completed(script, "rolemesh", "check", "--dtype", "b") == ["bf16"]
    (tmp_path / "run").mkdir()
    assert completed(script, "rolemesh", "show", f"{tmp_path}/r") == [f"{tmp_path}/run"]


def test_the_manual_page_is_up_to_date(
    capsys: pytest.CaptureFixture[str], repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")  # the page does not depend on the terminal
    committed = (repository / "docs/rolemesh.1").read_text(encoding="utf-8")
    assert printed(capsys, "man") == committed, "run `make man`"


def test_the_manual_page_has_every_command_option_and_example(
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = printed(capsys, "man").replace(r"\-", "-").replace(r"\e", "\\")
    for name, parser in subcommands().items():
        section = page.partition(f"\n.SS {name}\n")[2].partition("\n.S")[0]
        for action in parser._actions:
            for option in set(action.option_strings) - {"-h", "--help"}:
                assert rf"\fB{option}\fR" in section, (name, option)
        examples = (parser.epilog or "").partition("examples:\n")[2].partition("\n\n")[0]
        assert examples
        assert examples in section
    assert "ROLEMESH_DUMP" in page


@pytest.mark.skipif(shutil.which("groff") is None, reason="groff is not installed")
def test_groff_accepts_the_manual_page(repository: Path) -> None:
    command = ["groff", "-man", "-ww", "-Tutf8", str(repository / "docs/rolemesh.1")]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    warnings = [line for line in run.stderr.splitlines() if "can't break" not in line]
    assert warnings == []
    assert "fine" in run.stdout
