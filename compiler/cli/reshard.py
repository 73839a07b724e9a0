"""`rolemesh reshard`: a checkpoint in another layout or format."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from rolemesh.compiler.cli.conventions import (
    EXIT_CODES,
    FINE,
    Commands,
    Parser,
    Progress,
    add_json,
    print_json,
    print_text,
)
from rolemesh.compiler.cli.sizes import byte_count, byte_text

if TYPE_CHECKING:
    from rolemesh.runtime.reshard.reshard import Resharded

__all__ = ["register"]

_DESCRIPTION = """\
Write a checkpoint's tensors in another layout, or another format. The result appears when all of it
is there and every byte of the source has been found good; a run that was stopped goes on when it is
started again.
"""

_EPILOG = f"""\
CHECKPOINT is a safetensors file or an index, or a folder with a safetensors checkpoint, with one of
torch.distributed.checkpoint, or with what this command wrote.
TARGET is a layout manifest, or a folder of files of ranks whose layout is wanted; or, for whole
tensors as the checkpoint has them, safetensors or dcp.

formats:
  rank         a safetensors file for each rank of the manifest, and the manifest
  safetensors  whole tensors, with an index if there are several files
  dcp          a folder of torch.distributed.checkpoint, a file for each rank

examples:
  rolemesh reshard step_900 decode.json decode
  rolemesh reshard step_900 decode.json --dry-run
  rolemesh reshard decode safetensors plain --shard-size 2GB
  rolemesh reshard plain train.json train --format dcp

{EXIT_CODES}"""


def register(commands: Commands[Parser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "reshard",
        help="write a checkpoint in another layout or format",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    parser.set_defaults(command=lambda parsed: _run(parser, parsed))
    parser.add_argument("source", metavar="CHECKPOINT", help="what is read")
    parser.add_argument("target", metavar="TARGET", help="the layout, or a format")
    parser.add_argument("out", metavar="DIR", nargs="?", help="the folder to write")
    parser.add_argument(
        "--format",
        choices=("rank", "safetensors", "dcp"),
        help="what to write (default: rank, or what TARGET names)",
    )
    parser.add_argument(
        "--staging",
        metavar="BYTES",
        type=byte_count,
        default="256MiB",
        help="most bytes of tensors in memory (default 256MiB)",
    )
    parser.add_argument(
        "--shard-size",
        metavar="BYTES",
        type=byte_count,
        default="5GB",
        help="bytes of tensors in a file of whole tensors (default 5GB)",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace a checkpoint that was written here, once the new one is whole",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan, and write nothing")
    add_json(parser)


def _run(parser: argparse.ArgumentParser, parsed: argparse.Namespace) -> int:
    if (parsed.out is None) != parsed.dry_run:
        parser.error("name DIR, or --dry-run" if parsed.out is None else "--dry-run takes no DIR")
    Progress()("planning")
    from rolemesh.runtime.reshard.reshard import reshard

    done = reshard(
        parsed.source,
        parsed.target,
        parsed.out,
        file_format=parsed.format,
        staging=parsed.staging,
        shard_bytes=parsed.shard_size,
        overwrite=parsed.overwrite,
    )
    if parsed.json:
        print_json(_json(done))
    elif done.out is None:
        print_text(_text(done))
    else:
        before = f", {byte_text(done.resumed)} of them by an earlier run" if done.resumed else ""
        print(f"{done.out}: {byte_text(done.nbytes)} in {_files(done)} files{before}")
    return FINE


def _files(done: Resharded) -> int:
    return sum(1 for name in done.files if name)


def _json(done: Resharded) -> dict[str, object]:
    plan = done.plan
    ranks = [
        {"rank": rank, "file": name, "moved_bytes": moved, "kept_bytes": kept}
        for rank, (name, (moved, kept)) in enumerate(zip(done.files, plan.received, strict=True))
    ]
    return {
        "format": done.file_format,
        "out": None if done.out is None else str(done.out),
        "tensors": len(done.target.tensors),
        "bytes": done.nbytes,
        "resumed_bytes": done.resumed,
        "digest": plan.digest,
        "source_digest": plan.source,
        "target_digest": plan.target,
        "steps": len(plan.steps),
        "staging_bytes": plan.limit,
        "moved_bytes": plan.moved_bytes,
        "kept_bytes": plan.kept_bytes,
        "ranks": ranks,
    }


def _text(done: Resharded) -> str:
    plan = done.plan
    lines = [
        f"source   {len(done.source.tensors)} tensors on mesh {done.source.mesh}",
        f"target   {len(done.target.tensors)} tensors on mesh {done.target.mesh}",
        f"writes   {done.file_format}: {byte_text(done.nbytes)} in {_files(done)} files",
        f"moved    {plan.moved_bytes:,} bytes; kept {plan.kept_bytes:,}",
        f"steps    {len(plan.steps):,}, with {byte_text(plan.limit)} of staging at most",
        f"digest   {plan.digest}",
        "",
    ]
    width = max(len("file"), *map(len, done.files))
    lines.append(f"rank  {'file':{width}}  {'moved bytes':>18}  {'kept bytes':>18}")
    for rank, (name, (moved, kept)) in enumerate(zip(done.files, plan.received, strict=True)):
        lines.append(f"{rank:4}  {name or '-':{width}}  {moved:18,}  {kept:18,}")
    return "\n".join(lines)
