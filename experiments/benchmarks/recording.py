"""What recording costs the real engine: `python experiments/benchmarks/recording.py [smollm2|tiny] [requests]`.

One run of the main job's workload. The time spent inside the observers (recorder and log) is summed up and set
against the steps' own time, in the same run, so a noisy machine disturbs both alike.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

from lab.assembly import EngineSpec, assemble
from lab.config import Config, cache_dir
from lab.control.observer import Observer, Observers, RequestRecord, StepRecord
from lab.control.step import Limits
from lab.observe.identity import RunInfo
from lab.observe.logs import JsonLog
from lab.observe.recorder import Recorder
from real_engine.driver import SteppedRun
from real_engine.executor import TorchExecutor
from real_engine.models.loading import load_model
from real_engine.models.spec import ModelSpec
from traces.registry import build


class Stopwatch(Observer):
    """Passes everything on and adds up how long that takes."""

    def __init__(self, inner: Observer) -> None:
        self._inner = inner
        self.spent_ns = 0

    def on_step(self, step: StepRecord) -> None:
        began = time.perf_counter_ns()
        self._inner.on_step(step)
        self.spent_ns += time.perf_counter_ns() - began

    def on_request(self, record: RequestRecord) -> None:
        began = time.perf_counter_ns()
        self._inner.on_request(record)
        self.spent_ns += time.perf_counter_ns() - began


def main(model_name: str = "smollm2", count: int = 24) -> float:
    """Print and return recording's share of step time, in percent."""
    dtype = "bfloat16" if model_name == "smollm2" else "float32"
    model = load_model(ModelSpec(model_name, dtype), cache_dir=cache_dir(Config(), os.environ), notify=print)
    executor = TorchExecutor(model, blocks=1024)
    requests = build("chat", {"limit": count, "rate_scale": 4.0}).requests
    names = {"policy": "fcfs", "eviction": "lru", "admission": "always", "routing": "single"}
    spec = EngineSpec({seam: {"name": name} for seam, name in names.items()}, Limits(), True, 0)
    info = RunInfo(
        backend="real",
        clock="stepped",
        evidence="measured",
        workload="0" * 32,
        model=model_name,
        policy="fcfs",
        seed=0,
        run="benchmark",
    )
    recorder = Recorder()
    with tempfile.TemporaryDirectory() as folder, JsonLog(Path(folder) / "log.jsonl", info) as log:
        watch = Stopwatch(Observers(recorder, log))
        control = assemble(spec, executor.capacity, watch)
        SteppedRun(control, executor, requests).run()
    steps_ns = sum(step.timing.total_ns for step in recorder.steps)
    share = 100 * watch.spent_ns / steps_ns
    each = steps_ns / len(recorder.steps) / 1e6
    print(f"{model_name}: {len(recorder.steps)} steps of {each:.2f} ms on average, {count} requests")
    print(
        f"recording: {watch.spent_ns / len(recorder.steps) / 1e3:.1f} us a step, {share:.3f} % of step time"
    )
    return share


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:3]))
