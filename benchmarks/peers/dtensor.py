"""The model of transformers under DTensor's `parallelize_module`, as torch's tutorials write it."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)
from transformers import PreTrainedModel

__all__ = ["with_dtensor"]


class _ExpertsParallel(ParallelStyle):
    """Every expert split by columns and rows; tokens whole before and after."""

    def _apply(self, module: torch.nn.Module, device_mesh: DeviceMesh) -> torch.nn.Module:
        rank, ranks = device_mesh.get_local_rank(), device_mesh.size()
        halves = module.gate_up_proj.chunk(2, 1)
        columns = torch.cat([half.chunk(ranks, 1)[rank] for half in halves], 1)
        rows = module.down_proj.chunk(ranks, 2)[rank].contiguous()
        module.gate_up_proj = torch.nn.Parameter(columns, requires_grad=False)
        module.down_proj = torch.nn.Parameter(rows, requires_grad=False)

        def summed(*called: object) -> torch.Tensor:
            *_, local = called
            assert isinstance(local, torch.Tensor)
            partial = DTensor.from_local(local, device_mesh, [Partial()], run_check=False)
            return partial.redistribute(device_mesh, [Replicate()]).to_local()

        module.register_forward_hook(summed)
        return module


def with_dtensor(model: PreTrainedModel, mesh: DeviceMesh) -> PreTrainedModel:
    """Split a whole model over the mesh, in place.

    Args:
        model: The whole model.
        mesh: One axis.

    Returns:
        The model, with DTensors for weights; its key and value heads are those of the rank.
    """
    plan: dict[str, ParallelStyle] = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
        "lm_head": ColwiseParallel(output_layouts=Replicate()),
    }
    for index, layer in enumerate(model.model.layers):
        attention = f"model.layers.{index}.self_attn"
        mlp = f"model.layers.{index}.mlp"
        for name in ("q_proj", "k_proj", "v_proj"):
            plan[f"{attention}.{name}"] = ColwiseParallel()
        plan[f"{attention}.o_proj"] = RowwiseParallel()
        if hasattr(layer.mlp, "experts"):
            plan[f"{mlp}.experts"] = _ExpertsParallel()
        else:
            plan[f"{mlp}.gate_proj"] = ColwiseParallel()
            plan[f"{mlp}.up_proj"] = ColwiseParallel()
            plan[f"{mlp}.down_proj"] = RowwiseParallel()
    parallelize_module(model, mesh, plan)
    return model
