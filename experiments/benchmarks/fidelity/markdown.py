"""What was found as the tables of docs/fidelity.md."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.benchmarks.fidelity.kernels import SHAPES
from experiments.benchmarks.fidelity.prediction import TARGETS, within


def tables(found: Mapping[str, Any]) -> str:
    """All of them, one after another."""
    parts = []
    if "own" in found:
        parts += [targets(found["own"]), errors(found["own"]), causes(found["own"]), machine(found["own"])]
    if "run" in found:
        parts.append(run(found["run"]))
    if "kernels" in found:
        parts.append(kernels(found["kernels"]))
    if "ablations" in found:
        parts.append(ablations(found["ablations"]))
    return "\n\n".join(parts) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def errors(found: Mapping[str, Any]) -> str:
    """Own engine at the machine's pace: the error of each figure in percent, the median repeat's, and in brackets how
    far the repeats' errors lie apart."""
    names = ["TTFT mean", "TTFT p50", "TTFT p90", "TTFT p99", "TPOT mean", "TPOT p50", "TPOT p90", "TPOT p99"]
    names += [
        "E2E mean",
        "E2E p50",
        "E2E p90",
        "E2E p99",
        "output tokens/s",
        "hit rate, points",
        "preemptions",
    ]
    rows = []
    for workload, row in found["workloads"].items():
        cells = [
            f"{row['errors_pct'][name]:+.1f} ({row['spread_pct'][name]:.1f})"
            if name in row["errors_pct"]
            else "-"
            for name in names
        ]
        rows.append([workload, *cells])
    return _table(["", *names], rows)


def targets(found: Mapping[str, Any]) -> str:
    """Own engine: how many workloads meet each target, as calibrated and at the machine's pace."""
    rows, all_ = [], list(found["workloads"].values())
    for name, most in TARGETS.items():
        cells = [name, f"{most:g} %"]
        for errors, spread in (("as_calibrated_pct", "repeats_spread_pct"), ("errors_pct", "spread_pct")):
            sizes = [abs(row[errors][name]) for row in all_ if name in row[errors]]
            cells += [
                f"{within(found, errors)[name]} of {len(sizes)}",
                f"{statistics.median(sizes):.1f} %",
                f"{max(sizes):.1f} %",
                f"{statistics.median(row[spread][name] for row in all_ if name in row[errors]):.1f} %",
            ]
        rows.append(cells)
    kinds = [
        f"{kind}: {what}"
        for kind in ("as calibrated", "at its pace")
        for what in ("within", "median size", "largest", "repeats apart")
    ]
    return _table(["", "target", *kinds], rows)


def machine(found: Mapping[str, Any]) -> str:
    """Own engine: each repeat's pace by rows of the probes, how far its halves lie apart, and E2E as calibrated."""
    rows = []
    for workload, row in found["workloads"].items():
        cells = [
            ", ".join(f"{times:.2f}" for times in pace.values()) + f" ({apart:.0f} %)"
            for pace, apart in zip(row["pace"], row["unsteady_pct"], strict=True)
        ]
        told = [
            f"{row['as_calibrated_pct'][name]:+.1f} ({row['repeats_spread_pct'][name]:.1f})"
            for name in TARGETS
            if name in row["as_calibrated_pct"]
        ]
        rows.append([workload, *cells, *told])
    head = [f"repeat {n + 1}" for n in range(found["repeats"])]
    return _table(["", *head, *(f"{name} as calibrated" for name in TARGETS)], rows)


def causes(found: Mapping[str, Any]) -> str:
    """Own engine: duration and decision error of E2E and TTFT, and distances beside the repeats' own."""
    rows = []
    for workload, row in found["workloads"].items():
        split = row["split_pct"]
        cells = [
            f"{split[name][part]:+.1f}" if name in split else "-"
            for name in ("E2E mean", "TTFT mean")
            for part in ("duration", "decision")
        ]
        for name in ("e2e", "ttft", "itl"):
            pair = row["wasserstein_over_mean"][name]
            cells.append(
                f"{pair['sim']:.3f}" + ("" if pair["repeats"] is None else f" ({pair['repeats']:.3f})")
            )
        beyond = row["beyond_the_grid"]
        cells.append(f"{sum(beyond.get('outside', {}).values())} of {beyond.get('steps', 0)}")
        rows.append([workload, *cells])
    head = ["", "E2E: duration", "decision", "TTFT: duration", "decision", "W1 of E2E", "of TTFT", "of ITL"]
    return _table([*head, "extrapolated"], rows)


def run(found: Mapping[str, Any]) -> str:
    """The vLLM run."""
    rows = []
    for name, error in found["errors_pct"].items():
        a, b = found["measured"][name], found["simulated"][name]
        unit = 1000 if name.startswith("TPOT") else 1
        label = name if name.startswith("output") else f"{name}, {'ms' if unit == 1000 else 's'}"
        rows.append([label, f"{a * unit:.1f}", f"{b * unit:.1f}", f"{error:+.1f} %"])
    blocks = found["blocks"]
    rows.append(["KV blocks of 16", str(blocks["measured"]), str(blocks["computed"]), "0"])
    for name, gap in found["curves"].items():
        rows.append(
            [f"{name}, each second", "", f"{gap['mean']:+.1f} on average", f"{gap['distance']:.1f} apart"]
        )
    return _table(["", "measured", "simulated", "error"], rows)


def kernels(found: Mapping[str, Any]) -> str:
    """Devices and models by step."""
    rows = []
    for name, row in found.items():
        cells = [f"{row['physical_pct'][label]:+.1f}" for label in SHAPES]
        rows.append([name, *cells, f"{row['interpolation_pct']:.1f}"])
    return _table(["physical - measured, %", *SHAPES, "lines, left out"], rows)


def ablations(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Both deployments side by side."""
    names = list(next(iter(found.values())))
    head = ["without"] + [
        f"{title}: {key}" for title in found for key in ("TTFT", "TPOT", "E2E", "preemptions")
    ]
    rows = []
    for name in names:
        cells = []
        for table in found.values():
            for key in ("TTFT", "TPOT", "E2E", "preemptions"):
                value = table[name][key]
                if key == "preemptions":
                    cells.append(f"{value:.0f}")
                elif name.startswith("("):
                    cells.append(f"{value * 1e3:.1f} ms" if key == "TPOT" else f"{value:.2f} s")
                else:
                    cells.append(f"{value:+.1f}")
        rows.append([name, *cells])
    return _table(head, rows)
