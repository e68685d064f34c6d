"""What papers claim of policies, as directions: who wins, and which way a number moves with a parameter.

The engine is a cost model of about a 7B model on one GPU, where a chunk of a prompt reads again what came before it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from lab import plugins
from lab.control.executor import Capacity
from lab.control.observer import Observer, RequestRecord
from lab.control.plan import StepPlan, StepTiming
from lab.control.request import Prompt, Request, Segment
from lab.control.step import Limits
from policies.preemption.last import Last
from sim.cost.model import Batch
from tests.oracles.queueing import SECOND, Floats, drive, poisson


@dataclass(frozen=True)
class Gpu:
    """Microseconds: a step, a token of a prompt, a decode, a token of context that a chunk attends to."""

    step: float = 8000.0
    prompt: float = 60.0
    decode: float = 80.0
    context: float = 1.0

    def step_time(self, plan: StepPlan) -> StepTiming:
        batch = Batch.of(plan)
        decodes = sum(work.tokens == 1 for work in plan.work)
        us = self.step + self.decode * decodes + self.prompt * (batch.rows - decodes)
        return StepTiming(0, 0, round(1000 * (us + self.context * batch.prefill_context)), 0, 0)


class Lives(Observer):
    def __init__(self) -> None:
        self.all: list[RequestRecord] = []

    def on_request(self, record: RequestRecord) -> None:
        assert record.outcome == "finished", record
        self.all.append(record)


@dataclass(frozen=True)
class Outcome:
    ttft: Floats
    gaps: Floats
    """Times between tokens, of all requests pooled."""
    latency: Floats


@functools.cache
def serve(name: str, rate: float, slots: int = 128, count: int = 300, **parameters: object) -> Outcome:
    """Prompts of some 900 tokens, long-tailed; outputs of some 60, long-tailed too; the same ones at any rate."""
    rng = np.random.default_rng(12)
    prompts = np.clip(rng.lognormal(6.3, 1.0, count), 16, 8000).astype(int).tolist()
    outputs = np.clip(rng.lognormal(3.6, 1.0, count), 2, 800).astype(int).tolist()
    arrivals = poisson(rng, rate, count).tolist()
    requests = [
        Request(id=f"{i}", prompt=Prompt((Segment(i, 0, p),)), arrival=a, output_len=o)
        for i, (p, o, a) in enumerate(zip(prompts, outputs, arrivals, strict=True))
    ]
    lives = Lives()
    policy = plugins.create("policy", name, parameters)
    # Whoever is preempted is swapped out, and back for nothing: the papers hide the copies behind the steps.
    capacity = Capacity(20_000, host_blocks=200_000)
    drive(policy, Gpu(), requests, lives, capacity, Limits(8192, slots), preemption=Last(mode="swap"))
    records = sorted(lives.all, key=lambda record: record.seq)
    gaps = [b - a for r in records for a, b in itertools.pairwise(r.token_times)]
    return Outcome(
        np.array([r.token_times[0] - r.request.arrival for r in records]) / SECOND,
        np.array(gaps) / SECOND,
        np.array([r.end - r.request.arrival for r in records]) / SECOND,
    )


def test_a_smaller_chunk_trades_first_tokens_for_steady_ones(
    record_property: Callable[[str, object], None],
) -> None:
    """Sarathi-Serve: p99 of the time between tokens falls and the time to the first rises as the chunk shrinks."""
    chunks = (2048, 1024, 512, 256, 128)
    runs = [serve("sarathi", 5.0, chunk=chunk) for chunk in chunks]
    between = [float(np.quantile(run.gaps, 0.99)) for run in runs]
    first = [float(run.ttft.mean()) for run in runs]
    for chunk, b, f in zip(chunks, between, first, strict=True):
        record_property("row", f"sarathi chunk {chunk}: p99 TBT {b * 1e3:.0f} ms, mean TTFT {f:.3f} s")
    assert between == sorted(between, reverse=True)
    assert first == sorted(first)
    assert between[-1] < between[0] / 4
    longest = max(float(run.gaps.max()) for run in runs[-1:])
    assert longest < 2 * (8000 + 80 * 128 + 60 * 128 + 8000) / 1e6, "a step is longer than its chunk allows"


def capacity(name: str, objective: float, **parameters: object) -> float:
    """The highest rate of a grid with p99 of the time between tokens within the objective and no growing queue."""
    met = 0.0
    for rate in (2.0, 4.0, 6.0):
        run = serve(name, rate, **parameters)
        if np.quantile(run.gaps, 0.99) > objective or np.median(run.ttft) > 2:
            break
        met = rate
    return met


def test_stall_free_batching_carries_more_load_within_an_objective(
    record_property: Callable[[str, object], None],
) -> None:
    """Sarathi-Serve's claim of capacity under a p99 objective for the time between tokens."""
    stalls, steady = capacity("prefill_first", 0.060), capacity("sarathi", 0.060, chunk=512)
    record_property(
        "row", f"capacity at p99 TBT <= 60 ms: prefill_first {stalls}, sarathi {steady} requests/s"
    )
    assert steady > 2 * stalls > 0
    eager, patient = serve("prefill_first", 4.0), serve("sarathi", 4.0, chunk=128)
    assert eager.ttft.mean() < patient.ttft.mean()
    assert np.quantile(eager.gaps, 0.99) > 2 * np.quantile(patient.gaps, 0.99)


@pytest.mark.parametrize("name", ["sjf", "srpt", "ltr", "mlfq"])
def test_knowing_or_learning_lengths_helps_the_mean_under_load(
    name: str, record_property: Callable[[str, object], None]
) -> None:
    """SJF, SRPT, LTR and FastServe's claim against order of arrival, where slots are scarce and lengths vary."""
    plain, better = serve("fcfs", 5.0, slots=4), serve(name, 5.0, slots=4)
    record_property(
        "row", f"{name}: mean latency {better.latency.mean():.2f} s, fcfs {plain.latency.mean():.2f} s"
    )
    assert better.latency.mean() < 0.9 * plain.latency.mean()
