"""What each mechanism is worth: everything as the deployment has it, then one thing changed at a time."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from experiments.benchmarks.fidelity.case import Case, summary
from lab.control.request import Request
from lab.control.step import Limits
from sim.cost.physical import MEASURED, PERFECT

LATENCIES = ("TTFT", "TPOT", "E2E")
WARMUP = 1.0
API_MS = 8.2
WATERMARK = 0.01
UNCHUNKED = 1 << 20
"""A token budget that no prompt exceeds."""
EXACT = "control plane's time measured"
"""The one row that no two runs agree on,"""
TIMES = 3
"""so it is the median of so many, with how far they lie `apart`."""


def everything(case: Case) -> Case:
    """All mechanisms on, whether the deployment measured had them or not."""
    return replace(
        case, prefix_cache=True, last_block=True, whole_prompt=True, watermark=WATERMARK, late=True, graphs=True,
        warmup=WARMUP, api_ms=API_MS,
    )  # fmt: skip


def ways(case: Case) -> dict[str, Case]:
    """Each mechanism taken away from `everything`, and coefficients set to nothing."""
    seqs = case.limits.max_seqs

    def cheaper(**changes: float) -> Case:
        return replace(case, coefficients=replace(MEASURED, **changes))

    return {
        "prefix cache": replace(case, prefix_cache=False),
        "last-token rule": replace(case, last_block=False),
        "chunk budget": replace(case, limits=Limits(UNCHUNKED, seqs, None)),
        "recompute (swapped instead)": replace(case, swap=True),
        "room for the whole prompt": replace(case, whole_prompt=False),
        "watermark of 1 %": replace(case, watermark=0.0),
        "asynchronous scheduling": replace(case, late=False),
        "graph padding": replace(case, graphs=False),
        "warm-up": replace(case, warmup=0.0),
        "API path": replace(case, api_ms=0.0),
        "a layer's launch (44.2 us)": cheaper(layer_us=0.0),
        "a sequence's preparation (6.4 us)": cheaper(sequence_us=0.0),
        "memory efficiency": cheaper(weight_read=1.0, kv_read=1.0),
        "arithmetic efficiency": cheaper(mfu=1.0),
        "all of these four": replace(case, coefficients=PERFECT),
    }


def table(case: Case, requests: Sequence[Request], *, control: bool = True) -> dict[str, dict[str, float]]:
    """Change in percent of the means of TTFT, TPOT, E2E and of the tokens a second, without each; and preemptions.

    `control` adds a row that takes the planning's time from this machine, which no second run repeats.
    """
    whole = everything(case)
    before = _means(whole, requests)
    found = {"(everything on)": {**before}}
    for name, other in ways(whole).items():
        found[name] = _change(before, _means(other, requests))
    if control:
        exact = replace(whole, measured_control=True)
        rows = [_change(before, _means(exact, requests)) for _ in range(TIMES)]
        found[EXACT] = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
        found[EXACT]["apart"] = max(
            max(row[name] for row in rows) - min(row[name] for row in rows) for name in LATENCIES
        )
    return found


def _means(case: Case, requests: Sequence[Request]) -> dict[str, float]:
    seen = case.run(requests)
    means = summary(seen.latencies())
    found = {name: means[f"{name} mean"] for name in LATENCIES}
    return found | {"tokens/s": seen.tokens_per_s(), "preemptions": float(seen.preemptions)}


def _change(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    return {
        name: value if name == "preemptions" else 100 * (value / before[name] - 1)
        for name, value in after.items()
    }


def show(found: Mapping[str, Mapping[str, float]], title: str) -> str:
    names = list(next(iter(found.values())))
    lines = [
        f"{title}: means with everything on, and their change without",
        f"  {'':36}" + "".join(f"{n:>13}" for n in names),
    ]
    for label, row in found.items():
        marks: list[Any] = []
        for name, value in row.items():
            if name == "apart":
                continue
            if name == "preemptions":
                marks.append(f"{value:13.0f}")
            else:
                marks.append(f"{value:13.4f}" if label.startswith("(") else f"{value:+11.2f} %")
        lines.append(f"  {label:36}" + "".join(marks))
    return "\n".join(lines)
