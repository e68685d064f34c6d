"""A real vLLM run beside its simulation from its description alone: device, model, limits. Nothing is fitted to it.

A run is a directory with `requests.jsonl` (tokens and times of each request), `timeseries.csv` (running, waiting and
KV % each second) and `meta.json` (the engine's whole configuration). Coefficients are those measured on an H100
(`sim.cost.physical`), the device is its datasheet.
"""

from __future__ import annotations

import csv
import json
import statistics
from pathlib import Path
from typing import Any

from experiments.benchmarks.fidelity.case import Case, Seen, latencies, summary
from lab.control.request import Prompt, Request, Segment, stream_of
from lab.control.step import Limits
from sim import hardware, model_shape
from sim.capacity import blocks_that_fit
from sim.cost.physical import MEASURED, Coefficients

DEVICES = {"NVIDIA GeForce RTX 4090": "rtx_4090", "NVIDIA H100 80GB HBM3": "h100_sxm", "NVIDIA L40S": "l40s"}


def described(run: Path, coefficients: Coefficients = MEASURED) -> Case:
    """The run's deployment, as its `meta.json` has it."""
    meta = json.loads((run / "meta.json").read_text())
    engine, cache, told = meta["engine_kwargs"], meta["kv_cache"], meta.get("resolved_config", {})
    scheduler = told.get("scheduler_config", {})
    shape = model_shape.load(meta["model"])
    device = hardware.load(DEVICES[meta["hardware"]["device_name"]])
    limits = Limits(engine["max_num_batched_tokens"], engine["max_num_seqs"], None)
    blocks = blocks_that_fit(
        shape,
        device,
        utilization=cache["gpu_memory_utilization"],
        block_size=cache["block_size"],
        token_budget=limits.token_budget,
        max_seqs=limits.max_seqs,
    )
    return Case(
        shape,
        device,
        blocks,
        limits,
        cache["block_size"],
        engine["max_model_len"],
        coefficients,
        prefix_cache=cache["enable_prefix_caching"],
        whole_prompt=scheduler.get("scheduler_reserve_full_isl", False),
        watermark=scheduler.get("watermark") or 0.0,
        late=scheduler.get("async_scheduling", True),
    )


def rows(run: Path) -> list[dict[str, Any]]:
    """The measured requests in the order in which the engine met them."""
    found = [json.loads(line) for line in (run / "requests.jsonl").read_text().splitlines()]
    return sorted(found, key=lambda row: row["queued_ts"])


def workload(run: Path) -> list[Request]:
    """What they said isn't known, so no two prompts are alike."""
    found = rows(run)
    first = found[0]["queued_ts"]
    return [
        Request(
            id=row["request_id"],
            prompt=Prompt((Segment(stream_of(row["request_id"]), 0, row["input_toks"]),)),
            output_len=row["output_toks"],
            arrival=round((row["queued_ts"] - first) * 1e9),
        )
        for row in found
    ]


def measured(run: Path) -> dict[str, list[float]]:
    """Its latencies, from the moment when the engine had the request."""
    return latencies(
        (r["queued_ts"], r["first_token_ts"], r["last_token_ts"], r["output_toks"]) for r in rows(run)
    )


def tokens_per_s(run: Path) -> float:
    found = rows(run)
    span = max(row["last_token_ts"] for row in found) - found[0]["queued_ts"]
    return float(sum(row["output_toks"] for row in found) / span)


def curves(seen: Seen, run: Path) -> dict[str, list[tuple[float, float, float]]]:
    """(second, measured, simulated) of running, waiting and KV %, at the measured ticks while both have work."""
    with (run / "timeseries.csv").open(newline="") as file:
        ticks = list(csv.DictReader(file))
    names = {"running": "running", "waiting": "waiting", "KV %": "kv_cache_pct"}
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in names}
    steps = iter(seen.times)
    now = next(steps)
    ahead = next(steps, None)
    for tick in ticks:
        at = float(tick["t"]) * 1e9
        while ahead is not None and ahead[0] <= at:
            now, ahead = ahead, next(steps, None)
        if ahead is None:
            break
        for value, (name, key) in zip(now[1:], names.items(), strict=True):
            found[name].append((float(tick["t"]), float(tick[key]), value))
    return found


def compare(run: Path, case: Case | None = None) -> dict[str, Any]:
    """Errors in percent, and of the curves the mean difference and the mean distance."""
    case = case or described(run)
    seen = case.run(workload(run))
    a, b = summary(measured(run)), summary(seen.latencies())
    a["output tokens/s"], b["output tokens/s"] = tokens_per_s(run), seen.tokens_per_s()
    meta = json.loads((run / "meta.json").read_text())
    gaps = {name: [sim - real for _, real, sim in points] for name, points in curves(seen, run).items()}
    return {
        "run": run.name,
        "vllm": meta["vllm_version"],
        "requests": len(rows(run)),
        "blocks": {"measured": meta["kv_cache"]["num_gpu_blocks"], "computed": case.blocks},
        "measured": a,
        "simulated": b,
        "errors_pct": {name: 100 * (b[name] / a[name] - 1) for name in a},
        "curves": {
            name: {"mean": statistics.fmean(gap), "distance": statistics.fmean(map(abs, gap))}
            for name, gap in gaps.items()
        },
        "preemptions": seen.preemptions,
    }


def show(found: dict[str, Any]) -> str:
    lines = [
        f"{found['run']}: {found['requests']} requests, vLLM {found['vllm']}",
        f"  KV blocks: {found['blocks']['measured']} measured, {found['blocks']['computed']} computed",
    ]
    for name, error in found["errors_pct"].items():
        a, b = found["measured"][name], found["simulated"][name]
        lines.append(f"  {name:15}  {a:10.4f} measured  {b:10.4f} simulated  {error:+6.1f} %")
    lines.append(f"  preemptions simulated: {found['preemptions']}")
    gaps = ", ".join(
        f"{name} {gap['mean']:+.1f} (distance {gap['distance']:.1f})" for name, gap in found["curves"].items()
    )
    lines.append(f"  each second, simulated less measured: {gaps}")
    return "\n".join(lines)
