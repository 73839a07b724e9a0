"""One unmodified model, three node roles, four ranks.

    python examples/demo.py

The model is DeepSeek-V3.2 as `transformers` ships it (multi-head latent attention, an indexer for
sparse attention, experts), with random weights and small sizes. For each role, this process
captures it with `torch.compile(backend="rolemesh")`; then four processes, forked from this one and
talking over gloo, shard it, run a prompt and decode greedily. Results, caches and tokens must equal
those of one device, and the bytes that each attention layer moves must equal the formulas below.
Exits with 1 if anything differs.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import dataclass

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import sympy

from rolemesh.compiler.command.check import check
from rolemesh.compiler.command.check_options import CheckOptions
from rolemesh.compiler.command.report import CheckReport, PhaseReport
from rolemesh.compiler.ir.mesh import Mesh

RANKS = 4
BATCH = 4
PROMPT = 48
DECODE_STEPS = 4
ROLES = ("prefill", "decode", "pd_mixed")


@dataclass(frozen=True)
class Traffic:
    """What each attention layer of a program must move.

    Attributes:
        op: The collective.
        at_output: Whether it belongs to the output projection.
        count: How many of them.
        what: What they move.
        formula: Bytes a rank receives in all of them, in T (tokens), p (ranks) and f = (p-1)/p.
            The numbers are the model's: 32 + 8 + 20 cached numbers a token, an output projection
            of 16 heads x 16 to the hidden size 112, a query projection of 48 to 384; and 4 bytes.
    """

    op: str
    at_output: bool
    count: int
    what: str
    formula: str


NEW_KEYS = Traffic("all_gather", False, 1, "new keys, values, index keys", "f*T*(32+8+20)*4")
EXPECTED: dict[tuple[str, str], tuple[Traffic, ...]] = {
    ("prefill", "prefill"): (
        NEW_KEYS,
        Traffic("broadcast", False, 1, "query projection", "384*48*4"),
        Traffic("broadcast", True, 1, "output projection", "256*112*4"),
    ),
    ("decode", "decode"): (
        Traffic("all_reduce", True, 1, "hidden state, partial sums", "2*f*T*112*4"),
    ),
    ("pd_mixed", "prefill"): (
        NEW_KEYS,
        Traffic("all_gather", True, 1, "output projection", "f*256*112*4"),
    ),
    ("pd_mixed", "decode"): (
        NEW_KEYS,
        Traffic("all_to_all", True, 1, "attention output", "f*T/p*256*4"),
        Traffic("reduce_scatter", True, 1, "hidden state, partial sums", "f*T*112*4"),
    ),
}

ROW = "  {:<8} {:>2} {:<15} {:<29} {:<21} {:>9} {:>9}  {}".format


def main() -> int:
    """Run the demo.

    Returns:
        0 if everything is equal, 1 if not.
    """
    parser = argparse.ArgumentParser(description="Shard one model for each role and check it.")
    parser.add_argument("--layers", type=int, default=7, help="layers of the model (default 7)")
    parser.add_argument("--target", default="eager", help="eager, inductor or ge (default eager)")
    parser.add_argument("--roles", nargs="+", default=ROLES, choices=ROLES, help="default: all")
    parsed = parser.parse_args()
    started = time.monotonic()
    print(
        f"DeepSeek-V3.2 from transformers: {parsed.layers} layers, small sizes, random weights\n"
        f"{RANKS} processes over gloo, {BATCH} prompts of {PROMPT} tokens, "
        f"{DECODE_STEPS} greedy decode steps",
        flush=True,
    )
    wrong = [role for role in parsed.roles if not run_role(role, parsed.layers, parsed.target)]
    print(f"\n{time.monotonic() - started:.0f} s", end="   ")
    if wrong:
        print(f"DIFFERENT: {', '.join(wrong)}")
        return 1
    print("every role equals the single device and moves the bytes that the formulas say")
    return 0


def run_role(role: str, layers: int, target: str) -> bool:
    """Check one role and print its table.

    Args:
        role: The role.
        layers: Layers of the model.
        target: What the ranks' programs are compiled to.

    Returns:
        Whether everything is as it must be.
    """
    mesh = Mesh({"tp": RANKS})
    options = CheckOptions(
        "hf:deepseek_v32",
        role,
        mesh,
        tokens=PROMPT,
        batch=BATCH,
        decode_steps=DECODE_STEPS,
        layers=layers,
        target=target,
        processes=True,
    )
    report = check(options)
    print(f"\nrole {role}")
    print(ROW("phase", "", "attention layer", "moves", "bytes a rank receives", "", "measured", ""))
    right = [print_traffic(role, phase, layers) for phase in report.phases]
    print_equality(report)
    return report.ok and all(right)


def print_traffic(role: str, phase: PhaseReport, layers: int) -> bool:
    """Print what an attention layer moves, by formula and as measured; whether they are equal."""
    measured = attention_traffic(phase)
    tokens = BATCH * PROMPT if phase.phase == "prefill" else BATCH
    right = True
    for traffic in EXPECTED[role, phase.phase]:
        count, size = measured.pop((traffic.op, traffic.at_output), (0, 0))
        expected = bytes_of(traffic.formula, tokens)
        equal = (count, size) == (traffic.count * layers, expected * layers)
        right = right and equal
        found = f"{size / layers:,.10g}"
        print(
            ROW(
                phase.phase,
                traffic.count,
                traffic.op,
                traffic.what,
                traffic.formula,
                f"{expected:,}",
                found,
                "=" if equal else "DIFFERENT",
            )
        )
    for (op, _), (count, size) in measured.items():
        print(f"  {phase.phase:<8} UNEXPECTED: {count} {op}, {size:,} bytes")
    return right and not measured


def attention_traffic(phase: PhaseReport) -> dict[tuple[str, bool], tuple[int, int]]:
    """What all attention layers of a program move: number and bytes, by op and place."""
    moved: dict[tuple[str, bool], tuple[int, int]] = {}
    for row in phase.collectives:
        if ".self_attn" in row.module:
            key = row.op, row.module.endswith(".o_proj")
            count, size = moved.get(key, (0, 0))
            moved[key] = count + row.count, size + row.count * row.bytes
    return moved


def bytes_of(formula: str, tokens: int) -> int:
    """The value of a formula of `Traffic`."""
    fraction = sympy.Rational(RANKS - 1, RANKS)
    return int(sympy.sympify(formula, {"T": tokens, "p": RANKS, "f": fraction}))


def print_equality(report: CheckReport) -> None:
    """Print how far the ranks are from the single device."""
    for phase in report.phases:
        print(
            f"  {phase.phase:<8} differs from one device by at most {phase.output_error:.1e} in "
            f"logits, {phase.state_error:.1e} in caches ({phase.nodes} nodes)"
        )
    if report.ok:
        first = " ".join(str(step[0]) for step in report.tokens)
        print(f"  greedy tokens equal one device's; those of the first prompt: {first}")
    for problem in report.all_problems:
        print(f"  DIFFERENT: {problem}")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
