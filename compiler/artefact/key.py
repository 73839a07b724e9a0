"""The key of an artefact: all that decides whether its programs are right here, field by field.

Invariant: what is compared is everything that capture, passes and lowering look at: the model
(modules, numbers, code, what Dynamo guarded on), the shapes and dtypes of its tensors, the options,
torch's settings, and the versions of whatever had a part in the programs.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from rolemesh import __version__
from rolemesh.compiler.cache.state import package_digests, torch_settings
from rolemesh.compiler.capture.convention import Convention, Difference, unlike
from rolemesh.compiler.capture.paths import access_path
from rolemesh.compiler.capture.recording import MODEL, describe_model
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.serial_values import Json
from rolemesh.compiler.ir.spec import P
from rolemesh.compiler.pipeline import ShardOptions
from rolemesh.lowering.ge.loader import diagnose
from rolemesh.lowering.targets import Target
from rolemesh.passes.cost import CostTable
from rolemesh.runtime.config import Ascend

__all__ = [
    "differences",
    "here",
    "misfit",
    "model_differences",
    "options_from",
    "options_json",
    "target_options_from",
    "target_options_json",
]

_MOST_SHOWN = 8
"""Differences that an error lists."""

_ABSENT = "absent"


def here(target: str) -> dict[str, Json]:
    """Versions and settings of this process that an artefact must agree with."""
    return {"versions": {**_versions(target)}, "settings": {**torch_settings()}}


def _versions(target: str) -> Mapping[str, Json]:
    npu: Any = sys.modules.get("torch_npu")
    found: dict[str, Json] = {
        "rolemesh": __version__,
        "torch": f"{torch.__version__} {torch.version.git_version}",
        "torch_npu": str(getattr(npu, "__version__", "")),
        "torchair": diagnose().version if target == "ge" else "",
        "cann": _cann(npu),
        "soc": str(npu.npu.get_device_name()) if _has_device(npu) else "",
    }
    return found | {f"rolemesh.{name}": text for name, text in package_digests().items()}


def _has_device(npu: Any) -> bool:
    return npu is not None and bool(npu.npu.is_available())


def _cann(npu: Any) -> str:
    """CANN's version where torch_npu is loaded; elsewhere nothing runs on it."""
    if npu is None or Ascend.read().toolkit is None:
        return ""
    from torch_npu.npu.utils import get_cann_version

    return str(get_cann_version())


def options_json(options: ShardOptions) -> dict[str, Json]:
    """Options of `rolemesh.shard`, as fields."""
    annotations: dict[str, Json] = {
        name: {
            "entries": [list(entry) if isinstance(entry, tuple) else entry for entry in p.entries],
            "units": [list(pair) for pair in p.units],
            "parts": [list(pair) for pair in p.parts],
        }
        for name, p in options.annotations.items()
    }
    mesh: list[Json] = [
        [name, size] for name, size in zip(options.mesh.names, options.mesh.sizes, strict=True)
    ]
    return {
        "mesh": mesh,
        "role": options.role,
        "axis": options.axis,
        "annotations": annotations,
        "costs": asdict(options.costs),
        "prefetch": options.prefetch,
        "optimise": options.optimise,
        "memory_budget": options.memory_budget,
    }


def options_from(data: Mapping[str, Any]) -> ShardOptions:
    """The inverse of `options_json`."""
    annotations = {
        name: P(
            *(tuple(entry) if isinstance(entry, list) else entry for entry in p["entries"]),
            units=dict(p["units"]),
            parts=dict(p["parts"]),
        )
        for name, p in data["annotations"].items()
    }
    return ShardOptions(
        Mesh(dict(data["mesh"])),
        data["role"],
        data["axis"],
        annotations,
        CostTable(**data["costs"]),
        data["prefetch"],
        data["optimise"],
        data["memory_budget"],
    )


def target_options_json(options: object) -> dict[str, Json]:
    """Options of a target, as fields. Mappings are lists of pairs: their keys may be numbers."""
    return {
        entry.name: _pairs(getattr(options, entry.name)) for entry in fields(cast(Any, options))
    }


def target_options_from(target: Target, data: Mapping[str, Json]) -> object:
    """The inverse of `target_options_json`."""
    return target.parse({name: _from_pairs(value) for name, value in data.items()})


def _pairs(value: object) -> Json:
    if isinstance(value, Mapping):
        return {"pairs": [[_pairs(key), _pairs(item)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return [_pairs(item) for item in value]
    assert isinstance(value, bool | int | float | str | None), "an option is plain data"
    return value


def _from_pairs(data: Json) -> object:
    match data:
        case {"pairs": [*pairs]}:
            return {_from_pairs(key): _from_pairs(item) for key, item in cast(Any, pairs)}
        case [*items]:
            return [_from_pairs(item) for item in items]
    return data


def differences(saved: Json, found: Json, name: str = "") -> Iterator[Difference]:
    """Fields in which two trees of JSON differ.

    Args:
        saved: In the artefact.
        found: Here.
        name: Of the tree.
    """
    if isinstance(saved, dict) and isinstance(found, dict):
        for key in dict.fromkeys((*saved, *found)):
            below = f"{name}.{key}" if name else key
            if key not in saved or key not in found:
                sides = (_text(side[key]) if key in side else _ABSENT for side in (saved, found))
                yield Difference(below, *sides)
            else:
                yield from differences(saved[key], found[key], below)
    elif saved != found or isinstance(saved, bool) != isinstance(found, bool):
        yield Difference(name, _text(saved), _text(found))


def _text(value: Json) -> str:
    return value if isinstance(value, str) and value else repr(value)


def model_differences(conventions: Sequence[Convention], model: nn.Module) -> Iterator[Difference]:
    """What a model here has otherwise than the one that was traced, but for its tensors.

    Args:
        conventions: How each of its programs is called.
        model: The model.
    """
    described = describe_model(model)
    sources: dict[str, str] = {}
    for convention in conventions:
        yield from differences(dict(convention.model), described)
        facts = [(fact, access_path(fact.name)) for fact in convention.model_facts]
        yield from unlike([(f, path) for f, path in facts if path is not None], {MODEL: model})
        for module, digest in convention.sources.items():
            found = sources[module] = sources.get(module) or _source(module)
            if found != digest:
                yield Difference(f"source of {module}", digest[:16], found[:16])


def _source(module: str) -> str:
    """SHA-256 of a module's source file, whether it is imported or not."""
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None:
        top, *rest = module.split(".")
        spec = importlib.util.find_spec(top)  # imports nothing, for a name without dots
        roots = list(spec.submodule_search_locations or ()) if spec is not None else []
        places = [Path(root, *rest) for root in roots]
        files = [p for base in places for p in (base.with_suffix(".py"), base / "__init__.py")]
        file = next((path for path in files if path.is_file()), spec.origin if spec else None)
    try:
        return hashlib.sha256(Path(str(file)).read_bytes()).hexdigest()
    except OSError:
        return _ABSENT


def misfit(path: str, found: Sequence[Difference]) -> RolemeshError:
    """The error for an artefact that was made for something else."""
    lines = [f"{d.name}: {d.saved} in the artefact, {d.here} here" for d in found[:_MOST_SHOWN]]
    more = len(found) - len(lines)
    return RolemeshError(
        "RM043",
        f"the artefact {path} was made for something else",
        where="\n".join(lines + ([f"and {more} more"] if more else [])),
        why="its programs are right only for what they were compiled from and with",
        fix="save it again from this model, or pass recompile= to do so when that is needed",
    )
