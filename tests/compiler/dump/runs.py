"""A small model whose run directories are quick to write, and ways to write one."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from rolemesh.compiler.api import Sharded, shard
from rolemesh.compiler.capture.tracing import trace
from rolemesh.compiler.ir.spec import P

__all__ = ["Mlp", "contents", "write_run"]


class Mlp(nn.Module):
    """An embedding and two matmuls; with a graph break between them if asked for."""

    def __init__(self, breaks: bool = False) -> None:
        super().__init__()
        self.breaks = breaks
        self.embedding = nn.Embedding(11, 6)
        self.up = nn.Linear(6, 9, bias=False)
        self.down = nn.Linear(9, 6, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.up(self.embedding(ids)).relu()
        if self.breaks:
            torch._dynamo.graph_break()
        return self.down(hidden)


def write_run(folder: str | None, ranks: int = 3) -> Sharded:
    """Shard the model over rows and columns, its number of tokens a symbol."""
    ids = torch.arange(10).reshape(2, 5)
    torch._dynamo.mark_dynamic(ids, 1)
    with torch.no_grad():
        traced = trace(Mlp().eval(), ids)
    annotations = {"up.weight": P("tp", None), "down.weight": P(None, "tp")}
    return shard(traced, {"tp": ranks}, annotations=annotations, dump=folder)


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


if __name__ == "__main__":
    write_run(sys.argv[1])
