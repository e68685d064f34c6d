"""Crossing runs of equal steps: what a policy said `Step.repeat` of, without asking it again. State path.

While nobody arrives, and all that runs is the decodes in steady state, a step is a few sums: blocks for those whose
bucket it is, the digest, the duration. Each such step is one as `EngineCore.plan` and `commit` would have made it,
with the same digest and the same times; the data plane isn't asked for more than its duration.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from lab.control.decodes import WorkList
from lab.control.observer import StepRecord, pack_step
from lab.control.plan import Decoding, StepPlan, StepTiming, chain_decodes

if TYPE_CHECKING:
    from lab.control.core import EngineCore

Price = Callable[[Decoding], StepTiming]
"""How long a step takes that is nothing but these decodes."""


def coast(core: EngineCore, price: Price, now: int, until: int) -> int:
    """Take the steps that are foreseen and end before `until`; returns the time after the last of them."""
    decodes, pool, totals, load = core._decodes, core.pool, core._totals, core._load
    rows, replica, policy = core._rows, core.replica, core.policy_name
    waiting = core.waiting
    index, digest = core._index, core._digest
    held = pool.held
    while core._repeats and decodes.members:
        decoding = decodes.peek(pool)
        timing = price(decoding)
        done = now + timing.plan_ns + timing.execute_ns
        after = done + timing.commit_ns
        needed = decodes.needed
        if after >= until or (needed and needed > pool.available):
            break
        seqs = decoding.seqs
        taken = decodes.take(pool, now)
        held += len(taken)
        digest = chain_decodes(digest, index, decoding, taken)
        core.estimate.saw(0, seqs, decoding.context, done - now)
        load.context += seqs
        load.expected -= seqs
        state: tuple[int, ...] = ()
        gone: tuple[str, ...] = ()
        running = len(core._running)
        if rows is not None:
            free, cached, holding = pool.free, pool.cached, held
            allocated, evicted, released = core._count()
        elif totals is None:
            gone = tuple(core._released)
            core._released.clear()
            state = (running, waiting, pool.free, pool.cached, held, *core._count())
        else:
            totals.step(now, after - now, pool.total, held, digest)
        ended = decodes.advance(index, done)
        core._index, core._digest = index + 1, digest
        core._repeats -= 1
        if ended:
            for live in ended:
                core._end(live, "finished", "length", done)
            held = pool.held
        if rows is not None:
            numbers = pack_step(
                index, now, replica, running, waiting, 0, seqs, decoding.context, free, cached, holding,
                allocated, evicted, released, core._count()[2] if ended else 0, seqs, seqs, timing.plan_ns,
                timing.prepare_ns, timing.forward_ns, timing.sample_ns, timing.commit_ns, timing.transfer_ns,
                timing.compact_ns,
            )  # fmt: skip
            rows((numbers, digest, policy, timing.terms, None, ()))
        elif state:
            core._observer.on_step(_record(core, index, now, digest, decoding, taken, timing, state, gone))
        index += 1
        now = after
    if totals is not None:
        totals.evicted += core._count()[1]
    return now


def _record(
    core: EngineCore,
    index: int,
    now: int,
    digest: str,
    decoding: Decoding,
    taken: list[tuple[str, tuple[int, ...]]],
    timing: StepTiming,
    state: tuple[int, ...],
    gone: tuple[str, ...],
) -> StepRecord:
    """What an observer is told of such a step."""
    running, waiting, free, cached, held, allocated, evicted, released = state
    plan = StepPlan(
        index,
        now,
        WorkList((), decoding, None),
        digest,
        released=gone,
        decodes=replace(decoding, blocks=tuple(taken)),
        reread=decoding.reread,
    )
    return StepRecord(
        plan=plan,
        timing=timing,
        policy=core.policy_name,
        replica=core.replica,
        running=running,
        waiting=waiting,
        prefill_tokens=0,
        decode_tokens=decoding.seqs,
        context_tokens=decoding.context,
        blocks_free=free,
        blocks_cached=cached,
        blocks_held=held,
        allocated=allocated,
        evicted=evicted,
        released_plan=released,
        released_commit=core._count()[2],
    )
