"""Online: requests come by the wall clock, their lag is seen, and the steps' durations explain every decision."""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time
from collections.abc import Sequence

import pytest

from lab.assembly import ControlPlane, EngineSpec, assemble
from lab.control.executor import Capacity
from lab.control.plan import StepPlan, StepResult
from lab.control.request import Prompt, Request, Segment
from lab.control.step import Limits
from lab.observe.recorder import Recorder
from real_engine.models.loading import LoadedModel
from real_engine.online import OnlineRun
from tests.conformance.sides import MS, Setting, conversation, finish, run_replayed

SPEC = EngineSpec(
    {"policy": {"name": "fcfs"}, "eviction": {"name": "lru"}}, Limits(64, 4), prefix_cache=True, seed=0
)


class Wall:
    """A clock that moves when it is slept on, a little whenever it is read, and by steps."""

    def __init__(self, tick: int = 0) -> None:
        self.now, self.tick, self.slept = 5_000_000_000, tick, 0

    def __call__(self) -> int:
        self.now += self.tick
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept += round(seconds * 1e9)
        self.now += round(seconds * 1e9) + self.tick


class Device:
    """Takes the same time for each step, a bit of which it doesn't report."""

    def __init__(self, wall: Wall, step: int, unreported: int = 0) -> None:
        self.capacity = Capacity(100)
        self._wall, self._step, self._unreported = wall, step, unreported

    def execute(self, plan: StepPlan) -> StepResult:
        self._wall.now += self._step + self._unreported
        return StepResult((0,) * sum(work.samples for work in plan.work), forward_ns=self._step)

    def close(self) -> None:
        pass


def ask(name: str, arrival: int, output: int = 2, prompt: int = 8) -> Request:
    content = Prompt((Segment(len(name) + arrival, 0, prompt),))
    return Request(id=name, prompt=content, arrival=arrival, output_len=output)


def serve(
    requests: Sequence[Request], wall: Wall, device: Device
) -> tuple[OnlineRun, Recorder, ControlPlane]:
    recorder = Recorder()
    control = assemble(SPEC, device.capacity, recorder, requests)
    run = OnlineRun(control, device, requests, clock=wall, sleep=wall.sleep)
    return run, recorder, control


def test_lag_is_the_rest_of_the_step_under_way_and_times_count_from_the_arrival() -> None:
    wall = Wall()
    run, recorder, control = serve(
        [ask("a", 0), ask("b", 4 * MS), ask("c", 90 * MS)], wall, Device(wall, 10 * MS)
    )
    run.run()
    finish(control)
    found = {record.request.id: record for record in recorder.requests}
    assert {name: record.decision.ingest_lag for name, record in found.items()} == {
        "a": 0,
        "b": 6 * MS,
        "c": 0,
    }
    # b's two tokens come with the second and third step, 20 and 30 ms after the beginning.
    assert found["b"].token_times == (20 * MS, 30 * MS)
    assert found["b"].intervals[0].start == 4 * MS
    assert wall.slept == (90 - 30) * MS


def test_steps_tile_the_wall_clock_with_all_that_no_phase_reports() -> None:
    wall = Wall(tick=1000)
    device = Device(wall, 10 * MS, unreported=MS)
    run, recorder, control = serve([ask("a", 0, 5), ask("b", MS, 3), ask("c", 200 * MS, 2)], wall, device)
    began = wall.now
    run.run()
    steps = recorder.steps
    gaps = [(a.end, b.start) for a, b in itertools.pairwise(steps) if a.end != b.start]
    assert [start for _, start in gaps] == [200 * MS]  # the only idle time
    assert all(step.timing.plan_ns > 0 and step.timing.commit_ns >= MS for step in steps)
    assert wall.now - began - steps[-1].end < 10 * wall.tick
    finish(control)


@pytest.mark.parametrize("blocks", [400, 45], ids=["ample", "tight"])
def test_replayed_durations_of_an_online_run_give_its_decisions(blocks: int, tiny: LoadedModel) -> None:
    setting, requests = Setting(blocks=blocks), conversation()
    executor, recorder = setting.executor(tiny), Recorder()
    control = assemble(setting.spec, executor.capacity, recorder, requests)
    began = time.perf_counter_ns()
    OnlineRun(control, executor, requests).run()
    took = time.perf_counter_ns() - began
    finish(control)
    assert requests[-1].arrival <= recorder.steps[-1].end <= took
    assert any(record.decision.ingest_lag > 0 for record in recorder.requests)
    sim, cost = run_replayed(setting, tiny, requests, recorder)
    assert cost.parity(len(sim.steps))
    assert sim.steps == recorder.steps

    def timed(record: object) -> object:
        assert dataclasses.is_dataclass(record)
        decision = dataclasses.replace(record.decision, ingest_lag=0)  # type: ignore[attr-defined]
        return dataclasses.replace(record, output=(), decision=decision)  # type: ignore[type-var]

    assert [timed(r) for r in sim.requests] == [timed(r) for r in recorder.requests]


def test_an_abort_from_another_thread_ends_a_request_in_any_state(tiny: LoadedModel) -> None:
    requests = [ask("long", 0, 800, 40), ask("also", 0, 800, 40), ask("late", 60_000 * MS, 2)]
    setting = Setting()
    executor, recorder = setting.executor(tiny), Recorder()
    control = assemble(setting.spec, executor.capacity, recorder, requests)
    begun = threading.Event()
    run = OnlineRun(
        control, executor, requests[:2], lambda core, now: begun.set() if core.steps > 3 else None
    )

    def give_up() -> None:
        begun.wait(30)
        for name in ("long", "nobody", "also"):
            run.abort(name)

    thread = threading.Thread(target=give_up)
    thread.start()
    run.run()
    thread.join()
    assert {record.request.id: record.outcome for record in recorder.requests} == {
        "long": "aborted",
        "also": "aborted",
    }
    assert all(0 < len(record.token_times) < 800 for record in recorder.requests)
    finish(control)


def test_an_abort_wakes_an_idle_engine() -> None:

    wall = Wall()
    device = Device(wall, MS)
    requests = [ask("held", 0), ask("next", 50 * MS)]
    recorder = Recorder()
    control = assemble(SPEC, device.capacity, recorder, requests)
    control.core.pause()
    run: OnlineRun

    def sleep(seconds: float) -> None:
        wall.now += 20 * MS
        run.abort("held")
        control.core.resume()

    run = OnlineRun(control, device, requests, clock=wall, sleep=sleep)
    run.run()
    found = {record.request.id: record for record in recorder.requests}
    assert found["held"].outcome == "aborted"
    assert found["held"].end == 20 * MS
    assert found["next"].outcome == "finished"
    finish(control)
