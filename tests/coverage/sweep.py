"""`make sweep`: the check of every architecture and every role, as rows of docs/models.md.

Each architecture runs in a process of its own, forked from a server that has imported the
libraries, so that a crash or a hang is one row's verdict. Roles of an architecture share one model.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing.connection import Connection
from pathlib import Path

from tests.coverage.architectures import Architecture, selected
from tests.coverage.measure import measure
from tests.coverage.table import Row, parse, render, summary

from rolemesh.compiler.ir.atomic import write_whole

__all__ = ["main", "measure_apart"]

_DOCUMENT = Path("docs/models.md")
_GRACE = 5.0  # seconds that a child has to end once its row is there


def _child(architecture: Architecture, results: Connection) -> None:
    results.send(measure(architecture))
    results.close()


def measure_apart(architecture: Architecture, seconds: float) -> tuple[Row, float]:
    """The row of one architecture from a process of its own, and how long it took, in seconds.

    Args:
        architecture: The architecture.
        seconds: How long it may take; a process that hangs is killed.
    """
    context = multiprocessing.get_context("forkserver")
    receive, send = context.Pipe(duplex=False)
    started = time.monotonic()
    child = context.Process(target=_child, args=(architecture, send), daemon=True)
    child.start()
    send.close()
    try:
        if receive.poll(seconds):
            row = receive.recv()
            child.join(_GRACE)
        else:
            row = _same_verdict(architecture, f"no result in {seconds:g} s")
    except EOFError:
        child.join()
        row = _same_verdict(architecture, f"the process ended with exit code {child.exitcode}")
    child.kill()
    child.join()
    return row, time.monotonic() - started


def _same_verdict(architecture: Architecture, verdict: str) -> Row:
    return Row(dict.fromkeys(architecture.roles, verdict))


def _rows(
    architectures: Sequence[Architecture], jobs: int, seconds: float
) -> Iterator[tuple[Architecture, Row, float]]:
    context = multiprocessing.get_context("forkserver")
    # Models are imported by the children: those of one architecture may need what others break.
    context.set_forkserver_preload(["tests.coverage.measure", "transformers.modeling_utils"])
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(measure_apart, entry, seconds): entry for entry in architectures}
        for future in as_completed(futures):
            yield futures[future], *future.result()


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and rewrite the document after each architecture.

    Returns:
        0 if every row measured is ok, else 1.
    """
    arguments = _arguments(argv)
    names = tuple(name for name in arguments.only.split(",") if name)
    index, _, parts = arguments.part.partition("/")
    architectures = selected(names, (int(index), int(parts)))
    failed = 0
    for entry, row, seconds in _rows(architectures, arguments.jobs, arguments.timeout):
        failed += not row.ok
        results = {**_read(arguments.out), entry: row}
        _write(arguments.out, render(results))
        verdicts = "  ".join(f"{role}: {verdict}" for role, verdict in row.verdicts.items())
        unruled = f"  without a rule: {' '.join(row.unruled)}" if row.unruled else ""
        print(f"{entry.name:24} {seconds:5.1f} s  {verdicts}{unruled}", flush=True)
    print(f"{len(architectures) - failed} of {len(architectures)} ok in this run")
    print(f"{arguments.out}: {summary(_read(arguments.out))}")
    return 1 if failed else 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="sweep", description=__doc__)
    parser.add_argument("--only", default="", help="NAME, KIND/NAME or KIND, joined by commas")
    parser.add_argument("--part", default="1/1", help="I/N: the I-th of N parts")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds an architecture")
    parser.add_argument("--out", type=Path, default=_DOCUMENT, help="the document")
    return parser.parse_args(argv)


def _read(path: Path) -> dict[Architecture, Row]:
    return parse(path.read_text(encoding="utf-8")) if path.exists() else {}


def _write(path: Path, text: str) -> None:
    """Replace the file at once, so that another run never reads half of it."""
    write_whole(path, text.encode())


if __name__ == "__main__":
    sys.exit(main())
