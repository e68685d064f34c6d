"""Fit the simulator's cost model to an executor: measure a grid of batch shapes, then a short real workload.

The grid drives the data plane alone with plans made by hand, so that every shape is measured on purpose. The
short workload goes through the real control plane. Every other step of it joins the fit, which so learns the
planning and commit times and what a step takes in company (forward passes in a row of their own are up to a
tenth faster); the steps between are held out, for a first estimate of the error. Fits that leave out a fifth of
the shapes in turn say what the error is on each kind of batch. Data plane.

    python -m sim.calibrate model=smollm2       measures this machine, prints the fit, and keeps it
"""

from __future__ import annotations

import dataclasses
import json
import random
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from lab import plugins
from lab.config import Config, CostConfig
from lab.control.clock import MeasuredControl
from lab.control.core import EngineCore
from lab.control.executor import Executor
from lab.control.loop import IDLE, serve
from lab.control.observer import Observer, StepRecord
from lab.control.plan import GENESIS, Move, StepPlan, StepTiming, Work
from lab.control.request import Prompt, Request, Segment, stream_of
from lab.control.step import Limits
from lab.errors import ConfigError
from lab.policy import EvictionPolicy, SchedulingPolicy
from sim.cost.linear import PHASES, LinearCost
from sim.cost.model import Batch

if TYPE_CHECKING:
    from lab.backend import OpenBackend

Notify = Callable[[int, int, str], None]
"""Called with (done, total, what) as calibration goes on."""

Sample: TypeAlias = tuple[Batch, StepTiming]
IN_A_ROW = 3
"""Steps of a shape of decodes; the first meets caches full of something else, and isn't counted."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A batch to measure: decodes of about one context, and prompt chunks of (start, tokens) each."""

    decodes: int = 0
    context: int = 0
    chunks: tuple[tuple[int, int], ...] = ()

    def contexts(self) -> list[int]:
        """The decodes' contexts: from a quarter to seven quarters of `context`, as uneven as in a real batch.

        Equal contexts, or whole blocks, would need no padding, and measure a case that never happens.
        """
        if self.decodes == 1:
            return [self.context + 3]
        step = 1.5 * self.context / max(1, self.decodes - 1)
        return [self.context // 4 + round(step * i) + 3 for i in range(self.decodes)]

    @property
    def reach(self) -> int:
        """The longest context while it is measured."""
        row = 0 if self.chunks else IN_A_ROW - 1
        return row + max([*self.contexts(), *(start + tokens for start, tokens in self.chunks)])

    @property
    def tokens(self) -> int:
        return self.decodes + sum(tokens for _, tokens in self.chunks)

    def label(self) -> str:
        parts = [f"{self.decodes} decodes at about {self.context}"] if self.decodes else []
        parts += (
            [f"{len(self.chunks)} x {self.chunks[0][1]} prompt tokens at {self.chunks[0][0]}"]
            if self.chunks
            else []
        )
        return " + ".join(parts)


def grid(limits: Limits, max_context: int) -> list[Shape]:
    """Shapes around what an engine with these limits runs, smallest first."""
    budget, seqs = limits.token_budget, limits.max_seqs
    shapes = [Shape(b, c) for b in (1, 2, 4, 8, 12, 16, 24, 32) for c in (32, 128, 384, 1024)]
    shapes += [Shape(chunks=((s, n),)) for n in (16, 48, 128, 256, 512) for s in (0, 256)]
    shapes += [Shape(chunks=((0, n),) * k) for k, n in ((2, 64), (4, 64), (4, 128))]
    shapes += [Shape(b, 256, ((s, n),)) for b in (1, 4, 16) for s in (0, 150) for n in (24, 64, 192)]

    def fits(shape: Shape) -> bool:
        few = shape.tokens <= budget and shape.decodes + len(shape.chunks) <= seqs
        return few and shape.reach <= max_context

    return [shape for shape in shapes if fits(shape)]


class Bench:
    """Makes plans for shapes by hand and times them."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._count = 0
        self._next = 0
        order = list(range(executor.capacity.blocks))
        random.Random(0).shuffle(order)
        self._order = order
        """Blocks as a pool hands them out that was in use for a while: next to nothing lies side by side."""
        self._gone: tuple[str, ...] = ()

    def measure(self, shape: Shape) -> list[Sample]:
        """A shape once; if it is decodes alone, a row of steps after a first one, as they come in a run."""
        capacity = self._executor.capacity
        size = capacity.block_size
        row = 1 if shape.chunks else IN_A_ROW
        requests: list[Request] = []
        works: list[Work] = []
        items = [(context - 1, 1) for context in shape.contexts()] + list(shape.chunks)
        for start, tokens in items:
            self._count += 1
            name = f"calibration-{self._count}"
            prompt = Prompt((Segment(stream_of(name), 0, start + tokens),))
            count = -(-(start + tokens + row - 1) // size)
            blocks = tuple(self._order[(self._next + i) % capacity.blocks] for i in range(count))
            self._next += count
            requests.append(Request(id=name, prompt=prompt, output_len=row))
            works.append(Work(name, start, tokens, True, blocks))
        names = tuple(request.id for request in requests)
        # Introduced in a plan of their own: what a newcomer costs is no part of a batch's shape.
        self._executor.execute(StepPlan(0, 0, (), GENESIS, tuple(requests), names, released=self._gone))
        self._gone = names
        found = []
        for _ in range(row):
            plan = StepPlan(0, 0, tuple(works), GENESIS)
            result = self._executor.execute(plan)
            timing = StepTiming(0, result.prepare_ns, result.forward_ns, result.sample_ns, 0)
            found.append((Batch.of(plan), timing))
            works = [Work(work.request, work.start + 1, 1, True, ()) for work in works]
        return found[1:] or found

    def write(self) -> None:
        """Have every block written: memory that nobody wrote is one page, read over and over."""
        pairs = tuple((0, block) for block in range(1, self._executor.capacity.blocks))
        if pairs:
            self._executor.execute(StepPlan(0, 0, (), GENESIS, copies=(Move("calibration", pairs),)))

    def finish(self) -> None:
        self._executor.execute(StepPlan(0, 0, (), GENESIS, released=self._gone))


class _Steps(Observer):
    def __init__(self) -> None:
        self.records: list[StepRecord] = []

    def on_step(self, step: StepRecord) -> None:
        self.records.append(step)


def shakedown(
    executor: Executor, policy: SchedulingPolicy, eviction: EvictionPolicy, limits: Limits
) -> Iterator[StepRecord]:
    """Steps of a short mixed workload, through the real control plane."""
    capacity = executor.capacity
    steps = _Steps()
    core = EngineCore(
        policy,
        eviction,
        capacity=capacity,
        limits=limits,
        observer=steps,
    )
    longest = min(capacity.max_context, capacity.blocks * capacity.block_size) // 2
    count = min(24, limits.max_seqs)
    sizes = [(20 + 37 * i % 300, 6 + 4 * i) for i in range(count)]
    sizes += [
        (300 + 67 * i % 200, 2 + i % 5) for i in range(count // 2)
    ]  # and steps full of prompts, in a row
    for i, (asked, given) in enumerate(sizes):
        prompt = Prompt((Segment(stream_of("shakedown", i), 0, max(1, min(asked, longest))),))
        core.add(Request(id=f"shakedown-{i}", prompt=prompt, output_len=min(given, longest)), 0)
    clock = [0]
    for wait in serve(core, executor, MeasuredControl(), lambda: clock[0]):
        if wait == IDLE:
            raise core.stalled()
        clock[0] += wait
        yield from steps.records
        steps.records.clear()
        if not core.has_work:
            return


@dataclass(frozen=True)
class Measured:
    """What was measured: repeats of each shape by its label, and the short workload's steps in order."""

    grid: Mapping[str, Sequence[Sample]]
    steps: Sequence[Sample]

    def and_again(self, other: Measured) -> Measured:
        """Both together, as if measured at one time: what two moments of a machine have in common."""
        grid = {label: [*samples, *other.grid.get(label, ())] for label, samples in self.grid.items()}
        return Measured(grid, [*self.steps, *other.steps])

    def to_json(self) -> str:
        def plain(samples: Sequence[Sample]) -> list[list[Any]]:
            return [[list(astuple(batch)), list(astuple(timing))] for batch, timing in samples]

        grid = {label: plain(samples) for label, samples in self.grid.items()}
        return json.dumps({"grid": grid, "steps": plain(self.steps)}) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Measured:
        def samples(plain: list[list[Any]]) -> list[Sample]:
            return [(Batch(*batch), StepTiming(*timing[:7])) for batch, timing in plain]

        body = json.loads(text)
        return cls({label: samples(rows) for label, rows in body["grid"].items()}, samples(body["steps"]))


def measure(
    executor: Executor,
    policy: SchedulingPolicy,
    eviction: EvictionPolicy,
    limits: Limits,
    *,
    repeats: int = 3,
    notify: Notify = lambda done, total, what: None,
) -> Measured:
    """The grid, `repeats` times over, and the short workload. Raises `ConfigError` where nothing fits the limits."""
    capacity = executor.capacity
    shapes = grid(limits, min(capacity.max_context, capacity.blocks * capacity.block_size))
    if not shapes:
        raise ConfigError(
            f"no batch shape to measure fits engine.token_budget={limits.token_budget} and "
            f"engine.max_seqs={limits.max_seqs} with a context of {capacity.max_context}; make one of them larger"
        )
    bench = Bench(executor)
    bench.write()
    for shape in (shapes[0], shapes[-1]):
        bench.measure(shape)
    # Rounds over the whole grid, not repeats of one shape: a noisy second then spoils one sample of many.
    samples: dict[str, list[Sample]] = {shape.label(): [] for shape in shapes}
    for round_ in range(repeats):
        for index, shape in enumerate(shapes):
            notify(round_ * len(shapes) + index, repeats * len(shapes) + 1, shape.label())
            samples[shape.label()] += bench.measure(shape)
    bench.finish()
    notify(repeats * len(shapes), repeats * len(shapes) + 1, "a short workload")
    steps = shakedown(executor, policy, eviction, limits)
    return Measured(samples, [(Batch.of(step.plan), step.timing) for step in steps if step.plan.work])


def fit(measured: Measured, about: Mapping[str, Any]) -> LinearCost:
    """Fit what was measured. `about` is kept beside the coefficients, with the fit's error in and out of sample."""
    learnt, unseen = measured.steps[::2], measured.steps[1::2]
    told: dict[str, list[tuple[Batch, int]]] = {}
    for phase in PHASES:
        told[phase] = [(batch, getattr(timing, phase)) for batch, timing in learnt]
        if phase not in ("plan_ns", "commit_ns"):
            medians = [
                (runs[0][0], round(statistics.median(getattr(timing, phase) for _, timing in runs)))
                for runs in measured.grid.values()
            ]
            told[phase] = medians + told[phase]
    cost = levelled(LinearCost.fit(told, about), learnt)
    executed = [statistics.median(timing.execute_ns for _, timing in runs) for runs in measured.grid.values()]
    quality = {
        "grid_shapes": len(measured.grid),
        "repeat_spread_pct": round(
            statistics.median(
                _spread([timing.execute_ns for _, timing in runs]) for runs in measured.grid.values()
            ),
            1,
        ),
        "grid_error_pct": _errors(
            [cost.price(runs[0][0]).execute_ns for runs in measured.grid.values()], executed
        ),
        "holdout_steps": len(unseen),
        "holdout_error_pct": _errors(
            [cost.price(batch).total_ns for batch, _ in unseen], [timing.total_ns for _, timing in unseen]
        ),
        "holdout_by_shape_pct": _by_shape(told),
    }
    return LinearCost(cost.coefficients, {**cost.measured_on, "quality": quality}, cost.intervals)


MOST_OFF = 2.0
"""A step that took so many times as long as it should, or as many times less, says no more than that."""


def levelled(cost: LinearCost, steps: Sequence[Sample]) -> LinearCost:
    """The fit, each phase scaled so that these steps take what they took on average.

    A robust fit meets the usual step. Interruptions only ever make one longer, so the average lies above, and a
    run's time is made of averages (the idea of Duan's smearing estimate, JASA 1983).
    """
    coefficients, intervals = {}, {}
    for phase in PHASES:
        pairs = [(getattr(timing, phase), getattr(cost.price(batch), phase)) for batch, timing in steps]
        ratios = [min(max(took / told, 1 / MOST_OFF), MOST_OFF) for took, told in pairs if told]
        level = statistics.fmean(ratios) if ratios else 1.0
        coefficients[phase] = {name: level * value for name, value in cost.coefficients[phase].items()}
        intervals[phase] = {
            name: (level * low, level * high) for name, (low, high) in cost.intervals.get(phase, {}).items()
        }
    return LinearCost(coefficients, cost.measured_on, intervals)


def calibrate(
    executor: Executor,
    policy: SchedulingPolicy,
    eviction: EvictionPolicy,
    limits: Limits,
    *,
    about: Mapping[str, Any],
    repeats: int = 3,
    notify: Notify = lambda done, total, what: None,
) -> LinearCost:
    """Measure and fit."""
    return fit(measure(executor, policy, eviction, limits, repeats=repeats, notify=notify), about)


FOLDS = 5


def kind_of(batch: Batch) -> str:
    """What sort of batch it is, for errors by sort."""
    if batch.prefill_pairs == 0:
        return "up to 4 decodes" if batch.seqs <= 4 else "more decodes"
    return "mixed" if batch.decode_context else "prompts"


def _by_shape(measured: Mapping[str, Sequence[tuple[Batch, int]]]) -> dict[str, dict[str, float]]:
    """Error of the forward pass on each kind of batch, by fits that didn't see it: every fifth is left out in turn."""
    pairs: dict[str, list[tuple[float, float]]] = {}
    for fold in range(FOLDS):
        seen = {
            phase: [item for i, item in enumerate(items) if i % FOLDS != fold] or items
            for phase, items in measured.items()
        }
        fit = LinearCost.fit(seen, {}, intervals=False)
        for batch, took in measured["forward_ns"][fold::FOLDS]:
            pairs.setdefault(kind_of(batch), []).append((fit.price(batch).forward_ns, took))
    return {
        kind: {"batches": len(found), **_errors([p for p, _ in found], [m for _, m in found])}
        for kind, found in sorted(pairs.items())
    }


def _spread(durations: Sequence[int]) -> float:
    """How far repeats of one shape lie apart, in percent of the fastest."""
    return (max(durations) - min(durations)) / min(durations) * 100


def _errors(predicted: Sequence[float], measured: Sequence[float]) -> dict[str, float]:
    """Mean absolute and signed relative error, and error of the total, in percent."""
    relative = [(p - m) / m * 100 for p, m in zip(predicted, measured, strict=True)]
    return {
        "mean_abs": round(statistics.fmean(map(abs, relative)), 2),
        "mean": round(statistics.fmean(relative), 2),
        "total": round((sum(predicted) - sum(measured)) / sum(measured) * 100, 2),
    }


def describe(cost: LinearCost) -> list[str]:
    """The fit as lines: each coefficient with its interval, and the errors."""
    lines = []
    for phase, terms in cost.coefficients.items():
        for name, value in terms.items():
            low, high = cost.intervals.get(phase, {}).get(name, (float("nan"),) * 2)
            lines.append(f"{phase:11} {name:16} {value:14,.1f} ns   95 %: {low:,.1f} to {high:,.1f}")
    quality = cost.measured_on.get("quality", {})
    for kind, found in quality.get("holdout_by_shape_pct", {}).items():
        lines.append(
            f"left out, {kind:16} {found['mean_abs']:5.1f} % mean error over {found['batches']:.0f} batches "
            f"({found['mean']:+.1f} % signed)"
        )
    return lines


def command(cfg: Config) -> int:
    """Measure the real engine that `cfg` describes, keep the fit where `cost=fitted` looks for it, and print it."""
    from lab.console import Console
    from sim.backend import fitted

    console = Console()
    engine = cast("OpenBackend", plugins.load_object("backend", "real"))(cfg, console, None)
    try:
        cost = fitted(dataclasses.replace(cfg, cost=CostConfig(recalibrate=True)), console, engine)
    finally:
        engine.close()
    print("\n".join(describe(cost)))
    return 0


def main(argv: list[str] | None = None) -> int:
    from lab.cli import main as run

    return run(command, about="Measure the real engine and fit the simulator's cost model to it.", argv=argv)


if __name__ == "__main__":
    sys.exit(main())
