"""A run as tidy tables: one row an observation, units in the columns' names. Observation path.

    run = load("runs/x/sim")
    run.latencies.groupby("tenant").ttft_ms.median()
    run.tokens.gap_ms.quantile(0.99)

The tables on disk keep integer nanoseconds and lists; these are made from them for looking and plotting. Times
are since the run began. What a request never had is NaN.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lab.analysis.frames import STEP_PHASES, RunLike, intervals, items

if TYPE_CHECKING:
    import pandas as pd

_PHASES = (*STEP_PHASES[:-1], "compact", STEP_PHASES[-1])


def latencies(run: RunLike) -> pd.DataFrame:
    """One row a request: id, tenant, replica, outcome, arrival_s, sizes in tokens, preemptions, and times in ms.

    queue_ms is the wait before the first schedule, queue_total_ms all waiting, after preemptions too; tpot_ms the
    mean time a token after the first; e2e_ms ends with the last token.
    """
    table = run.requests
    kept = [
        "id",
        "tenant",
        "replica",
        "outcome",
        "prompt_tokens",
        "output_tokens",
        "cached_tokens",
        "preemptions",
    ]
    ran = table["last_token_ns"] - table["first_token_ns"]
    return table[kept].assign(
        arrival_s=table["arrival_ns"] / 1e9,
        queue_ms=(table["first_scheduled_ns"] - table["arrival_ns"]) / 1e6,
        queue_total_ms=table["queue_ns"] / 1e6,
        ttft_ms=(table["first_token_ns"] - table["arrival_ns"]) / 1e6,
        tpot_ms=(ran / (table["output_tokens"] - 1).where(table["output_tokens"] > 1)) / 1e6,
        e2e_ms=(table["last_token_ns"] - table["arrival_ns"]) / 1e6,
    )


def stages(run: RunLike) -> pd.DataFrame:
    """One row a stretch of a request's life: id, stage, start_s, end_s, duration_ms, first_step, last_step (-1: none).

    The stretches of a request tile its life, so their durations add up to it.
    """
    pieces = intervals(run.requests)
    return pieces[["id", "stage"]].assign(
        start_s=pieces["start_ns"] / 1e9,
        end_s=pieces["end_ns"] / 1e9,
        duration_ms=(pieces["end_ns"] - pieces["start_ns"]) / 1e6,
        first_step=pieces["first_step"],
        last_step=pieces["last_step"],
    )


def tokens(run: RunLike) -> pd.DataFrame:
    """One row a generated token: id, token (1, 2, ...), time_s, gap_ms since the one before (the first: NaN)."""
    import pandas as pd

    times = run.requests["token_times_ns"].map(items)
    long = pd.DataFrame({"id": run.requests["id"], "time_ns": times}).explode("time_ns").dropna()
    long["time_ns"] = long["time_ns"].astype("int64")
    by_request = long.groupby("id", sort=False)["time_ns"]
    return pd.DataFrame(
        {
            "id": long["id"],
            "token": by_request.cumcount() + 1,
            "time_s": long["time_ns"] / 1e9,
            "gap_ms": by_request.diff() / 1e6,
        }
    ).reset_index(drop=True)


def phases(run: RunLike) -> pd.DataFrame:
    """One row a phase of a step: step, replica, start_s (of the step), phase, duration_ms, batch (requests),
    prefill_tokens, decode_tokens, context_tokens. A step's phases add up to its duration."""
    import pandas as pd

    steps = run.steps
    about = ["step", "replica", "batch", "prefill_tokens", "decode_tokens", "context_tokens"]
    parts = [
        steps[about].assign(
            start_s=steps["start_ns"] / 1e9, phase=phase, duration_ms=steps[f"{phase}_ns"] / 1e6
        )
        for phase in _PHASES
    ]
    return pd.concat(parts).sort_values(["replica", "step"], kind="stable", ignore_index=True)
