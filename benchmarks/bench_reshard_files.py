"""A reshard of files against a copy of them, and one rank's load against torch's own.

    python benchmarks/bench_reshard_files.py

A dense model of about 0.9 GB is in files of four ranks, rows of every weight cut over them. It is
written for eight ranks, by rows or by columns. Timed against it, in turn, is `shutil.copyfile` of
the same files with fsync; both leave nothing unsynced, and both find their input in the page cache.
The reshard checks every byte it reads and records checksums of every byte it writes. Limit: the
median of the ratios is 1.3.

Then rank 3 of the eight loads its shard: from its own file, and through
torch.distributed.checkpoint, which reshards the four ranks' checkpoint while it loads. Compared are
the bytes that the process reads (of /proc/self/io) and the time. Limit: own bytes plus 5 %.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import rolemesh
from rolemesh.compiler.ir.boxes import distribute
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.manifest import Manifest, StoredTensor
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.placement import REPLICATE, Shard
from rolemesh.runtime.checkpoint.rank_files import load_rank_file
from rolemesh.runtime.reshard.dtensor import to_placements

LIMIT_RATIO, LIMIT_READ = 1.3, 1.05

TRAIN, SERVE = Mesh({"fsdp": 4}), Mesh({"tp": 8})
RANK = 3


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """The weights of a dense model."""
    found: dict[str, tuple[int, ...]] = {}
    for layer in range(layers):
        found[f"layers.{layer}.up"] = (2816, 1024)
        found[f"layers.{layer}.down"] = (1024, 2816)
        found[f"layers.{layer}.out"] = (1024, 1024)
        found[f"layers.{layer}.norm"] = (1024,)
    return found


def rows(name: str, shape: tuple[int, ...]) -> Layout:
    """The layout of the trainer."""
    return Layout((Shard(0, 1, shape[0]),))


def served(name: str, shape: tuple[int, ...]) -> Layout:
    """The layout of the server."""
    if name.endswith("norm"):
        return Layout((REPLICATE,))
    return Layout((Shard(1, 1, shape[1]),)) if name.endswith("down") else rows(name, shape)


def manifest(
    mesh: Mesh, kinds: dict[str, tuple[int, ...]], layout: Callable[[str, tuple[int, ...]], Layout]
) -> Manifest:
    """All weights on a mesh."""
    return Manifest(
        mesh,
        {
            name: StoredTensor(torch.float32, distribute(layout(name, shape), shape, mesh))
            for name, shape in kinds.items()
        },
    )


def copied(source: Path, out: Path) -> None:
    """Copy a folder's files so that they last."""
    out.mkdir()
    for file in sorted(source.iterdir()):
        shutil.copyfile(file, out / file.name)
        synced(out / file.name)
    synced(out)


def synced(path: Path) -> None:
    """Wait until a file or folder lasts."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds of the clock, and of the CPUs."""
    os.sync()
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def against_copy(folder: Path, target: Manifest, rounds: int) -> float:
    """The median ratio of the time of a reshard to that of a copy."""
    source, copy, out = folder / "train", folder / "copy", folder / "serve"
    ratios = []
    for number in range(rounds):
        shutil.rmtree(out, ignore_errors=True)
        a, a_cpu = timed(lambda: copied(source, copy))
        shutil.rmtree(copy)
        b, b_cpu = timed(lambda: rolemesh.reshard(source, target, out, progress=False))
        ratios.append(b / a)
        print(
            f"round {number}: copy {a:.2f} s ({a_cpu:.2f} s of CPU), "
            f"reshard {b:.2f} s ({b_cpu:.2f} s of CPU), ratio {b / a:.2f}"
        )
    return statistics.median(ratios)


def bytes_read(work: Callable[[], object]) -> tuple[int, float]:
    """What the process reads while it works, and how long it takes."""

    def total() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    before, start = total(), time.perf_counter()
    work()
    return total() - before, time.perf_counter() - start


def main() -> int:
    """Measure, print, and say whether the limits hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="where to work (default: the temporary folder)")
    parsed = parser.parse_args()
    kinds = shapes(parsed.layers)
    train, serve = manifest(TRAIN, kinds, rows), manifest(SERVE, kinds, served)
    with tempfile.TemporaryDirectory(dir=parsed.folder) as name:
        folder = Path(name)
        plain = folder / "model.safetensors"
        save_file({name: torch.randn(shape) for name, shape in kinds.items()}, plain)
        rolemesh.reshard(plain, train, folder / "train", progress=False)
        plain.unlink()
        ratio = against_copy(folder, serve, parsed.rounds)
        print(f"median ratio of a reshard and a copy: {ratio:.2f}, limit {LIMIT_RATIO}")

        tensors = {name: torch.empty(shape, device="meta") for name, shape in kinds.items()}
        layouts = {name: served(name, shape) for name, shape in kinds.items()}
        held = serve.rank_bytes[RANK]
        own, own_time = bytes_read(
            lambda: load_rank_file(folder / "serve", tensors, layouts, SERVE, RANK)
        )
        shutil.rmtree(folder / "serve")
        rolemesh.reshard(folder / "train", train, folder / "dcp", file_format="dcp", progress=False)
        dist.init_process_group("fake", rank=RANK, world_size=SERVE.size, store=FakeStore())
        mesh = init_device_mesh("cpu", (SERVE.size,), mesh_dim_names=("tp",))
        state = {
            name: DTensor.from_local(
                torch.empty(layouts[name].local_shape(shape, SERVE)),
                mesh,
                to_placements(serve, name),
                run_check=False,
            )
            for name, shape in kinds.items()
        }
        theirs, their_time = bytes_read(
            lambda: dcp.load(state, checkpoint_id=folder / "dcp", no_dist=True)
        )
        dist.destroy_process_group()
    print(f"rank {RANK} holds {held:,} bytes")
    print(f"its own file:                 {own:,} bytes read ({own / held:.3f}), {own_time:.2f} s")
    print(
        f"torch.distributed.checkpoint: {theirs:,} bytes read ({theirs / held:.3f}), "
        f"{their_time:.2f} s"
    )
    return int(ratio > LIMIT_RATIO or own > LIMIT_READ * held)


if __name__ == "__main__":
    sys.exit(main())
