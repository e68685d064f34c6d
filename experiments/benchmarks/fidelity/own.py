"""Our own engine beside what is predicted of it: measuring, in pieces that can be interrupted.

One directory holds everything: `calibration-N.json`, `real/WORKLOAD/REPEAT` (run directories), `drift.jsonl`
(two fixed batches before each run, which say what the machine was like just then). What is there isn't measured again.
Repeats go round all workloads, so that a slow minute spoils one repeat of several rather than all of one.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from experiments.benchmarks.fidelity.workloads import Named, catalogue, offered
from lab import plugins
from lab.analysis.runs import Run, load
from lab.assembly import EngineSpec
from lab.config import Config, validate
from lab.console import Console
from lab.control.request import Request
from lab.control.step import Limits
from lab.session import Side, run_side
from sim.calibrate import Bench, Measured, Shape, fit
from sim.calibrate import measure as grid_of
from sim.cost.linear import LinearCost

SENTINELS = (Shape(16, 256), Shape(chunks=((0, 128),)))
"""Batches measured before each run."""


@dataclass(frozen=True)
class Setup:
    """What is measured: model, threads, requests a workload, repeats, and where the public traces lie."""

    directory: Path
    model: str = "smollm2"
    threads: int = 1
    """Two would wait for each other, spinning, whenever anything else runs on a machine of two cores."""
    count: int = 60
    repeats: int = 3
    traces: Path | None = None
    scale: int = 1
    """Lengths are divided by so much more."""
    only: str = ""
    """Workloads whose name has this in it; empty: all."""

    def config(self) -> Config:
        from lab.compose import composer

        words = [f"model={self.model}", f"engine.threads={self.threads}", "policy=vllm_v1", "backend=both"]
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
        found, about = None, {}
        for repeat in range(self.repeats):
            body = json.loads(self.calibration(repeat).read_text(encoding="utf-8"))
            measured, about = Measured.from_json(json.dumps(body)), body["about"]
            found = measured if found is None else found.and_again(measured)
        assert found is not None
        return fit(found, about)


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


def _warm(backend: Any) -> None:
    bench = Bench(backend.executor)
    bench.write()  # or the first to use a block would pay for its memory
    for _ in range(3):
        for shape in SENTINELS:
            bench.measure(shape)
    bench.finish()


def _calibrate(setup: Setup, cfg: Config, backend: Any, repeat: int) -> None:
    about = {**backend.about, "capacity": dataclasses.asdict(backend.capacity)}
    limits = Limits(cfg.engine.token_budget, cfg.engine.max_seqs)
    policy, eviction = plugins.create("policy", "vllm_v1"), plugins.create("eviction", "lru")
    measured = grid_of(backend.executor, policy, eviction, limits)
    setup.directory.mkdir(parents=True, exist_ok=True)
    body = {**json.loads(measured.to_json()), "about": about}
    setup.calibration(repeat).write_text(json.dumps(body) + "\n", encoding="utf-8")


def _run(setup: Setup, cfg: Config, backend: Any, workload: Named, repeat: int) -> None:
    """One repeat, on the blocks that the workload asks for."""
    bench = Bench(backend.executor)
    took = {
        shape.label(): statistics.median(bench.measure(shape)[0][1].execute_ns for _ in range(7))
        for shape in SENTINELS
    }
    bench.finish()
    whole = backend.capacity
    backend.capacity = dataclasses.replace(whole, blocks=workload.blocks or whole.blocks)
    try:
        run_side(side(setup, cfg, backend, setup.requests(workload)), setup.real(workload.name, repeat), None)
    finally:
        backend.capacity = whole
    with (setup.directory / "drift.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"workload": workload.name, "repeat": repeat, "ns": took}) + "\n")


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


def simulate(setup: Setup, cfg: Config, cost: LinearCost, workload: Named, out: Path) -> Run:
    """The workload as the fit predicts it, on the capacity that the real run had."""
    from sim.backend import SimBackend, recorded_capacity

    capacity = recorded_capacity(setup.ran(workload.name)[0])
    backend = SimBackend(cost, capacity, "modelled", {"cost": "fitted", "name": "sim"})
    run_side(side(setup, cfg, cast("Any", backend), setup.requests(workload)), out, None)
    return load(out)
