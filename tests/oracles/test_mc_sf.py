"""mc_sf against the hindsight optimum, on instances small enough to solve exactly."""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Callable

import pytest

from lab import plugins
from lab.analysis.optimum import Job, hindsight_latency
from lab.control.request import Prompt, Request, Segment
from lab.errors import ConfigError
from tests.control.harness import commit, engine


def instance(rng: random.Random, jobs: int = 6) -> tuple[list[Job], int]:
    """Up to `jobs` requests of a few tokens for 10 to 16 tokens of KV."""
    memory = rng.randint(10, 16)
    made = []
    for _ in range(rng.randint(2, jobs)):
        prompt = rng.randint(1, 5)
        made.append(Job(rng.randint(0, 4), prompt, rng.randint(1, min(8, memory - prompt))))
    return sorted(made, key=lambda job: job.arrival), memory


def play(name: str, jobs: list[Job], memory: int, **params: object) -> tuple[int, int]:
    """Total latency in steps through the engine, a token a block and a unit of time a step; preemptions."""
    core, notes = engine(
        plugins.create("policy", name, params),
        blocks=memory,
        block_size=1,
        token_budget=1000,
        max_seqs=64,
        prefix_cache=False,
    )
    due, now = list(enumerate(jobs)), 0
    while due or core.has_work:
        while due and due[0][1].arrival <= now:
            number, job = due.pop(0)
            prompt = Prompt((Segment(number, 0, job.prompt),))
            core.add(Request(id=f"{number}", prompt=prompt, arrival=job.arrival, output_len=job.output), now)
        plan = core.plan(now)
        if plan:
            commit(core, plan, now + 1)
        now += 1
    records = notes.requests.values()
    return sum(r.end - r.request.arrival for r in records), sum(r.preemptions for r in records)


def brute_force(jobs: list[Job], memory: int) -> int:
    """Every start of every job."""
    slack = sum(job.output for job in jobs)
    best = 1 << 30
    for waits in itertools.product(range(slack), repeat=len(jobs)):
        used = [0] * (max(job.arrival for job in jobs) + 2 * slack)
        for job, wait in zip(jobs, waits, strict=True):
            for k in range(job.output):
                used[job.arrival + wait + k] += job.prompt + k
        if max(used) <= memory:
            best = min(best, sum(wait + job.output for job, wait in zip(jobs, waits, strict=True)))
    return best


def test_optimum_is_what_trying_every_start_finds() -> None:
    rng = random.Random(3)
    for _ in range(40):
        jobs, memory = [Job(rng.randint(0, 2), rng.randint(1, 4), rng.randint(1, 4)) for _ in range(3)], 8
        assert hindsight_latency(jobs, memory) == brute_force(jobs, memory)


def test_optimum_of_cases_that_can_be_seen() -> None:
    both = [Job(0, 3, 2), Job(0, 3, 2)]
    assert hindsight_latency(both, 8) == 4, "4 + 4 tokens fit in the second step"
    assert hindsight_latency(both, 7) == 5, "a step apart, 4 + 3 fit"
    assert hindsight_latency(both, 6) == 6, "one after the other"
    assert hindsight_latency(both, 8, slots=1) == 6
    assert hindsight_latency([], 8) == 0
    # While the long one runs the short one would have to wait for its end; a pause lets it through.
    late = [Job(0, 2, 7), Job(2, 4, 1)]
    assert hindsight_latency(late, 8) == 8
    assert hindsight_latency([Job(0, 4, 5), Job(2, 5, 1)], 8) == 9
    assert hindsight_latency([Job(0, 4, 5), Job(2, 5, 1)], 8, pauses=True) == 7


def test_a_job_that_never_fits_is_named() -> None:
    with pytest.raises(ConfigError, match="prompt=5"):
        hindsight_latency([Job(0, 5, 5)], 8)


def test_mc_sf_is_near_the_optimum_and_beats_the_order_of_arrival() -> None:
    """150 instances; published for the like: 1.022 of the optimum in the mean, and 1.121 in order of arrival."""
    rng = random.Random(12)
    shortest, arrival = [], []
    for _ in range(150):
        jobs, memory = instance(rng)
        optimum = hindsight_latency(jobs, memory)
        for found, params in ((shortest, {}), (arrival, {"by_arrival": True})):
            latency, preemptions = play("mc_sf", jobs, memory, **params)
            assert preemptions == 0, (jobs, memory)
            assert latency >= optimum, (jobs, memory)
            found.append(latency / optimum)
    assert statistics.mean(shortest) <= 1.05
    assert sum(ratio == 1 for ratio in shortest) >= 90
    assert 1.08 <= statistics.mean(arrival) <= 1.16
    assert statistics.mean(arrival) > statistics.mean(shortest) + 0.04


NAMES = plugins.names("policy")


@pytest.mark.parametrize("name", NAMES)
def test_no_policy_beats_the_optimum(name: str) -> None:
    """A schedule that preempts is held against the optimum that may, too."""
    rng = random.Random(5)
    for _ in range(12):
        jobs, memory = instance(rng, 5)
        latency, preemptions = play(name, jobs, memory)
        assert latency >= optimum(tuple(jobs), memory, preemptions > 0), (jobs, memory)


def _cached() -> Callable[[tuple[Job, ...], int, bool], int]:
    known: dict[tuple[tuple[Job, ...], int, bool], int] = {}

    def ask(jobs: tuple[Job, ...], memory: int, pauses: bool) -> int:
        key = (jobs, memory, pauses)
        if key not in known:
            known[key] = hindsight_latency(jobs, memory, pauses=pauses)
        return known[key]

    return ask


optimum = _cached()
