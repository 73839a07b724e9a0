"""What it costs to start the command line, against Python alone.

    python benchmarks/bench_cli.py

User time of `rolemesh --help` and of `rolemesh show --help`, over that of `python -c pass`: medians
of rounds in turn. At most 100 ms, and nothing but the standard library is imported.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
from collections.abc import Sequence

COMMANDS = {
    "python -c pass": ("-c", "pass"),
    "rolemesh --help": ("-m", "rolemesh.compiler.cli.main", "--help"),
    "rolemesh show --help": ("-m", "rolemesh.compiler.cli.main", "show", "--help"),
}


def user_seconds(arguments: Sequence[str]) -> float:
    """User time of one process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Start of the command line against Python alone.")
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    taken: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(rounds):
        for name, arguments in COMMANDS.items():
            taken[name].append(user_seconds(arguments))
    base = statistics.median(taken["python -c pass"])
    for name, seconds in taken.items():
        median = statistics.median(seconds)
        print(f"{name:22} {1000 * median:6.1f} ms user   {median / base:5.1f} x python -c pass")


if __name__ == "__main__":
    main()
