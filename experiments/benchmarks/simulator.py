"""How fast the simulator is: `python experiments/benchmarks/simulator.py trace=FILE [requests=16000,...]`.

The first requests of an Azure trace at three quarters of what one replica of an 8B model takes (512 tokens a step, 256
requests at once), first come first served, with prefix cache and full block accounting. The durations are those of
a stand-in: fixed coefficients about an A100's. Each row is a process of its own on one core, timed from its start to
its end: reading the trace, simulating, and writing the run directory; `record %` is the share of that which turning
records into tables takes. Words:

    requests=16000,64000,256000     more than the trace has: the trace again and again, made as it is needed
    record=requests,steps           what is written (`run.record`): requests and their spans; all steps and theirs too
    vidur=CHECKOUT [python=PATH]    Vidur beside it on the same requests, in its own Python
    blis=CHECKOUT                   BLIS beside it (simulators.py beside this file says what both need and do)
    load=0.78                       rate of the trace: 1 is its own
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import simulators  # beside this file

from lab.assembly import EngineSpec
from lab.collector import collector_at_rest
from lab.control.executor import Capacity
from lab.control.plan import Decoding, StepPlan, StepTiming
from lab.control.step import Limits
from traces.registry import build

BLOCKS = 27_000
"""KV blocks of 16 tokens that an 8B model in 16 bits leaves on 80 GB."""


class StandIn:
    """Step times of an 8B model, in round numbers: weights and launches, arithmetic by token, KV read by context."""

    STEP, TOKEN, CONTEXT = 10_000_000, 85_000, 80

    def __init__(self) -> None:
        self.seqs = 0
        self._last = (0, 0, 0)

    def step_time(self, plan: StepPlan) -> StepTiming:
        decodes, items = plan.decodes, plan.items
        tokens, context = decodes.seqs, decodes.context
        for work in items:
            tokens += work.tokens
            context += work.start + work.tokens
        return self._price(decodes.seqs + len(items), tokens, context)

    def decode_time(self, decodes: Decoding) -> StepTiming:
        return self._price(decodes.seqs, decodes.seqs, decodes.context)

    def _price(self, seqs: int, tokens: int, context: int) -> StepTiming:
        if (seqs, tokens, context) != self._last:  # a step that is looked at and put off is priced again
            self._last = (seqs, tokens, context)
            self.seqs += seqs
        took = self.STEP + self.TOKEN * tokens + self.CONTEXT * context
        return StepTiming(0, 0, took, 0, 0)


def simulate(trace: str, count: int, record: str, load: float, folder: Path) -> dict[str, Any]:
    """One run, in this process; returns what it was like."""
    from lab.control.request import stream_of
    from lab.observe.bill import Power
    from lab.observe.identity import workload_id
    from lab.observe.stream import Stream
    from lab.session import Side, run_side
    from sim.backend import SimBackend
    from traces.repeated import Repeated

    workload = build("azure_2023_conv", {"path": trace, "limit": count, "rate_scale": load}).requests
    requests = workload if count <= len(workload) else Repeated(workload, count)
    cost = StandIn()
    backend = SimBackend(cost, Capacity(BLOCKS, 16), "modelled", {"cost": "stand-in"})
    backend.power = [Power(1, 0.0, 0.0, 0.0)]  # for the time spent in steps
    names = {"policy": "fcfs", "eviction": "lru", "admission": "always", "routing": "single"}
    spec = EngineSpec({seam: {"name": name} for seam, name in names.items()}, Limits(512, 256), True, 0)
    side = Side(
        backend=backend,
        spec=spec,
        requests=requests,
        config_text=f"seed: 0\ntrace: {trace}\n",
        model="8b",
        identity=None if requests is workload else f"{stream_of(workload_id(workload), count):032x}",
        record=record,
    )
    recording = _clocked(Stream, "_write_requests", "_write_steps", "close")
    run_side(side, folder / "run", None)
    metrics = json.loads((folder / "run" / "metrics.json").read_text())
    return {
        "steps": metrics["steps"],
        "batch": cost.seqs / metrics["steps"],
        "busy": metrics["energy"]["busy_ratio"],
        "digest": metrics["plan_digest"],
        "finished": metrics["requests"]["finished"],
        "drive_s": metrics["wall_s"],
        "recording_s": sum(recording),
        "ttft_p50_ms": metrics["ttft_ms"]["p50"],
        "written_mb": sum(file.stat().st_size for file in (folder / "run").iterdir()) / 1e6,
    }


def _clocked(kind: type, *names: str) -> list[float]:
    """Where the seconds of every call of these methods are going to stand, calls within another's left out."""
    took: list[float] = []
    inside: list[str] = []

    def clocked(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*told: Any) -> Any:
            if inside:
                return method(*told)
            inside.append(name)
            began = time.perf_counter()
            try:
                return method(*told)
            finally:
                took.append(time.perf_counter() - began)
                inside.clear()

        return call

    for name in names:
        setattr(kind, name, clocked(name, getattr(kind, name)))
    return took


def beside(options: dict[str, str], trace: str, count: int, load: float) -> None:
    """Print what other simulators take for the same requests."""
    requests = build("azure_2023_conv", {"path": trace, "limit": count, "rate_scale": load}).requests
    print(
        f"{'another':<22}{'requests':>9}{'wall s':>8}{'CPU s':>7}{'requests/s':>12}{'MB':>6}{'start s':>9}{'batch':>7}"
    )
    with tempfile.TemporaryDirectory() as name:
        rows: list[Iterator[simulators.Row]] = []
        if "vidur" in options:
            python = options.get("python", sys.executable)
            rows.append(simulators.vidur(options["vidur"], python, requests, Path(name)))
        if "blis" in options:
            rows.append(simulators.blis(options["blis"], requests, Path(name)))
        for what, took, start, mean in itertools.chain(*rows):
            batch = f"{mean:.1f}" if mean else ""
            print(f"{what:<22}{len(requests):>9}{took.wall:>8.2f}{took.cpu:>7.2f}{len(requests) / took.wall:>12.0f}"
                  f"{took.memory:>6.0f}{start:>9.2f}{batch:>7}", flush=True)  # fmt: skip


def main(words: list[str]) -> int:
    options = dict(word.split("=", 1) for word in words if "=" in word)
    unknown = set(options) - {"trace", "requests", "record", "load", "vidur", "blis", "python", "child"}
    if unknown or "trace" not in options or len(options) != len(words):
        print(__doc__)
        return 2
    trace, load = str(Path(options["trace"]).resolve()), float(options.get("load", "0.78"))
    counts = [int(count) for count in options.get("requests", "16000").split(",")]
    if "child" in options:
        with collector_at_rest():  # as the command line does
            found = simulate(trace, counts[0], options["record"], load, Path(options["child"]))
        (Path(options["child"]) / "found.json").write_text(json.dumps(found))
        return 0
    core = {max(os.sched_getaffinity(0))}
    print(f"{'written':<10}{'requests':>9}{'wall s':>8}{'CPU s':>7}{'requests/s':>12}{'MB':>6}{'steps':>9}"
          f"{'batch':>7}{'busy':>6}{'drive s':>9}{'record %':>10}{'disk MB':>9}  digest")  # fmt: skip
    for record in options.get("record", "requests,steps").split(","):
        for count in counts:
            with tempfile.TemporaryDirectory() as name:
                words = [
                    f"trace={trace}",
                    f"requests={count}",
                    f"record={record}",
                    f"load={load}",
                    f"child={name}",
                ]
                wall, cpu, memory = simulators.timed([sys.executable, __file__, *words], Path(name), core)
                f = json.loads((Path(name) / "found.json").read_text())
                share = 100 * f["recording_s"] / wall
            print(f"{record:<10}{count:>9}{wall:>8.2f}{cpu:>7.2f}{count / wall:>12.0f}{memory:>6.0f}{f['steps']:>9}"
                  f"{f['batch']:>7.1f}{f['busy']:>6.2f}{f['drive_s']:>9.2f}{share:>10.0f}"
                  f"{f['written_mb']:>9.1f}  {f['digest']}", flush=True)  # fmt: skip
    if {"vidur", "blis"} & set(options):
        beside(options, trace, counts[0], load)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
