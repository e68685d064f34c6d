"""Fit the simulator's cost model to an executor: measure a grid of batch shapes, then a short real workload.

The grid drives the data plane alone with plans made by hand, so that every shape is measured on purpose. The
short workload goes through the real control plane, once after each round of the grid. Every other step of it joins
the fit, which so learns the planning and commit times and what a step takes in company (forward passes in a row of
their own are up to a tenth faster); the steps between are held out, for a first estimate of the error. Fits that
leave out a fifth of the shapes in turn say what the error is on each kind of batch. Data plane.

    python -m sim.calibrate model=smollm2       measures this machine, prints the fit, and keeps it
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import TYPE_CHECKING, Any, cast

from lab import plugins
from lab.config import Config, CostConfig
from lab.control.clock import MeasuredControl
from lab.control.core import EngineCore
from lab.control.executor import Executor
from lab.control.loop import IDLE, serve
from lab.control.observer import Observer, StepRecord
from lab.control.plan import StepTiming
from lab.control.request import Prompt, Request, Segment, stream_of
from lab.control.step import Limits
from lab.errors import ConfigError
from lab.policy import EvictionPolicy, SchedulingPolicy
from sim.bench import Bench, Sample, Shape
from sim.cost.linear import PHASES, LinearCost
from sim.cost.model import Batch
from sim.probes import EVERY_S, Pace, Probed, Speed, mean

if TYPE_CHECKING:
    from lab.backend import OpenBackend

Notify = Callable[[int, int, str], None]
"""Called with (done, total, what) as calibration goes on."""


def grid(limits: Limits, max_context: int) -> list[Shape]:
    """Shapes around what an engine with these limits runs, smallest first."""
    budget, seqs = limits.token_budget, limits.max_seqs
    shapes = [Shape(b, c) for b in (1, 2, 4, 8, 12, 16, 24, 32) for c in (32, 128, 384, 1024)]
    shapes += [Shape(b, c) for b in (6, 10, 13, 20) for c in (32, 256)]
    shapes += [Shape(b, c, side_by_side=True) for b in (2, 4, 8, 12, 16, 24) for c in (128, 512)]
    shapes += [Shape(b, c, shared=c * 7 // 8) for b in (4, 8, 16, 32) for c in (256, 1024)]
    shapes += [Shape(chunks=((s, n),)) for n in (16, 48, 128, 256, 512) for s in (0, 256)]
    shapes += [Shape(chunks=((0, n),) * k) for k, n in ((2, 64), (4, 64), (4, 128))]
    shapes += [Shape(b, 256, ((s, n),)) for b in (1, 4, 16) for s in (0, 150) for n in (24, 64, 192)]

    def fits(shape: Shape) -> bool:
        few = shape.tokens <= budget and shape.decodes + len(shape.chunks) <= seqs
        return few and shape.reach <= max_context

    return [shape for shape in shapes if fits(shape)]


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
    """What was measured: repeats of each shape by its label, and the short workload's steps in order.

    All as they would be had the machine been of one `speed` throughout: the mean of the probes taken between them.
    """

    grid: Mapping[str, Sequence[Sample]]
    steps: Sequence[Sample]
    speed: Speed = field(default_factory=dict)

    @classmethod
    def together(cls, several: Sequence[Measured]) -> Measured:
        """All of them, as if measured at one time, at the mean of their speeds."""
        speed = mean([each.speed for each in several])
        several = [each.at(speed) for each in several]
        labels = dict.fromkeys(label for each in several for label in each.grid)
        grid = {label: [s for each in several for s in each.grid.get(label, ())] for label in labels}
        return cls(grid, [s for each in several for s in each.steps], speed)

    def at(self, speed: Speed) -> Measured:
        """The same as of a machine of another speed."""
        pace = Pace.of(speed, self.speed)

        def paced(samples: Sequence[Sample]) -> list[Sample]:
            return [(batch, pace.applied(timing, batch.rows)) for batch, timing in samples]

        return Measured({k: paced(v) for k, v in self.grid.items()}, paced(self.steps), speed)

    def to_json(self) -> str:
        def plain(samples: Sequence[Sample]) -> list[list[Any]]:
            return [[list(astuple(batch)), list(astuple(timing))] for batch, timing in samples]

        grid = {label: plain(samples) for label, samples in self.grid.items()}
        return json.dumps({"grid": grid, "steps": plain(self.steps), "probes_ns": self.speed}) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Measured:
        def samples(plain: list[list[Any]]) -> list[Sample]:
            return [(Batch(*batch), StepTiming(*timing[:7])) for batch, timing in plain]

        body = json.loads(text)
        grid = {label: samples(rows) for label, rows in body["grid"].items()}
        return cls(grid, samples(body["steps"]), {int(rows): ns for rows, ns in body["probes_ns"].items()})


class _AtOneSpeed:
    """Samples with the probes that were taken around each."""

    def __init__(self, probed: Probed) -> None:
        self._probed = probed
        self._places: list[int] = []
        self._samples: list[tuple[str | None, Sample]] = []

    def add(self, label: str | None, samples: Sequence[Sample]) -> None:
        """Of a shape of this label; None: of the short workload."""
        self._samples += [(label, sample) for sample in samples]
        self._places += [len(self._probed.taken)] * len(samples)

    def all(self) -> Measured:
        """All of them at one speed."""
        speed = mean([self._probed.near(place + 1) for place in range(len(self._probed.taken))])
        grid: dict[str, list[Sample]] = {}
        steps: list[Sample] = []
        for place, (label, (batch, timing)) in zip(self._places, self._samples, strict=True):
            pace = Pace.of(speed, self._probed.near(place))
            into = steps if label is None else grid.setdefault(label, [])
            into.append((batch, pace.applied(timing, batch.rows)))
        return Measured(grid, steps, speed)


def measure(
    executor: Executor,
    policy: SchedulingPolicy,
    eviction: EvictionPolicy,
    limits: Limits,
    *,
    repeats: int = 3,
    every_s: float = EVERY_S,
    notify: Notify = lambda done, total, what: None,
) -> Measured:
    """The grid, `repeats` times over, and the short workload, with probes every `every_s` seconds.

    Raises `ConfigError` where nothing fits the limits.
    """
    probed = Probed(executor, every_s=every_s)
    capacity = probed.capacity
    shapes = grid(limits, min(capacity.max_context, capacity.blocks * capacity.block_size))
    if not shapes:
        raise ConfigError(
            f"no batch shape to measure fits engine.token_budget={limits.token_budget} and "
            f"engine.max_seqs={limits.max_seqs} with a context of {capacity.max_context}; make one of them larger"
        )
    bench = Bench(executor, range(capacity.blocks))
    bench.write()
    for shape in (shapes[0], shapes[-1]):
        bench.measure(shape)
    probed.probe()
    probed.forget()  # the first of all is slower
    seen = _AtOneSpeed(probed)
    # Rounds over the whole grid, not repeats of one shape: a noisy second then spoils one sample of many.
    for round_ in range(repeats):
        for index, shape in enumerate(shapes):
            notify(round_ * (len(shapes) + 1) + index, repeats * (len(shapes) + 1), shape.label())
            probed.keep_up()
            seen.add(shape.label(), bench.measure(shape))
        bench.finish()
        notify((round_ + 1) * (len(shapes) + 1) - 1, repeats * (len(shapes) + 1), "a short workload")
        for step in shakedown(probed, policy, eviction, limits):
            if step.plan.work:
                seen.add(None, [(Batch.of(step.plan), step.timing)])
    probed.probe()
    return seen.all()


TILES = {"native": 12}
"""By product: the rows of one tile (`ROWS` in real_engine/native/product.h)."""
HEADS_APART = {"native-paged": 4}
"""By attention: with fewer decodes than so many a thread, their heads are shared out (`tasks` in
real_engine/native/attention.h)."""


def fit(measured: Measured, about: Mapping[str, Any]) -> LinearCost:
    """Fit what was measured. `about` is kept beside the coefficients, with the fit's error in and out of sample."""
    if measured.speed:
        about = {**about, "probes_ns": {str(rows): ns for rows, ns in measured.speed.items()}}
    share = HEADS_APART.get(about.get("attention", ""), 0)
    about = {
        **about,
        "heads_apart_below": share * int(about.get("threads", 0)),
        "tile_rows": TILES.get(about.get("linear", ""), 0),
    }
    # The short workload comes several times: its steps are as many batches, of which every other is left out.
    steps: dict[Batch, list[Sample]] = {}
    for sample in measured.steps:
        steps.setdefault(sample[0], []).append(sample)
    batches = list(steps.values())
    learnt, unseen = ([sample for runs in batches[start::2] for sample in runs] for start in (0, 1))
    told: dict[str, list[tuple[Batch, int]]] = {}
    for phase in PHASES:
        kept: list[Sequence[Sample]] = list(batches[::2])
        if phase not in ("plan_ns", "commit_ns"):
            kept = [*measured.grid.values(), *kept]
        told[phase] = [
            (runs[0][0], round(statistics.median(getattr(timing, phase) for _, timing in runs)))
            for runs in kept
        ]
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
        "holdout_by_shape_pct": _by_shape(told, about),
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


def _by_shape(
    measured: Mapping[str, Sequence[tuple[Batch, int]]], about: Mapping[str, Any]
) -> dict[str, dict[str, float]]:
    """Error of the forward pass on each kind of batch, by fits that didn't see it: every fifth is left out in turn."""
    pairs: dict[str, list[tuple[float, float]]] = {}
    for fold in range(FOLDS):
        seen = {
            phase: [item for i, item in enumerate(items) if i % FOLDS != fold] or items
            for phase, items in measured.items()
        }
        fit = LinearCost.fit(seen, about, intervals=False)
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
    from sim.fitted import fitted

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
