"""Plays a workload on a real engine core with the policy under test in it. Observation path.

Other parts are the plainest there are. The laws of the core are looked at after each half of a step; what is decided is
returned, for a second play to be compared with.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from typing import Any

from lab import plugins
from lab.control.core import EngineCore
from lab.control.executor import Capacity
from lab.control.observer import Observer, RequestRecord
from lab.control.plan import StepPlan, StepResult, StepTiming
from lab.control.request import Request
from lab.control.step import Limits
from lab.errors import RequestRefused
from lab.policy import NEVER, How, RequestId, RequestView, SchedulingPolicy, Shortage, Step
from lab.state.prefix import ContentChain
from lab.testing.cases import MS, TOKEN_NS, Ask, Case
from lab.testing.contracts import Broken
from lab.testing.standin import unchanged, watched
from lab.testing.watch import Watch, judged


class Plain(SchedulingPolicy):
    """First come, first served; whom to preempt is left to the preemption policy."""

    def __init__(self) -> None:
        self.queue: dict[RequestId, RequestView] = {}

    def on_arrival(self, request: RequestView, now: int) -> None:
        self.queue[request.id] = request

    def on_preempt(self, request: RequestView, how: How, now: int) -> None:
        self.queue[request.id] = request

    def on_finish(self, request: RequestView, reason: str, now: int) -> None:
        self.queue.pop(request.id, None)

    def schedule(self, step: Step) -> None:
        left = sorted(step.running.values(), key=lambda r: (r.arrival, r.seq))
        lost = False
        while left:
            grant = step.run(left[0])
            if grant.short is Shortage.BLOCKS:
                victim = step.victim(left)
                step.preempt(victim)
                left.remove(victim)
                lost = True
            elif grant:
                left.pop(0)
            else:
                return
        for request in [] if lost else sorted(self.queue.values(), key=lambda r: (r.arrival, r.seq)):
            if not step.run(request):
                return
            del self.queue[request.id]


class Future:
    """`lab.policy.Future` over a case's own requests."""

    def __init__(self, case: Case) -> None:
        self.arrived = 0
        self._uses: dict[bytes, list[int]] = {}
        for position, (_, request) in enumerate(case.made()):
            chain = ContentChain(request.prompt, case.block_size, "", (), None)
            for key in chain.upto(len(request.prompt) // case.block_size)[1:]:
                self._uses.setdefault(key, []).append(position)

    def next_use(self, key: bytes) -> int:
        return next((p for p in self._uses.get(key, ()) if p >= self.arrived), NEVER)


class _Ends(Observer):
    def __init__(self) -> None:
        self.outcomes: dict[str, str] = {}

    def on_request(self, record: RequestRecord) -> None:
        self.outcomes[record.request.id] = record.outcome


Decided = tuple[object, ...]
"""What is compared between two plays: one entry a step, or an answer."""


@functools.cache
def _lru() -> type:
    return plugins.load("eviction", "lru")


def engine(case: Case, parts: Mapping[str, Any], observer: Observer, replica: int = 0) -> EngineCore:
    """The core a case asks for; parts that aren't given are the plainest there are."""
    capacity = Capacity(
        blocks=case.blocks,
        block_size=case.block_size,
        max_context=1 << 30,
        vocab_size=1000,
        host_blocks=case.host_blocks,
        block_bytes=1 << 14,
    )
    return EngineCore(
        parts.get("policy") or Plain(),
        parts.get("eviction") or _lru()(),
        capacity=capacity,
        limits=Limits(case.token_budget, case.max_seqs, case.chunk),
        prefix_cache=case.prefix_cache and "compression" not in parts,
        preemption=parts.get("preemption"),
        predictor=parts.get("predictor"),
        compression=parts.get("compression"),
        observer=observer,
        replica=replica,
    )


def play_engine(case: Case, watch: Watch, salt: int = 0) -> list[Decided]:
    """Serve a case to its end and return every decision. Raises `Broken`."""
    ends, future = _Ends(), Future(case)
    if watch.kind == "eviction":
        watch.policy.future = future
    with judged(watch):
        core = engine(case, {watch.kind: watched(watch)}, ends)
    made = case.made(salt)
    todo = [*made]
    aborts = sorted(
        ((ask.abort * MS, r, ask) for ask, r in made if ask.abort is not None), key=lambda x: x[0]
    )
    pauses = [t * MS for t in case.pause or ()]
    now, said, since = 0, [], 0
    patience = 4 * case.tokens + 50  # steps without a token or an end; the longest prefill takes fewer
    while True:
        while todo and todo[0][1].arrival <= now:
            _, request = todo.pop(0)
            future.arrived += 1
            with judged(watch), contextlib.suppress(RequestRefused):
                core.add(request, now)
        _pause(core, case, now)
        _abort(core, watch, aborts, now, in_flight=False)
        with judged(watch):
            plan = core.plan(now)
        _inspect(core, case, watch, plan)
        if not plan:
            due = [request.arrival for _, request in todo[:1]]
            due += [t for t in pauses if t > now] + [a[0] for a in aborts]
            if due:
                now = max(now, min(due))
                _abort(core, watch, aborts, now, in_flight=True)
                continue
            if core.has_work:
                raise Broken("progress", str(core.stalled()), watch.defined("schedule"))
            break
        _abort(core, watch, aborts, now, in_flight=True)
        took = MS + TOKEN_NS * plan.tokens
        before = len(ends.outcomes)
        with judged(watch):
            emitted = core.commit(plan, StepResult((0,) * sum(w.samples for w in plan.work)), now + took)
        core.observe(StepTiming(0, took, 0, 0, 0))
        _inspect(core, case, watch, None)
        now += took
        said.append((plan.index, plan.work, plan.preempted, plan.rejected, plan.swap_out, plan.swap_in))
        since = 0 if emitted or len(ends.outcomes) > before or core.paused else since + 1
        if since > patience:
            says = f"no request ended or got a token for {since} steps, up to step {plan.index}"
            raise Broken("progress", says, watch.defined("schedule"))
    for view, facts in watch.views:
        unchanged(watch, view, facts)
    return [*said, tuple(sorted(ends.outcomes.items()))]


def _pause(core: EngineCore, case: Case, now: int) -> None:
    if case.pause is not None:
        if case.pause[0] * MS <= now < case.pause[1] * MS:
            core.pause("admission" if case.pause_what == "admission" else "all")
        else:
            core.resume()


def _abort(
    core: EngineCore, watch: Watch, aborts: list[tuple[int, Request, Ask]], now: int, *, in_flight: bool
) -> None:
    for item in [a for a in aborts if a[0] <= now and a[2].in_flight == in_flight]:
        aborts.remove(item)
        with judged(watch):
            core.abort(item[1].id, now)


def _inspect(core: EngineCore, case: Case, watch: Watch, plan: StepPlan | None) -> None:
    """The laws, after each half of a step."""
    if plan is not None and (plan.tokens > case.token_budget or core.running > case.max_seqs):
        says = (
            f"step {plan.index} has {plan.tokens} tokens and {core.running} requests; "
            f"allowed are {case.token_budget} and {case.max_seqs}"
        )
        raise Broken("budgets", says, watch.defined("schedule"))
    try:
        core.check()
    except (AssertionError, KeyError, TypeError) as error:
        raise Broken("conservation", f"after {watch.hook}: {error}", watch.defined(watch.hook)) from error
