"""rolemesh: one single-device PyTorch model in, one sharded program per node role out.

The public names below are imported on first use (PEP 562), so that ``import rolemesh`` costs
nothing: tools that only ask for the version or the command line's help never load torch.

Invariants:

* `_EXPORTS`, ``__all__`` and the ``TYPE_CHECKING`` imports name the same things.
* Importing this module imports no other module of rolemesh and no third-party package.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rolemesh.compiler.annotate import constrain
    from rolemesh.compiler.api import lockstep, lower, shard, trace, trace_training
    from rolemesh.compiler.artefact.load import load
    from rolemesh.compiler.artefact.save import save
    from rolemesh.compiler.engine.engine import Engine
    from rolemesh.compiler.integrate import integrate
    from rolemesh.compiler.ir.errors import RolemeshError
    from rolemesh.compiler.ir.mesh import Mesh
    from rolemesh.compiler.ir.spec import P
    from rolemesh.compiler.manifest import manifest
    from rolemesh.compiler.models.cases import Case
    from rolemesh.compiler.training import lockstep_gradients
    from rolemesh.passes.rules import register_rule
    from rolemesh.runtime.phase import phase
    from rolemesh.runtime.reshard.files import read_manifest, write_manifest
    from rolemesh.runtime.reshard.plan import plan_reshard
    from rolemesh.runtime.reshard.reshard import reshard
    from rolemesh.runtime.store import gather

__all__ = [
    "Case",
    "Engine",
    "Mesh",
    "P",
    "RolemeshError",
    "__version__",
    "constrain",
    "gather",
    "integrate",
    "load",
    "lockstep",
    "lockstep_gradients",
    "lower",
    "manifest",
    "phase",
    "plan_reshard",
    "read_manifest",
    "register_rule",
    "reshard",
    "save",
    "shard",
    "trace",
    "trace_training",
    "write_manifest",
]

__version__ = "0.1.0"

_EXPORTS: Mapping[str, str] = MappingProxyType(
    {
        "Case": "rolemesh.compiler.models.cases",
        "Engine": "rolemesh.compiler.engine.engine",
        "Mesh": "rolemesh.compiler.ir.mesh",
        "P": "rolemesh.compiler.ir.spec",
        "RolemeshError": "rolemesh.compiler.ir.errors",
        "constrain": "rolemesh.compiler.annotate",
        "gather": "rolemesh.runtime.store",
        "integrate": "rolemesh.compiler.integrate",
        "load": "rolemesh.compiler.artefact.load",
        "lockstep": "rolemesh.compiler.api",
        "lockstep_gradients": "rolemesh.compiler.training",
        "lower": "rolemesh.compiler.api",
        "manifest": "rolemesh.compiler.manifest",
        "phase": "rolemesh.runtime.phase",
        "plan_reshard": "rolemesh.runtime.reshard.plan",
        "read_manifest": "rolemesh.runtime.reshard.files",
        "register_rule": "rolemesh.passes.rules",
        "reshard": "rolemesh.runtime.reshard.reshard",
        "save": "rolemesh.compiler.artefact.save",
        "shard": "rolemesh.compiler.api",
        "trace": "rolemesh.compiler.api",
        "trace_training": "rolemesh.compiler.api",
        "write_manifest": "rolemesh.runtime.reshard.files",
    }
)
"""Public name -> the module that defines it."""


def __getattr__(name: str) -> object:
    """Import a public name from the module that defines it.

    Raises:
        AttributeError: If `name` is not public.
    """
    module = _EXPORTS.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(module), name)


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted(__all__)
