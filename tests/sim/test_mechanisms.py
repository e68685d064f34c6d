"""Switches of the simulator: each does what it says, to the nanosecond, and nothing else."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.assembly import EngineSpec, assemble
from lab.control.executor import Capacity
from lab.control.observer import Observer, RequestRecord, StepRecord
from lab.control.plan import Decoding, StepPlan, StepTiming
from lab.control.request import Prompt, Request, Segment, stream_of
from lab.control.step import Limits
from sim.cost.warmup import WithWarmup
from sim.driver import Simulation
from sim.executor import SimExecutor

MS = 1_000_000


class Flat:
    """Every step takes 10 ms."""

    def step_time(self, plan: StepPlan) -> StepTiming:
        return StepTiming(0, 0, 10 * MS, 0, 0)

    def decode_time(self, decodes: Decoding) -> StepTiming:
        return StepTiming(0, 0, 10 * MS, 0, 0)


class Seen(Observer):
    wants_work = False  # else no steps are crossed at once

    def __init__(self) -> None:
        self.steps: list[StepRecord] = []
        self.requests: dict[str, RequestRecord] = {}

    def on_step(self, step: StepRecord) -> None:
        self.steps.append(step)

    def on_request(self, record: RequestRecord) -> None:
        self.requests[record.request.id] = record


def request(name: str, arrival: int, prompt: int = 8, output: int = 4) -> Request:
    return Request(
        id=name, prompt=Prompt((Segment(stream_of(name), 0, prompt),)), output_len=output, arrival=arrival
    )


def run(
    requests: list[Request],
    *,
    late: bool = False,
    last_block: bool = True,
    policy: str = "fcfs",
    cost: object = None,
    **more: object,
) -> Seen:
    seen = Seen()
    spec = EngineSpec(
        {"policy": {"name": policy}}, Limits(64, 8, None), True, 0, joins_late=late, last_block=last_block
    )
    capacity = Capacity(200, 4, 4096)
    control = assemble(spec, capacity, seen, requests, aggregate=True)
    executor = SimExecutor(cost or Flat(), capacity)  # type: ignore[arg-type]
    Simulation(control, executor, requests, **more).run()  # type: ignore[arg-type]
    control.fleet.cores[0].check()
    return seen


def test_who_arrives_while_a_step_runs_joins_one_step_late() -> None:
    """b arrives at 15 ms, within step 1 (10 to 20): it could be in step 2, and is in step 3."""
    requests = [request("a", 0, output=9), request("b", 15 * MS)]
    soon, late = run(requests), run(requests, late=True)
    assert soon.requests["b"].token_times[0] == 30 * MS
    assert late.requests["b"].token_times[0] == 40 * MS
    assert late.requests["a"].token_times == soon.requests["a"].token_times


def test_who_meets_an_idle_engine_is_served_at_once() -> None:
    for arrival in (0, 95 * MS):
        requests = [request("a", 0), request("b", arrival)]
        assert run(requests, late=True).requests["b"].token_times[0] == arrival + 10 * MS
    # The engine's last step is running: nothing can be decided without b.
    requests = [request("a", 0, output=1), request("b", 5 * MS)]
    assert run(requests, late=True).requests["b"].token_times[0] == 20 * MS


@given(st.integers(0, 2**32), st.sampled_from(["fcfs", "sjf", "vllm_v1", "srpt", "vtc", "prefill_first"]))
def test_late_joins_lose_nobody_and_nothing(seed: int, policy: str) -> None:
    rng = random.Random(seed)
    requests = [
        request(f"r{i}", rng.randrange(300) * MS, rng.randrange(1, 90), rng.randrange(1, 20))
        for i in range(12)
    ]
    requests.sort(key=lambda item: item.arrival)
    seen = run(requests, late=True, policy=policy)
    for item in requests:
        record = seen.requests[item.id]
        assert record.outcome == "finished"
        assert len(record.token_times) == item.output_len
        first = next(s for s in seen.steps if item.id in s.plan.admitted)
        running = next((s for s in seen.steps if s.plan.now < item.arrival < s.end), None)
        if running is None:
            continue
        assert first.plan.index > running.plan.index
        if first.plan.index == running.plan.index + 1:  # then there was nobody else to plan for
            assert first.running == len(first.plan.admitted)


def alike(name: str, arrival: int, prompt: int) -> Request:
    return dataclasses.replace(request(name, arrival), prompt=Prompt((Segment(1, 0, prompt),)))


@pytest.mark.parametrize(
    ("prompt", "last_block", "computed"),
    [(16, True, 4), (16, False, 1), (18, True, 2), (18, False, 2), (4, False, 1)],
)
def test_a_prompt_that_is_cached_whole_computes_its_last_block_or_its_last_token(
    prompt: int, last_block: bool, computed: int
) -> None:
    """In blocks of 4; the second of two equal prompts, while the first holds the blocks and after it let them go."""
    for arrival in (15 * MS, 95 * MS):
        seen = run([alike("a", 0, prompt), alike("b", arrival, prompt)], last_block=last_block)
        (work,) = next(
            [w for w in step.plan.items if w.request == "b"]
            for step in seen.steps
            if "b" in step.plan.admitted
        )
        assert (work.start, work.tokens, work.samples) == (prompt - computed, computed, True)
        assert seen.requests["b"].cached_tokens == prompt - computed
        assert len(seen.requests["b"].token_times) == 4


@given(st.integers(0, 2**32), st.sampled_from(["fcfs", "sjf", "vllm_v1", "srpt", "vtc", "prefill_first"]))
def test_without_the_last_blocks_rule_nobody_and_nothing_is_lost(seed: int, policy: str) -> None:
    """`run` checks the pool's books; every token is computed or cached, and never more than there are."""
    rng = random.Random(seed)
    requests = [
        dataclasses.replace(
            alike(f"r{i}", rng.randrange(300) * MS, 4 * rng.randrange(1, 20)), output_len=rng.randrange(1, 20)
        )
        for i in range(12)
    ]
    requests.sort(key=lambda item: item.arrival)
    seen = run(requests, policy=policy, last_block=False)
    for item in requests:
        record = seen.requests[item.id]
        assert (record.outcome, len(record.token_times)) == ("finished", item.output_len)
        assert record.cached_tokens < len(item.prompt)
        if not record.preemptions:
            assert record.cached_tokens + record.computed_tokens == len(item.prompt) + item.output_len - 1


def test_the_api_holds_everybody_up_by_its_time() -> None:
    requests = [request("a", 0), request("b", 200 * MS)]
    plain, held = run(requests), run(requests, api_ns=8 * MS)
    for name in ("a", "b"):
        times = [time + 8 * MS for time in plain.requests[name].token_times]
        assert list(held.requests[name].token_times) == times


def test_the_first_steps_are_slower_coasting_or_not() -> None:
    requests = [request("a", 0, output=30)]
    for policy in ("fcfs", "vllm_v1"):
        seen = run(requests, policy=policy, cost=WithWarmup(Flat(), 2.0, 5.0))  # type: ignore[arg-type]
        took = [step.timing.forward_ns for step in seen.steps]
        assert took == [round(10 * MS * (1 + 2 * math.exp(-i / 5))) for i in range(30)]


def test_each_replica_warms_up_by_itself() -> None:
    cost = WithWarmup(Flat(), 1.0, 5.0)  # type: ignore[arg-type]
    first, second = SimExecutor(cost, Capacity(10)), SimExecutor(cost, Capacity(10)).another(1)
    plan = StepPlan(0, 0, (), "", preempted=(("x", "recompute"),))
    assert first.execute(plan) == second.execute(plan)
    assert first.plan_ns(plan) == second.plan_ns(plan) == 0
    assert second._cost is not cost


def test_measured_planning_takes_time_and_modelled_planning_takes_the_models() -> None:
    requests = [request("a", 0)]
    assert all(step.timing.plan_ns == 0 for step in run(requests).steps)
    measured = run(requests, measured_control=True)
    assert all(step.timing.plan_ns > 0 and step.timing.commit_ns > 0 for step in measured.steps)
    assert all(step.timing.forward_ns == 10 * MS for step in measured.steps)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["mechanisms.warmup=-1", "backend=sim"], "mechanisms.warmup is -1.0"),
        (["mechanisms.api_ms=8"], "switches of the simulator"),
        (["mechanisms.graph_padding=true", "backend=sim"], "isn't read with cost=fitted"),
        (["mechanisms.control=guessed", "backend=sim"], "mechanisms.control is 'guessed'"),
        (["cost=tables", "backend=sim"], "cost.tables=DIR"),
        (["cost.mfu=0.5", "backend=sim"], "expected cost=physical or tables"),
        (["cost=physical", "cost.kv=int4", "backend=sim"], "cost.kv is 'int4'"),
    ],
)
def test_wrong_switches_are_one_sentence(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from lab.experiment import main

    assert main(words) != 0
    assert sentence in capsys.readouterr().err
