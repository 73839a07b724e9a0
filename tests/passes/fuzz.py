"""`make fuzz`: many random Programs with symbolic sizes; each that fails is shrunk to a file.

python -m tests.passes.fuzz --count 10000 --seed 0 --jobs 2 --out build/fuzz
python -m tests.passes.fuzz --replay build/fuzz/seed-17.json
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from tests.passes.random.case import Case
from tests.passes.random.check import Tally, check
from tests.passes.random.families import draw_case, draw_symbolic_case
from tests.passes.random.files import load, save
from tests.passes.random.shrink import shrink_alike

__all__ = ["main", "problem", "report"]

_BLOCK = 50


def report(case: Case, name: str, out: Path) -> str:
    """Shrink a failing case to a file; what is wrong with it and where it is.

    Args:
        case: A case that fails.
        name: Of the file.
        out: Folder for the file.
    """
    small = shrink_alike(case, check)
    wrong, path = check(small), out / f"{name}.json"
    save(small, path, wrong)
    return f"{wrong}\nreplay: python -m tests.passes.fuzz --replay {path}"


def problem(seed: int, out: Path, tally: Tally, runs: int) -> str:
    """What is wrong with the cases of a seed, one with symbols and at times one without."""
    cases = {f"seed-{seed}": draw_symbolic_case(seed, runs)}
    if seed % 4 == 0:
        cases[f"plain-{seed}"] = draw_case(seed)
    found = [report(case, name, out) for name, case in cases.items() if check(case, tally=tally)]
    return "\n".join(found)


def _block(first: int, last: int, out: Path, runs: int) -> tuple[int, list[str], Tally]:
    torch.set_num_threads(1)
    tally = Tally()
    found = [problem(seed, out, tally, runs) for seed in range(first, min(first + _BLOCK, last))]
    return min(_BLOCK, last - first), [wrong for wrong in found if wrong], tally


def _blocks(
    seed: int, count: int, jobs: int, out: Path, runs: int
) -> Iterator[tuple[int, list[str], Tally]]:
    run = partial(_block, last=seed + count, out=out, runs=runs)
    starts: Iterable[int] = range(seed, seed + count, _BLOCK)
    if jobs == 1:
        yield from map(run, starts)
        return
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap_unordered(run, starts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status is 1 if a case failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.passes.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=10_000, help="cases with symbols")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--runs", type=int, default=2, help="values of the symbols per case")
    parser.add_argument("--out", type=Path, default=Path("build/fuzz"), help="folder for failures")
    parser.add_argument("--replay", type=Path, help="a file to run again, and nothing else")
    options = parser.parse_args(arguments)
    if options.replay is not None:
        wrong = check(load(options.replay))
        print(wrong or "right")
        return int(bool(wrong))
    started, done, failures = time.monotonic(), 0, 0
    ran, unfit, refused = 0, 0, Counter[str]()
    blocks = _blocks(options.seed, options.count, options.jobs, options.out, options.runs)
    for count, found, tally in blocks:
        done, failures = done + count, failures + len(found)
        ran, unfit, refused = ran + tally.ran, unfit + tally.unfit, refused + tally.refused
        for wrong in found:
            print(wrong, flush=True)
        print(f"{done} cases, {failures} wrong, {time.monotonic() - started:.0f} s", flush=True)
    print(f"ran at {ran} values; {sum(refused.values())} refused by an assumption, {unfit} unfit")
    for assumption, times in refused.most_common(10):
        print(f"  {times} x {assumption}")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
