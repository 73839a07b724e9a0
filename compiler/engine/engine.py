"""The serving engine's front door: a model, its slots and its programs for one role.

    engine = rolemesh.Engine(model, "pd_mixed", {"tp": 4})
    tokens = engine.generate([[1, 2, 3], [4, 5]], max_new_tokens=16)

docs/engine.md says how to use it. Its parts: `ServingModel` is what is compiled, `Programs` finds
or makes the program of a call, `CacheRows` holds the cache tensors, `Replica` runs the phases over
slots, and `Scheduler` serves a queue of requests.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from rolemesh.compiler.engine.masks import configuration
from rolemesh.compiler.engine.programs import ProgramKey, ProgramOptions, Programs
from rolemesh.compiler.engine.rehearsal import rehearse
from rolemesh.compiler.engine.replica import Replica, TokenRows
from rolemesh.compiler.engine.rows import CacheRows, SlotState
from rolemesh.compiler.engine.sampling import Sampling
from rolemesh.compiler.engine.scheduler import Completion, Request, Scheduler
from rolemesh.compiler.engine.serving import ServingModel
from rolemesh.compiler.engine.setup import check_counts, check_length, model_to_serve, replica_of
from rolemesh.compiler.engine.sizes import Sizes, decode_buckets, prefill_lengths
from rolemesh.compiler.ir.program import Program
from rolemesh.compiler.ir.spec import P
from rolemesh.compiler.models.families import require_transformers
from rolemesh.compiler.pipeline import MeshLike, ShardOptions, as_mesh
from rolemesh.compiler.roles import role_named
from rolemesh.passes.cost import CostTable
from rolemesh.passes.seed import Tokens
from rolemesh.runtime.checkpoint.hub import HubNaming
from rolemesh.runtime.checkpoint.load import fill_from_checkpoint, load_checkpoint
from rolemesh.runtime.config import Torchrun
from rolemesh.runtime.groups import MeshGroups, groups_for
from rolemesh.runtime.rank import process_watch
from rolemesh.runtime.store import default_store

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["Engine"]


class Engine:
    """Serves a causal language model of `transformers` on the ranks of a mesh.

    With a process group, or under torchrun, this process is one rank: every rank makes the same
    calls, and holds its shards only. Otherwise all ranks of the mesh run in this process in
    lock-step, which is for tests and for trying things out: it needs as much memory as the whole
    model, and is slow.

    Axes of the mesh other than the role's are replicas: each serves requests of its own.

    Args:
        model: The model, whose weights become shards; or its configuration, and the weights come
            from `checkpoint`.
        role: `pd_mixed`, `prefill` or `decode`.
        mesh: Axis sizes by name, a Mesh or a DeviceMesh.
        target: What programs are compiled to, as in `rolemesh.lower`; `eager` or `ge` in lock-step.
        checkpoint: A safetensors file or folder, for a model given by its configuration.
        dtype: Data type of a model given by its configuration; by default what that says.
        device: Device of a model given by its configuration.
        slots: Requests that each replica holds at a time.
        max_len: Tokens, of prompt and answer, that a slot holds.
        buckets: Numbers of rows that decode programs are made for: multiples of the ranks that
            share a batch. By default doubled from the least one up to all slots.
        prefill_sizes: Numbers of tokens that prefill programs are made for. Prompts are padded to
            the next one, and longer ones are read in chunks of the largest. By default one program
            serves any number; for the target `ge`, and for models with layers that keep states,
            there is one for each power of two.
        prefill_chunk: Most tokens of a prompt that are read in one call; by default all.
        axis: Mesh axis the role uses; by default `tp`, else the last one.
        annotations: `P` by name pattern of parameters, buffers and inputs; overrides the role.
        costs: Prices of collectives.
        prefetch: Layers ahead that broadcasts of layer-sharded weights start.
        target_options: The target's options.

    Raises:
        RolemeshError: For options that do not fit (RM001 to RM003, RM015, RM018), a model that
            cannot be served (RM007), and what loading a checkpoint raises.
    """

    def __init__(
        self,
        model: torch.nn.Module | PreTrainedConfig,
        role: str,
        mesh: MeshLike,
        target: str = "eager",
        *,
        checkpoint: str | os.PathLike[str] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        slots: int = 8,
        max_len: int = 256,
        buckets: Sequence[int] | None = None,
        prefill_sizes: Sequence[int] | None = None,
        prefill_chunk: int | None = None,
        axis: str | None = None,
        annotations: Mapping[str, P] | None = None,
        costs: CostTable | None = None,
        prefetch: int | None = None,
        target_options: Mapping[str, object] | None = None,
    ) -> None:
        require_transformers("rolemesh.Engine")
        from rolemesh.compiler.engine.view import plan_cache

        self.mesh = as_mesh(mesh)
        self.role = role_named(role)
        known = ShardOptions(self.mesh, role, axis, annotations or {})
        ranks = self.mesh.sizes[self.mesh.index(known.role_axis)]
        check_counts(slots=slots, max_len=max_len, prefill_chunk=prefill_chunk or max_len)
        rows_unit = ranks if Tokens.BATCH in self.role.phases.values() else 1
        allowed_buckets = decode_buckets(buckets, slots, rows_unit)
        in_lockstep = not dist.is_initialized() and Torchrun.read() is None
        groups: MeshGroups | None = None
        if not in_lockstep:
            groups = groups_for(mesh if isinstance(mesh, DeviceMesh) else self.mesh)
        self._groups = groups
        self.model = model_to_serve(
            model, checkpoint, dtype, torch.device(device), ghosts=not in_lockstep
        )
        text = configuration(self.model)
        check_length(text, max_len)
        serving = ServingModel(self.model, max_len)
        continues = rehearse(self.model)
        self.plan = plan_cache(self.model, slots, max_len)
        exact = self.plan.has_states
        # GE graphs have fixed shapes, and layers with states take no pads.
        any_length = prefill_sizes is None and not exact and target in ("eager", "inductor")
        lengths = () if any_length else prefill_lengths(prefill_sizes, max_len, exact)
        most = min(prefill_chunk or max_len, lengths[-1] if lengths else max_len)
        sizes = Sizes(allowed_buckets, lengths, most, exact, continues is True)
        where = next(self.model.parameters()).device
        self._checkpoint = None if in_lockstep else checkpoint
        self._programs = Programs(
            serving,
            ProgramOptions(
                mesh=mesh,
                role=role,
                axis=known.role_axis,
                target=target,
                target_options=target_options,
                annotations=known.annotations,
                costs=costs,
                prefetch=prefetch,
                in_lockstep=in_lockstep,
                any_length=any_length,
            ),
            self._place,
        )
        count = self.mesh.size // ranks
        self._replica_here = replica_of(self.mesh, known.role_axis, groups)
        self.replicas = tuple(
            Replica(
                self._programs,
                CacheRows(self.plan, where, groups, known.role_axis),
                sizes,
                self.role,
                text.vocab_size,
                where,
            )
            for _ in range(count if in_lockstep else 1)
        )
        self._count = count
        self._schedulers = tuple(Scheduler(replica) for replica in self.replicas)
        self._submitted = 0
        self._finished: list[Completion] = []
        if checkpoint is not None and in_lockstep:
            tensors = self.model.state_dict(keep_vars=True)
            fill_from_checkpoint(checkpoint, tensors, naming=HubNaming(self.model))
        elif not in_lockstep:
            # Layouts are known once a program is: weights and caches then get their shards.
            first = self.replicas[0]
            phase, batch, fresh = first.smallest_call()
            self._programs.prepare(
                phase, batch, first.rows.tables, fresh=fresh, last=phase == "prefill"
            )

    # ------------------------------------------------------------------------------ weights

    def _place(self, program: Program, inputs: list[torch.Tensor]) -> None:
        """Give what a new Program reads its bytes on this rank."""
        self.replicas[0].rows.place(program, inputs)
        if self._checkpoint is None:
            return
        path, self._checkpoint = self._checkpoint, None
        tensors = self.model.state_dict(keep_vars=True)
        names = {id(tensor): name for name, tensor in tensors.items()}
        layouts = {
            names[id(tensor)]: program.layout(node)
            for node, tensor in zip(program.placeholders, inputs, strict=True)
            if id(tensor) in names
        }
        load_checkpoint(
            path, tensors, layouts, self.mesh, default_store(), naming=HubNaming(self.model)
        )

    # ------------------------------------------------------------------------------- slots

    @property
    def compiled(self) -> tuple[ProgramKey, ...]:
        """What programs were compiled for, in order. A replay compiles nothing."""
        return tuple(self._programs.made)

    @property
    def free_slots(self) -> int:
        """Number of slots that no request has, in the first replica of this process."""
        return self.replicas[0].free_slots

    @property
    def bytes_on_this_rank(self) -> tuple[int, int]:
        """Bytes of weights and of caches that this process holds."""
        tensors = {id(t): t for t in (*self.model.parameters(), *self.model.buffers())}
        store = default_store()
        weights = 0
        for tensor in tensors.values():
            stored = store.find(tensor)
            weights += (tensor if stored is None else stored.local).untyped_storage().nbytes()
        return weights, sum(replica.rows.bytes for replica in self.replicas)

    def acquire(self) -> int:
        """Take a free slot; see `Replica.acquire`."""
        return self.replicas[0].acquire()

    def release(self, slot: int) -> None:
        """Give a slot back; see `Replica.release`."""
        self.replicas[0].release(slot)

    def length(self, slot: int) -> int:
        """Number of tokens in a slot."""
        return self.replicas[0].length(slot)

    def truncate(self, slot: int, length: int) -> None:
        """Forget the tokens of a slot from `length` on; see `Replica.truncate`."""
        self.replicas[0].truncate(slot, length)

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Start a slot with the first tokens of another one; see `Replica.copy_prefix`."""
        self.replicas[0].copy_prefix(source, target, length)

    def export_slot(self, slot: int) -> SlotState:
        """A copy of what a slot holds; see `Replica.export_slot`."""
        return self.replicas[0].export_slot(slot)

    def import_slot(self, state: SlotState) -> int:
        """Take a free slot and fill it with an export; see `Replica.import_slot`."""
        return self.replicas[0].import_slot(state)

    # ------------------------------------------------------------------------------ phases

    def prefill(
        self,
        tokens: TokenRows,
        slots: int | Sequence[int],
        *,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Read tokens into slots of the first replica here; see `Replica.prefill`."""
        return self.replicas[0].prefill(
            tokens, slots, attention_mask=attention_mask, position_ids=position_ids
        )

    def decode(
        self,
        tokens: TokenRows,
        slots: int | Sequence[int],
        *,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Decode one step of slots of the first replica here; see `Replica.decode`."""
        return self.replicas[0].decode(tokens, slots, position_ids=position_ids)

    # ---------------------------------------------------------------------------- requests

    def submit(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        *,
        eos: int | Collection[int] | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> int:
        """Queue a request. Replicas take turns; every rank submits all requests in one order.

        Args:
            prompt: Token ids.
            max_new_tokens: Most tokens to generate.
            eos: Token ids that end the generation, and are part of the result; None for those of
                the model's configuration.
            temperature: Logits are divided by it; 0 takes the likeliest token.
            top_k: Draw from this many likeliest tokens; 0 for all.
            top_p: Draw from the likeliest tokens that have this much probability together.
            seed: Seed of the request's own random numbers.

        Returns:
            The request's number, which its `Completion` has.

        Raises:
            RolemeshError: RM034 for a request that can never be served, RM018 for sampling options
                out of range, RM004 if the role does not run both phases.
        """
        request = Request(
            tuple(prompt),
            max_new_tokens,
            self._stop_tokens(eos),
            Sampling(temperature, top_k, top_p, seed),
        )
        self._schedulers[0].check(request)
        return self._add(request)

    def step(self) -> list[Completion]:
        """Let waiting requests into free slots and decode one token of each that runs.

        Returns:
            Requests of this process's replicas that are finished since the last call.
        """
        done, self._finished = self._finished, []
        for scheduler in self._schedulers:
            done.extend(scheduler.step())
        return done

    @property
    def busy(self) -> bool:
        """Whether a replica of this process has a request that is not finished."""
        return any(scheduler.busy for scheduler in self._schedulers)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        eos: int | Collection[int] | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[list[int]]:
        """Generate from prompts, on all replicas. Every rank makes the call with all prompts.

        Args:
            prompts: Token ids of each.
            max_new_tokens: As for `submit`.
            eos: As for `submit`.
            temperature: As for `submit`.
            top_k: As for `submit`.
            top_p: As for `submit`.
            seed: Seed of the first prompt; each further one has the next.

        Returns:
            The new tokens of each prompt, on every rank.

        Raises:
            RolemeshError: As for `submit`, before anything is generated.
        """
        stop = self._stop_tokens(eos)
        requests = [
            Request(
                tuple(prompt), max_new_tokens, stop, Sampling(temperature, top_k, top_p, seed + n)
            )
            for n, prompt in enumerate(prompts)
        ]
        for request in requests:
            self._schedulers[0].check(request)
        numbers = [self._add(request) for request in requests]
        waiting = {number for number in numbers if self._here(number) is not None}
        found: dict[int, list[int]] = {}
        others: list[Completion] = []
        while waiting:
            for completion in self.step():
                if completion.number in waiting:
                    waiting.remove(completion.number)
                    found[completion.number] = list(completion.tokens)
                else:
                    others.append(completion)
        self._finished.extend(others)
        found = self._gathered(found)
        return [found[number] for number in numbers]

    def _add(self, request: Request) -> int:
        number = self._submitted
        self._submitted += 1
        scheduler = self._here(number)
        if scheduler is not None:
            scheduler.add(number, request)
        return number

    def _here(self, number: int) -> Scheduler | None:
        """The scheduler that serves a request; None if it is another process's."""
        replica = number % self._count
        if self._groups is None:
            return self._schedulers[replica]
        return self._schedulers[0] if replica == self._replica_here else None

    def _gathered(self, found: dict[int, list[int]]) -> dict[int, list[int]]:
        """What all replicas generated."""
        if self._groups is None or self._count == 1:
            return found
        parts: list[dict[int, list[int]]] = [{} for _ in range(self.mesh.size)]
        with process_watch().guard():
            dist.all_gather_object(parts, found)
        return {number: tokens for part in parts for number, tokens in part.items()}

    def _stop_tokens(self, eos: int | Collection[int] | None) -> frozenset[int]:
        if eos is None:
            generation = getattr(self.model, "generation_config", None)
            eos = getattr(generation, "eos_token_id", None)
        if eos is None:
            return frozenset()
        return frozenset([eos] if isinstance(eos, int) else eos)
