"""How far the cost models are from what was measured on GPUs, and what each mechanism is worth.

    python experiments/benchmarks/fidelity.py run=DIR tables=DIR [out=FILE.json]

`run` is a directory with `requests.jsonl`, `timeseries.csv` and `meta.json` of one real vLLM run: it is simulated
from its description alone (device, model, limits; no coefficient is fitted to it), then with each mechanism taken
away. `tables` holds one directory of measured kernels for each device: the physical model's terms are compared with
them, and their interpolation with points that were left out. Either may be missing.
"""

from __future__ import annotations

import csv
import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lab.assembly import EngineSpec, assemble
from lab.control.executor import Capacity
from lab.control.observer import Observer, RequestRecord, StepRecord
from lab.control.plan import Decoding, Work
from lab.control.request import Prompt, Request, Segment, stream_of
from lab.control.step import Limits
from sim import hardware, model_shape
from sim.capacity import blocks_that_fit
from sim.cost import table_files
from sim.cost.curves import Curve
from sim.cost.physical import ALONE, GRAPH_SIZES, MEASURED, PERFECT, Coefficients, PhysicalCost
from sim.cost.tables import TablesCost
from sim.cost.warmup import WithWarmup
from sim.driver import Simulation
from sim.executor import SimExecutor

DEVICES = {"NVIDIA GeForce RTX 4090": "rtx_4090", "NVIDIA H100 80GB HBM3": "h100_sxm", "NVIDIA L40S": "l40s"}
FOLDERS = {"a100_sxm": "a100_80g"}
QUANTILES = (50, 90, 99)


class Seen(Observer):
    """What is needed for the comparison, and no more."""

    wants_work = False

    def __init__(self) -> None:
        self.requests: list[RequestRecord] = []
        self.times: list[tuple[int, int, int, float]] = []
        self.preemptions = 0

    def on_step(self, step: StepRecord) -> None:
        total = step.blocks_free + step.blocks_cached + step.blocks_held
        self.times.append((step.plan.now, step.running, step.waiting, 100 * step.blocks_held / total))
        self.preemptions += len(step.plan.preempted)

    def on_request(self, record: RequestRecord) -> None:
        self.requests.append(record)


def simulate(
    run: Path,
    coefficients: Coefficients = MEASURED,
    *,
    late: bool = True,
    graphs: bool = True,
    warmup: float = 0.0,
    prefix_cache: bool = True,
) -> tuple[Seen, int]:
    """The run's requests on its described device. Returns what was seen and the blocks it had."""
    meta = json.loads((run / "meta.json").read_text())
    engine = meta["engine_kwargs"]
    shape = model_shape.load(meta["model"])
    device = hardware.load(DEVICES[meta["hardware"]["device_name"]])
    limits = Limits(engine["max_num_batched_tokens"], engine["max_num_seqs"], None)
    blocks = blocks_that_fit(
        shape,
        device,
        utilization=meta["kv_cache"]["gpu_memory_utilization"],
        block_size=meta["kv_cache"]["block_size"],
        token_budget=limits.token_budget,
        max_seqs=limits.max_seqs,
    )
    capacity = Capacity(blocks, meta["kv_cache"]["block_size"], engine["max_model_len"])
    cost: Any = PhysicalCost(shape, device, coefficients, ALONE, GRAPH_SIZES if graphs else ())
    if warmup:
        cost = WithWarmup(cost, warmup, 10.0)
    spec = EngineSpec({"policy": {"name": "vllm_v1"}}, limits, prefix_cache, 0, joins_late=late)
    seen, requests = Seen(), workload(run)
    control = assemble(spec, capacity, seen, requests, aggregate=True)
    Simulation(control, SimExecutor(cost, capacity), requests).run()
    return seen, blocks


def measured(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "requests.jsonl").read_text().splitlines()]
    return sorted(rows, key=lambda row: row["queued_ts"])


def workload(run: Path) -> list[Request]:
    """Its requests as the engine met them; what they said isn't known, so no two prompts are alike."""
    rows = measured(run)
    first = rows[0]["queued_ts"]
    return [
        Request(
            id=row["request_id"],
            prompt=Prompt((Segment(stream_of(row["request_id"]), 0, row["input_toks"]),)),
            output_len=row["output_toks"],
            arrival=round((row["queued_ts"] - first) * 1e9),
        )
        for row in rows
    ]


def latencies(items: Iterable[tuple[float, float, float, int]]) -> dict[str, list[float]]:
    """TTFT, TPOT and E2E in seconds, from (arrival, first, last, tokens)."""
    found: dict[str, list[float]] = {"TTFT": [], "TPOT": [], "E2E": []}
    for arrival, first, last, tokens in items:
        found["TTFT"].append(first - arrival)
        found["E2E"].append(last - arrival)
        if tokens > 1:
            found["TPOT"].append((last - first) / (tokens - 1))
    return found


def of_measured(run: Path) -> dict[str, list[float]]:
    return latencies(
        (r["queued_ts"], r["first_token_ts"], r["last_token_ts"], r["output_toks"]) for r in measured(run)
    )


def of_simulated(seen: Seen) -> dict[str, list[float]]:
    return latencies(
        (r.request.arrival / 1e9, r.token_times[0] / 1e9, r.token_times[-1] / 1e9, len(r.token_times))
        for r in seen.requests
    )


def quantile(values: Sequence[float], percent: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def summary(latency: dict[str, list[float]]) -> dict[str, float]:
    found = {}
    for name, values in latency.items():
        found[f"{name} mean"] = statistics.fmean(values)
        found |= {f"{name} p{p}": quantile(values, p) for p in QUANTILES}
    return found


def seconds_of_work(latency: dict[str, list[float]], run: Path) -> float:
    """From the first arrival to the last token."""
    arrivals = [row["queued_ts"] for row in measured(run)]
    return max(a - arrivals[0] + e for a, e in zip(arrivals, latency["E2E"], strict=True))


def curves(seen: Seen, run: Path) -> dict[str, float]:
    """Mean running, waiting and KV %, each second as measured: (simulated - measured), while both have work."""
    with (run / "timeseries.csv").open(newline="") as file:
        ticks = list(csv.DictReader(file))
    found: dict[str, list[float]] = {"running": [], "waiting": [], "KV %": []}
    steps = iter(seen.times)
    now = next(steps)
    ahead = next(steps, None)
    for tick in ticks:
        at = float(tick["t"]) * 1e9
        while ahead is not None and ahead[0] <= at:
            now, ahead = ahead, next(steps, None)
        if ahead is None:
            break
        for (name, gaps), value, key in zip(
            found.items(), now[1:], ("running", "waiting", "kv_cache_pct"), strict=True
        ):
            del name
            gaps.append(value - float(tick[key]))
    return {name: statistics.fmean(gaps) for name, gaps in found.items()} | {
        f"{name}, distance": statistics.fmean(map(abs, gaps)) for name, gaps in found.items()
    }


def against_run(run: Path) -> dict[str, Any]:
    seen, blocks = simulate(run)
    real, sim = of_measured(run), of_simulated(seen)
    meta = json.loads((run / "meta.json").read_text())
    print(f"{run.name}: {len(real['E2E'])} requests, vLLM {meta['vllm_version']}")
    print(f"  KV blocks: {meta['kv_cache']['num_gpu_blocks']} measured, {blocks} computed")
    a, b = summary(real), summary(sim)
    errors = {}
    for name in a:
        errors[name] = 100 * (b[name] / a[name] - 1)
        print(f"  {name:10}  {a[name]:9.4f} s measured  {b[name]:9.4f} s simulated  {errors[name]:+6.1f} %")
    tokens = sum(row["output_toks"] for row in measured(run))
    one, other = (tokens / seconds_of_work(latency, run) for latency in (real, sorted_by(seen, run)))
    errors["output tokens/s"] = 100 * (other / one - 1)
    print(
        f"  output tokens/s  {one:7.1f} measured  {other:7.1f} simulated  {errors['output tokens/s']:+6.1f} %"
    )
    print(f"  preemptions simulated: {seen.preemptions}")
    gaps = curves(seen, run)
    print("  each second, simulated less measured: " + ", ".join(f"{k} {v:+.1f}" for k, v in gaps.items()))
    off = ablations(run, b)
    return {"errors_pct": errors, "curves": gaps, "ablations_pct": off, "blocks": blocks}


def sorted_by(seen: Seen, run: Path) -> dict[str, list[float]]:
    """The simulated latencies in the order of the measured rows."""
    by_name = {record.request.id: record for record in seen.requests}
    return latencies(
        (r.request.arrival / 1e9, r.token_times[0] / 1e9, r.token_times[-1] / 1e9, len(r.token_times))
        for r in (by_name[row["request_id"]] for row in measured(run))
    )


def ablations(run: Path, whole: dict[str, float]) -> dict[str, dict[str, float]]:
    """What each mechanism and coefficient is worth: the change of the means without it."""
    from dataclasses import replace

    ways: dict[str, dict[str, Any]] = {
        "without asynchronous scheduling": {"late": False},
        "without graph padding": {"graphs": False},
        "without the prefix cache": {"prefix_cache": False},
        "with a warm-up (first step twice as long)": {"warmup": 1.0},
        "without a layer's launch": {"coefficients": replace(MEASURED, layer_us=0.0)},
        "without a sequence's preparation": {"coefficients": replace(MEASURED, sequence_us=0.0)},
        "at the roofline": {"coefficients": PERFECT},
    }
    found = {}
    print("  ablation: change of the simulated mean of TTFT, TPOT, E2E")
    for name, how in ways.items():
        means = summary(of_simulated(simulate(run, **how)[0]))
        found[name] = {
            key: 100 * (means[f"{key} mean"] / whole[f"{key} mean"] - 1) for key in ("TTFT", "TPOT", "E2E")
        }
        print(f"    {name:45}" + "".join(f"{value:+8.2f} %" for value in found[name].values()))
    return found


SHAPES: dict[str, tuple[Decoding, tuple[Work, ...]]] = {
    "1 decode at 1,000": (Decoding(1, 1000, 1000), ()),
    "32 decodes at 1,000": (Decoding(32, 32_000, 1000), ()),
    "128 decodes at 1,000": (Decoding(128, 128_000, 1000), ()),
    "prompt of 512": (Decoding(), (Work("a", 0, 512, True),)),
    "prompt of 2,048": (Decoding(), (Work("a", 0, 2048, True),)),
    "32 decodes + 512": (Decoding(32, 32_000, 1000), (Work("a", 0, 512, True),)),
}


def against_tables(root: Path) -> dict[str, Any]:
    """The physical model against steps made of measured kernels, and interpolation against left-out points."""
    found: dict[str, Any] = {}
    for directory in sorted(path for path in root.iterdir() if (path / "gemm_perf.parquet").is_file()):
        device = hardware.load(FOLDERS.get(directory.name, directory.name))
        for name in ("llama-3.1-8b", "qwen2.5-7b"):
            shape = model_shape.load(name)
            kernels = table_files.load(directory, shape, device, ALONE)
            tables, physical = TablesCost(shape, device, kernels), PhysicalCost(shape, device)
            rows = {}
            for label, (decodes, items) in SHAPES.items():
                a, b = tables.cost_of(decodes, items), physical.cost_of(decodes, items)
                rows[label] = 100 * (b.total / a.total - 1)
            gap = left_out(kernels.linear)
            found[f"{directory.name} {name}"] = {"physical_pct": rows, "interpolation_pct": gap}
            print(f"{directory.name}, {name}: physical against measured kernels, % of the step")
            print("  " + ", ".join(f"{label} {value:+.1f}" for label, value in rows.items()))
            print(f"  linear layers at left-out sizes: {gap:.1f} % (mean)")
    return found


def left_out(curve: Curve) -> float:
    """Mean error of the line between two neighbours at the point between them, percent."""
    xs, ys = curve.xs, curve.ys
    gaps = []
    for i in range(1, len(xs) - 1):
        share = (xs[i] - xs[i - 1]) / (xs[i + 1] - xs[i - 1])
        line = ys[i - 1] + share * (ys[i + 1] - ys[i - 1])
        gaps.append(100 * abs(line / ys[i] - 1))
    return statistics.fmean(gaps)


def main(words: list[str]) -> int:
    options = dict(word.split("=", 1) for word in words if "=" in word)
    wrong = [word for word in words if word.split("=")[0] not in ("run", "tables", "out")]
    if wrong or not options.keys() & {"run", "tables"}:
        print("usage: fidelity.py [run=DIR] [tables=DIR] [out=FILE.json]", file=sys.stderr)
        return 2
    found: dict[str, Any] = {}
    if "run" in options:
        found["run"] = against_run(Path(options["run"]))
    if "tables" in options:
        found["tables"] = against_tables(Path(options["tables"]))
    if "out" in options:
        Path(options["out"]).write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
