"""`rolemesh verify`: whether the bytes of a checkpoint are those that were written."""

from __future__ import annotations

import argparse

from rolemesh.compiler.cli.conventions import (
    EXIT_CODES,
    FINE,
    Commands,
    Parser,
    add_json,
    print_json,
)
from rolemesh.compiler.cli.sizes import byte_text

__all__ = ["register"]

_EPILOG = f"""\
CHECKPOINT is what rolemesh reshard takes. What that command writes has checksums; for a checkpoint
of something else --record writes them, into checksums.json beside its files.

examples:
  rolemesh verify decode
  rolemesh verify step_900 --record

{EXIT_CODES}"""


def register(commands: Commands[Parser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "verify",
        help="check the bytes of a checkpoint",
        description="Compare every byte of a checkpoint with the checksums that were recorded.",
        epilog=_EPILOG,
    )
    parser.set_defaults(command=_run)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="the checkpoint")
    parser.add_argument(
        "--record", action="store_true", help="write the checksums of one that has none"
    )
    add_json(parser)


def _run(parsed: argparse.Namespace) -> int:
    from rolemesh.runtime.reshard.verify import verify_checkpoint

    found = verify_checkpoint(parsed.checkpoint, record=parsed.record)
    files = len(found.source.files) + len(found.source.others)
    if parsed.json:
        print_json(
            {
                "format": found.source.kind,
                "files": files,
                "bytes": found.nbytes,
                "recorded": found.recorded,
            }
        )
    else:
        what = "recorded" if found.recorded else "good"
        print(f"{parsed.checkpoint}: {byte_text(found.nbytes)} in {files} files, {what}")
    return FINE
