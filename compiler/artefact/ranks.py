"""Ranks that load an artefact together: they use the same one, or all of them refuse.

They talk through the store of the default process group: texts and files, nothing that is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.runtime.config import Torchrun
from rolemesh.runtime.groups import groups_for

__all__ = ["Meeting", "join_world"]


def join_world() -> None:
    """Make the default process group under torchrun, where there is none yet."""
    torchrun = Torchrun.read()
    if torchrun is not None and not dist.is_initialized():
        groups_for(Mesh({"rank": torchrun.world_size}))


class Meeting:
    """All ranks of the default group, at one load; this process alone if there is no group.

    Every rank must make its meetings in the same order.
    """

    def __init__(self) -> None:
        self.size = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        if self.size > 1:
            store = _get_default_store()
            number = store.add(f"rolemesh/artefact/{self.rank}", 1)
            self._store = dist.PrefixStore(f"rolemesh/artefact/{number}/", store)

    def said(self, text: str) -> list[str]:
        """What each rank says, in order."""
        if self.size == 1:
            return [text]
        self._store.set(f"said/{self.rank}", text)
        return [self._store.get(f"said/{rank}").decode() for rank in range(self.size)]

    def from_first(self, read: Callable[[], Mapping[str, bytes]]) -> Mapping[str, bytes]:
        """The files that rank 0 reads; none if reading fails, which only rank 0 raises.

        Args:
            read: Reads them, on rank 0.
        """
        if self.size == 1:
            return read()
        if self.rank > 0:
            names = json.loads(self._store.get("names"))
            return {name: self._store.get(f"file/{name}") for name in names}
        files: Mapping[str, bytes] = {}
        try:
            files = read()
        finally:
            for name, content in files.items():
                self._store.set(f"file/{name}", content)  # type: ignore[arg-type]
            self._store.set("names", json.dumps(list(files)))
        return files
