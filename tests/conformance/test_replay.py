"""Recorded plans executed again: with the recorded durations, the very same run; with others, only other times."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import pytest

from lab.assembly import assemble
from lab.control.clock import ControlTimer, MeasuredControl
from lab.control.core import EngineCore
from lab.control.executor import Executor
from lab.control.observer import RequestRecord, StepRecord
from lab.control.plan import StepPlan, StepResult, StepTiming
from lab.errors import ExecutorError, ReplayError
from lab.observe.recorder import Recorder, by_entry
from lab.observe.spans import check
from real_engine.driver import SteppedRun
from real_engine.models.loading import LoadedModel
from real_engine.replay import ReplayRun
from tests.conformance.sides import Setting, conversation, finish, run_replayed
from tests.conformance.test_schema import rows

TIGHT = Setting(blocks=45, host_blocks=30)


class Timed:
    """An executor and a control plane whose steps take what a list says. Fails at one step, if told to."""

    def __init__(self, inner: Executor, timings: Sequence[StepTiming], fails: int = -1) -> None:
        self.capacity = inner.capacity
        self._inner, self._timings, self._fails = inner, timings, fails
        self._now = timings[0]

    def start(self) -> None:
        pass

    def plan_ns(self, plan: StepPlan) -> int:
        self._now = self._timings[plan.index] if plan else self._now
        return self._now.plan_ns

    def commit_ns(self, plan: StepPlan) -> int:
        return self._now.commit_ns

    def execute(self, plan: StepPlan) -> StepResult:
        if plan.index == self._fails:
            raise ExecutorError("as told")
        result, now = self._inner.execute(plan), self._now
        return dataclasses.replace(
            result,
            prepare_ns=now.prepare_ns,
            forward_ns=now.forward_ns,
            sample_ns=now.sample_ns,
            transfer_ns=now.transfer_ns,
        )

    def close(self) -> None:
        self._inner.close()


def recorded(
    model: LoadedModel, aborts: Sequence[tuple[int, str]] = (), setting: Setting = TIGHT, fails: int = -1
) -> Recorder:
    """A run with preemption, swapping, refusal and idle time; requests of `aborts` give up at their steps."""
    requests, recorder = conversation(), Recorder()
    executor: Executor = setting.executor(model)
    timer: ControlTimer = MeasuredControl()
    if fails >= 0:
        timings = [StepTiming(1000, 2000, 100_000 + 7 * i, 3000, 500, 100 * (i % 3)) for i in range(2000)]
        executor = timer = Timed(executor, timings, fails)
    control = assemble(setting.spec, executor.capacity, recorder, requests)
    left = list(aborts)

    def progress(core: EngineCore, now: int) -> None:
        while left and core.steps >= left[0][0]:
            run.abort(left.pop(0)[1])

    run = SteppedRun(control, executor, requests, progress, timer)
    try:
        run.run()
        finish(control)
    except ExecutorError:
        control.core.interrupt(run.now)
    return recorder


def again(
    model: LoadedModel,
    run: Recorder,
    timings: Sequence[StepTiming] | None = None,
    setting: Setting = TIGHT,
    fails: int = -1,
) -> Recorder:
    recorder, executor = Recorder(), setting.executor(model)
    control = assemble(setting.spec, executor.capacity, recorder)
    timed = Timed(executor, timings, fails) if timings is not None else None
    replay = ReplayRun(
        run.steps, by_entry(run.requests), timed or executor, recorder, control.core, timer=timed
    )
    if fails >= 0:
        with pytest.raises(ExecutorError, match="as told"):
            replay.run()
    else:
        replay.run()
    return recorder


@pytest.mark.parametrize("aborts", [(), ((5, "r00"), (9, "r07"), (20, "r11"), (21, "r20"), (60, "r23"))])
def test_with_the_recorded_durations_it_is_the_recorded_run(
    aborts: tuple[tuple[int, str], ...], tiny: LoadedModel
) -> None:
    run = recorded(tiny, aborts)
    outcomes = {record.outcome for record in run.requests}
    assert outcomes == {"finished", "rejected"} | ({"aborted"} if aborts else set())
    assert any(step.plan.swap_in for step in run.steps)
    replay = again(tiny, run, [step.timing for step in run.steps])
    assert replay.steps == run.steps
    assert by_entry(replay.requests) == by_entry(run.requests)  # with the tokens: greedy, in float32


@pytest.mark.parametrize("factor", [0.01, 40], ids=["faster", "slower"])
def test_other_durations_change_times_alone(factor: float, tiny: LoadedModel) -> None:
    run = recorded(tiny)
    timings = [
        StepTiming(*(round(factor * part) for part in dataclasses.astuple(step.timing)[:-1]))
        for step in run.steps
    ]
    replay = again(tiny, run, timings)
    assert [step.plan.digest for step in replay.steps] == [step.plan.digest for step in run.steps]
    assert check(rows(replay, "real")) == check(rows(run, "real"))
    end = 0
    for step in replay.steps:
        # Neither before the step before it ended, nor before those had come that it takes in; no later either.
        assert step.start == max(end, *(request.arrival for request in step.plan.new), 0)
        end = step.end
    taken = {record.request.id: record for record in run.requests}
    for record in replay.requests:
        before: RequestRecord = taken[record.request.id]
        bounds = [(part.start, part.end) for part in record.intervals]
        assert bounds[0][0] == record.request.arrival
        assert bounds[-1][1] == record.end
        assert all(a[1] == b[0] for a, b in itertools.pairwise(bounds))
        assert all(start <= stop for start, stop in bounds)
        assert record.output == before.output
        assert len(record.token_times) == len(before.token_times)
        assert [p.phase for p in record.intervals] == [p.phase for p in before.intervals]


def test_plans_of_a_simulation_run_on_the_real_engine(tiny: LoadedModel) -> None:
    first = recorded(tiny)
    sim, _ = run_replayed(TIGHT, tiny, conversation(), first)
    replay = again(tiny, sim)
    assert [step.plan.digest for step in replay.steps] == [step.plan.digest for step in first.steps]
    outputs = {record.request.id: record.output for record in first.requests}
    assert {record.request.id: record.output for record in replay.requests} == outputs
    assert all(step.timing.forward_ns > 0 for step in replay.steps if step.plan.work)


@pytest.mark.parametrize("step", [0, 1, 17, 40])
def test_cut_off_it_tells_what_an_engine_would_have_told(step: int, tiny: LoadedModel) -> None:
    timings = [StepTiming(1000, 2000, 100_000 + 7 * i, 3000, 500, 100 * (i % 3)) for i in range(2000)]
    whole = recorded(tiny, fails=2000)
    cut = recorded(tiny, fails=step)
    replay = again(tiny, whole, timings, fails=step)
    assert replay.steps == cut.steps
    assert 0 < len(cut.requests) < 25

    def told(recorder: Recorder) -> dict[str, RequestRecord]:
        # What the step that failed had planned is known to an engine, and to a replay only once it's done.
        return {record.request.id: record for record in recorder.requests}

    got, want = told(replay), told(cut)
    assert got.keys() == want.keys()
    for name, record in want.items():
        assert got[name].token_times == record.token_times
        assert got[name].outcome == record.outcome
        assert got[name].computed_tokens == record.computed_tokens
        assert got[name].output == record.output
        assert got[name].end == record.end
        assert sum(p.end - p.start for p in got[name].intervals) == record.end - record.request.arrival


def test_a_plan_that_is_not_what_was_decided_is_refused(tiny: LoadedModel) -> None:
    run = recorded(tiny)
    forged: StepRecord = run.steps[12]
    work = forged.plan.work[0]
    other = dataclasses.replace(work, blocks=(*work.blocks, 3))
    plan = dataclasses.replace(forged.plan, work=(other, *forged.plan.work[1:]))
    run.steps[12] = dataclasses.replace(forged, plan=plan)
    recorder, executor = Recorder(), TIGHT.executor(tiny)
    control = assemble(TIGHT.spec, executor.capacity, recorder)
    with pytest.raises(ReplayError, match="step 12 of the recorded run isn't what was decided then"):
        ReplayRun(run.steps, run.requests, executor, recorder, control.core).run()
    assert len(recorder.steps) == 12
