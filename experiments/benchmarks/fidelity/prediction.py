"""Our own engine's runs beside their predictions: errors, the engine's own spread, and what the errors are made of."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.benchmarks.fidelity.own import Setup, probes, simulate, unsteady
from lab.analysis.frames import scalars
from lab.analysis.runs import Run
from lab.diff import compare as difference
from sim.cost.linear import LinearCost
from sim.probes import Pace, Paced, mean, speed_of

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
SHOWN = [name for name in METRICS if name not in ("TPOT p50", "TPOT p90")] + [*COUNTS]
SPLIT = {"e2e_ms.mean": "E2E mean", "ttft_ms.mean": "TTFT mean", "tpot_ms.mean": "TPOT mean"}


def compare(setup: Setup, cost: LinearCost | None = None) -> dict[str, Any]:
    """Every workload that was measured, predicted by the fit (or by `cost`), which saw none of them.

    Twice: as of the machine that was calibrated, and for each repeat as of the machine that the probes met meanwhile.
    """
    cfg, cost = setup.config(), cost or setup.fit()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="diptych-fidelity-") as temporary:
        for number, workload in enumerate(setup.workloads()):
            reals = setup.ran(workload.name)
            if not reals:
                continue
            mine, place = replace(cost), Path(temporary) / str(number)  # which counts for itself
            plain = simulate(setup, cfg, mine, workload, place / "calibrated")
            paces = [Pace.of(mean(probes(run)), speed_of(cost)) for run in reals]
            sims = [
                simulate(setup, cfg, Paced(replace(cost), pace), workload, place / str(repeat))
                for repeat, pace in enumerate(paces)
            ]
            found[workload.name] = _row(reals, sims, plain) | {
                "pace": [dict(zip(pace.rows, pace.times, strict=True)) for pace in paces],
                "unsteady_pct": [unsteady(probes(run)) for run in reals],
                "beyond_the_grid": mine.account(),
            }
    return {
        "model": setup.model,
        "threads": cost.measured_on.get("threads", setup.threads),
        "requests": setup.count,
        "repeats": setup.repeats,
        "machine": cost.measured_on.get("cpu", ""),
        "attention": cost.measured_on.get("attention", ""),
        "calibration": cost.measured_on.get("quality", {}),
        "workloads": found,
    }


def _row(reals: Sequence[Run], sims: Sequence[Run], plain: Run) -> dict[str, Any]:
    """Errors of `sims`, each beside its repeat: the median, and how far they lie apart. Of `plain`: against the median
    repeat, beside how far the repeats lie apart."""
    ours, theirs = [scalars(run.metrics) for run in sims], [scalars(run.metrics) for run in reals]
    once = scalars(plain.metrics)
    errors, spread, plain_errors, plain_spread, values = {}, {}, {}, {}, {}
    for name, key in METRICS.items():
        pairs = [(a[key], b[key]) for a, b in zip(ours, theirs, strict=True) if key in a and key in b]
        if not pairs or key not in once:
            continue
        each = [100 * (a / b - 1) for a, b in pairs]
        errors[name], spread[name] = statistics.median(each), max(each) - min(each)
        measured = [b for _, b in pairs]
        middle = statistics.median(measured)
        plain_errors[name] = 100 * (once[key] / middle - 1)
        plain_spread[name] = 100 * (max(measured) - min(measured)) / middle
        values[name] = [middle, once[key]]
    for name, (key, factor) in COUNTS.items():
        each = [factor * (a.get(key, 0.0) - b.get(key, 0.0)) for a, b in zip(ours, theirs, strict=True)]
        errors[name], spread[name] = statistics.median(each), max(each) - min(each)
        measured = [factor * run.get(key, 0.0) for run in theirs]
        middle = statistics.median(measured)
        plain_errors[name] = factor * once.get(key, 0.0) - middle
        plain_spread[name] = max(measured) - min(measured)
        values[name] = [middle, factor * once.get(key, 0.0)]
    sim = sims[0]
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
        "as_calibrated_pct": plain_errors,
        "repeats_spread_pct": plain_spread,
        "split_pct": split,
        "wasserstein_over_mean": distances,
        "paired_mape_pct": {name: said.distances[name]["mape_pct"] for name in ("e2e", "ttft")},
        "same_decisions_on_the_same_durations": said.parity,
        "terms": said.terms.to_dict("records")[:4],
    }


def missed(found: dict[str, Any]) -> list[str]:
    """Which targets are missed where at the machine's pace, with how far the repeats' errors lie apart."""
    return [
        f"{name}: {what} {row['errors_pct'][what]:+.1f} % (target {most:g}, apart {row['spread_pct'][what]:.1f})"
        for name, row in found["workloads"].items()
        for what, most in TARGETS.items()
        if abs(row["errors_pct"].get(what, 0.0)) > most
    ]


def within(found: dict[str, Any], errors: str) -> dict[str, int]:
    """Workloads that meet each target."""
    rows = found["workloads"].values()
    return {
        name: sum(abs(row[errors].get(name, 0.0)) <= most for row in rows) for name, most in TARGETS.items()
    }


def show(found: dict[str, Any]) -> str:
    lines = [f"{found['model']}, {found['threads']} threads: predicted against measured, %"]
    for title, errors, spread in (
        ("at the pace of the probes (and how far the repeats' errors lie apart)", "errors_pct", "spread_pct"),
        ("as calibrated (and how far the repeats lie apart)", "as_calibrated_pct", "repeats_spread_pct"),
    ):
        lines.append(f" {title}")
        lines.append(f"  {'':26}" + "".join(f"{name:>17}" for name in SHOWN))
        for name, row in found["workloads"].items():
            cells = ""
            for what in SHOWN:
                given = what in row[errors]
                cells += f"{row[errors][what]:+9.1f} ({row[spread][what]:5.1f})" if given else f"{'-':>17}"
            lines.append(f"  {name:26}{cells}")
        count = len(found["workloads"])
        met = (f"{what} {number} of {count}" for what, number in within(found, errors).items())
        lines.append("  within the targets: " + ", ".join(met))
    lines.append(
        " split of the first repeat's error at its pace, %: duration + decision; Wasserstein over the mean"
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
    lines.append(
        " the machine against its calibration, by rows of the probes; how far each run's halves lie apart"
    )
    for name, row in found["workloads"].items():
        runs = (
            ", ".join(f"{rows}: {times:.2f}" for rows, times in pace.items()) + f" ({apart:.0f} %)"
            for pace, apart in zip(row["pace"], row["unsteady_pct"], strict=True)
        )
        lines.append(f"  {name:26}" + "; ".join(runs))
    lines += [f"  target missed: {sentence}" for sentence in missed(found)] or ["  every target is met"]
    return "\n".join(lines)
