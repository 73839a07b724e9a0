"""Sharded Programs, and what their targets compiled, kept for the next process.

A sharded Program is one entry for all ranks; its key has the captured graph's key and what the
pipeline looks at. What a target compiled is an entry for each rank: whatever the target needs to
load it from its own files (`rolemesh.lowering.targets.Target.reload`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from rolemesh.compiler.cache.folder import CacheFolder
from rolemesh.compiler.cache.programs import (
    decode_entry,
    encode_entry,
    program_from,
    program_json,
)
from rolemesh.compiler.cache.state import inductor_state
from rolemesh.compiler.cache.text import NotCacheableError, digest, plain_text
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.program import Program, tensor_type
from rolemesh.compiler.ir.serial_values import Json, encode_placement, encode_size
from rolemesh.compiler.pipeline import ShardOptions
from rolemesh.compiler.sized import Values
from rolemesh.lowering.targets import Target
from rolemesh.runtime.groups import MeshGroups
from rolemesh.runtime.rank import RankProgram

__all__ = ["Kept", "Lowered", "rank_program"]


@dataclass(frozen=True)
class Lowered:
    """The place of what a target compiled for one rank.

    Attributes:
        folder: The cache.
        key: The key.
    """

    folder: CacheFolder
    key: str

    def load(self) -> Mapping[str, Json] | None:
        """What the target gave to keep."""
        content = self.folder.read("lowered", self.key)
        return None if content is None else decode_entry(content)[0]

    def save(self, data: Mapping[str, object]) -> None:
        """Keep what the target gave."""
        self.folder.write("lowered", self.key, encode_entry(cast(Mapping[str, Json], data)))


@dataclass(frozen=True)
class Kept:
    """The place of one sharded Program.

    Attributes:
        folder: The cache.
        key: The key.
    """

    folder: CacheFolder
    key: str

    @classmethod
    def of(
        cls,
        folder: CacheFolder,
        graph: str,
        options: ShardOptions,
        phase: str | None,
        stored: Mapping[int, Layout],
        program: Program,
    ) -> Kept:
        """The place of what `shard_program` makes of these arguments.

        Args:
            folder: The cache.
            graph: Key of the captured graph.
            options: The options.
            phase: The phase.
            stored: Layouts of inputs that live as shards already, by position.
            program: The captured Program, or that at plain sizes.

        Raises:
            NotCacheableError: For an option that has no text.
        """
        shapes: list[Json] = [
            [encode_size(size) for size in tensor_type(node).shape] for node in program.placeholders
        ]
        layouts: list[Json] = [
            [index, *map(encode_placement, layout.placements)]
            for index, layout in sorted(stored.items())
        ]
        told = json.dumps([shapes, layouts])
        return cls(folder, digest(graph, plain_text(options), plain_text(phase), told))

    def load(self) -> Program | None:
        """The Program, if it is there."""
        content = self.folder.read("sharded", self.key)
        if content is None:
            return None
        try:
            return program_from(decode_entry(content)[0])
        except ValueError as error:
            self.folder.refuse("sharded", self.key, str(error))
            return None

    def save(self, program: Program) -> None:
        """Keep the Program; one that cannot be written is not kept."""
        try:
            content = encode_entry(program_json(program))
        except TypeError:
            return
        self.folder.write("sharded", self.key, content)

    def lowered(
        self, target: Target, options: object, groups: MeshGroups, values: Values
    ) -> Lowered | None:
        """The place of what a target makes of the Program on this rank.

        Args:
            target: The target.
            options: Its options.
            groups: The process groups that collectives name.
            values: Values of the symbols of its sizes to compile by.

        Returns:
            The place; None if the target keeps nothing.
        """
        if target.reload is None:
            return None
        told = (target.name, options, groups.rank, groups.names, [*values.values()])
        try:
            return Lowered(self.folder, digest(self.key, plain_text(told), inductor_state()))
        except NotCacheableError:
            return None


def rank_program(
    program: Program,
    target: Target,
    options: object,
    groups: MeshGroups,
    values: Values,
    kept: Kept | None,
) -> RankProgram:
    """A sharded Program bound to this rank: as its target kept it, else lowered, and then kept.

    Args:
        program: The Program.
        target: The target.
        options: Its options.
        groups: The process groups of the Program's mesh.
        values: Values of the symbols of its sizes to compile by.
        kept: The place of the Program; None to keep nothing.
    """
    place = None if kept is None else kept.lowered(target, options, groups, values)
    saved = None if place is None else place.load()
    made = RankProgram(program, target, options, groups, values, saved)
    if place is not None and made.saved is not None and made.saved != saved:
        place.save(made.saved)
    return made
