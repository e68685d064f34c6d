"""Shapes that the literature reports, run on the simulator with a cost model of two lines; and what planning costs."""

from __future__ import annotations

import itertools
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lab.control.executor import Capacity
from lab.control.plan import StepPlan, StepTiming
from lab.control.request import Prompt, Request, Segment
from lab.control.step import Limits
from lab.policy import SchedulingPolicy
from policies.keyed_heap import KeyedHeap
from policies.scheduling.edf import EarliestDeadlineFirst
from policies.scheduling.fcfs import Fcfs
from policies.scheduling.mc_sf import MemoryConstrainedShortest
from policies.scheduling.prefill_first import PrefillFirst
from policies.scheduling.sarathi import Sarathi
from policies.scheduling.sjf import ShortestJobFirst
from policies.scheduling.srpt import ShortestRemaining
from tests.control.harness import Notes
from tests.oracles.queueing import drive

ROOT = Path(__file__).resolve().parents[2]
MS = 1_000_000


class Linear:
    """A step takes 8 ms and 0.1 ms for each token."""

    def step_time(self, plan: StepPlan) -> StepTiming:
        return StepTiming(0, 0, 8 * MS + plan.tokens * MS // 10, 0, 0)


def requests(count: int, rate: float, seed: int = 1, **options: object) -> list[Request]:
    """Poisson arrivals; prompts of about 600 tokens, outputs of about 60, both with a tail."""
    rng, now, made = random.Random(seed), 0.0, []
    for i in range(count):
        now += rng.expovariate(rate)
        prompt, output = (round(rng.lognormvariate(mean, 0.7)) + 1 for mean in (6.2, 3.9))
        made.append(
            Request(
                id=f"{i}",
                prompt=Prompt((Segment(i, 0, min(prompt, 4000)),)),
                arrival=round(now * 1e9),
                output_len=output,
                **options,  # type: ignore[arg-type]
            )
        )
    return made


def run(policy: SchedulingPolicy, work: list[Request], *, blocks: int = 4000, budget: int = 2048) -> Notes:
    notes = Notes()
    drive(policy, Linear(), work, notes, Capacity(blocks, 16), Limits(budget, 64))
    return notes


def ttft_ms(notes: Notes) -> float:
    return float(np.mean([(r.token_times[0] - r.request.arrival) / MS for r in notes.requests.values()]))


def gaps_p99_ms(notes: Notes) -> float:
    times = [record.token_times for record in notes.requests.values()]
    return float(np.percentile([(b - a) / MS for row in times for a, b in itertools.pairwise(row)], 99))


def test_a_smaller_chunk_bounds_the_time_between_tokens_and_raises_the_time_to_the_first() -> None:
    work = requests(250, 5.0)
    runs = [run(Sarathi(chunk=chunk), work) for chunk in (128, 256, 512, 2048)]
    gaps, firsts = [gaps_p99_ms(notes) for notes in runs], [ttft_ms(notes) for notes in runs]
    assert gaps == sorted(gaps)
    assert firsts == sorted(firsts, reverse=True)
    assert gaps[0] < 0.25 * gaps[-1]
    # A full chunk's step is the most that can come between two tokens: 8 ms and 0.1 ms a token.
    for chunk, gap in zip((128, 256, 512, 2048), gaps, strict=True):
        assert gap <= 8 + chunk / 10 + 1e-6


def test_prompts_first_stall_generation_more_than_stall_free_batching() -> None:
    work = requests(250, 5.0)
    stalls, free = run(PrefillFirst(), work), run(Sarathi(chunk=256), work)
    assert gaps_p99_ms(stalls) > 3 * gaps_p99_ms(free)
    assert ttft_ms(stalls) < ttft_ms(free)


def test_knowing_lengths_lowers_mean_latency_under_load_and_minding_memory_lowers_it_more() -> None:
    work = requests(250, 8.0)
    mean, computed = {}, {}
    for policy in (Fcfs(), ShortestJobFirst(), ShortestRemaining(), MemoryConstrainedShortest()):
        records = run(policy, work, blocks=500).requests.values()
        mean[type(policy)] = np.mean([record.end - record.request.arrival for record in records])
        computed[type(policy)] = sum(record.computed_tokens for record in records)
    assert mean[ShortestRemaining] < 0.97 * mean[Fcfs]
    assert mean[ShortestJobFirst] < 0.9 * mean[Fcfs]
    assert mean[MemoryConstrainedShortest] < 0.95 * mean[ShortestJobFirst]
    assert computed[MemoryConstrainedShortest] == sum(len(r.prompt) + r.output_limit - 1 for r in work)


def test_deadline_order_recomputes_little_more_than_order_of_arrival_when_memory_is_tight() -> None:
    rng = random.Random(3)
    work = requests(250, 6.0)
    slos = [{"ttft_slo": rng.choice((500, 2000)) * MS, "tpot_slo": rng.choice((50, 150)) * MS} for _ in work]
    work = [
        Request(id=r.id, prompt=r.prompt, arrival=r.arrival, output_len=r.output_len, **slo)
        for r, slo in zip(work, slos, strict=True)
    ]
    computed = {}
    for policy in (Fcfs(), EarliestDeadlineFirst()):
        records = run(policy, work, blocks=600).requests.values()
        computed[type(policy)] = sum(record.computed_tokens for record in records)
    assert computed[EarliestDeadlineFirst] < 1.15 * computed[Fcfs]


# -- what planning costs ---------------------------------------------------------------------------------------


def test_the_planning_benchmark_prints_a_ratio_for_each_policy() -> None:
    """What it is is for people on a quiet machine; that it is a ratio of times, and not of queue lengths, for us."""
    command = [sys.executable, str(ROOT / "experiments/benchmarks/planning.py"), "fcfs,srpt,dlpm", "200,4000"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    rows = re.findall(r"^(\w+) .* ([\d.]+)$", done.stdout, re.MULTILINE)
    assert [name for name, _ in rows] == ["fcfs", "srpt", "dlpm"], done.stdout
    assert all(0 < float(ratio) < 10 for _, ratio in rows)


@pytest.mark.parametrize("seed", range(5))
def test_a_heap_tells_its_first_names_without_losing_any(seed: int) -> None:
    rng, heap, keys = random.Random(seed), KeyedHeap[str](), {}
    for _ in range(3000):
        name = f"n{rng.randrange(60)}"
        if rng.random() < 0.3:
            heap.remove(name)
            keys.pop(name, None)
        else:
            keys[name] = (rng.randrange(5), name)
            heap.push(name, keys[name])
        count = rng.randrange(8)
        expected = sorted(keys, key=keys.__getitem__)
        assert heap.first(count) == expected[:count]
        assert len(heap) == len(keys)
        if expected and rng.random() < 0.1:
            assert heap.pop() == expected[0]
            del keys[expected[0]]
