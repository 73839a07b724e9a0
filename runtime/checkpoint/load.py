"""Loading a checkpoint: every rank ends up with its shards, and never holds more than a bit more.

Invariants:

* Nothing is read before all headers, names, shapes and dtypes are found good on all ranks, and
  nothing is stored before everything is read: ranks succeed together or refuse together.
* Ranks of one node read each byte of the checkpoint once between them. The reader of a block cuts
  it and sends every other rank its piece.
* Beside its shards, a rank holds at most two blocks and what becomes of one: less than the largest
  tensor, of which a block has at most an eighth. But it has at least one row, and a conversion that
  does not work row by row is one block; with it, a rank holds its sources and its results.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.runtime.checkpoint.blocks import Block, Reader, blocks_of
from rolemesh.runtime.checkpoint.files import Checkpoint, listed, open_checkpoint
from rolemesh.runtime.checkpoint.naming import AsTheyAre, Conversion, Naming
from rolemesh.runtime.checkpoint.pieces import (
    Run,
    as_bytes,
    as_rows,
    clipped,
    empty_local,
    piece,
    runs,
)
from rolemesh.runtime.checkpoint.plan import make_plan, type_of
from rolemesh.runtime.checkpoint.rank_files import (
    fill_from_rank_files,
    has_rank_files,
    load_rank_file,
)
from rolemesh.runtime.checkpoint.ranks import ALONE, Ranks, all_ranks, this_node
from rolemesh.runtime.groups import groups_for
from rolemesh.runtime.progress import bar
from rolemesh.runtime.rank import process_watch
from rolemesh.runtime.store import Store

__all__ = ["BLOCK_BYTES", "fill_from_checkpoint", "load_checkpoint"]

BLOCK_BYTES = 32 << 20
"""Most bytes that a block has, unless one row is more: large enough for disks and sockets."""

Path = str | os.PathLike[str]


def load_checkpoint(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    layouts: Mapping[str, Layout],
    mesh: Mesh,
    store: Store,
    *,
    naming: Naming | None = None,
    cast: bool = False,
    progress: bool = True,
    node: str | None = None,
) -> None:
    """Load this rank's shards of a model's tensors into the store. Every rank must call it.

    Args:
        path: A safetensors file, an index, a folder with `model.safetensors` or
            `model.safetensors.index.json`, or a folder of files of ranks, of which this rank reads
            its own: they have the model's names, on this mesh and in these layouts.
        tensors: All tensors that the checkpoint must have, by name: parameters and persistent
            buffers, as `state_dict(keep_vars=True)` lists them, a tied one under each of its names.
            They need no bytes and are not written to.
        layouts: Layout of each tensor to load, under any of its names. A tensor without one is
            checked, not loaded.
        mesh: The mesh, over all ranks.
        store: Where the shards are put.
        naming: Relates the names of checkpoint and model, for example
            `rolemesh.runtime.checkpoint.hub.HubNaming(model)`; the names are the same if None.
        cast: Load floating-point tensors of another floating-point dtype too, rounded to the
            model's.
        progress: Show a bar of bytes on standard error, on the first rank of each node.
        node: Names this rank's node, whose ranks share their reads; found out if None.

    Raises:
        RolemeshError: On every rank alike. RM032 if the checkpoint cannot be read, RM033 if it does
            not fit the tensors, RM024 if one is stored already; RM013 if a rank died; RM005 or
            RM006 without fitting processes.
    """
    groups_for(mesh)
    watch = process_watch()
    naming = naming or AsTheyAre()
    with watch.guard(), all_ranks(node or this_node()) as ranks:
        if has_rank_files(path):
            _load_own(path, tensors, layouts, mesh, store, ranks, cast=cast, progress=progress)
            return
        checkpoint, problem = _opened(path, ranks)
        plan: Sequence[Conversion] = ()
        if checkpoint is not None:
            try:
                for name in sorted(layouts.keys() & tensors.keys()):
                    store.check_absent(tensors[name], name)
                plan = make_plan(checkpoint, tensors, naming, cast=cast)
            except RolemeshError as error:
                problem = error
        problem = ranks.first_problem(problem)
        places: dict[str, _Place] = {}
        if problem is None:
            places = _places(plan, tensors, layouts)
            for place in places.values():
                place.local = empty_local(type_of(place.tensor), place.layout, mesh, ranks.rank)
            problem = _load(plan, places, mesh, ranks, progress=progress)
    if problem is not None:
        raise problem
    for name, place in places.items():
        if name == place.name:
            store.put(place.tensor, name, place.layout, mesh, place.local)


def fill_from_checkpoint(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    naming: Naming | None = None,
    cast: bool = False,
    progress: bool = True,
) -> None:
    """Fill whole tensors of this process, as ranks in lock-step need them.

    Args:
        path: As for `load_checkpoint`.
        tensors: All tensors that the checkpoint must have, with their storage.
        naming: As for `load_checkpoint`.
        cast: As for `load_checkpoint`.
        progress: Show a bar of bytes on standard error.

    Raises:
        RolemeshError: RM032 or RM033, before a tensor is written to unless a file fails later.
    """
    if has_rank_files(path):
        total = sum({id(tensor): tensor.nbytes for tensor in tensors.values()}.values())
        with bar(total, "loading weights", shown=progress) as advance:
            fill_from_rank_files(path, tensors, cast=cast, advance=advance)
        return
    mesh = Mesh({"rank": 1})
    plan = make_plan(open_checkpoint(path), tensors, naming or AsTheyAre(), cast=cast)
    places = _places(plan, tensors, dict.fromkeys(tensors, Layout.replicated(mesh)))
    for place in places.values():
        place.local = place.tensor.detach()
    problem = _load(plan, places, mesh, ALONE, progress=progress)
    if problem is not None:
        raise problem


def _load_own(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    layouts: Mapping[str, Layout],
    mesh: Mesh,
    store: Store,
    ranks: Ranks,
    *,
    cast: bool,
    progress: bool,
) -> None:
    """Load this rank's file; all ranks do, or none."""
    found: dict[str, torch.Tensor] = {}
    problem = None
    try:
        for name in sorted(layouts.keys() & tensors.keys()):
            store.check_absent(tensors[name], name)
        names = {id(tensors[name]): name for name in layouts.keys() & tensors.keys()}
        total = sum(
            math.prod(layouts[name].local_shape(tensors[name].shape, mesh)) * tensors[name].itemsize
            for name in names.values()
        )
        with bar(total, "loading weights", shown=progress and ranks.leads) as advance:
            found = load_rank_file(
                path, tensors, layouts, mesh, ranks.rank, cast=cast, advance=advance
            )
    except RolemeshError as error:
        problem = error
    problem = ranks.first_problem(problem)
    if problem is not None:
        raise problem
    for name, local in found.items():
        store.put(tensors[name], name, layouts[name], mesh, local)


@dataclass
class _Place:
    """Where a tensor goes on this rank.

    Attributes:
        tensor: The model's tensor.
        name: The name by which it is loaded; by others, it is compared.
        layout: Its layout.
        local: This rank's shard, which is filled; set before loading begins.
    """

    tensor: torch.Tensor
    name: str
    layout: Layout
    local: torch.Tensor


def _opened(path: Path, ranks: Ranks) -> tuple[Checkpoint | None, RolemeshError | None]:
    """What the node's first rank finds at a path: headers are bytes too, and read once."""
    found: tuple[Checkpoint | None, RolemeshError | None] = None, None
    if ranks.leads:
        try:
            found = open_checkpoint(path), None
        except RolemeshError as error:
            found = None, error
    return ranks.from_leader(found)


def _places(
    plan: Sequence[Conversion],
    tensors: Mapping[str, torch.Tensor],
    layouts: Mapping[str, Layout],
) -> dict[str, _Place]:
    """Where the results of a plan go, by every name that the plan gives."""
    layout_of = {id(tensors[name]): layouts[name] for name in layouts.keys() & tensors.keys()}
    found: dict[int, _Place] = {}
    places: dict[str, _Place] = {}
    for name in (name for conversion in plan for name in conversion.results if name in tensors):
        tensor = tensors[name]
        layout = layout_of.get(id(tensor))
        if layout is not None:
            places[name] = found.setdefault(id(tensor), _Place(tensor, name, layout, tensor))
    return places


def _load(
    plan: Sequence[Conversion],
    places: Mapping[str, _Place],
    mesh: Mesh,
    ranks: Ranks,
    *,
    progress: bool,
) -> RolemeshError | None:
    """Read what the places need and fill them; the first problem of any rank."""
    plan = [conversion for conversion in plan if conversion.results.keys() & places.keys()]
    largest = max((kind.nbytes for c in plan for kind in c.results.values()), default=0)
    limit = min(BLOCK_BYTES, max(1, largest // 8))

    def blocks() -> Iterator[Block]:
        return blocks_of(plan, limit, len(ranks.members))

    me = ranks.members.index(ranks.rank)
    delivery = _Delivery(mesh, ranks)
    total = sum(source.type.nbytes for conversion in plan for source in conversion.sources)
    reader = Reader(block for block in blocks() if block.reader == me)
    with reader, bar(total, "loading weights", shown=progress and ranks.leads) as advance:
        for block in blocks():
            values = reader.take(block) if block.reader == me else {}
            for name, kind in block.conversion.results.items():
                if name in places:
                    start, stop = block.rows_of(kind)
                    sender = ranks.members[block.reader]
                    delivery.hand_out(places[name], name, start, stop, values.get(name), sender)
            del values
            advance(block.nbytes)
    # Two votes: where reading failed, values are zeros and differ from others for that alone.
    return ranks.first_problem(reader.problem) or ranks.first_problem(delivery.problem())


@dataclass
class _Delivery:
    """Hands blocks out to the ranks of a node.

    Attributes:
        mesh: The mesh of all layouts.
        ranks: The ranks.
        unequal: Tied names whose values differ from what their tensor was filled with.
    """

    mesh: Mesh
    ranks: Ranks
    unequal: dict[str, str] = field(default_factory=dict)

    def hand_out(
        self,
        place: _Place,
        name: str,
        start: int,
        stop: int,
        value: torch.Tensor | None,
        sender: int,
    ) -> None:
        """Bring the rows from `start` to before `stop` of a tensor to the ranks that hold them.

        Args:
            place: The tensor.
            name: The name under which the checkpoint gives it here.
            start: The first row.
            stop: The row after the last one.
            value: The rows, on the rank that read them.
            sender: That rank.
        """
        ranks, kind = self.ranks, type_of(place.tensor)
        if value is not None:
            value = as_rows(value).to(kind.dtype).contiguous()
        if len(ranks.members) > 2 and place.layout.canonical(self.mesh).is_replicated:
            self._broadcast(place, name, Run(start, start, stop - start), value, sender)
            return
        for rank in ranks.members:
            if ranks.rank not in (rank, sender):
                continue
            held = clipped(runs(place.layout, kind, self.mesh, rank), start, stop)
            if not held:
                continue
            if value is None:
                part = self._target(place, name, held)
                dist.recv(as_bytes(part), sender, group=ranks.node)
                self._keep(place, name, held, part)
                continue
            part = piece(value, start, held, place.layout, self.mesh, rank)
            if rank == ranks.rank:
                self._keep(place, name, held, part)
            else:
                dist.send(as_bytes(part), rank, group=ranks.node)

    def problem(self) -> RolemeshError | None:
        """Refuses a checkpoint with different values for one tensor."""
        if not self.unequal:
            return None
        pairs = [f"{name} differs from {first}" for name, first in self.unequal.items()]
        return RolemeshError(
            "RM033",
            what="the checkpoint has different values for one tensor of the model",
            where=listed(pairs),
            why="the model's configuration ties these weights: it computes with one tensor",
            fix="set tie_word_embeddings=False in the configuration, or give the checkpoint that "
            "belongs to it; nothing is stored",
        )

    def _broadcast(
        self, place: _Place, name: str, run: Run, value: torch.Tensor | None, sender: int
    ) -> None:
        part = self._target(place, name, [run]) if value is None else value
        dist.broadcast(as_bytes(part), sender, group=self.ranks.node)
        self._keep(place, name, [run], part)

    def _target(self, place: _Place, name: str, held: Sequence[Run]) -> torch.Tensor:
        """Where to receive rows: in the shard itself, if they are to lie there one by one."""
        local = as_rows(place.local)
        if len(held) == 1 and name == place.name:
            return local.narrow(0, held[0].local, held[0].rows)
        return local.new_empty(sum(run.rows for run in held), *local.shape[1:])

    def _keep(self, place: _Place, name: str, held: Sequence[Run], part: torch.Tensor) -> None:
        rows = part.split([run.rows for run in held])
        for run, value in zip(held, rows, strict=True):
            own = as_rows(place.local).narrow(0, run.local, run.rows)
            if name == place.name:
                if own.data_ptr() != value.data_ptr():  # else it was received there
                    own.copy_(value)
            elif not torch.equal(as_bytes(own.contiguous()), as_bytes(value)):
                self.unequal[name] = place.name
