"""How fast the simulator is: `python experiments/benchmarks/simulator.py trace=FILE [requests=16000,...]`.

The first requests of an Azure trace at three quarters of what one replica of an 8B model takes (512 tokens a step, 256
requests at once), first come first served, with prefix cache and full block accounting. The durations are those of
a stand-in: fixed coefficients about an A100's. Each row is a process of its own on one core, timed from its start to
its end: reading the trace, simulating, and writing the run directory; `record %` is the share of that which turning
records into tables takes. Words:

    requests=16000,64000,256000     more than the trace has: the trace again and again, made as it is needed
    record=requests,steps           what is written (`run.record`): requests and their spans; all steps and theirs too
    vidur=CHECKOUT                  Vidur beside it on the same requests (its own Python: python=PATH)
    load=0.78                       rate of the trace: 1 is its own
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lab.assembly import EngineSpec
from lab.control.executor import Capacity
from lab.control.plan import Decoding, StepPlan, StepTiming
from lab.control.step import Limits

BLOCKS = 27_000
"""KV blocks of 16 tokens that an 8B model in 16 bits leaves on 80 GB."""


class StandIn:
    """Step times of an 8B model, in round numbers: weights and launches, arithmetic by token, KV read by context."""

    STEP, TOKEN, CONTEXT = 10_000_000, 85_000, 80

    def __init__(self) -> None:
        self.busy = self.seqs = 0

    def step_time(self, plan: StepPlan) -> StepTiming:
        decodes, items = plan.decodes, plan.items
        tokens, context = decodes.seqs, decodes.context
        for work in items:
            tokens += work.tokens
            context += work.start + work.tokens
        self.seqs += decodes.seqs + len(items)
        return self._price(tokens, context)

    def decode_time(self, decodes: Decoding) -> StepTiming:
        self.seqs += decodes.seqs
        return self._price(decodes.seqs, decodes.context)

    def _price(self, tokens: int, context: int) -> StepTiming:
        took = self.STEP + self.TOKEN * tokens + self.CONTEXT * context
        self.busy += took
        return StepTiming(0, 0, took, 0, 0)


def simulate(trace: str, count: int, record: str, load: float, folder: Path) -> dict[str, Any]:
    """One run, in this process; returns what it was like."""
    from lab.control.request import stream_of
    from lab.observe.identity import workload_id
    from lab.observe.stream import Stream
    from lab.session import Side, run_side
    from sim.backend import SimBackend
    from traces.registry import build
    from traces.repeated import Repeated

    workload = build("azure_2023_conv", {"path": trace, "limit": count, "rate_scale": load}).requests
    requests = workload if count <= len(workload) else Repeated(workload, count)
    cost = StandIn()
    backend = SimBackend(cost, Capacity(BLOCKS, 16), "modelled", {"cost": "stand-in"})
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
    recording = _clocked(Stream, "on_request", "on_step", "close")
    run_side(side, folder / "run", None)
    metrics = json.loads((folder / "run" / "metrics.json").read_text())
    return {
        "steps": metrics["steps"],
        "batch": cost.seqs / metrics["steps"],
        "busy": cost.busy / 1e9 / metrics["duration_s"],
        "digest": metrics["plan_digest"],
        "finished": metrics["requests"]["finished"],
        "drive_s": metrics["wall_s"],
        "recording_s": sum(recording),
        "ttft_p50_ms": metrics["ttft_ms"]["p50"],
        "written_mb": sum(file.stat().st_size for file in (folder / "run").iterdir()) / 1e6,
    }


def _clocked(kind: type, *names: str) -> list[float]:
    """Where the seconds of every call of these methods are going to stand."""
    took: list[float] = []

    def clocked(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*told: Any) -> Any:
            began = time.perf_counter()
            try:
                return method(*told)
            finally:
                took.append(time.perf_counter() - began)

        return call

    for name in names:
        setattr(kind, name, clocked(getattr(kind, name)))
    return took


def timed(command: list[str], folder: Path, cores: set[int] | None = None) -> tuple[float, float, float]:
    """Wall seconds, CPU seconds and peak MB of a process of its own; raises when it fails."""
    began = time.perf_counter()
    with (folder / "said").open("w+") as said:
        child = subprocess.Popen(
            command,
            stdout=said,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: cores and os.sched_setaffinity(0, cores),
        )
        _, status, usage = os.wait4(child.pid, 0)
        wall = time.perf_counter() - began
        if status:
            said.seek(0)
            raise SystemExit(f"{' '.join(command)}: it failed\n{said.read()[-2000:]}")
    return wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def vidur(
    checkout: str, python: str, trace: str, count: int, load: float, folder: Path
) -> tuple[float, float, float]:
    """Vidur's own simulator on the same arrivals and lengths, with its Sarathi scheduler at these limits."""
    from traces.registry import build

    rows = ["arrived_at,num_prefill_tokens,num_decode_tokens"]
    for request in build("azure_2023_conv", {"path": trace, "limit": count, "rate_scale": load}).requests:
        rows.append(f"{request.arrival / 1e9},{len(request.prompt)},{request.output_limit}")
    (folder / "trace.csv").write_text("\n".join(rows) + "\n")
    words = {
        "replica_config_device": "a100",
        "replica_config_model_name": "meta-llama/Meta-Llama-3-8B",
        "cluster_config_num_replicas": "1",
        "replica_config_tensor_parallel_size": "1",
        "replica_config_num_pipeline_stages": "1",
        "request_generator_config_type": "trace_replay",
        "trace_request_generator_config_trace_file": str(folder / "trace.csv"),
        "trace_request_generator_config_max_tokens": "16384",
        "replica_scheduler_config_type": "sarathi",
        "sarathi_scheduler_config_batch_size_cap": "256",
        "sarathi_scheduler_config_chunk_size": "512",
        "random_forrest_execution_time_predictor_config_prediction_max_prefill_chunk_size": "16384",
        "random_forrest_execution_time_predictor_config_prediction_max_batch_size": "512",
        "random_forrest_execution_time_predictor_config_prediction_max_tokens_per_request": "16384",
        "metrics_config_output_dir": str(folder / "vidur"),
    }
    flags = [word for key, value in words.items() for word in (f"--{key}", value)]
    here = os.getcwd()
    os.chdir(checkout)
    try:
        return timed([python, "-m", "vidur.main", *flags], folder, {min(os.sched_getaffinity(0))})
    finally:
        os.chdir(here)


def main(words: list[str]) -> int:
    options = dict(word.split("=", 1) for word in words if "=" in word)
    unknown = set(options) - {"trace", "requests", "record", "load", "vidur", "python", "child"}
    if unknown or "trace" not in options or len(options) != len(words):
        print(__doc__)
        return 2
    trace, load = str(Path(options["trace"]).resolve()), float(options.get("load", "0.78"))
    counts = [int(count) for count in options.get("requests", "16000").split(",")]
    if "child" in options:
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
                wall, cpu, memory = timed([sys.executable, __file__, *words], Path(name), core)
                f = json.loads((Path(name) / "found.json").read_text())
                share = 100 * f["recording_s"] / wall
            print(f"{record:<10}{count:>9}{wall:>8.2f}{cpu:>7.2f}{count / wall:>12.0f}{memory:>6.0f}{f['steps']:>9}"
                  f"{f['batch']:>7.1f}{f['busy']:>6.2f}{f['drive_s']:>9.2f}{share:>10.0f}"
                  f"{f['written_mb']:>9.1f}  {f['digest']}", flush=True)  # fmt: skip
    if "vidur" in options:
        with tempfile.TemporaryDirectory() as name:
            python = options.get("python", sys.executable)
            wall, cpu, memory = vidur(options["vidur"], python, trace, counts[0], load, Path(name))
            print(
                f"{'Vidur':<10}{counts[0]:>9}{wall:>8.2f}{cpu:>7.2f}{counts[0] / wall:>12.0f}{memory:>6.0f}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
