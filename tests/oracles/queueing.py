"""Closed forms of queueing theory, and the shipped simulator set up as the queue that each of them describes.

Time is in seconds, sizes in tokens. A server is an engine whose step time says what a token costs:

- `PerPrompt`: a job is a prompt, computed whole in one step, with one output token. One step a job, not
  interruptible: FCFS, SJF and non-preemptive priorities, at any size resolution.
- `PerSample(token)`: a job is its output tokens; a step takes `token` for each sequence that gets one, and
  (re)computing a prompt is free. One slot gives a server that can turn to another job after each token;
  many slots give processor sharing; `PerSample(each, step)` adds a fixed part (continuous batching), and
  `PerSample(0, step)` makes each slot a server of its own.

Sizes are discrete and a step is never cut short, so the textbook formulas, which know neither, hold only in
the limit. They are not met by a wider tolerance here: every formula below is for *discrete* sizes served in
quanta of `quantum` seconds, is exact for that system, and becomes the textbook's as the quantum goes to 0.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from lab.assembly import ControlPlane
from lab.control.core import EngineCore
from lab.control.executor import Capacity
from lab.control.fleet import Fleet, FleetSpec
from lab.control.gateway import Gateway
from lab.control.observer import Observer, RequestRecord, StepRecord
from lab.control.plan import StepPlan, StepTiming
from lab.control.request import Prompt, Request, Segment
from lab.control.step import Limits
from lab.policy import LengthPredictor, PreemptionPolicy, SchedulingPolicy
from policies.admission.always import Always
from policies.eviction.lru import Lru
from policies.routing.single import Single
from policies.scaling.fixed import Fixed
from sim.cost.model import CostModel
from sim.driver import Simulation
from sim.executor import SimExecutor

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

SECOND = 1_000_000_000
ENDLESS = 1 << 40
"""Tokens: a block of this size holds anything, a budget of this size never binds."""


# -- sizes ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """A distribution over `values` tokens (ascending, at least 1); a token takes `quantum` seconds."""

    values: Ints
    probability: Floats
    quantum: float

    @property
    def seconds(self) -> Floats:
        return self.values * self.quantum

    def mean(self, of: Floats | None = None) -> float:
        """Expectation of `of`, given at each value (default: of the size in seconds)."""
        return float(self.probability @ (self.seconds if of is None else of))

    @property
    def second_moment(self) -> float:
        return self.mean(self.seconds**2)

    def up_to(self, of: Floats) -> Floats:
        """E[of; S <= x] at each value x."""
        return np.cumsum(self.probability * of)

    def below(self, of: Floats) -> Floats:
        """E[of; S < x] at each value x."""
        return self.up_to(of) - self.probability * of

    def draw(self, rng: np.random.Generator, count: int) -> Ints:
        """Inverse transform: one uniform a job, so that streams stay comparable between distributions."""
        index = np.searchsorted(np.cumsum(self.probability), rng.random(count), side="right")
        return self.values[np.minimum(index, len(self.values) - 1)]


def geometric(*parts: tuple[float, float], per_second: int) -> Sizes:
    """Mixture of geometric sizes, given as (probability, mean seconds): exponentials, rounded up to tokens."""
    longest = max(mean for _, mean in parts) * per_second
    values = np.arange(1, int(45 * longest) + 1)
    probability = sum(
        share * (1 - 1 / (mean * per_second)) ** (values - 1) / (mean * per_second) for share, mean in parts
    )
    assert isinstance(probability, np.ndarray)
    return Sizes(values, probability / probability.sum(), 1 / per_second)


def exponential(per_second: int) -> Sizes:
    """Mean 1 s; the rows `exp` of the table."""
    return geometric((1.0, 1.0), per_second=per_second)


def hyperexponential(per_second: int) -> Sizes:
    """Mean 1 s, E[S^2] = 10.82; the rows `H2` of the table."""
    return geometric((0.9, 0.3), (0.1, 7.3), per_second=per_second)


def fixed(tokens: int, per_second: int) -> Sizes:
    """All of one size."""
    return Sizes(np.array([tokens]), np.array([1.0]), 1 / per_second)


def empirical(tokens: Sequence[int] | Ints, quantum: float) -> Sizes:
    """The sizes of a trace."""
    values, counts = np.unique(np.asarray(tokens), return_counts=True)
    return Sizes(values, counts / counts.sum(), quantum)


# -- closed forms: mean sojourn time E[T] of M/G/1 with arrival rate `rate` --------------------------------


def fcfs(rate: float, sizes: Sizes) -> float:
    """Pollaczek-Khinchine: E[S] + rate E[S^2] / (2 (1 - rho))."""
    return sizes.mean() + rate * sizes.second_moment / 2 / (1 - rate * sizes.mean())


def processor_sharing(rate: float, sizes: Sizes) -> float:
    """E[S] / (1 - rho), whatever the distribution (the limit of small quanta)."""
    return sizes.mean() / (1 - rate * sizes.mean())


def sjf(rate: float, sizes: Sizes, score: Floats | None = None) -> float:
    """Non-preemptive shortest job first (Phipps 1956): E[T(x)] = x + W0 / ((1 - rho_<x) (1 - rho_<=x)).

    W0 = rate E[S^2] / 2 is the residual of the job in service; equal sizes are served in order of arrival.
    """
    x = sizes.seconds
    before, with_equals = rate * sizes.below(x), rate * sizes.up_to(x)
    return sizes.mean(x + rate * sizes.second_moment / 2 / ((1 - before) * (1 - with_equals)))


def longest_first(rate: float, sizes: Sizes) -> float:
    """Non-preemptive longest job first: `sjf` with the order turned round."""
    x = sizes.seconds
    rho = rate * sizes.mean()
    before, with_equals = rho - rate * sizes.up_to(x), rho - rate * sizes.below(x)
    return sizes.mean(x + rate * sizes.second_moment / 2 / ((1 - before) * (1 - with_equals)))


def psjf(rate: float, sizes: Sizes) -> float:
    """Preemptive shortest job first, by original size, turning only after a token (of q seconds):

    E[T(x)] = (rate E[S^2; S<=x] / 2 + (rho - rho_<=x) q / 2) / ((1 - rho_<x) (1 - rho_<=x))
              + q + (x - q) / (1 - rho_<x)

    The second term of the numerator is the token of a longer job that an arrival waits for; whoever arrives
    during the last token of a job no longer delays it. q = 0 is the textbook's.
    """
    x, q = sizes.seconds, sizes.quantum
    before, with_equals = rate * sizes.below(x), rate * sizes.up_to(x)
    found = rate * sizes.up_to(x**2) / 2 + (rate * sizes.mean() - with_equals) * q / 2
    return sizes.mean(found / ((1 - before) * (1 - with_equals)) + q + (x - q) / (1 - before))


def srpt(rate: float, sizes: Sizes) -> float:
    """Shortest remaining processing time (Schrage and Miller 1966), turning only after a token (of q seconds):

    E[T(x)] = W0(x) / ((1 - rho_<x) (1 - rho_<=x)) + q + q sum_{r=1}^{x/q-1} 1 / (1 - rho_<rq)
    W0(x) = rate (E[S^2; S<=x] + P(S>x) (x+q)^2 + q E[(S-x-q)+]) / 2

    A longer job delays one of size x by single tokens until it has x left, and then, since it came earlier, by
    all of x: the token that brings it there and the rest are one uninterrupted block, hence (x+q)^2.
    """
    assert np.array_equal(sizes.values, np.arange(len(sizes.values)) + 1)  # sums over r run over the values
    x, q = sizes.seconds, sizes.quantum
    before, with_equals = rate * sizes.below(x), rate * sizes.up_to(x)
    longer = 1 - np.cumsum(sizes.probability)
    beyond = sizes.mean() - sizes.up_to(x) - longer * (x + q)  # E[(S - x - q)+]
    found = rate * (sizes.up_to(x**2) + longer * (x + q) ** 2 + q * beyond) / 2
    slowed = q / (1 - before)
    residence = q + np.cumsum(slowed) - slowed
    return sizes.mean(found / ((1 - before) * (1 - with_equals)) + residence)


def foreground_background(rate: float, sizes: Sizes) -> float:
    """Least attained service in the limit of small quanta:

    E[T(x)] = rate E[min(S,x)^2] / (2 (1 - rho_x)^2) + x / (1 - rho_x), rho_x = rate E[min(S,x)].
    """
    x = sizes.seconds
    longer = 1 - np.cumsum(sizes.probability)
    load = rate * (sizes.up_to(x) + longer * x)
    found = rate * (sizes.up_to(x**2) + longer * x**2) / 2
    return sizes.mean(found / (1 - load) ** 2 + x / (1 - load))


def cobham(rates: Sequence[float], sizes: Sequence[Sizes]) -> list[float]:
    """Mean waits of non-preemptive priority classes, the first one first (Cobham 1954):

    W_k = W0 / ((1 - sigma_{k-1}) (1 - sigma_k)), W0 = sum of rate E[S^2] / 2 over all classes.
    """
    w0 = sum(rate * s.second_moment for rate, s in zip(rates, sizes, strict=True)) / 2
    sigma = np.cumsum([0.0, *(rate * s.mean() for rate, s in zip(rates, sizes, strict=True))])
    return [w0 / ((1 - a) * (1 - b)) for a, b in itertools.pairwise(sigma)]


def preemptive_priority(rates: Sequence[float], sizes: Sequence[Sizes]) -> list[float]:
    """Mean sojourn times of preemptive-resume classes that give way only after a token (of q seconds):

    E[T_k] = (sum_{i<=k} rate_i E[S_i^2] / 2 + (rho - sigma_k) q / 2) / ((1 - sigma_{k-1}) (1 - sigma_k))
             + q + (E[S_k] - q) / (1 - sigma_{k-1})
    """
    q = sizes[0].quantum
    loads = [rate * s.mean() for rate, s in zip(rates, sizes, strict=True)]
    answer, above, found = [], 0.0, 0.0
    for rate, s, load in zip(rates, sizes, loads, strict=True):
        found += rate * s.second_moment / 2
        upto = above + load
        delay = (found + (sum(loads) - upto) * q / 2) / ((1 - above) * (1 - upto))
        answer.append(delay + q + (s.mean() - q) / (1 - above))
        above = upto
    return answer


def mm1_quantile(rate: float, service_rate: float, p: float) -> float:
    """Sojourn times of M/M/1 FCFS are exponential with rate mu - lambda."""
    return float(np.log(1 / (1 - p)) / (service_rate - rate))


def erlang_c(rate: float, service_rate: float, servers: int) -> float:
    """Mean sojourn time of M/M/c: C(c, a) / (c mu - lambda) + 1 / mu, with Erlang's C by his B recursion."""
    load, blocked = rate / service_rate, 1.0
    for n in range(1, servers + 1):
        blocked = load * blocked / (n + load * blocked)
    waits = blocked / (1 - load / servers * (1 - blocked))
    return waits / (servers * service_rate - rate) + 1 / service_rate


def birth_death(rate: float, completion: Callable[[int], float], states: int = 20_000) -> float:
    """E[T] = E[N] / rate of the birth-death chain with births at `rate`, deaths at `completion(n)`."""
    log = np.concatenate([[0.0], np.cumsum([np.log(rate / completion(n)) for n in range(1, states)])])
    weight = np.exp(log - log.max())
    return float(weight @ np.arange(states) / weight.sum() / rate)


def batching(rate: float, step: float, each: float, length: float, cap: int | None = None) -> float:
    """Continuous batching as a birth-death chain: a step takes step + each * n, mean output `length`.

    mu(n) = n / (length (step + each n)) up to the cap, constant beyond it.
    """

    def completion(n: int) -> float:
        n = n if cap is None else min(n, cap)
        return n / (length * (step + each * n))

    return birth_death(rate, completion)


def batching_by_steps(
    rate: float, step: float, each: float, length: float, cap: int | None = None, states: int = 400
) -> float:
    """E[T] of the same engine exactly, for geometric lengths: the chain seen at step boundaries.

    From n >= 1 a step of s = step + each min(n, cap) ends min(n, cap) sequences with probability 1/length
    each, and Poisson(rate s) arrive in it; an arrival at an empty engine starts a step at once. What the
    birth-death chain leaves out: arrivals wait for the step in progress, and completions come in bunches.
    """
    cap = cap or states
    move = np.zeros((states, states))
    took, area = np.zeros(states), np.zeros(states)
    for n in range(1, states):
        rows = min(n, cap)
        took[n] = step + each * rows
        area[n] = n * took[n] + rate * took[n] ** 2 / 2
        left = stats.binom.pmf(np.arange(rows + 1), rows, 1 / length)[::-1]  # of the rows, 0..rows stay
        new = stats.poisson.pmf(np.arange(states), rate * took[n])
        after = np.convolve(left, new)[:states]
        lo = n - rows
        move[n, lo:] = after[: states - lo]
        move[n, -1] += 1 - move[n].sum()  # what is cut off at the end
    took[0] = 1 / rate
    move[0, 1] = 1.0
    balance = move.T - np.eye(states)
    balance[-1] = 1.0
    share = np.linalg.solve(balance, np.eye(states)[-1])
    return float(share @ area / (share @ took) / rate)


# -- estimates -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A mean with the half-width of its 95 % confidence interval."""

    mean: float
    error: float
    """Standard error of the mean."""
    freedom: int

    def half(self, level: float = 0.95) -> float:
        return float(stats.t.ppf((1 + level) / 2, self.freedom)) * self.error

    def __str__(self) -> str:
        return f"{self.mean:.4f} ± {self.half():.4f}"

    def misses(self, expected: float, *, precision: float, rows: int = 1) -> str:
        """Why this doesn't agree with `expected`; empty if it does.

        The 95 % interval must be narrower than ± `precision` (relative), or agreement would say nothing, and
        `expected` must lie in the interval whose level makes 99 % for all `rows` of a table together: means of
        long-tailed batches are skewed, and a 95 % interval made from them covers a little less.
        """
        if self.half() > precision * expected:
            return f"{self} is too vague to compare with {expected:.4f}"
        if abs(self.mean - expected) > self.half(1 - 0.01 / rows):
            return f"{self} (95 %) differs from {expected:.4f} by {self.mean / expected - 1:+.2%}"
        return ""


def batch_means(
    values: Floats, controls: Sequence[tuple[Floats, float]] = (), *, batches: int = 60, warm_up: float = 0.05
) -> Estimate:
    """Mean of a correlated series, from means of consecutive batches, after a warm-up.

    `controls` are series along the same path whose expectation is known; what they missed it by, times their
    regression coefficients, is taken off (control variates: unbiased up to 1/batches, and much narrower).
    """
    size = int(len(values) * (1 - warm_up)) // batches

    def means(series: Floats) -> Floats:
        return np.asarray(series[len(series) - size * batches :].reshape(batches, size).mean(axis=1))

    columns = [np.ones(batches)] + [means(series) - known for series, known in controls]
    design = np.stack(columns, axis=1)
    y = means(values)
    scale = np.maximum(np.abs(design).max(axis=0), 1e-300)
    solution, *_ = np.linalg.lstsq(design / scale, y, rcond=None)
    freedom = batches - design.shape[1]
    variance = float(((y - design / scale @ solution) ** 2).sum()) / freedom
    inverse = np.linalg.pinv((design / scale).T @ (design / scale))
    return Estimate(float(solution[0] / scale[0]), float(np.sqrt(variance * inverse[0, 0])), freedom)


def work_found(arrivals: Ints, service: Ints) -> Ints:
    """Unfinished work that each arrival finds at a work-conserving server, exactly (Lindley's recursion)."""
    net = np.concatenate([[0], np.cumsum(service[:-1] - np.diff(arrivals))])
    return net - np.minimum.accumulate(net)


def mg1_controls(
    rate: float, sizes: Sizes, arrivals: Ints, drawn: Ints, cuts: Sequence[float] = (0.5, 0.9)
) -> list[tuple[Floats, float]]:
    """What is known of any M/G/1 path: gaps, sizes, and the work found, in all and in jobs up to some sizes.

    Work found has the mean of Pollaczek-Khinchine's wait, of the thinned stream for a thinned stream. The cuts
    are shares of the load, not of the jobs.
    """
    gaps = np.diff(arrivals, prepend=0) / SECOND
    known = [(gaps, 1 / rate), (drawn * sizes.quantum, sizes.mean())]
    share = sizes.up_to(sizes.seconds) / sizes.mean()
    for cut in (*cuts, 1.0):
        index = min(int(np.searchsorted(share, cut)), len(sizes.values) - 1)
        kept = np.where(drawn <= sizes.values[index], drawn, 0) * round(sizes.quantum * SECOND)
        load = rate * sizes.up_to(sizes.seconds)[index]
        mean = rate * sizes.up_to(sizes.seconds**2)[index] / 2 / (1 - load)
        known.append((work_found(arrivals, kept) / SECOND, float(mean)))
    return known


# -- the simulator as a queue ----------------------------------------------------------------------------


@dataclass(frozen=True)
class PerPrompt:
    """A step takes `token` nanoseconds for each token it computes."""

    token: int

    def step_time(self, plan: StepPlan) -> StepTiming:
        return StepTiming(0, 0, self.token * plan.tokens, 0, 0)


@dataclass(frozen=True)
class PerSample:
    """A step takes `step`, and `each` for each sequence that gets a token, nanoseconds. Prompts are free."""

    each: int
    step: int = 0

    def step_time(self, plan: StepPlan) -> StepTiming:
        return StepTiming(0, 0, self.step + self.each * sum(work.samples for work in plan.work), 0, 0)


class Run(Observer):
    """What came out, in order of arrival, in nanoseconds; and what the engine said of itself at each step."""

    def __init__(self) -> None:
        self._requests: list[tuple[int, int, int, int, int, str]] = []
        self._waits: list[int] = []
        self.steps: list[tuple[int, int, int]] = []
        """Start, end, requests in the engine."""
        self.work = 0
        """Sum over the tokens generated of how long before each its request had arrived."""

    def on_step(self, step: StepRecord) -> None:
        self.steps.append((step.start, step.end, step.running + step.waiting))

    def on_request(self, record: RequestRecord) -> None:
        assert record.outcome == "finished", record
        request = record.request
        self._requests.append(
            (record.seq, request.arrival, record.token_times[0], record.end, record.preemptions, request.id)
        )
        self.work += sum(record.token_times) - request.arrival * len(record.token_times)

    def close(self, expected: int) -> Run:
        self._requests.sort()
        assert len(self._requests) == expected
        table = np.array([row[1:5] for row in self._requests], dtype=np.int64)
        self.arrival, self.first, self.end, self.preemptions = table.T
        return self

    @property
    def sojourn(self) -> Floats:
        """Seconds from arrival to the last token."""
        return np.asarray((self.end - self.arrival) / SECOND)

    @property
    def ttft(self) -> Floats:
        return np.asarray((self.first - self.arrival) / SECOND)

    @property
    def area(self) -> int:
        """The integral of the number of requests in the engine over time, from its own counts at each step."""
        starts, ends, inside = np.array(self.steps, dtype=np.int64).T
        assert np.all(starts[1:] >= ends[:-1])
        # Those that arrive during a step are not in its count; each is inside from its arrival on.
        step = np.searchsorted(starts, self.arrival, side="right") - 1
        during = (step >= 0) & (self.arrival < ends[step]) & (self.arrival > starts[step])
        return int(inside @ (ends - starts) + (ends[step] - self.arrival)[during].sum())


def poisson(rng: np.random.Generator, rate: float, count: int) -> Ints:
    """Arrival times in nanoseconds."""
    return np.rint(np.cumsum(rng.exponential(SECOND / rate, count))).astype(np.int64)


def simulate(
    policy: SchedulingPolicy,
    cost: PerPrompt | PerSample,
    arrivals: Ints,
    sizes: Ints,
    *,
    slots: int = 1,
    predictor: LengthPredictor | None = None,
    preemption: PreemptionPolicy | None = None,
    priorities: Ints | None = None,
    ttft_slos: Ints | None = None,
    tenants: Sequence[str] | None = None,
) -> Run:
    """Run jobs through the shipped engine core, gateway and SimPy driver."""
    whole = isinstance(cost, PerPrompt)
    requests = [
        Request(
            id=f"{i}",
            prompt=Prompt((Segment(i, 0, size if whole else 1),)),
            arrival=arrival,
            output_len=1 if whole else size,
            priority=0 if priorities is None else int(priorities[i]),
            ttft_slo=None if ttft_slos is None else int(ttft_slos[i]),
            tenant="" if tenants is None else tenants[i],
        )
        for i, (arrival, size) in enumerate(zip(arrivals.tolist(), sizes.tolist(), strict=True))
    ]
    run = Run()
    capacity = Capacity(slots + 1, block_size=ENDLESS, max_context=ENDLESS)
    limits = Limits(ENDLESS, slots)
    drive(policy, cost, requests, run, capacity, limits, predictor=predictor, preemption=preemption)
    return run.close(len(requests))


def drive(
    policy: SchedulingPolicy,
    cost: CostModel,
    requests: Sequence[Request],
    observer: Observer,
    capacity: Capacity,
    limits: Limits,
    **options: Any,
) -> None:
    """The shipped engine core behind the shipped gateway and driver, without a prefix cache."""
    policy.rng = random.Random(1)
    core = EngineCore(
        policy, Lru(), capacity=capacity, limits=limits, prefix_cache=False, observer=observer, **options
    )
    fleet = Fleet(lambda replica, slot: core, Fixed(), FleetSpec())
    control = ControlPlane(Gateway(Always(), Single(), fleet, observer), fleet)
    Simulation(control, SimExecutor(cost, capacity), requests).run()
    core.check()
