"""How fast the machine is just now, on batches that are nobody's workload. Data plane.

A shared machine is another one from second to second: neighbours take memory bandwidth and cache, and equal batches
take up to a third longer in one ten seconds than in the next. A few fixed batches, timed between the steps of a run and
between those of a calibration, say how the two compare. On a stepped clock that takes nothing from the run: only its
own steps' durations let its time pass.

One number is not enough: what waits for memory slows down by a third while what computes does not, or the other way
round. So a pace goes by rows, from a lone decode's to a prompt's.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from bisect import bisect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from lab.control.executor import Capacity, Executor
from lab.control.plan import Decoding, StepPlan, StepResult, StepTiming
from lab.control.request import Request
from sim.bench import IN_A_ROW, Bench, Shape
from sim.cost.linear import LinearCost
from sim.cost.model import Batch

SHAPES = (Shape(1, 256), Shape(4, 256), Shape(16, 256), Shape(chunks=((0, 128),)))
"""From bound by memory to bound by arithmetic."""
EVERY_S = 0.5
WATCHED, WATCH_S = 5, 1.0
"""Probes around a run, and seconds within which the last of them begins."""
NEAR = 2
"""Probes on either side of a step that say how fast the machine was then: one alone is noise."""

Speed: TypeAlias = Mapping[int, float]
"""What the probes took, nanoseconds of their forward passes, by their rows."""


def speed_of(cost: LinearCost) -> Speed:
    """Of the machine when the fit was measured; empty where nobody took probes."""
    return {int(rows): ns for rows, ns in cost.measured_on.get("probes_ns", {}).items()}


def mean(taken: Sequence[Speed]) -> Speed:
    """Of several probes. Empty where there are none."""
    return {rows: statistics.fmean(speed[rows] for speed in taken) for rows in taken[0]} if taken else {}


@dataclass(frozen=True)
class Pace:
    """How many times as long a forward pass takes at one speed as at another, by its rows.

    Between two probes a straight line over the logarithm of the rows; beyond the outermost, theirs. 1 without any.
    """

    rows: tuple[int, ...] = ()
    times: tuple[float, ...] = ()

    @classmethod
    def of(cls, now: Speed, then: Speed) -> Pace:
        rows = tuple(sorted(now.keys() & then.keys()))
        return cls(rows, tuple(now[n] / then[n] for n in rows))

    def at(self, rows: int) -> float:
        place = bisect(self.rows, rows)
        if not self.rows:
            return 1.0
        if place in (0, len(self.rows)):
            return self.times[min(place, len(self.rows) - 1)]
        low, high = self.rows[place - 1], self.rows[place]
        share = math.log(rows / low) / math.log(high / low)
        return (1 - share) * self.times[place - 1] + share * self.times[place]

    def applied(self, timing: StepTiming, rows: int) -> StepTiming:
        """What a step took at the one speed, as it would be at the other. The host's own work keeps its time."""
        return dataclasses.replace(timing, forward_ns=round(timing.forward_ns * self.at(rows)))


@dataclass(frozen=True)
class Paced:
    """A fit as of a machine that is faster or slower than the one it was measured on. A `CostModel`."""

    cost: LinearCost
    pace: Pace

    def step_time(self, plan: StepPlan) -> StepTiming:
        return self.price(Batch.of(plan))

    def decode_time(self, decodes: Decoding) -> StepTiming:
        return self.price(Batch.of_decodes(decodes))

    def price(self, batch: Batch) -> StepTiming:
        return self.pace.applied(self.cost.price(batch), batch.rows)

    def expects(self, requests: Iterable[Request], capacity: Capacity, pools: int = 1) -> None:
        self.cost.expects(requests, capacity, pools)

    def account(self) -> dict[str, Any]:
        return self.cost.account()


class Probed:
    """An executor that takes probes between two steps, every `every_s` seconds, on KV blocks it keeps for them.

    Implements `lab.control.executor.Executor`, with fewer blocks than the one it wraps. Not for the wall clock.
    """

    def __init__(
        self, executor: Executor, *, every_s: float = EVERY_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        whole = executor.capacity
        self._shapes = [shape for shape in SHAPES if shape.reach <= whole.max_context]
        kept = min(sum(_blocks(shape, whole.block_size) for shape in self._shapes), whole.blocks // 2)
        self.capacity: Capacity = dataclasses.replace(whole, blocks=whole.blocks - kept)
        self._executor, self._every, self._clock = executor, every_s, clock
        self._bench = Bench(executor, range(whole.blocks - max(1, kept), whole.blocks), name="probe")
        self._bench.write()
        self.taken: list[Speed] = []
        self._last = -math.inf

    def execute(self, plan: StepPlan) -> StepResult:
        self.keep_up()
        return self._executor.execute(plan)

    def keep_up(self) -> None:
        """Take a probe if it is time."""
        if self._clock() >= self._last + self._every:
            self.probe()

    def probe(self) -> None:
        """Take one now."""
        self._last = self._clock()
        self.taken.append({shape.tokens: self._time(shape) for shape in self._shapes})
        self._bench.finish()

    def near(self, place: int) -> Speed:
        """How fast the machine was when so many probes had been taken; an interrupted one doesn't count."""
        taken = self.taken[max(0, place - NEAR) : place + NEAR]
        return {rows: statistics.median(speed[rows] for speed in taken) for rows in taken[0]} if taken else {}

    def forget(self) -> None:
        """Begin anew, with a probe before the next step."""
        self.taken, self._last = [], -math.inf

    def close(self) -> None:
        self._executor.close()

    def _time(self, shape: Shape) -> float:
        return statistics.fmean(timing.forward_ns for _, timing in self._bench.measure(shape))


class Watch:
    """The machine around a run of the real engine, against when it was calibrated."""

    def __init__(self, executor: Executor, then: Speed) -> None:
        """Takes probes: the run is about to begin."""
        self._probed, self._then = Probed(executor), then
        self._probed.probe()
        self._before = self._some()
        self._after: Speed = {}

    def ended(self) -> None:
        """Take them again."""
        self._after = self._some()

    def account(self) -> dict[str, Any]:
        """For the run's record: nanoseconds of each probe, by its rows."""
        speeds = {"calibrated": self._then, "before": self._before, "after": self._after}
        return {name: {str(rows): ns for rows, ns in speed.items()} for name, speed in speeds.items()}

    def _some(self) -> Speed:
        self._probed.forget()  # the first of all is slower
        ends = time.monotonic() + WATCH_S
        while not self._probed.taken or (len(self._probed.taken) < WATCHED and time.monotonic() < ends):
            self._probed.probe()
        return mean(self._probed.taken)


def _blocks(shape: Shape, size: int) -> int:
    ends = [context + IN_A_ROW for context in shape.contexts()] + [start + n for start, n in shape.chunks]
    return sum(-(-end // size) for end in ends)
