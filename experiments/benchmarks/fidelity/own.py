"""Our own engine beside what is predicted of it: measuring, in pieces that can be interrupted.

One directory holds everything: `calibration-N.json` and `real/WORKLOAD/REPEAT` (run directories, each with the probes
that were taken between its steps: `sim.probes`). What is there isn't measured again.
Repeats go round all workloads, so that a slow minute spoils one repeat of several rather than all of one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from experiments.benchmarks.fidelity.workloads import Named, catalogue, offered
from lab import plugins
from lab.analysis.runs import Run, load
from lab.assembly import EngineSpec
from lab.config import Config
from lab.console import Console
from lab.control.request import Request
from lab.control.step import Limits
from lab.session import Side, run_side
from lab.validation import validate
from sim.bench import Bench
from sim.calibrate import Measured, fit
from sim.calibrate import measure as grid_of
from sim.cost.linear import LinearCost
from sim.probes import Pace, Paced, Probed, Speed, mean

PROBES = "probes.json"
STEADY_PCT = 10.0
"""A run during which the machine changed by more is measured again,"""
TRIES = 3
"""so often at most."""


@dataclass(frozen=True)
class Setup:
    """What is measured: model, threads, requests a workload, repeats, and where the public traces lie."""

    directory: Path
    model: str = "smollm2"
    threads: int | None = None
    """Torch's; None: its own choice, which is what users get."""
    count: int = 60
    repeats: int = 3
    traces: Path | None = None
    scale: int = 1
    """Lengths are divided by so much more."""
    only: str = ""
    """Workloads whose name has this in it; empty: all."""

    def config(self) -> Config:
        from lab.compose import composer

        words = [f"model={self.model}", "policy=vllm_v1", "backend=both"]
        words += [] if self.threads is None else [f"engine.threads={self.threads}"]
        with composer() as composing:
            found = composing.config(words)
        validate(found)
        return found

    def workloads(self) -> list[Named]:
        """All that can be made here: those from public traces need the files."""
        known = [w for w in catalogue(self.count) if self.traces is not None or not w.file]
        chosen = [w for w in known if self.only in w.name]
        needed = {w.measure for w in chosen}
        return [w for w in known if w in chosen or w.name in needed]

    def real(self, workload: str, repeat: int) -> Path:
        return self.directory / "real" / workload.replace(" ", "_").replace(",", "") / str(repeat)

    def ran(self, workload: str) -> list[Run]:
        """The repeats that are there."""
        paths = (self.real(workload, repeat) for repeat in range(self.repeats))
        return [load(path) for path in paths if (path / "metrics.json").is_file()]

    def requests(self, workload: Named) -> list[Request]:
        """Its requests at its rate, which may need a measured capacity."""
        found = workload.requests(self.traces, self.scale)
        if workload.load is None:
            return found
        rate = workload.load if not workload.measure else workload.load * self.capacity(workload.measure)
        return offered(found, rate)

    def capacity(self, workload: str) -> float:
        """Requests a second when all are there at once, by its first repeat."""
        metrics = load(self.real(workload, 0)).metrics
        return float(metrics["throughput"]["requests_per_s"])

    def calibration(self, repeat: int) -> Path:
        return self.directory / f"calibration-{repeat}.json"

    def fit(self) -> LinearCost:
        """To all calibrations together: one a repeat, since no two moments of a machine are alike."""
        bodies = [self.calibration(repeat).read_text(encoding="utf-8") for repeat in range(self.repeats)]
        together = Measured.together([Measured.from_json(body) for body in bodies])
        return fit(together, json.loads(bodies[-1])["about"])


def measure(setup: Setup, seconds: float) -> bool:
    """Measure what is missing until `seconds` are over, one unit at least. True: nothing is missing."""
    todo = list(_missing(setup))
    if not todo:
        return True
    ends = time.monotonic() + seconds
    cfg, console = setup.config(), Console()
    backend = plugins.load_object("backend", "real")(cfg, console, None)
    try:
        _warm(backend)
        for number, (label, unit) in enumerate(todo):
            if number and time.monotonic() > ends:
                print(f"{len(todo) - number} units are left")
                return False
            started = time.monotonic()
            unit(cfg, backend)
            print(f"{label}: {time.monotonic() - started:.1f} s", flush=True)
    finally:
        backend.close()
    return True


Unit = Callable[[Config, Any], None]


def _missing(setup: Setup) -> Iterator[tuple[str, Unit]]:
    for repeat in range(setup.repeats):
        if not setup.calibration(repeat).is_file():
            yield (
                f"calibration {repeat}",
                lambda cfg, backend, r=repeat: _calibrate(setup, cfg, backend, r),  # type: ignore[misc]
            )
        for workload in setup.workloads():
            if not (setup.real(workload.name, repeat) / "metrics.json").is_file():
                yield (
                    f"{workload.name}, repeat {repeat}",
                    lambda cfg, backend, w=workload, r=repeat: _run(setup, cfg, backend, w, r),  # type: ignore[misc]
                )


@contextlib.contextmanager
def _probed(backend: Any) -> Iterator[Probed]:
    """The backend with probes between its steps."""
    executor, capacity = backend.executor, backend.capacity
    probed = Probed(executor)
    backend.executor, backend.capacity = probed, probed.capacity
    try:
        yield probed
    finally:
        backend.executor, backend.capacity = executor, capacity


def _warm(backend: Any) -> None:
    bench = Bench(backend.executor)
    bench.write()  # or the first to use a block would pay for its memory
    bench.finish()
    with _probed(backend) as probed:
        for _ in range(5):
            probed.probe()


def _calibrate(setup: Setup, cfg: Config, backend: Any, repeat: int) -> None:
    about = {**backend.about, "capacity": dataclasses.asdict(backend.capacity)}
    limits = Limits(cfg.engine.token_budget, cfg.engine.max_seqs)
    policy, eviction = plugins.create("policy", "vllm_v1"), plugins.create("eviction", "lru")
    measured = grid_of(backend.executor, policy, eviction, limits)
    setup.directory.mkdir(parents=True, exist_ok=True)
    body = {**json.loads(measured.to_json()), "about": about}
    setup.calibration(repeat).write_text(json.dumps(body) + "\n", encoding="utf-8")


def _run(setup: Setup, cfg: Config, backend: Any, workload: Named, repeat: int) -> None:
    """One repeat: the steadiest of a few, where the first is none. What errors it has isn't looked at."""
    path = setup.real(workload.name, repeat)
    trial, best = path.with_name(f"{repeat}.trial"), math.inf
    for _ in range(TRIES):
        apart = _once(setup, cfg, backend, workload, trial)
        if apart < best:
            shutil.rmtree(path, ignore_errors=True)
            trial.rename(path)
            best = apart
        else:
            shutil.rmtree(trial)
        if best <= STEADY_PCT:
            return
        print(f"  the machine changed by {apart:.0f} % during {workload.name}", flush=True)


def _once(setup: Setup, cfg: Config, backend: Any, workload: Named, path: Path) -> float:
    """Run on the blocks that the workload asks for, with probes before, between and after the steps; `unsteady`."""
    with _probed(backend) as probed:
        backend.capacity = dataclasses.replace(
            probed.capacity, blocks=workload.blocks or probed.capacity.blocks
        )
        probed.probe()
        probed.forget()  # the first is slower
        run_side(side(setup, cfg, backend, setup.requests(workload)), path, None)
        probed.probe()
    (path / PROBES).write_text(json.dumps({"probes_ns": probed.taken}) + "\n", encoding="utf-8")
    return unsteady(probed.taken)


def probes(run: Run) -> list[Speed]:
    """Those taken while it ran."""
    if not (run.path / PROBES).is_file():
        return []
    body = json.loads((run.path / PROBES).read_text(encoding="utf-8"))
    return [{int(rows): ns for rows, ns in speed.items()} for speed in body["probes_ns"]]


def unsteady(taken: Sequence[Speed]) -> float:
    """How far the means of the probes' two halves lie apart, percent; of the batch that changed most."""
    half = len(taken) // 2
    pace = Pace.of(mean(taken[half:]), mean(taken[:half])) if half else Pace()
    return max((100 * (math.exp(abs(math.log(times))) - 1) for times in pace.times), default=0.0)


def side(setup: Setup, cfg: Config, backend: Any, requests: Sequence[Request]) -> Side:
    """A side of the comparison, configured alike on both."""
    from lab.experiment import config_yaml

    plain = dataclasses.replace(cfg, backend=backend.name)
    return Side(
        backend=backend,
        spec=EngineSpec.of(dataclasses.asdict(plain)),
        requests=requests,
        config_text=config_yaml(plain),
        model=cfg.model.name,
    )


def simulate(setup: Setup, cfg: Config, cost: LinearCost | Paced, workload: Named, out: Path) -> Run:
    """The workload as the fit predicts it, on the capacity that the real run had."""
    from sim.backend import SimBackend
    from sim.recorded import recorded_capacity

    capacity = recorded_capacity(setup.ran(workload.name)[0])
    backend = SimBackend(cost, capacity, "modelled", {"cost": "fitted", "name": "sim"})
    run_side(side(setup, cfg, cast("Any", backend), setup.requests(workload)), out, None)
    return load(out)
