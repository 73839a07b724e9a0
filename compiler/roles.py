"""Roles as data: which phases a node runs and what its weights must serve.

Each phase says how its tokens lie; the storage table says how each class of stored tensors lies,
once for all phases, because phases share one storage. What a table leaves out is replicated. The
layouts of everything else, and the collectives, follow by propagation; docs/roles.md derives them
with byte formulas.

A role for inference uses one axis of the mesh, whatever its name. For training the names of the
axes say what each is used for.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.passes.classify import StorageClass as Class
from rolemesh.passes.seed import AxisUse, Stays, Storage, Tokens

__all__ = ["ROLES", "TRAIN", "Role", "role_named"]


@dataclass(frozen=True)
class Role:
    """A preset.

    Attributes:
        name: Its name.
        phases: Phases it runs, with how their tokens lie; in the order a request meets them.
        storage: How each class of stored tensors lies on the ranks, for all phases.
        needs_cache: Whether it makes sense only for a model that updates a cache.
        prefetch: Layers ahead of use that a layer-sharded weight's broadcast starts.
        axes: What it does with the axis of each name; empty for a role that uses one of any name.
    """

    name: str
    phases: Mapping[str, Tokens]
    storage: Mapping[Class, Storage]
    needs_cache: bool
    prefetch: int = 1
    axes: Mapping[str, AxisUse] = field(default_factory=dict)

    @property
    def trains(self) -> bool:
        """Whether it computes gradients."""
        return bool(self.axes)

    def uses(self, phase: str, mesh: Mesh, axis: str) -> Mapping[str, AxisUse]:
        """What it does with the axes of a mesh.

        Args:
            phase: The phase.
            mesh: The mesh.
            axis: The axis of a role that uses one.

        Raises:
            RolemeshError: RM004 if the role does not run that phase, RM002 if an axis has no use.
        """
        tokens = self.tokens(phase)
        if not self.axes:
            return {axis: AxisUse(tokens, self.storage)}
        for name in mesh.names:
            if name not in self.axes:
                close = difflib.get_close_matches(name, self.axes, n=1)
                raise RolemeshError(
                    "RM002",
                    what=f"role {self.name!r} has no use for the mesh axis {name!r}",
                    where=f"mesh {mesh}",
                    why=f"its axes are {', '.join(self.axes)}",
                    fix=f"did you mean {close[0]!r}?" if close else "use one of these axes",
                )
        return {name: self.axes[name] for name in mesh.names}

    def tokens(self, phase: str) -> Tokens:
        """How the tokens of `phase` lie.

        Raises:
            RolemeshError: RM004 if the role does not run that phase.
        """
        if phase not in self.phases:
            close = difflib.get_close_matches(phase, self.phases, n=1)
            raise RolemeshError(
                "RM004",
                what=f"role {self.name!r} has no phase {phase!r}",
                where="option phase",
                why=f"it runs {', '.join(self.phases)}",
                fix=f"did you mean {close[0]!r}?" if close else "use one of these phases",
            )
        return self.phases[phase]


PREFILL = Role(
    name="prefill",
    phases={"prefill": Tokens.SEQUENCE},
    storage={
        Class.QUERY: Storage.OWNER,
        Class.ATTENTION_OUT: Storage.OWNER,
        Class.EXPERTS: Storage.ROWS,
    },
    needs_cache=False,
)

DECODE = Role(
    name="decode",
    phases={"decode": Tokens.WHOLE},
    storage={
        Class.EMBEDDING: Storage.ROWS,
        Class.LM_HEAD: Storage.ROWS,
        Class.QUERY: Storage.OUT_HEADS,
        Class.KEY_VALUE: Storage.OUT_HEADS,
        Class.KEY_VALUE_UP: Storage.OUT_HEADS,
        Class.ATTENTION_OUT: Storage.IN_HEADS,
        Class.CACHE: Storage.CACHE_HEADS,
        Class.STATE: Storage.UNITS,
        Class.MLP_IN: Storage.OUT,
        Class.MLP_OUT: Storage.IN,
        Class.EXPERTS: Storage.ROWS,
    },
    needs_cache=True,
)

PD_MIXED = Role(
    name="pd_mixed",
    phases={"prefill": Tokens.SEQUENCE, "decode": Tokens.BATCH},
    storage={
        Class.EMBEDDING: Storage.ROWS,
        Class.LM_HEAD: Storage.ROWS,
        Class.ATTENTION_OUT: Storage.IN_HEADS,
        Class.MLP_IN: Storage.OUT,
        Class.MLP_OUT: Storage.IN,
        Class.EXPERTS: Storage.ROWS,
        Class.STATE: Storage.UNITS,
    },
    needs_cache=True,
)

_MEGATRON: Mapping[Class, Storage] = {
    Class.EMBEDDING: Storage.ROWS,
    Class.LM_HEAD: Storage.ROWS,
    Class.QUERY: Storage.OUT_HEADS,
    Class.ATTENTION_OUT: Storage.IN_HEADS,
    Class.MLP_IN: Storage.OUT,
    Class.MLP_OUT: Storage.IN,
    Class.EXPERTS: Storage.ROWS,
}
"""Without a cache, all projections that attention reads are queries to the classifier."""

TRAIN = Role(
    name="train",
    phases={"step": Tokens.BATCH},
    storage={},
    needs_cache=False,
    axes={
        "dp": AxisUse(Tokens.BATCH, {}, Stays.TOKENS),
        "fsdp": AxisUse(Tokens.BATCH, dict.fromkeys(Class, Storage.FULLY), Stays.TOKENS),
        "tp": AxisUse(Tokens.WHOLE, _MEGATRON, Stays.WEIGHTS, dtensors=True),
        "sp": AxisUse(Tokens.SEQUENCE, _MEGATRON, Stays.WEIGHTS, dtensors=True),
    },
)

ROLES: Mapping[str, Role] = {role.name: role for role in (PREFILL, DECODE, PD_MIXED)}
"""The roles that serve."""

_ALL: Mapping[str, Role] = {**ROLES, TRAIN.name: TRAIN}


def role_named(name: str) -> Role:
    """The preset called `name`.

    Raises:
        RolemeshError: RM001 for an unknown name.
    """
    if name not in _ALL:
        close = difflib.get_close_matches(name, _ALL, n=1)
        raise RolemeshError(
            "RM001",
            what=f"unknown role {name!r}",
            where="option role",
            why=f"the roles are {', '.join(_ALL)}",
            fix=f"did you mean {close[0]!r}?" if close else "use one of these roles",
        )
    return _ALL[name]
