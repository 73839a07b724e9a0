"""One replica: slots with their tokens, and the two phases over them.

Invariants:

* A call is checked as a whole before anything changes, so that a refused one leaves no trace.
* A slot's length counts the tokens whose keys are in the cache; the next token goes to that place.
* Pads of a call are at the front of a row, so that the last token of every row is the last column.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch

from rolemesh.compiler.engine.cache import Batch, Tables
from rolemesh.compiler.engine.rows import CacheRows, SlotState
from rolemesh.compiler.engine.sizes import Sizes
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.roles import Role

__all__ = ["Replica", "Runs", "TokenRows"]

TokenRows = torch.Tensor | Sequence[int] | Sequence[Sequence[int]]
"""Token ids of one request, `[tokens]`, or of several, `[rows, tokens]` or a list of lists."""


@dataclass
class _Slot:
    """A slot in use: its tokens, and the position id of the next one."""

    length: int = 0
    position: int = 0


@dataclass
class _Row:
    """What one request does in a call."""

    slot: int
    tokens: list[int]
    positions: list[int]
    place: int


class Runs(Protocol):
    """Runs batches: the engine's programs, or the model itself."""

    def __call__(
        self, phase: str, batch: Batch, tables: Tables, *, fresh: bool, last: bool
    ) -> torch.Tensor:
        """Logits of a batch; the tables get its tokens."""


class Replica:
    """The slots of one replica.

    Args:
        programs: Runs the calls.
        rows: The replica's cache tensors.
        sizes: Sizes of calls.
        role: The engine's role.
        vocabulary: Number of token ids.
        device: Where programs take their inputs.
    """

    def __init__(
        self,
        programs: Runs,
        rows: CacheRows,
        sizes: Sizes,
        role: Role,
        vocabulary: int,
        device: torch.device,
    ) -> None:
        self.programs = programs
        self.rows = rows
        self.plan = rows.plan
        self.sizes = sizes
        self.role = role
        self.vocabulary = vocabulary
        self.device = device
        self._slots: dict[int, _Slot] = {}

    def smallest_call(self) -> tuple[str, Batch, bool]:
        """The phase of the role's smallest call, a batch of pads, and whether it is fresh."""
        if "decode" in self.role.phases:
            return "decode", self._batch([], self.sizes.buckets[0], 1), not self.plan.has_states
        return "prefill", self._batch([], 1, self.sizes.padded(1)), True

    # ------------------------------------------------------------------------------- slots

    @property
    def free_slots(self) -> int:
        """Number of slots that no request has."""
        return self.plan.slots - len(self._slots)

    def acquire(self) -> int:
        """Take a free slot and empty it.

        Raises:
            RolemeshError: RM034 if every slot is taken.
        """
        free = [slot for slot in range(self.plan.slots) if slot not in self._slots]
        if not free:
            raise _refused(
                f"all {self.plan.slots} slots are taken",
                "a request keeps its slot until it is released",
                "release a slot, or make the engine with more slots",
            )
        # Masks hide what an earlier request left, but not values that are no numbers.
        self.rows.clear(free[0])
        self._slots[free[0]] = _Slot()
        return free[0]

    def release(self, slot: int) -> None:
        """Give a slot back.

        Raises:
            RolemeshError: RM034 if it is not taken.
        """
        self._slot(slot)
        del self._slots[slot]

    def length(self, slot: int) -> int:
        """Number of tokens in a slot."""
        return self._slot(slot).length

    def truncate(self, slot: int, length: int) -> None:
        """Forget the tokens of a slot from `length` on, such as drafts that were not accepted.

        Raises:
            RolemeshError: RM034 if the slot is not taken or holds fewer tokens, or if the model
                keeps states, which cannot go back.
        """
        found = self._slot(slot)
        if not 0 <= length <= found.length:
            raise _refused(
                f"slot {slot} cannot be cut to {length} tokens",
                f"it holds {found.length}",
                "pass a length between 0 and that",
            )
        if length == found.length:
            return
        self._no_states("cut a slot")
        found.position -= found.length - length
        found.length = length

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Start a slot with the first tokens of another one.

        Args:
            source: The slot to copy from.
            target: The slot to fill, which must be empty.
            length: Number of tokens.

        Raises:
            RolemeshError: RM034 if a slot is not taken, the target is not empty, the source holds
                fewer tokens, or the model keeps states, which belong to the last token only.
        """
        origin, found = self._slot(source), self._slot(target)
        if found.length:
            raise _refused(
                f"slot {target} already holds {found.length} tokens",
                "a prefix is what a request starts with",
                "copy into a slot that was just acquired",
            )
        if not 0 <= length <= origin.length:
            raise _refused(
                f"slot {source} has no prefix of {length} tokens",
                f"it holds {origin.length}",
                "pass a length between 0 and that",
            )
        if length < origin.length:
            self._no_states("copy a part of a slot")
        self.rows.copy(source, target, length)
        found.length = length
        found.position = origin.position - (origin.length - length)

    def export_slot(self, slot: int) -> SlotState:
        """A copy of what a slot holds, whole. All ranks of the replica must make the call."""
        found = self._slot(slot)
        return SlotState(found.length, found.position, self.rows.read(slot, found.length))

    def import_slot(self, state: SlotState) -> int:
        """Take a free slot and fill it with what another engine of the same model exported.

        Raises:
            RolemeshError: RM034 if no slot is free or the tokens do not fit.
        """
        if state.length > self.plan.max_len or state.tensors.keys() != self.plan.tensors.keys():
            raise _refused(
                f"a slot state of {state.length} tokens does not fit",
                f"slots hold {self.plan.max_len} tokens in {', '.join(self.plan.tensors)}",
                "import what an engine of the same model exported",
            )
        slot = self.acquire()
        self.rows.write(slot, state.tensors, state.length)
        self._slots[slot] = _Slot(state.length, state.position)
        return slot

    def _slot(self, slot: int) -> _Slot:
        if slot not in self._slots:
            raise _refused(
                f"unknown slot {slot}",
                f"the slots taken are {sorted(self._slots) or 'none'}",
                "acquire a slot first",
            )
        return self._slots[slot]

    def _no_states(self, what: str) -> None:
        if self.plan.has_states:
            raise _refused(
                f"cannot {what} of this model",
                "some of its layers keep a state of all tokens so far, not one entry per token",
                "read the tokens again in another slot",
            )

    # ------------------------------------------------------------------------------ phases

    def prefill(
        self,
        tokens: TokenRows,
        slots: int | Sequence[int],
        *,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Read tokens of one or more requests into their slots, after what these hold already.

        Args:
            tokens: Token ids of each request; `[rows, tokens]` if there is a mask.
            slots: The slot of each.
            attention_mask: `[rows, tokens]`, 0 where `tokens` has a pad, on any side.
            position_ids: `[rows, tokens]`; by default each row counts on from its slot.

        Returns:
            Logits of the last token of each request, `[rows, vocabulary]`.

        Raises:
            RolemeshError: RM004 if the role does not prefill; RM034 for an empty prompt, a bad
                token id, an unknown slot, or tokens that do not fit in the cache.
        """
        self.role.tokens("prefill")
        rows = self._rows(tokens, slots, attention_mask, position_ids)
        logits: dict[int, torch.Tensor] = {}
        while rows:
            calls: dict[tuple[int, bool], list[_Row]] = {}
            for row in rows:
                size = self.sizes.chunk(len(row.tokens), fresh=row.place == 0)
                taken = _Row(row.slot, row.tokens[:size], row.positions[:size], row.place)
                row.tokens, row.positions = row.tokens[size:], row.positions[size:]
                row.place += size
                # Rows of other lengths share a call, unless pads or a missing state would matter.
                key = (size, taken.place == 0) if self.sizes.exact else (0, True)
                calls.setdefault(key, []).append(taken)
            for (_, fresh), together in calls.items():
                width = self.sizes.padded(max(len(row.tokens) for row in together))
                found = self._run("prefill", together, len(together), width, fresh, last=True)
                logits.update({row.slot: found[index, -1] for index, row in enumerate(together)})
            rows = [row for row in rows if row.tokens]
        order = [slots] if isinstance(slots, int) else slots
        return torch.stack([logits[slot] for slot in order])

    def decode(
        self,
        tokens: TokenRows,
        slots: int | Sequence[int],
        *,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run one step of one or more requests: the token chosen last, and any drafts after it.

        Args:
            tokens: `[rows, 1 + drafts]` token ids, or one request's.
            slots: The slot of each row.
            position_ids: Of the shape of `tokens`; by default each row counts on.

        Returns:
            Logits after each token, `[rows, 1 + drafts, vocabulary]`. The slots hold all tokens:
            `truncate` those whose drafts are not accepted.

        Raises:
            RolemeshError: RM004 if the role does not decode; RM034 as for `prefill`, and for rows
                of different lengths or slots without tokens.
        """
        self.role.tokens("decode")
        rows = self._rows(tokens, slots, None, position_ids)
        widths = {len(row.tokens) for row in rows}
        if len(widths) > 1:
            raise _refused(
                f"rows of {sorted(widths)} tokens in one decode call",
                "a decode program has one number of drafts",
                "decode requests with as many drafts together",
            )
        empty = [row.slot for row in rows if row.place == 0]
        if empty:
            raise _refused(
                f"slot {empty[0]} holds no tokens",
                "a decode step goes on after a prompt",
                "prefill the slot, or import it, first",
            )
        (width,) = widths
        most = self.sizes.buckets[-1]
        results = []
        for start in range(0, len(rows), most):
            together = rows[start : start + most]
            bucket = self.sizes.bucket(len(together))
            fresh = not self.plan.has_states
            results.append(
                self._run("decode", together, bucket, width, fresh, last=False)[: len(together)]
            )
        return torch.cat(results)

    def _run(
        self, phase: str, rows: list[_Row], count: int, width: int, fresh: bool, *, last: bool
    ) -> torch.Tensor:
        batch = self._batch(rows, count, width)
        logits = self.programs(phase, batch, self.rows.tables, fresh=fresh, last=last)
        for row in rows:
            found = self._slots[row.slot]
            found.length = row.place + len(row.tokens)
            found.position = row.positions[-1] + 1
        return logits

    def _batch(self, rows: list[_Row], count: int, width: int) -> Batch:
        scratch = self.plan.scratch
        columns: dict[str, list[list[int]]] = {name: [] for name in ("ids", "at", "place", "row")}
        for row in rows:
            pads = width - len(row.tokens)
            columns["ids"].append([0] * pads + row.tokens)
            columns["at"].append([0] * pads + row.positions)
            places = range(row.place, row.place + len(row.tokens))
            columns["place"].append([0] * pads + list(places))
            columns["row"].append([scratch] * pads + [row.slot] * len(row.tokens))
        for name, column in columns.items():
            fill = scratch if name == "row" else 0
            column.extend([fill] * width for _ in range(count - len(rows)))
        slots = [row.slot for row in rows] + [scratch] * (count - len(rows))
        tensors = [
            torch.tensor(values, device=self.device) for values in (*columns.values(), slots)
        ]
        return Batch._make(tensors)

    # ------------------------------------------------------------------------------ checks

    def check_tokens(self, tokens: Sequence[int]) -> None:
        """Refuse an empty prompt or an id that is no token.

        Raises:
            RolemeshError: RM034.
        """
        if not tokens:
            raise _refused("the prompt is empty", "there is nothing to go on from", "pass a token")
        for token in tokens:
            if not 0 <= token < self.vocabulary:
                raise _refused(
                    f"bad token id {token}",
                    f"the model has {self.vocabulary} tokens",
                    f"pass ids from 0 to {self.vocabulary - 1}",
                )

    def _rows(
        self,
        tokens: TokenRows,
        slots: int | Sequence[int],
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
    ) -> list[_Row]:
        order = [slots] if isinstance(slots, int) else list(slots)
        listed = _lists(tokens)
        keep = None if attention_mask is None else _lists(attention_mask)
        given = None if position_ids is None else _lists(position_ids)
        for name, other in (("attention_mask", keep), ("position_ids", given)):
            if other is not None and [len(row) for row in other] != [len(row) for row in listed]:
                raise _refused(
                    f"{name} and tokens have different shapes",
                    "each token has an entry of its own",
                    "pass them with the same shape",
                )
        if len(listed) != len(order) or len(set(order)) < len(order):
            raise _refused(
                f"{len(listed)} rows of tokens for slots {order}",
                "each row has a slot of its own",
                "pass as many different slots as rows",
            )
        rows = []
        for index, slot in enumerate(order):
            found = self._slot(slot)
            kept = [n for n in range(len(listed[index])) if keep is None or keep[index][n]]
            ids = [listed[index][n] for n in kept]
            self.check_tokens(ids)
            if found.length + len(ids) > self.plan.max_len:
                raise _refused(
                    f"{len(ids)} tokens do not fit in slot {slot}",
                    f"it holds {found.length} of {self.plan.max_len} tokens",
                    "make the engine with a longer max_len",
                )
            positions = (
                list(range(found.position, found.position + len(ids)))
                if given is None
                else [given[index][n] for n in kept]
            )
            rows.append(_Row(slot, ids, positions, found.length))
        return rows


def _lists(values: TokenRows) -> list[list[int]]:
    plain = values.tolist() if isinstance(values, torch.Tensor) else list(values)
    if not plain or isinstance(plain[0], int):
        return [cast("list[int]", plain)]
    return [list(row) for row in cast("list[Sequence[int]]", plain)]


def _refused(what: str, why: str, fix: str) -> RolemeshError:
    return RolemeshError("RM034", what, where="rolemesh.Engine", why=why, fix=fix)
