"""The difference of two runs' requests and steps, piece by piece; the pieces add up exactly. Observation path."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lab.analysis.frames import PARTS, STEP_PHASES, RunLike, table_of
from lab.analysis.parts import credit_cache, part_times, token_price

if TYPE_CHECKING:
    import pandas as pd

LATENCIES = {"e2e": "last_token_ns", "ttft": "first_token_ns"}


def per_request(
    keys: tuple[str, str],
    runs: tuple[RunLike, RunLike],
    done: tuple[pd.DataFrame, pd.DataFrame],
    pieces: tuple[pd.DataFrame, pd.DataFrame],
) -> pd.DataFrame:
    """Columns `<what>_ns_<side>` and `<what>_delta_ns`, for e2e, ttft and each of `PARTS` of either."""
    import pandas as pd

    differ = (
        len(done[0]) and (done[0]["cached_tokens"].to_numpy() != done[1]["cached_tokens"].to_numpy()).any()
    )
    price = token_price(*runs) if differ else 0.0
    columns: dict[str, pd.Series[int]] = {}
    for latency, until in LATENCIES.items():
        left, right = (
            part_times(run, frame, piece, until) for run, frame, piece in zip(runs, done, pieces, strict=True)
        )
        credit_cache((left, right), done, price)
        tables = [
            table.assign(total=frame[f"{latency}_ns"])
            for table, frame in zip((left, right), done, strict=True)
        ]
        for part in ("total", *PARTS):
            what = latency if part == "total" else f"{latency}_{part}"
            for key, table in zip(keys, tables, strict=True):
                columns[f"{what}_ns_{key}"] = table[part]
            columns[f"{what}_delta_ns"] = tables[1][part] - tables[0][part]
    context = done[0][["arrival_ns", "prompt_tokens", "output_tokens"]]
    return pd.concat([context, pd.DataFrame(columns, index=done[0].index)], axis=1)


def attribute(requests: pd.DataFrame, latency: str) -> dict[str, Any]:
    """Signed ms by part, and B_k: a part's share of the absolute differences (ecosystem: Scalasca's severity)."""
    deltas = {part: requests[f"{latency}_{part}_delta_ns"] for part in PARTS}
    absolute = {part: int(delta.abs().sum()) for part, delta in deltas.items()}
    moved = sum(absolute.values())
    total = requests[f"{latency}_delta_ns"]
    residual = total - sum(deltas.values())
    count = len(requests)
    return {
        "requests": count,
        "total_ms": int(total.sum()) / 1e6,
        "mean_ms": int(total.sum()) / 1e6 / count if count else 0.0,
        "residual_ns": int(residual.abs().max()) if count else 0,
        "stages": {
            part: {
                "total_ms": int(delta.sum()) / 1e6,
                "mean_ms": int(delta.sum()) / 1e6 / count if count else 0.0,
                "share": absolute[part] / moved if moved else 0.0,
            }
            for part, delta in deltas.items()
        },
    }


def step_phases(a: RunLike, b: RunLike, keys: tuple[str, str]) -> dict[str, Any]:
    """Where the run's span went on each side: the phases of its steps, and the idle time between them."""

    def spent(run: RunLike) -> dict[str, int]:
        steps = table_of(run, "steps", ["replica", "end_ns"])
        phases = {
            phase: int(steps[f"{phase}_ns"].sum()) if f"{phase}_ns" in steps else 0 for phase in STEP_PHASES
        }
        span = int(steps["end_ns"].max()) if len(steps) else 0
        # Each replica is idle from the run's beginning to its end, except in its own steps.
        idle = span * steps["replica"].nunique() - sum(phases.values())
        return phases | {"idle": idle, "span": span}

    left, right = spent(a), spent(b)
    moved = sum(abs(right[phase] - left[phase]) for phase in (*STEP_PHASES, "idle"))
    table = {
        phase: {
            f"{keys[0]}_ms": left[phase] / 1e6,
            f"{keys[1]}_ms": right[phase] / 1e6,
            "delta_ms": (right[phase] - left[phase]) / 1e6,
            "share": abs(right[phase] - left[phase]) / moved if moved else 0.0,
        }
        for phase in (*STEP_PHASES, "idle")
    }
    return {"phases": table, "span_delta_ms": (right["span"] - left["span"]) / 1e6}
