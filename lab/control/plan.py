"""The values that cross the boundary: `StepPlan` down, `StepResult` up. State path.

They are the trace record, the replay format and the wire format in one, so they are frozen and hold
nothing but plain values. `digest` chains every plan to all earlier ones: two runs took the same decisions
up to step n exactly when their digests at n are equal. The digest covers decisions, never times.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from functools import cache, lru_cache
from hashlib import blake2b

from lab.control.request import BlockId, Request, RequestId
from lab.frozen import frozen

GENESIS = "0" * 32
"""The digest before the first plan."""


@frozen
class Work:
    """Compute tokens `start .. start + tokens` of one request.

    `blocks` are the KV blocks this step appends to the request's table (a table begins empty when the
    request is in `StepPlan.admitted`, with `cached` leading blocks that already hold their content).
    `samples` is true when the last of these tokens is the last known one, so the step yields the next.
    """

    request: RequestId
    start: int
    tokens: int
    samples: bool
    blocks: tuple[BlockId, ...] = ()
    dropped: int = 0
    """Earlier tokens whose KV compression has dropped: their places in the table are closed over."""

    @property
    def context(self) -> int:
        """Tokens that the last of these attends to, itself included."""
        return self.start + self.tokens - self.dropped


@frozen
class Move:
    """Copy KV of one request between device and host: (device block, host block) for each block."""

    request: RequestId
    pairs: tuple[tuple[BlockId, int], ...]


@frozen
class Decoding:
    """Decodes that a plan grants all together, as sums: one token each, and the blocks they take.

    `marks` and `starts` are their part of the digest (see `chain`).
    """

    seqs: int = 0
    context: int = 0
    """Sum of the tokens they attend to, their own included."""
    longest: int = 0
    """The most that one of them attends to."""
    marks: int = 0
    starts: int = 0
    blocks: tuple[tuple[RequestId, tuple[BlockId, ...]], ...] = ()
    reread: int = 0
    """See `StepPlan`."""


NO_DECODES = Decoding()


@frozen
class Compaction:
    """KV that a request gives up when the step's work is done: `blocks` of its table, `tokens` in all.

    The blocks lie side by side in the table, after the first `sinks`. By which `rule` their content is chosen is the
    data plane's business: empty, it's what they hold; else the name of a compression policy, whose scores say so
    for each layer, with the last `recent` full blocks left alone. What is to stay moves to where what goes lay.
    """

    request: RequestId
    blocks: tuple[BlockId, ...]
    tokens: int
    sinks: int = 0
    recent: int = 0
    rule: str = ""


@frozen
class StepPlan:
    """One engine iteration, decided. Executing it needs no knowledge of queues, policies or arrivals."""

    index: int
    now: int
    work: Sequence[Work]
    digest: str
    new: tuple[Request, ...] = ()
    """Requests that the data plane sees for the first time, in full."""
    admitted: tuple[RequestId, ...] = ()
    """Requests that enter (or re-enter) the running set: their block tables start afresh."""
    preempted: tuple[tuple[RequestId, str], ...] = ()
    """(request, how): its blocks are gone; its tokens stay known."""
    rejected: tuple[tuple[RequestId, str], ...] = ()
    """(request, reason): a policy gave up on it."""
    released: tuple[RequestId, ...] = ()
    """Requests that ended since the last plan: the data plane may forget them."""
    swap_out: tuple[Move, ...] = ()
    """Carried out before anything else: what is written next may lie in the blocks that they empty."""
    swap_in: tuple[Move, ...] = ()
    """Carried out after `swap_out` and before the work that needs it."""
    compactions: tuple[Compaction, ...] = ()
    """Carried out after all else."""

    decodes: Decoding = NO_DECODES
    """Sums over the first `decodes.seqs` of `work`, where the engine keeps them as aggregates: `work` then
    lists them only when asked, before the commit. What needs no list uses `decodes` and `items`."""

    copies: tuple[Move, ...] = ()
    """Copies within the device, (source block, its copy), of blocks that others hold and the request writes into.
    Carried out after `swap_out` and before `swap_in`, all at once."""

    reread: int = 0
    """Of the context that the running requests read, tokens in blocks that another of them reads before it. Nothing
    is decided by it: it is how a cost model can know that KV is shared."""

    def __bool__(self) -> bool:
        """False when there is nothing to execute and nothing was decided."""
        return bool(self.decodes.seqs or self.work or self.preempted or self.rejected)

    @property
    def items(self) -> Sequence[Work]:
        """The work that isn't in `decodes`: all of it, unless the engine keeps aggregates."""
        items: Sequence[Work] = getattr(self.work, "items", self.work)
        return items

    @property
    def tokens(self) -> int:
        return self.decodes.seqs + sum([work.tokens for work in self.items])

    @property
    def samples(self) -> int:
        """Tokens that the step yields."""
        return self.decodes.seqs + sum([work.samples for work in self.items])

    @property
    def moved_blocks(self) -> int:
        """Blocks copied between device and host, both ways together."""
        return sum(len(move.pairs) for move in (*self.swap_out, *self.swap_in))

    @property
    def dropped_tokens(self) -> int:
        """Tokens whose KV is given up."""
        return sum(item.tokens for item in self.compactions)

    @property
    def copied_blocks(self) -> int:
        """Blocks copied within the device."""
        return sum(len(move.pairs) for move in self.copies)


@lru_cache(maxsize=1 << 14)
def weight(request: RequestId) -> int:
    """A request's number in the digest: 128 bits made of its name."""
    return int.from_bytes(blake2b(request.encode(), digest_size=16).digest(), "little")


MASK = (1 << 128) - 1
"""The sums of `chain` are taken modulo this plus one."""


_SIZES = struct.Struct("<iqq?i").pack
_HEAD = struct.Struct("<qqq").pack
_TAKEN = struct.Struct("<ii").pack
_TAKEN_ONE = struct.Struct("<iii").pack


@cache
def _ids(count: int) -> Callable[..., bytes]:
    """Packs so many block ids."""
    return struct.Struct(f"<{count}i").pack


_NOTHING = blake2b(digest_size=16)
"""Copied for each digest, which takes two thirds of the time that making one anew does."""


def _hashed(said: bytes) -> str:
    state = _NOTHING.copy()
    state.update(said)
    return state.hexdigest()


def chain(
    previous: str,
    index: int,
    work: Sequence[Work],
    preempted: Sequence[tuple[RequestId, str]] = (),
    rejected: Sequence[tuple[RequestId, str]] = (),
    swap_out: Sequence[Move] = (),
    swap_in: Sequence[Move] = (),
    decodes: Decoding = NO_DECODES,
    compactions: Sequence[Compaction] = (),
    copies: Sequence[Move] = (),
) -> str:
    """Digest of a plan's decisions chained over `previous` (blake2b, 128 bits, hex).

    Items of one token that yield the next enter by two sums, of their requests' `weight` and of weight times
    start, and by the blocks they take: so whoever keeps the sums from step to step (`decodes`, beside the rest of
    `work`) gets the same digest as whoever lists them, without looking at each. All other items enter in full.
    """
    count, marks, starts = decodes.seqs, decodes.marks, decodes.starts
    parts: list[bytes] = []
    blocks = list(decodes.blocks)
    for item in work:
        if item.tokens == 1 and item.samples:
            mark = weight(item.request)
            count += 1
            marks += mark
            starts += mark * item.start
            if item.blocks:
                blocks.append((item.request, item.blocks))
            continue
        name, taken_now = item.request.encode(), item.blocks
        parts.append(_SIZES(len(name), item.start, item.tokens, item.samples, len(taken_now)))
        parts.append(name)
        parts.append(_ids(len(taken_now))(*taken_now))
    head = _HEAD(index, count, len(parts))
    parts.append((marks & MASK).to_bytes(16, "little"))
    parts.append((starts & MASK).to_bytes(16, "little"))
    for request, ids in blocks:
        name = request.encode()
        if len(ids) == 1:
            parts.append(_TAKEN_ONE(len(name), 1, ids[0]))
        else:
            parts.append(_TAKEN(len(name), len(ids)))
            parts.append(_ids(len(ids))(*ids))
        parts.append(name)
    if preempted or rejected or swap_out or swap_in or copies:
        for mark_, pairs in (("preempted", preempted), ("rejected", rejected)):
            for request, word in pairs:
                parts.append(f"\x1e{mark_}\x1f{request}\x1f{word}".encode())
        for mark_, moves in (("out", swap_out), ("in", swap_in), ("copy", copies)):
            for move in moves:
                parts.append(f"\x1e{mark_}\x1f{move.request}\x1f{move.pairs}".encode())
    for gone in compactions:
        parts.append(
            f"\x1ecompact\x1f{gone.request}\x1f{gone.rule}\x1f{gone.recent}\x1f{gone.blocks}".encode()
        )
    return _hashed(previous.encode() + head + b"".join(parts))


def chain_decodes(
    previous: str, index: int, decodes: Decoding, taken: Sequence[tuple[RequestId, tuple[BlockId, ...]]]
) -> str:
    """`chain` of a plan that is nothing but these decodes, with the block that some have `taken`."""
    parts = [
        previous.encode(),
        _HEAD(index, decodes.seqs, 0),
        (decodes.marks & MASK).to_bytes(16, "little"),
        (decodes.starts & MASK).to_bytes(16, "little"),
    ]
    for request, ids in taken:
        name = request.encode()
        parts.append(_TAKEN_ONE(len(name), 1, ids[0]))
        parts.append(name)
    return _hashed(b"".join(parts))


def digest_of(previous: str, plan: StepPlan) -> str:
    """The digest that a plan should carry when it follows one of digest `previous`."""
    moves = (plan.swap_out, plan.swap_in)
    changes = (plan.compactions, plan.copies)
    return chain(previous, plan.index, plan.work, plan.preempted, plan.rejected, *moves, NO_DECODES, *changes)


@frozen
class TokenLogprobs:
    """Log-probabilities for one sampled token: its own, and the most likely alternatives (id, logprob)."""

    chosen: float
    top: tuple[tuple[int, float], ...] = ()


@frozen
class RankTiming:
    """What one rank did of a step that several computed, nanoseconds on its own clock, one phase after another."""

    rank: int
    tensor: int = 0
    """Which cut of its layers it holds."""
    pipeline: int = 0
    """Which run of layers it holds."""
    prepare_ns: int = 0
    forward_ns: int = 0
    sample_ns: int = 0
    transfer_ns: int = 0
    compact_ns: int = 0
    communication_ns: int = 0
    """Of these, within exchanges with other ranks: passing data on, and waiting for it."""
    down_ns: int = 0
    """The time of day at which the plan came, by this rank's clock, less when it was sent, by rank 0's."""
    up_ns: int = 0
    """The time of day at which rank 0 took the answer, less when it was given, by this rank's clock. Only clocks that
    disagree make either of them negative (`lab.analysis.clocks`)."""


@frozen
class StepResult:
    """What executing one plan gave. `tokens` answers the sampling work items in their order.

    Durations are nanoseconds, measured or modelled; the phases run one after another.
    """

    tokens: tuple[int, ...]
    prepare_ns: int = 0
    forward_ns: int = 0
    sample_ns: int = 0
    logprobs: Mapping[RequestId, TokenLogprobs] = field(default_factory=dict)
    transfer_ns: int = 0
    """Copies between device and host, before the rest."""
    compact_ns: int = 0
    """Choosing and moving KV that compression keeps, after the rest."""
    ranks: tuple[RankTiming, ...] = ()
    """Each rank's share, where several computed the step; the phases above are then those of rank 0."""
    stopped: frozenset[RequestId] = frozenset()
    """Requests whose text has reached one of their stop strings with this token."""
    terms: tuple[int, ...] = ()
    """See `StepTiming`."""

    @property
    def duration_ns(self) -> int:
        return self.transfer_ns + self.prepare_ns + self.forward_ns + self.sample_ns + self.compact_ns


TERMS = ("weights", "attention", "kv_read", "collectives", "host", "transfer")
"""Parts of a modelled step: linear layers, attention of prompt chunks, reading the KV of single tokens, devices waiting
for each other's data, launching and preparing, KV between device and host. A pipeline's bubbles are in each of them."""


@frozen
class StepTiming:
    """Where a step's time went, nanoseconds: control plane (plan, commit) around data plane (the rest)."""

    plan_ns: int
    prepare_ns: int
    forward_ns: int
    sample_ns: int
    commit_ns: int
    transfer_ns: int = 0
    compact_ns: int = 0
    terms: tuple[int, ...] = ()
    """What a cost model says that `execute_ns` is made of, in the order of `TERMS`; empty where nobody knows."""

    @property
    def execute_ns(self) -> int:
        return self.transfer_ns + self.prepare_ns + self.forward_ns + self.sample_ns + self.compact_ns

    @property
    def total_ns(self) -> int:
        return self.plan_ns + self.execute_ns + self.commit_ns
