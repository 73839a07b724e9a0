"""The command line: `rolemesh check` and `rolemesh doctor`.

Results go to stdout and everything else to stderr. Exit codes: 0 equal (check) or usable (doctor),
1 not, 2 usage, 3 bad input, 4 internal error, 130 interrupted.

Invariant: `--help`, `--version` and usage errors import nothing outside the standard library.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence

from rolemesh import __version__
from rolemesh.compiler.ir.errors import RolemeshError

__all__ = ["main"]

EQUAL, DIFFERENT, BAD_INPUT, INTERNAL, INTERRUPTED = 0, 1, 3, 4, 130
_OUR_FAULT = frozenset({"RM013", "RM016"})
"""Errors that no input explains: a rank that died, and a program that the verifier refused."""

_DESCRIPTION = """\
One single-device PyTorch model in, one sharded program per node role out.
"""

_EXIT_CODES = """\
exit codes:
  0  equal (check), usable (doctor)      3  bad input: model, role, mesh or option
  1  not                                 4  internal error
  2  usage                             130  interrupted
"""

_CHECK = """\
Compile every phase of a role, run all ranks, and compare results, every updated tensor (such as
caches) and greedy tokens with the model on a single device. Report what each phase moves and how
each tensor is stored.
"""

_CHECK_EPILOG = f"""\
MODEL is one of
  hf:TYPE               a tiny random model of a transformers causal-LM type, such as hf:llama
  hf:encoder/TYPE       of an encoder, or of the encoder of an encoder-decoder type, such as
                        hf:encoder/bert; it has the phase prefill and no cache
  hf:vision/TYPE        of a vision-language type, such as hf:vision/llava; each prompt has an image
  hf:...:config.json    any of them with the fields of a JSON file; a file with a model_type is a
                        full configuration
  FILE.py:FUNCTION      a function that returns rolemesh.Case(model, phases={{"prefill": (args,
                        kwargs), "decode": (args, kwargs)}}); phases run in that order. It is given
                        those of tokens, batch, dtype, attn, experts, layers and max_len that are
                        among its parameters.

roles: prefill, decode, pd_mixed

Ranks run in lock-step in this process, with NaN wherever a rank must not read. With --processes, or
the target inductor, they are processes that talk over gloo; then the traffic of the process groups
and the size of every shard are compared with the report too. With the target ge, the ranks' GE
graphs are executed, on CPU tensors where there is no NPU.

examples:
  rolemesh check hf:llama --role decode --mesh tp=4
  rolemesh check hf:deepseek_v32 --role pd_mixed --mesh tp=4 --batch 4 --decode-steps 8
  rolemesh check hf:qwen3_moe --role prefill --mesh tp=2 --target inductor --json
  rolemesh check hf:deepseek_v32 --role decode --mesh tp=4 --target ge --target-option dump=graphs
  rolemesh check hf:encoder/bert --role prefill --mesh tp=4
  rolemesh check my_model.py:case --role pd_mixed --mesh tp=2 --processes

{_EXIT_CODES}"""

_DOCTOR_EPILOG = f"""\
examples:
  rolemesh doctor
  rolemesh doctor --json

{_EXIT_CODES}"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Arguments without the program's name; those of the process if None.

    Returns:
        The exit code.

    Raises:
        SystemExit: For `--help`, `--version` (0) and usage errors (2).
    """
    parsed = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = parsed.command
    try:
        return command(parsed)
    except RolemeshError as error:
        print(error, file=sys.stderr)
        return INTERNAL if error.code in _OUR_FAULT else BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception:  # noqa: BLE001 - reported in full, with its own exit code
        traceback.print_exc()
        print(
            "\nrolemesh: internal error; please report it with the command and this traceback",
            file=sys.stderr,
        )
        return INTERNAL


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rolemesh",
        description=_DESCRIPTION,
        epilog=f"rolemesh COMMAND --help explains a command, with examples.\n\n{_EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"rolemesh {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_check(commands)
    _add_doctor(commands)
    return parser


def _add_check(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    check = commands.add_parser(
        "check",
        help="compare a role's sharded programs with the single device",
        description=_CHECK,
        epilog=_CHECK_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    check.set_defaults(command=_check)
    add = check.add_argument
    add("model", metavar="MODEL", help="hf:TYPE, hf:encoder/TYPE, hf:vision/TYPE; see below")
    add("--role", required=True, metavar="R", help="prefill, decode or pd_mixed")
    add("--mesh", required=True, metavar="AXIS=N", help="mesh axes, such as tp=4 or dp=2,tp=4")
    add("--tokens", type=_count, default=13, metavar="N", help="prompt length (default 13)")
    add("--batch", type=_count, default=2, metavar="N", help="number of sequences (default 2)")
    add(
        "--decode-steps",
        type=_count,
        default=1,
        metavar="N",
        help="greedy tokens to decode, for language models (default 1)",
    )
    add("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the weights (default fp32)")
    add("--layers", type=_count, metavar="N", help="number of layers (default: the model's)")
    add("--attn", default="sdpa", metavar="A", help="attention implementation (default sdpa)")
    add("--experts", metavar="E", help="batched_mm, grouped_mm or eager (default: the library's)")
    add(
        "--target",
        default="eager",
        metavar="T",
        help="eager, inductor, ge or npugraph_ex (default eager)",
    )
    add(
        "--target-option",
        dest="target_options",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the target, such as device=npu or dump=DIR for ge; may be repeated",
    )
    add("--processes", action="store_true", help="run ranks as processes over gloo")
    add(
        "--tolerance",
        type=_tolerance,
        metavar="X",
        help="what counts as equal. fp32: the largest difference, relative to the tensor's largest "
        "magnitude on the single device (default 1e-3). bf16: the same of root mean squares "
        "(default 5e-1, which finds gross errors only: rounding may make routers choose otherwise)",
    )
    add("--json", action="store_true", help="print the report as JSON")


def _add_doctor(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    doctor = commands.add_parser(
        "doctor",
        help="say what is installed, what is missing and how to get it",
        description="Say what is installed, what is missing and how to get it.",
        epilog=_DOCTOR_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    doctor.set_defaults(command=_doctor)
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON")


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def _tolerance(text: str) -> float:
    number = float(text)
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number of at least 0")
    return number


def _check(parsed: argparse.Namespace) -> int:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read when transformers is imported
    progress = _Progress()
    progress("importing torch")
    from rolemesh.compiler.command.check import check
    from rolemesh.compiler.command.check_options import CheckOptions
    from rolemesh.compiler.ir.mesh import Mesh

    names = CheckOptions.__dataclass_fields__
    given = {name: value for name, value in vars(parsed).items() if name in names}
    given["mesh"] = Mesh.parse(parsed.mesh)
    given["target_options"] = tuple(parsed.target_options)
    report = check(CheckOptions(**given), progress)
    print(json.dumps(report.as_json(), indent=2) if parsed.json else report.as_text())
    if parsed.json:
        for problem in report.all_problems:
            print(problem, file=sys.stderr)
    return EQUAL if report.ok else DIFFERENT


def _doctor(parsed: argparse.Namespace) -> int:
    from rolemesh.compiler.command.doctor import examine

    findings = examine()
    print(json.dumps(findings.as_json(), indent=2) if parsed.json else findings.as_text())
    return EQUAL if findings.ok else DIFFERENT


class _Progress:
    """Says on stderr what is being done, on a terminal or once it has taken a second."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._pending: list[str] = []

    def __call__(self, message: str) -> None:
        self._pending.append(message)
        if sys.stderr.isatty() or time.monotonic() - self._started > 1.0:
            for text in self._pending:
                print(f"rolemesh: {text} ...", file=sys.stderr, flush=True)
            self._pending.clear()


if __name__ == "__main__":
    sys.exit(main())
