"""A step between its plan and its record: what was decided, and the state right after. Observation path.

A plan is described when it is made, since its commit changes what it is described by; it is told of when all of its
durations are known, in the form that the observer asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lab.control.live import LiveRequest
from lab.control.observer import StepRecord, pack_step
from lab.control.plan import RankTiming, StepPlan, StepTiming
from lab.control.step import StepBuilder

if TYPE_CHECKING:
    from lab.control.core import EngineCore


@dataclass(slots=True)
class InFlight:
    """A plan that was handed out and not yet committed, and the state right after planning."""

    plan: StepPlan
    work: list[LiveRequest]
    """Those granted on their own: of `plan.items`, after the first `together`."""
    together: int
    running: int
    waiting: int
    prefill_tokens: int
    decode_tokens: int
    context_tokens: int
    blocks_free: int
    blocks_cached: int
    allocated: int
    evicted: int
    released_plan: int
    samples: int
    told: StepPlan | None
    """The plan, if it decided more than work."""
    released_commit: int = 0
    ranks: tuple[RankTiming, ...] = ()


def describe(core: EngineCore, plan: StepPlan, step: StepBuilder) -> InFlight:
    """The plan just made, before anything of it is done."""
    granted = step.granted
    prefill, decode, context = 0, plan.decodes.seqs, plan.decodes.context
    samples = decode
    for live, work in zip(granted, plan.items, strict=True) if granted else ():
        samples += work.samples
        context += work.context
        if work.start >= live.prompt_tokens and work.tokens == 1:
            decode += 1
        else:
            prefill += work.tokens
    allocated, evicted, released = core._count()
    return InFlight(
        plan, granted, len(step.together), len(core._running), core.waiting, prefill, decode, context,
        core.pool.free, core.pool.cached, allocated, evicted, released, samples,
        plan if step.admitted or step.preempted or step.rejected or step.moved else None,
    )  # fmt: skip


def tell(core: EngineCore, flight: InFlight, timing: StepTiming) -> None:
    """Sums, a row, or a record: what the core's observer wants of a committed step."""
    if core._totals is not None:
        plan, total = flight.plan, core.pool.total
        held = total - flight.blocks_free - flight.blocks_cached
        core._totals.step(plan.now, timing.total_ns, total, held, plan.digest)
        core._totals.decided(plan, flight.evicted)
        return
    if core._rows is not None:
        plan, free, cached = flight.plan, flight.blocks_free, flight.blocks_cached
        numbers = pack_step(
            plan.index, plan.now, core.replica, flight.running, flight.waiting, flight.prefill_tokens,
            flight.decode_tokens, flight.context_tokens, free, cached, core.pool.total - free - cached,
            flight.allocated, flight.evicted, flight.released_plan, flight.released_commit, len(plan.work),
            flight.samples, timing.plan_ns, timing.prepare_ns, timing.forward_ns, timing.sample_ns,
            timing.commit_ns, timing.transfer_ns, timing.compact_ns,
        )  # fmt: skip
        core._rows((numbers, plan.digest, core.policy_name, timing.terms, flight.told, flight.ranks))
        return
    core._observer.on_step(
        StepRecord(
            plan=flight.plan,
            timing=timing,
            policy=core.policy_name,
            replica=core.replica,
            running=flight.running,
            waiting=flight.waiting,
            prefill_tokens=flight.prefill_tokens,
            decode_tokens=flight.decode_tokens,
            context_tokens=flight.context_tokens,
            blocks_free=flight.blocks_free,
            blocks_cached=flight.blocks_cached,
            blocks_held=core.pool.total - flight.blocks_free - flight.blocks_cached,
            allocated=flight.allocated,
            evicted=flight.evicted,
            released_plan=flight.released_plan,
            released_commit=flight.released_commit,
            ranks=flight.ranks,
        )
    )
