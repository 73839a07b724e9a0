"""Layout manifests as files.

Invariant: a file is a whole manifest, or the one that was there before; never a part of one.
"""

from __future__ import annotations

import os
from pathlib import Path

from rolemesh.compiler.ir.atomic import write_whole
from rolemesh.compiler.ir.manifest import Manifest, bad_manifest
from rolemesh.compiler.ir.manifest_json import decode_manifest, encode_manifest

__all__ = ["read_manifest", "write_manifest"]


def write_manifest(manifest: Manifest, path: str | os.PathLike[str]) -> None:
    """Write a manifest's canonical JSON, in the place of a file that is there.

    Raises:
        RolemeshError: RM038 if the file cannot be written.
    """
    target = Path(path)
    try:
        write_whole(target, encode_manifest(manifest))
    except OSError as error:
        raise bad_manifest(
            f"the manifest {target} cannot be written",
            where=str(target),
            why=str(error),
            fix="give a file in a folder that exists and can be written to",
        ) from error


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """Read a manifest and check it.

    Raises:
        RolemeshError: RM038 if the file cannot be read, is damaged, of another schema, or has boxes
            that are not those of its layouts.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise bad_manifest(
            f"the manifest {path} cannot be read",
            where=str(path),
            why=str(error),
            fix="give a file that write_manifest wrote",
        ) from error
    return decode_manifest(data, str(path))
