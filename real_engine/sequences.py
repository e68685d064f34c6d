"""What the data plane remembers between steps: each request's tokens and block table. Data plane; state path."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lab.control.plan import Compaction, StepPlan, Work
from lab.control.request import Request, RequestId, SamplingParams
from lab.errors import ExecutorError
from real_engine.attention.backend import IntArray, PackedBatch
from real_engine.penalties import Adjustment


@dataclass(slots=True)
class _Sequence:
    request: Request
    tokens: IntArray
    """int64, room for prompt and all output; `known` are filled."""
    known: int
    table: IntArray
    """int32, room for all blocks; `held` are filled."""
    held: int = 0
    active: bool = False
    context: int = 0
    """Tokens of KV that the table holds once the step is done."""
    dropped: int = 0
    """Tokens whose KV compression gave up; the table holds the rest side by side."""


class Sequences:
    """All requests the data plane knows. Turns a plan into a `PackedBatch`, checking it on the way."""

    def __init__(self, *, blocks: int, block_size: int, max_context: int, vocab_size: int) -> None:
        self._blocks, self._block_size = blocks, block_size
        self._max_context, self._vocab_size = max_context, vocab_size
        self._known: dict[RequestId, _Sequence] = {}
        self._adjusted: dict[RequestId, Adjustment] = {}
        """Of those that have penalties and the like."""

    def __len__(self) -> int:
        return len(self._known)

    def apply(self, plan: StepPlan) -> None:
        """Requests that lost their blocks, left, came, and got a fresh table, in this order.

        A request can lose its blocks and leave in one step, when a policy preempts and rejects it.
        """
        for name, how in plan.preempted:
            sequence = self._find(name, plan, "preempts")
            sequence.active, sequence.held = False, 0
            sequence.dropped = sequence.dropped if how == "swap" else 0
        for name in plan.released:
            self._known.pop(name, None)
            self._adjusted.pop(name, None)
        for request in plan.new:
            self._known[request.id] = self._enter(request, plan)
        for name in plan.admitted:
            sequence = self._find(name, plan, "admits")
            sequence.active, sequence.held = True, 0

    def pack(self, plan: StepPlan) -> tuple[PackedBatch, list[RequestId], list[SamplingParams], list[int]]:
        """The plan's tokens as one batch, tables extended; and in plan order, of the requests that sample: names,
        parameters, and the positions that the drawn tokens will have."""
        work = plan.work
        sequences = [self._extend(item, plan) for item in work]
        if len({item.request for item in work}) < len(work):
            raise ExecutorError(f"step {plan.index} has two work items of one request")
        size, count = self._block_size, len(work)
        lengths = np.fromiter((item.tokens for item in work), np.int64, count)
        starts = np.fromiter((item.start for item in work), np.int64, count)
        dropped = np.fromiter((item.dropped for item in work), np.int64, count)
        contexts = starts + lengths - dropped
        ends = np.cumsum(lengths)
        firsts = ends - lengths
        needed = -(-contexts // size)
        table = np.zeros((count, int(needed.max())), np.int32)
        for row, (sequence, used) in enumerate(zip(sequences, needed.tolist(), strict=True)):
            table[row, :used] = sequence.table[:used]
        token_ids = np.concatenate(
            [s.tokens[w.start : w.start + w.tokens] for s, w in zip(sequences, work, strict=True)]
        )
        owner = np.repeat(np.arange(count), lengths)
        positions = np.arange(int(ends[-1])) - firsts[owner] + starts[owner]
        places = positions - dropped[owner]
        samples = np.fromiter((item.samples for item in work), np.bool_, count)
        cu_seqlens = np.zeros(count + 1, np.int32)
        cu_seqlens[1:] = ends
        batch = PackedBatch(
            token_ids=token_ids,
            positions=positions,
            cu_seqlens_q=cu_seqlens,
            seqlens_k=contexts.astype(np.int32),
            block_table=table,
            slot_mapping=table[owner, places // size].astype(np.int64) * size + places % size,
            sample_rows=(ends - 1)[samples],
        )
        drawn = [sequence for item, sequence in zip(work, sequences, strict=True) if item.samples]
        names = [sequence.request.id for sequence in drawn]
        return batch, names, [sequence.request.sampling for sequence in drawn], [s.known for s in drawn]

    def adjustments(self, names: Sequence[RequestId]) -> dict[int, Adjustment]:
        """By row, what changes the logits of those of `names` that are not drawn from as they are."""
        if not self._adjusted:
            return {}
        return {row: self._adjusted[name] for row, name in enumerate(names) if name in self._adjusted}

    def append(self, name: RequestId, token: int) -> None:
        """A generated token becomes known."""
        sequence = self._known[name]
        if self._adjusted and name in self._adjusted:
            self._adjusted[name].append(token)
        if sequence.known < len(sequence.tokens):  # the last one of all is never fed back
            sequence.tokens[sequence.known] = token
        sequence.known += 1

    def table(self, name: RequestId) -> tuple[IntArray, int]:
        """Its cache blocks, in order, and how many tokens they hold."""
        sequence = self._known[name]
        return sequence.table[: sequence.held], sequence.context

    def compact(self, item: Compaction, plan: StepPlan) -> None:
        """The blocks that a compaction gives up leave the table, which closes over them."""
        sequence = self._find(item.request, plan, "compacts")
        end = item.sinks + len(item.blocks)
        if tuple(sequence.table[item.sinks : min(end, sequence.held)].tolist()) != item.blocks:
            raise ExecutorError(
                f"step {plan.index}, request '{item.request}': gives up blocks {item.blocks}, which aren't those "
                f"of its table from {item.sinks} on"
            )
        sequence.table[item.sinks : sequence.held - len(item.blocks)] = sequence.table[
            end : sequence.held
        ].copy()
        sequence.held -= len(item.blocks)
        sequence.dropped += item.tokens

    def _enter(self, request: Request, plan: StepPlan) -> _Sequence:
        prompt = request.prompt.token_ids(self._vocab_size)
        room = len(prompt) + request.output_limit - 1
        tokens = np.zeros(room, np.int64)
        tokens[: len(prompt)] = prompt
        for token in (min(prompt), max(prompt)):
            if not 0 <= token < self._vocab_size:
                raise ExecutorError(
                    f"step {plan.index}: the prompt of request '{request.id}' has token id {token}; expected ids "
                    f"within 0 .. {self._vocab_size - 1}"
                )
        if Adjustment.needed(request):
            self._adjusted[request.id] = Adjustment(request, prompt, self._vocab_size)
        return _Sequence(request, tokens, len(prompt), np.zeros(-(-room // self._block_size), np.int32))

    def _find(self, name: RequestId, plan: StepPlan, verb: str) -> _Sequence:
        sequence = self._known.get(name)
        if sequence is None:
            raise ExecutorError(
                f"step {plan.index} {verb} request '{name}', and '{name}' is unknown to the data plane"
            )
        return sequence

    def _extend(self, item: Work, plan: StepPlan) -> _Sequence:
        """Append a work item's blocks to its table, and see that the work can be done."""
        sequence = self._find(item.request, plan, "works on")
        where = f"step {plan.index}, request '{item.request}'"
        if not sequence.active:
            raise ExecutorError(f"{where}: work on a request that isn't admitted")
        new = len(item.blocks)
        if new:
            if min(item.blocks) < 0 or max(item.blocks) >= self._blocks:
                raise ExecutorError(
                    f"{where}: block ids {item.blocks} aren't all within 0 .. {self._blocks - 1}"
                )
            if sequence.held + new > len(sequence.table):  # more than its tokens need: odd, but no harm
                sequence.table = np.concatenate((sequence.table, np.zeros(new, np.int32)))
            sequence.table[sequence.held : sequence.held + new] = item.blocks
            sequence.held += new
        end = item.start + item.tokens
        if item.tokens < 1 or item.start < 0 or end > sequence.known:
            raise ExecutorError(
                f"{where}: to compute tokens {item.start} .. {end} of {sequence.known} known ones"
            )
        if item.dropped != sequence.dropped:
            raise ExecutorError(
                f"{where}: {item.dropped} tokens are said to be dropped, and {sequence.dropped} are"
            )
        if item.context > sequence.held * self._block_size:
            raise ExecutorError(
                f"{where}: its table holds {sequence.held} blocks of {self._block_size} tokens; the work reaches "
                f"{end}"
            )
        if item.samples and end != sequence.known:
            raise ExecutorError(f"{where}: samples after token {end}, but {sequence.known} tokens are known")
        if end > self._max_context:
            raise ExecutorError(
                f"{where}: the work reaches token {end}; the model's longest context is {self._max_context}"
            )
        sequence.context = item.context
        return sequence
