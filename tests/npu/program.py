"""What each rank of the hardware tests runs: a model on the target ge, compared with one CPU.

    torchrun --nproc-per-node N tests/npu/program.py model
    torchrun --nproc-per-node N tests/npu/program.py all_gather

The last line that rank 0 prints is a JSON object. `--device cpu` runs the same over gloo, on the
reference executor, to check this program itself where there is no NPU.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
from collections.abc import Mapping

import torch
import torch.distributed as dist

import rolemesh
from rolemesh.compiler.models.cases import Case, cache_tensors, language_model_case, load_case
from rolemesh.lowering.ge.loader import load_torchair

MODEL, LAYERS, TOKENS, BATCH = "hf:deepseek_v32", 3, 13, 2


def main() -> None:
    """Run one rank."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("model", "all_gather"))
    parser.add_argument("--device", default="npu", choices=("npu", "cpu"))
    parsed = parser.parse_args()
    device = torch.device("cpu")
    if parsed.device == "npu":
        load_torchair("npu")
        device = torch.device("npu", int(os.environ["LOCAL_RANK"]))
        torch.npu.set_device(device)  # type: ignore[attr-defined]
    dist.init_process_group("hccl" if parsed.device == "npu" else "gloo")
    found = model(device) if parsed.what == "model" else all_gather(device)
    if dist.get_rank() == 0:
        print(json.dumps(found))  # noqa: T201 - the result
    dist.destroy_process_group()


def model(device: torch.device) -> dict[str, float]:
    """The largest relative differences between all ranks and one CPU, by what is compared."""
    reference = load_case(MODEL, layers=LAYERS, tokens=TOKENS, batch=BATCH)
    moved = copy.deepcopy(reference.model).to(device)
    case = language_model_case(moved, tokens=TOKENS, batch=BATCH)
    mesh = {"tp": dist.get_world_size()}
    errors = {}
    with torch.no_grad():
        for phase, (args, kwargs) in case.phases.items():
            expected = reference.model(*reference.phases[phase][0], **reference.phases[phase][1])
            traced = rolemesh.trace(case.model, *args, **kwargs)
            sharded = rolemesh.shard(traced, mesh, "pd_mixed", phase=phase)
            compiled = rolemesh.lower(sharded, target="ge").compile()
            actual = compiled(*args, **kwargs)
            errors[f"{phase} logits"] = _difference(actual.logits, expected.logits)  # type: ignore[attr-defined]
            wanted, got = _state(reference, phase), _state(case, phase)
            errors[f"{phase} cache"] = max(
                _difference(rolemesh.gather(got[name]), wanted[name]) for name in wanted
            )
    return errors


def all_gather(device: torch.device) -> dict[str, object]:
    """What every rank gets from an all_gather of what each has."""
    rank, size = dist.get_rank(), dist.get_world_size()
    mine = torch.arange(6, dtype=torch.float32, device=device).reshape(2, 3) + 10 * rank
    whole = torch.empty(2 * size, 3, device=device)
    dist.all_gather_into_tensor(whole, mine)
    return {"size": size, "first_column": whole[:, 0].tolist()}


def _state(case: Case, phase: str) -> Mapping[str, torch.Tensor]:
    _, kwargs = case.phases[phase]
    return cache_tensors(kwargs["past_key_values"])  # type: ignore[arg-type]


def _difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    distance = (actual.cpu().float() - expected.float()).abs().max()
    return float(distance / expected.float().abs().max().clamp_min(1e-12))


if __name__ == "__main__":
    main()
