"""How late an online run took its requests in, and whether that deserves a warning. Observation path.

Requests are taken in between steps, so one that comes during a step waits for its end, and longer where the
control plane or the machine is slow. That wait is part of every latency here. A client that counts from when
it got round to sending would have hidden it, so where it is large it is said how much that would be.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lab.analysis.runs import Run

SHARE = 0.25
"""Lag may make up this much of TTFT before it is a warning."""


def lateness(run: Run) -> str:
    """A sentence or two; empty for a run under a virtual clock."""
    lag = run.metrics.get("ingest") or {}
    ttft = run.metrics["ttft_ms"]["mean"]
    if lag.get("lag_max_ms") is None or not ttft:
        return ""
    done = run.requests[run.requests["outcome"] == "finished"]
    share = float(done["ingest_lag_ns"].mean()) / 1e6 / ttft
    text = (
        f"requests were taken in up to {lag['lag_max_ms']:.1f} ms after they came (p99 {lag['lag_p99_ms']:.1f} ms), "
        f"{100 * share:.0f} % of TTFT on average; their times count from when they came"
    )
    if share <= SHARE:
        return text
    return (
        f"{text}. Warning: the engine was too busy to take them in; a load generator that counts from when it "
        "gets round to sending would leave that much out (coordinated omission)"
    )
