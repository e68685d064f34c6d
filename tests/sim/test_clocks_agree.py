"""The stepped clock and SimPy's clock: equal durations give equal decisions and times."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lab.assembly import EngineSpec, assemble
from lab.control.executor import Capacity
from lab.control.plan import StepPlan, StepResult, StepTiming
from lab.control.request import Prompt, Request, Segment
from lab.control.step import Limits
from lab.errors import PolicyError, ReplayError
from lab.observe.recorder import Recorder
from real_engine.driver import SteppedRun
from sim.cost.replay import RecordedCost
from sim.driver import Simulation
from sim.executor import SimExecutor


class Erratic:
    """A data plane and a control plane that take a few random nanoseconds, so that ties are common."""

    def __init__(self, capacity: Capacity, seed: int) -> None:
        self.capacity = capacity
        self._rng = random.Random(seed)

    def execute(self, plan: StepPlan) -> StepResult:
        rng = self._rng
        tokens = (0,) * sum(work.samples for work in plan.work)
        return StepResult(tokens, rng.randrange(3), rng.randrange(1, 6), rng.randrange(3))

    def start(self) -> None: ...

    def plan_ns(self, plan: StepPlan) -> int:
        return self._rng.randrange(3)

    def commit_ns(self, plan: StepPlan) -> int:
        return self._rng.randrange(8)

    def close(self) -> None: ...


def spec(
    policy: str, eviction: str = "lru", budget: int = 24, seqs: int = 4, cache: bool = True
) -> EngineSpec:
    names = {"policy": policy, "eviction": eviction, "admission": "always", "routing": "single"}
    return EngineSpec({seam: {"name": name} for seam, name in names.items()}, Limits(budget, seqs), cache, 0)


def run_stepped(chosen: EngineSpec, capacity: Capacity, requests: Sequence[Request], seed: int) -> Recorder:
    recorder = Recorder()
    control = assemble(chosen, capacity, recorder)
    erratic = Erratic(capacity, seed)
    SteppedRun(control, erratic, requests, timer=erratic).run()
    return recorder


def replay(
    chosen: EngineSpec, capacity: Capacity, requests: Sequence[Request], recorded: Recorder
) -> Recorder:
    recorder = Recorder()
    control = assemble(chosen, capacity, recorder)
    cost = RecordedCost(
        [step.plan.digest for step in recorded.steps],
        [step.timing for step in recorded.steps],
        [(step.prefill_tokens, step.decode_tokens, step.context_tokens) for step in recorded.steps],
    )
    Simulation(control, SimExecutor(cost, capacity), requests).run()
    assert cost.parity(len(recorder.steps))
    return recorder


workloads = st.lists(
    st.tuples(
        st.integers(0, 90), st.integers(0, 30), st.integers(1, 20), st.integers(1, 9), st.integers(0, 2)
    ),
    min_size=1,
    max_size=15,
).map(
    lambda rows: [
        Request(
            id=f"r{i}",
            prompt=Prompt((*((Segment(1, 0, shared),) if shared else ()), Segment(100 + i, 0, own))),
            arrival=arrival,
            output_len=output,
            priority=priority,
            ttft_slo=20,
            tpot_slo=5,
        )
        for i, (arrival, shared, own, output, priority) in enumerate(sorted(rows))
    ]
)


@pytest.mark.parametrize("eviction", ["lru", "fifo", "lfu"])
@pytest.mark.parametrize("policy", ["fcfs", "prefill_first", "sjf", "priority", "edf"])
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(requests=workloads, seed=st.integers(0, 99), blocks=st.integers(16, 40), cache=st.booleans())
def test_replaying_durations_repeats_every_step_and_every_timestamp(
    policy: str, eviction: str, requests: list[Request], seed: int, blocks: int, cache: bool
) -> None:
    # Nothing but time separates the two clocks here, and times are small, so that an arrival often falls on
    # the very instant of a plan or a commit: the order of equal times must be the same on both.
    chosen, capacity = spec(policy, eviction, cache=cache), Capacity(blocks, 4, 10_000, 100)
    real = run_stepped(chosen, capacity, requests, seed)
    sim = replay(chosen, capacity, requests, real)
    assert [step.plan for step in sim.steps] == [step.plan for step in real.steps]
    assert [step.timing for step in sim.steps] == [step.timing for step in real.steps]
    assert sim.requests == real.requests


def test_a_replay_that_decides_otherwise_says_where_it_left_the_record() -> None:
    requests = [
        Request(id=f"r{i}", prompt=Prompt((Segment(i, 0, 8),)), arrival=0, output_len=6 - i) for i in range(5)
    ]
    capacity = Capacity(40, 4, 10_000, 100)
    recorded = run_stepped(spec("fcfs", seqs=2), capacity, requests, 1)
    recorder = Recorder()
    control = assemble(spec("sjf", seqs=2), capacity, recorder)
    cost = RecordedCost(
        [step.plan.digest for step in recorded.steps],
        [step.timing for step in recorded.steps],
        [(step.prefill_tokens, step.decode_tokens, step.context_tokens) for step in recorded.steps],
    )
    Simulation(control, SimExecutor(cost, capacity), requests).run()
    assert cost.diverged_at == 0
    assert not cost.parity(len(recorder.steps))
    assert len(recorder.requests) == 5


def test_a_recording_without_steps_is_refused() -> None:
    with pytest.raises(ReplayError, match="no steps"):
        RecordedCost([], [], [])


@pytest.mark.parametrize("driver", ["stepped", "simpy"])
def test_a_policy_that_schedules_nothing_ends_the_run_with_its_name(driver: str, tmp_path: object) -> None:
    from lab.policy import SchedulingPolicy, Step

    class Idle(SchedulingPolicy):
        def schedule(self, step: Step) -> None:
            pass

    recorder = Recorder()
    capacity = Capacity(8, 4, 100, 100)
    control = assemble(spec("fcfs"), capacity, recorder)
    control.core.policy, control.core.policy_name = Idle(), "Idle"
    requests = [Request(id="a", prompt=Prompt((Segment(1, 0, 4),)), arrival=5, output_len=2)]
    cost = RecordedCost(["x"], [StepTiming(0, 0, 1, 0, 0)], [(0, 0, 0)])
    drive = (
        SteppedRun(control, Erratic(capacity, 0), requests)
        if driver == "stepped"
        else Simulation(control, SimExecutor(cost, capacity), requests)
    )
    with pytest.raises(PolicyError, match="'Idle' scheduled nothing at step 0 although 1 requests wait"):
        drive.run()
