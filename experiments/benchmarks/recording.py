"""What recording costs the real engine: `python experiments/benchmarks/recording.py [smollm2|tiny] [requests] [pairs]`.

Chat requests, all there from the beginning, so that no plan depends on the time anything takes: with recording
on and off the engine does the very same steps (the digests are compared). The two are run by turns, on-off-off-on,
so a noisy machine disturbs both alike. Off means that no step record is made and nobody is told of anything.

Two figures. The first is exact and says what recording itself takes: the time spent in making records and in the
observers (recorder and log), summed up, against the steps' own time in the same run. The second is what it all comes
to, collected garbage and cold caches included: the time of a run with recording against one without, as the median
over the pairs; on a busy machine it says little.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lab import compose
from lab.assembly import EngineSpec, assemble
from lab.console import Console
from lab.control.observer import Observer, Observers, RequestRecord, StepRecord
from lab.control.request import Request
from lab.control.step import Limits
from lab.observe.identity import RunInfo
from lab.observe.logs import JsonLog
from lab.observe.recorder import Recorder
from real_engine.backend import RealBackend, open_backend
from real_engine.driver import SteppedRun
from traces.registry import build

TARGET_PCT = 1.0
PAIRS = {"tiny": 16}
INFO = RunInfo(
    backend="real",
    clock="stepped",
    evidence="measured",
    workload="0" * 32,
    model="any",
    policy="fcfs",
    seed=0,
    run="benchmark",
)


class Stopwatch(Observer):
    """Passes everything on and adds up how long that takes."""

    def __init__(self, inner: Observer) -> None:
        self._inner = inner
        self.spent_ns = 0

    def timed(self, call: Callable[[Any], object]) -> Callable[[Any], None]:
        def told(what: Any) -> None:
            began = time.perf_counter_ns()
            call(what)
            self.spent_ns += time.perf_counter_ns() - began

        return told

    def on_step(self, step: StepRecord) -> None:
        self._inner.on_step(step)  # timed with the making of the record

    def on_request(self, record: RequestRecord) -> None:
        self.timed(self._inner.on_request)(record)


@dataclasses.dataclass(frozen=True)
class Run:
    wall_ns: int
    """The whole loop."""
    digest: str
    steps: int = 0
    steps_ns: int = 0
    """The steps' own time."""
    spent_ns: int = 0
    """In recording."""


def serve(backend: RealBackend, requests: Sequence[Request], *, on: bool) -> Run:
    """One run of the workload, with recording or without."""
    spec = EngineSpec({"policy": {"name": "fcfs"}}, Limits(), True, 0)
    recorder = Recorder()
    with tempfile.TemporaryDirectory() as folder, JsonLog(Path(folder) / "log.jsonl", INFO) as log:
        watch = Stopwatch(Observers(recorder, log))
        control = assemble(spec, backend.capacity, watch if on else Observer())
        core: Any = control.core
        core.observe = watch.timed(core.observe) if on else lambda timing: None
        run = SteppedRun(control, backend.executor, requests)
        began = time.perf_counter_ns()
        run.run()
        wall = time.perf_counter_ns() - began
        log.close()
    own = sum(step.timing.total_ns for step in recorder.steps)
    return Run(wall, core.digest, len(recorder.steps), own, watch.spent_ns)


def main(model: str = "smollm2", count: int = 24, pairs: int = 0) -> float:
    """Print both figures, and return the first: recording's share of step time, in percent."""
    with compose.composer() as composer:
        cfg = composer.config(["backend=real", f"model={model}"])
    backend = open_backend(cfg, Console(), None)
    loaded = build("chat", {"limit": count, "rate_scale": 4.0}).requests
    requests = [dataclasses.replace(request, arrival=0) for request in loaded]
    serve(backend, requests, on=True)  # warm up
    taken: dict[bool, list[Run]] = {True: [], False: []}
    for pair in range(pairs or PAIRS.get(model, 3)):
        for on in (True, False) if pair % 2 else (False, True):
            taken[on].append(serve(backend, requests, on=on))
    backend.close()
    assert len({run.digest for runs in taken.values() for run in runs}) == 1, "the runs took other steps"
    share = statistics.median(100 * run.spent_ns / run.steps_ns for run in taken[True])
    each = statistics.median(run.spent_ns / run.steps for run in taken[True])
    mean = statistics.median(run.steps_ns / run.steps for run in taken[True])
    print(f"{model}: {taken[True][0].steps} steps of {mean / 1e6:.2f} ms on average, {count} requests")
    print(f"recording: {each / 1e3:.1f} us a step, {share:.3f} % of step time")
    off = taken[False]
    changes = [100 * (a.wall_ns / b.wall_ns - 1) for a, b in zip(taken[True], off, strict=True)]
    noise = 100 * (statistics.median(run.wall_ns for run in off) / min(run.wall_ns for run in off) - 1)
    fastest = 100 * (min(run.wall_ns for run in taken[True]) / min(run.wall_ns for run in off) - 1)
    print(
        f"on against off: {statistics.median(changes):+.2f} % (median of {len(changes)} interleaved pairs), "
        f"{fastest:+.2f} % (the fastest of each); runs without recording differ by {noise:.2f} % themselves"
    )
    print(f"target: at most {TARGET_PCT} %: {'met' if share <= TARGET_PCT else 'MISSED'}")
    return share


if __name__ == "__main__":
    name, requests, pairs = (*sys.argv[1:4], *("smollm2", "24", "0")[len(sys.argv) - 1 :])
    main(name, int(requests), int(pairs))
