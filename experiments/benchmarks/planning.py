"""What planning costs with many waiting: `python experiments/benchmarks/planning.py [policy,...] [waiting,...]`.

For each shipped scheduling policy: a full engine (32 running, all decoding) with so many requests waiting behind it,
and the time of `plan()` per step, in two kinds of step: those in which everybody decodes and nobody can enter, and
those before which one request has ended, so that another is admitted. The last column sets the mean over both at
the longest queue against that at the shortest.
"""

from __future__ import annotations

import gc
import random
import statistics
import sys
import time
from dataclasses import dataclass

from lab import plugins
from lab.control.core import EngineCore
from lab.control.executor import Capacity
from lab.control.plan import StepResult, StepTiming
from lab.control.request import Prompt, Request, Segment
from lab.control.step import Limits
from policies.eviction.lru import Lru
from policies.prediction.oracle import Oracle

SLOTS = 32
WAITING = (100, 10_000, 50_000)
STEP_NS = 20_000_000


@dataclass(frozen=True)
class Cost:
    """Median microseconds of a plan."""

    decoding: float
    admitting: float

    @property
    def mean(self) -> float:
        return (self.decoding + self.admitting) / 2


def request(number: int, arrival: int, rng: random.Random) -> Request:
    """Prompts of several lengths, tenants, priorities; half of them share one of ten heads."""
    head = (Segment(rng.randrange(10), 0, 64),) if rng.random() < 0.5 else ()
    return Request(
        id=f"r{number}",
        prompt=Prompt((*head, Segment(100 + number, 0, rng.randint(20, 400)))),
        arrival=arrival,
        output_len=rng.randint(400, 1000),
        tenant=f"t{rng.randrange(20)}",
        priority=rng.randrange(3),
        ttft_slo=rng.choice((10**9, 10**10)),
        tpot_slo=rng.choice((50_000_000, 200_000_000)),
    )


def measure(name: str, waiting: int, steps: int = 60) -> Cost:
    """Time `plan()` on one policy behind a queue of this length."""
    policy = plugins.create("policy", name)
    policy.rng = random.Random(0)
    core = EngineCore(
        policy,
        Lru(),
        capacity=Capacity(2 * SLOTS * 60, 16),
        limits=Limits(2048, SLOTS),
        predictor=Oracle(),
    )
    rng = random.Random(1)
    added, now = 0, 0
    running: list[str] = []
    spent: dict[bool, list[int]] = {False: [], True: []}

    def refill(count: int) -> None:
        nonlocal added
        while core.waiting < count:
            core.add(request(added, now, rng), now)
            added += 1

    def step(kind: bool | None) -> None:
        nonlocal now, running
        began = time.perf_counter_ns()
        plan = core.plan(now)
        took = time.perf_counter_ns() - began
        if kind is not None:
            spent[kind].append(took)
        now += STEP_NS
        core.commit(plan, StepResult((0,) * sum(work.samples for work in plan.work)), now)
        core.observe(StepTiming(0, 0, STEP_NS, 0, 0))
        running = [work.request for work in plan.work]

    gc.collect()
    gc.disable()
    try:
        refill(waiting + SLOTS)
        for _ in range(40):  # fill the slots, compute the prompts, let the policy look at all that came
            step(None)
        for _ in range(steps):
            step(False)
            core.abort(rng.choice(running), now)
            step(True)
            refill(waiting)
            for _ in range(3):  # the newcomer's prompt, and whom it displaces
                step(None)
    finally:
        gc.enable()
    return Cost(statistics.median(spent[False]) / 1e3, statistics.median(spent[True]) / 1e3)


def main(names: list[str], counts: list[int]) -> dict[str, float]:
    """Print the table; return the ratio of each policy."""
    print(f"plan(), microseconds, {SLOTS} running: decoding only / with one admission")
    print(f"{'policy':<14}" + "".join(f"{f'{count} waiting':>22}" for count in counts) + f"{'ratio':>9}")
    ratios = {}
    for name in names:
        costs = [measure(name, count) for count in counts]
        ratios[name] = costs[-1].mean / costs[0].mean
        cells = "".join(f"{f'{cost.decoding:.0f} / {cost.admitting:.0f}':>22}" for cost in costs)
        print(f"{name:<14}{cells}{ratios[name]:>9.2f}", flush=True)
    return ratios


if __name__ == "__main__":
    chosen = sys.argv[1].split(",") if sys.argv[1:] else plugins.names("policy")
    main(chosen, [int(count) for count in sys.argv[2].split(",")] if sys.argv[2:] else list(WAITING))
