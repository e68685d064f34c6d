"""Time, for the real engine: recorded plans. Request path.

Each step that a run recorded is executed again, whoever decided it then: an earlier real run, or a simulation
whose plans a real machine has never seen. No policy is asked, so nothing is new but the durations (and the
tokens): what a cost model is calibrated on, and what tells a slower machine from another decision.

The clock is a stepped one. A step begins when the one before it has ended and all whom it works on have
come. The records are the recorded ones with the new times in the places of the old.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from lab.control.clock import ControlTimer, MeasuredControl
from lab.control.core import EngineCore
from lab.control.executor import Executor
from lab.control.loop import serve
from lab.control.observer import Interval, Observer, RequestRecord, StepRecord
from lab.control.plan import GENESIS, RankTiming, StepPlan, StepResult, StepTiming, TokenLogprobs, digest_of
from lab.control.request import RequestId
from lab.errors import ExecutorError, ReplayError
from real_engine.driver import Progress


class ReplayRun:
    """Executes `steps` in their order, and tells `observer` of them and of `requests` as they end."""

    def __init__(
        self,
        steps: Sequence[StepRecord],
        requests: Iterable[RequestRecord],
        executor: Executor,
        observer: Observer,
        core: EngineCore,
        progress: Progress | None = None,
        timer: ControlTimer | None = None,
    ) -> None:
        self._timer = timer or MeasuredControl()
        self._log = _PlanLog(steps, requests, observer)
        self._executor, self._core, self._progress = executor, core, progress
        self.now = 0

    def run(self) -> None:
        """Until every recorded step was executed. Raises what the executor raises, and `ReplayError`."""
        log = self._log
        loop = serve(log, self._executor, self._timer, lambda: self.now)
        try:
            for plan in log.plans():
                self.now = max(self.now, *(request.arrival for request in plan.new), 0)
                for _ in ("execute", "commit"):
                    self.now += next(loop)
                if self._progress is not None:
                    self._progress(self._core, self.now)
        except BaseException:
            log.cut_off(self.now)
            raise
        log.finish(self.now)


@dataclass(slots=True)
class _Life:
    """What the replay has given to one request so far."""

    admitted: list[int] = field(default_factory=list)
    preempted: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    times: list[int] = field(default_factory=list)
    computed: int = 0


class _PlanLog:
    """In the place of an engine core: hands out the recorded plans, and keeps the requests' new times."""

    def __init__(
        self, steps: Sequence[StepRecord], requests: Iterable[RequestRecord], observer: Observer
    ) -> None:
        self._steps, self._observer = steps, observer
        self._next = 0
        self._digest = GENESIS
        self._ranks: tuple[RankTiming, ...] = ()
        self._timed: list[tuple[int, int]] = []
        """Of each step that was executed: when it began, and when its tokens were there."""
        self._plan = StepPlan(0, 0, (), GENESIS)
        self._lives: dict[RequestId, _Life] = defaultdict(_Life)
        self._ending: dict[int, list[RequestRecord]] = defaultdict(list)
        committed = [step.start + step.timing.plan_ns + step.timing.execute_ns for step in steps]
        rejected = {name: i for i, step in enumerate(steps) for name, _ in step.plan.rejected}
        at = {step.plan.index: i for i, step in enumerate(steps)}
        for record in sorted(requests, key=lambda record: (record.end, record.seq)):
            if record.outcome == "finished":
                where = at.get(record.intervals[-1].last_step, len(steps))
            elif record.request.id in rejected and record.seq >= 0:
                where = rejected[record.request.id]
            elif record.outcome == "unfinished":
                where = len(steps)
            else:
                where = bisect_left(committed, record.end)
            self._ending[where].append(record)
        self._at, self._committed = at, committed

    def plans(self) -> Iterator[StepPlan]:
        """Each plan, before its turn."""
        for step in self._steps:
            yield step.plan

    # -- what `serve` calls ------------------------------------------------------------------------------

    def plan(self, now: int) -> StepPlan:
        """The next plan as it was recorded, `now` for its time. Raises `ReplayError` if it isn't what was decided."""
        recorded = self._steps[self._next].plan
        digest = digest_of(self._digest, recorded)
        if digest != recorded.digest:
            raise ReplayError(
                f"step {recorded.index} of the recorded run isn't what was decided then: its plan gives digest "
                f"{digest}, and {recorded.digest} is on record"
            )
        self._digest = digest
        self._plan = replace(recorded, now=now)
        return self._plan

    def commit(self, plan: StepPlan, result: StepResult, now: int) -> None:
        wanted = sum(work.samples for work in plan.work)
        if len(result.tokens) != wanted:
            raise ExecutorError(
                f"step {plan.index}: the data plane returned {len(result.tokens)} tokens for {wanted} sampling "
                "requests"
            )
        for name, _ in plan.preempted:
            self._lives[name].preempted.append(plan.now)
        for name in plan.admitted:
            self._lives[name].admitted.append(plan.now)
        tokens = iter(result.tokens)
        for work in plan.work:
            life = self._lives[work.request]
            life.computed += work.tokens
            if work.samples:
                life.tokens.append(next(tokens))
                life.times.append(now)
                if work.request in result.logprobs:
                    life.logprobs.append(result.logprobs[work.request])
        self._timed.append((plan.now, now))
        self._ranks = result.ranks
        for record in self._ending.pop(self._next, ()):
            self._observer.on_request(self._again(record, now))

    def observe(self, timing: StepTiming) -> None:
        self._observer.on_step(
            replace(self._steps[self._next], plan=self._plan, timing=timing, ranks=self._ranks)
        )
        self._next += 1

    # -- the end ---------------------------------------------------------------------------------------

    def finish(self, now: int) -> None:
        """Every step was executed: what ended after the last of them, and what never ended."""
        for index in sorted(self._ending):
            for record in self._ending.pop(index):
                self._observer.on_request(self._again(record, now))

    def cut_off(self, now: int) -> None:
        """The replay ends early: of all who had come by `now`, what there is."""
        for index in sorted(self._ending):
            for record in self._ending.pop(index):
                if record.seq < 0 and record.end <= now:
                    self._observer.on_request(record)
                elif record.seq >= 0 and (record.request.arrival <= now or record.request.id in self._lives):
                    self._observer.on_request(self._unfinished(record, now))

    # -- records ---------------------------------------------------------------------------------------

    def _again(self, record: RequestRecord, now: int) -> RequestRecord:
        """The record with new times. The gateway refused at the arrival, and arrivals stay as they were."""
        if record.seq < 0:
            return record
        starts = list(self._starts(record))
        end = self._end(record, now)
        return self._filled(record, record.intervals, [*starts, max(end, starts[-1])])

    def _unfinished(self, record: RequestRecord, now: int) -> RequestRecord:
        life, starts = self._lives[record.request.id], list(self._starts(record))
        last = self._steps[len(self._timed) - 1].plan.index if self._timed else -1
        parts = [
            replace(part, last_step=min(part.last_step, last)) for part in record.intervals[: len(starts)]
        ]
        return replace(
            self._filled(record, parts, [*starts, max(now, starts[-1])]),
            outcome="unfinished",
            reason="interrupted",
            computed_tokens=life.computed,
            preemptions=len(life.preempted),
            cached_tokens=record.cached_tokens if life.admitted else 0,
            cached_blocks=record.cached_blocks if life.admitted else 0,
        )

    def _filled(
        self, record: RequestRecord, parts: Sequence[Interval], bounds: Sequence[int]
    ) -> RequestRecord:
        life = self._lives[record.request.id]
        spans = itertools.pairwise(bounds)
        return replace(
            record,
            end=bounds[-1],
            intervals=tuple(
                replace(part, start=start, end=end) for part, (start, end) in zip(parts, spans, strict=True)
            ),
            token_times=tuple(life.times),
            output=tuple(life.tokens),
            logprobs=tuple(life.logprobs),
        )

    def _starts(self, record: RequestRecord) -> Iterator[int]:
        """When each of its intervals begins now; ends early at one that hasn't begun."""
        life = self._lives[record.request.id]
        admitted, preempted = iter(life.admitted), iter(life.preempted)
        yield record.request.arrival
        for before, after in zip(record.intervals, record.intervals[1:], strict=False):
            if after.phase == "queue":
                start = next(preempted, None)
            elif before.phase == "queue":
                start = next(admitted, None)
            else:  # the prompt was computed: with that step's tokens
                step = self._at.get(before.last_step, len(self._timed))
                start = self._timed[step][1] if step < len(self._timed) else None
            if start is None:
                return
            yield start

    def _end(self, record: RequestRecord, now: int) -> int:
        if record.outcome == "finished":
            return self._lives[record.request.id].times[-1]
        if record.outcome == "rejected":
            return self._plan.now
        if record.outcome == "unfinished":
            return now
        # Aborted: with a step's tokens, or as long after the last step before it as it was then.
        step = bisect_left(self._committed, record.end)
        if step < len(self._timed) and record.end >= self._steps[step].start:
            return self._timed[step][1] if record.end == self._committed[step] else self._timed[step][0]
        before = self._timed[step - 1][1] - self._committed[step - 1] if step else 0
        return record.end + before
