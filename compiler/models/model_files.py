"""The files that a MODEL argument names: a configuration, or a module with a function.

What is wrong with a file, or raised by its code, becomes RM019 with the path and the line.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.models.families import suggestion

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["MODEL_FORMS", "check_file", "load_module", "read_json", "user_code"]

MODEL_FORMS = (
    "MODEL is hf:TYPE, hf:encoder/TYPE, hf:vision/TYPE, any of them with :config.json, "
    "or FILE.py:FUNCTION"
)
"""What a MODEL argument can be, for errors."""


def read_json(spec: str, path: Path) -> dict[str, object]:
    """The object in a JSON file.

    Args:
        spec: The MODEL argument, for errors.
        path: The file.

    Raises:
        RolemeshError: RM019, if there is no such file or it holds anything else.
    """
    check_file(spec, path)
    where = f"MODEL {spec}"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RolemeshError(
            "RM019",
            f"{path} is not valid JSON",
            where=where,
            why=str(error),
            fix="correct the file",
        ) from error
    if not isinstance(fields, dict):
        raise RolemeshError(
            "RM019",
            f"{path} holds a JSON {type(fields).__name__}, not an object",
            where=where,
            why="a configuration is an object of field names and values",
            fix='write for example {"hidden_size": 64}',
        )
    return fields


def check_file(spec: str, path: Path) -> None:
    """Raise RM019, with the closest name in its folder, unless `path` is a file."""
    if path.is_file():
        return
    folder = path.parent
    siblings = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    hint = suggestion(path.name, siblings)
    raise RolemeshError(
        "RM019",
        f"there is no file {str(path)!r}",
        where=f"MODEL {spec}",
        why=MODEL_FORMS,
        fix=f"{hint}give the path of a file that exists",
    )


def load_module(path: Path) -> ModuleType:
    """Import a file as a module of its own.

    Raises:
        RolemeshError: RM019 for what its code raises.
    """
    name = f"rolemesh_case_{path.stem}"
    specification = importlib.util.spec_from_file_location(name, path)
    if specification is None or specification.loader is None:
        raise ImportError(f"no loader for {path}")
    module = importlib.util.module_from_spec(specification)
    # Dataclasses and pickling look the module of a class up by name.
    sys.modules[name] = module
    with user_code(path):
        specification.loader.exec_module(module)
    return module


@contextmanager
def user_code(path: Path) -> Iterator[None]:
    """Turn what the user's file raises into RM019, with the line of that file."""
    try:
        yield
    except RolemeshError:
        raise
    except Exception as error:
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if Path(frame.filename) == path.absolute() or frame.filename == str(path)
        ]
        raise RolemeshError(
            "RM019",
            f"{path} raised {type(error).__name__}",
            where=f"{path}:{lines[-1]}" if lines else str(path),
            why=str(error),
            fix="correct the file",
        ) from error
