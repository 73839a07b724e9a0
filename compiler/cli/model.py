"""Arguments of commands that compile a model: MODEL, role, mesh, sizes.

`add_model` adds them; `options_of` makes the `CheckOptions` of what was given.
"""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from rolemesh.compiler.cli.conventions import count

if TYPE_CHECKING:
    from rolemesh.compiler.command.check_options import CheckOptions

__all__ = ["MODEL_HELP", "add_model", "add_sizes", "add_tolerance", "options_of"]

MODEL_HELP = """\
MODEL is one of
  hf:TYPE               a tiny random model of a transformers causal-LM type, such as hf:llama
  hf:encoder/TYPE       of an encoder, or of the encoder of an encoder-decoder type, such as
                        hf:encoder/bert; it has the phase prefill and no cache
  hf:vision/TYPE        of a vision-language type, such as hf:vision/llava; each prompt has an image
  hf:...:config.json    any of them with the fields of a JSON file; a file with a model_type is a
                        full configuration
  FILE.py:FUNCTION      a function that returns rolemesh.Case(model, phases={"prefill": (args,
                        kwargs), "decode": (args, kwargs)}); phases run in that order. It is given
                        those of tokens, batch, dtype, attn, experts, layers and max_len that are
                        among its parameters.

roles: prefill, decode, pd_mixed
"""


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add MODEL and what says how it is compiled."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="hf:TYPE, hf:encoder/TYPE, hf:vision/TYPE; see below")
    add_sizes(parser, required=True)
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


def add_sizes(parser: argparse._ActionsContainer, required: bool) -> None:
    """Add the role, the mesh, and sizes and kinds of the model.

    Args:
        parser: Where to.
        required: Whether a role and a mesh must be given.
    """
    add = parser.add_argument
    add("--role", required=required, metavar="R", help="prefill, decode or pd_mixed")
    add("--mesh", required=required, metavar="AXIS=N", help="mesh axes, such as tp=4 or dp=2,tp=4")
    add("--tokens", type=count, default=13, metavar="N", help="prompt length (default 13)")
    add("--batch", type=count, default=2, metavar="N", help="number of sequences (default 2)")
    add("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the weights (default fp32)")
    add("--layers", type=count, metavar="N", help="number of layers (default: the model's)")
    add("--attn", default="sdpa", metavar="A", help="sdpa, eager or rolemesh (default sdpa)")
    add(
        "--experts",
        metavar="E",
        help="batched_mm, grouped_mm, eager or rolemesh (default: the library's)",
    )
    add(
        "--no-optimise",
        dest="optimise",
        action="store_false",
        help="leave out the passes that change no result, only what it costs",
    )


def add_tolerance(parser: argparse._ActionsContainer) -> None:
    """Add `--tolerance`."""
    parser.add_argument(
        "--tolerance",
        type=_tolerance,
        metavar="X",
        help="what counts as equal. fp32: the largest difference, relative to the tensor's largest "
        "magnitude on the single device (default 1e-3). bf16: the same of root mean squares "
        "(default 5e-1, which finds gross errors only: rounding may make routers choose otherwise)",
    )


def _tolerance(text: str) -> float:
    number = float(text)
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number of at least 0")
    return number


def options_of(parsed: argparse.Namespace) -> CheckOptions:
    """The options that were given. Imports torch.

    Raises:
        RolemeshError: For a role, mesh or option that does not exist.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read when transformers is imported
    from rolemesh.compiler.command.check_options import CheckOptions
    from rolemesh.compiler.ir.mesh import Mesh

    names = CheckOptions.__dataclass_fields__
    given = {name: value for name, value in vars(parsed).items() if name in names}
    given["mesh"] = Mesh.parse(parsed.mesh)
    given["target_options"] = tuple(given.get("target_options", ()))
    return CheckOptions(**given)
