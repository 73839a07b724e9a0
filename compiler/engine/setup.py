"""What an engine is made from: checks of its options, its model, and its place in the mesh."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from rolemesh.compiler.engine.ghosts import build_model
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.runtime.groups import MeshGroups

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["check_counts", "check_length", "model_to_serve", "replica_of"]


def model_to_serve(
    model: torch.nn.Module | PreTrainedConfig,
    checkpoint: str | os.PathLike[str] | None,
    dtype: torch.dtype | None,
    device: torch.device,
    *,
    ghosts: bool,
) -> torch.nn.Module:
    """The model to serve; if it is built here, its weights are still to be loaded.

    Raises:
        RolemeshError: RM018 unless either a model or a checkpoint is given.
    """
    given = isinstance(model, torch.nn.Module)
    if given == (checkpoint is not None):
        raise RolemeshError(
            "RM018",
            "a model and a checkpoint are given" if given else "there are no weights to serve",
            where="rolemesh.Engine",
            why="weights come from the model, or from a checkpoint if it is a configuration",
            fix="pass a model, or a configuration with checkpoint=PATH",
        )
    if isinstance(model, torch.nn.Module):
        return model.eval().requires_grad_(requires_grad=False)
    return build_model(model, dtype, device, ghosts=ghosts)


def check_counts(**counts: int) -> None:
    """Refuse counts that are no positive numbers.

    Raises:
        RolemeshError: RM018.
    """
    for name, count in counts.items():
        if not isinstance(count, int) or count < 1:
            raise RolemeshError(
                "RM018",
                f"{name} is {count!r}",
                where="rolemesh.Engine",
                why="it must be at least 1",
                fix=f"pass a positive {name}",
            )


def check_length(config: PreTrainedConfig, max_len: int) -> None:
    """Refuse slots that are longer than the model has positions.

    Raises:
        RolemeshError: RM018.
    """
    most = getattr(config, "max_position_embeddings", None)
    if isinstance(most, int) and max_len > most > 0:
        raise RolemeshError(
            "RM018",
            f"max_len is {max_len}",
            where="rolemesh.Engine",
            why=f"the model has positions for {most} tokens (max_position_embeddings)",
            fix=f"pass a max_len of at most {most}",
        )


def replica_of(mesh: Mesh, axis: str, groups: MeshGroups | None) -> int:
    """The number of this process's replica, counted over the axes other than the role's."""
    number = 0
    if groups is None:
        return number
    for name, size, place in zip(mesh.names, mesh.sizes, mesh.coordinate(groups.rank), strict=True):
        if name != axis:
            number = number * size + place
    return number
