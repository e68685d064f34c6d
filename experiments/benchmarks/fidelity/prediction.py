"""Our own engine's runs beside their predictions: errors, the engine's own spread, and what the errors are made of."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.benchmarks.fidelity.own import Setup, simulate
from lab.analysis.frames import scalars
from lab.analysis.runs import Run
from lab.diff import compare as difference
from sim.cost.linear import LinearCost

METRICS = {
    **{
        f"{name} {of}": f"{name.lower()}_ms.{of}"
        for name in ("TTFT", "TPOT", "E2E")
        for of in ("mean", "p50", "p90", "p99")
    },
    "output tokens/s": "throughput.output_tokens_per_s",
}
"""What errors are in percent of the measured value."""
COUNTS = {"hit rate, points": ("kv.prefix_hit_ratio_tokens", 100.0), "preemptions": ("preemptions", 1.0)}
"""What errors are plain differences in, times so much."""
TARGETS = {"E2E mean": 3.0, "TPOT mean": 3.0, "TTFT p50": 5.0, "TTFT p99": 10.0}
SPLIT = {"e2e_ms.mean": "E2E mean", "ttft_ms.mean": "TTFT mean", "tpot_ms.mean": "TPOT mean"}


def compare(setup: Setup, cost: LinearCost | None = None) -> dict[str, Any]:
    """Every workload that was measured, predicted by the fit (or by `cost`), which saw none of them."""
    cfg, cost = setup.config(), cost or setup.fit()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="diptych-fidelity-") as temporary:
        for number, workload in enumerate(setup.workloads()):
            reals = setup.ran(workload.name)
            if not reals:
                continue
            mine = replace(cost)  # which counts for itself
            sim = simulate(setup, cfg, mine, workload, Path(temporary) / str(number))
            found[workload.name] = _row(reals, sim) | {"beyond_the_grid": mine.account()}
    return {
        "model": setup.model,
        "threads": setup.threads,
        "requests": setup.count,
        "repeats": setup.repeats,
        "machine": cost.measured_on.get("cpu", ""),
        "attention": cost.measured_on.get("attention", ""),
        "calibration": cost.measured_on.get("quality", {}),
        "drift_pct": drift(setup),
        "workloads": found,
    }


def _row(reals: Sequence[Run], sim: Run) -> dict[str, Any]:
    """Errors against the median of the repeats; `spread`: how far those lie apart, from least to most."""
    ours, theirs = scalars(sim.metrics), [scalars(run.metrics) for run in reals]
    errors, spread, values = {}, {}, {}
    for name, key in METRICS.items():
        measured = [run[key] for run in theirs if key in run]
        if key not in ours or not measured:
            continue
        middle = statistics.median(measured)
        errors[name] = 100 * (ours[key] / middle - 1)
        spread[name] = 100 * (max(measured) - min(measured)) / middle
        values[name] = [middle, ours[key]]
    for name, (key, factor) in COUNTS.items():
        measured = [factor * run.get(key, 0.0) for run in theirs]
        middle = statistics.median(measured)
        errors[name] = factor * ours.get(key, 0.0) - middle
        spread[name] = max(measured) - min(measured)
        values[name] = [middle, factor * ours.get(key, 0.0)]
    said = difference(reals[0], sim, noise=reals[1:])
    split = {}
    for key, name in SPLIT.items():
        cell = (said.counterfactual or {}).get(key)
        if cell is not None:
            base = theirs[0][key]
            split[name] = {part: 100 * cell[part] / base for part in ("total", "duration", "decision")}
    distances = {
        name: {
            "sim": said.distances[name]["w1_over_mean"],
            "repeats": (said.noise or {}).get("distances", {}).get(f"{name}.w1_over_mean", {}).get("floor"),
        }
        for name in ("e2e", "ttft", "itl")
    }
    return {
        "repeats": len(reals),
        "values": values,
        "errors_pct": errors,
        "spread_pct": spread,
        "split_pct": split,
        "wasserstein_over_mean": distances,
        "paired_mape_pct": {name: said.distances[name]["mape_pct"] for name in ("e2e", "ttft")},
        "same_decisions_on_the_same_durations": said.parity,
        "terms": said.terms.to_dict("records")[:4],
    }


def drift(setup: Setup) -> dict[str, float]:
    """How far the two fixed batches moved while everything was measured: from the first to the last tenth, percent."""
    path = setup.directory / "drift.jsonl"
    if not path.is_file():
        return {}
    taken = [json.loads(line)["ns"] for line in path.read_text().splitlines()]
    found = {}
    for label in taken[0]:
        values = sorted(row[label] for row in taken)
        cut = len(values) // 10
        found[label] = 100 * (values[-1 - cut] / values[cut] - 1)
    return found


def missed(found: dict[str, Any]) -> list[str]:
    """Which targets are missed where, with the engine's own spread beside."""
    return [
        f"{name}: {what} {row['errors_pct'][what]:+.1f} % (target {most:g}, repeats {row['spread_pct'][what]:.1f})"
        for name, row in found["workloads"].items()
        for what, most in TARGETS.items()
        if abs(row["errors_pct"].get(what, 0.0)) > most
    ]


def show(found: dict[str, Any]) -> str:
    shown = [name for name in METRICS if name not in ("TPOT p50", "TPOT p90")] + [*COUNTS]
    lines = [
        f"{found['model']}, {found['threads']} threads: predicted against measured, %, and the repeats' spread"
    ]
    lines.append(f"  {'':26}" + "".join(f"{name:>17}" for name in shown))
    for name, row in found["workloads"].items():
        cells = ""
        for what in shown:
            if what in row["errors_pct"]:
                cells += f"{row['errors_pct'][what]:+9.1f} ({row['spread_pct'][what]:5.1f})"
            else:
                cells += f"{'-':>17}"
        lines.append(f"  {name:26}{cells}")
    lines.append(
        "  split of the error (first repeat), %: duration + decision; Wasserstein distance over the mean"
    )
    for name, row in found["workloads"].items():
        parts = "; ".join(
            f"{what} {cell['duration']:+.1f} {cell['decision']:+.1f}"
            for what, cell in row["split_pct"].items()
        )
        lines.append(
            f"  {name:26}{parts}; "
            + ", ".join(
                f"{what} {d['sim']:.3f} (repeats {d['repeats']:.3f})"
                if d["repeats"] is not None
                else f"{what} {d['sim']:.3f}"
                for what, d in row["wasserstein_over_mean"].items()
                if d["sim"] is not None
            )
        )
    lines += [f"  drift of {label}: {value:.1f} %" for label, value in found["drift_pct"].items()]
    lines += [f"  target missed: {sentence}" for sentence in missed(found)] or ["  every target is met"]
    return "\n".join(lines)
