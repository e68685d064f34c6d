"""Distances between two runs' timelines; every one is exactly 0 for equal runs. Observation path.

`w1` is the Wasserstein-1 distance of two empirical distributions over the reference's mean, `ks` the largest
gap of their cumulative curves. The completion-curve identity is Little's law: with the number completed by
t as N(t), the integral of N_a - N_b is the sum of the requests' completion differences, to the nanosecond.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

    from lab.analysis.aligned import Aligned

    Values = NDArray[np.int64] | NDArray[np.float64]


def distribution(a: Values, b: Values) -> dict[str, float | None]:
    """W1 over the mean of `a`, and KS; None where a side is empty."""
    import numpy as np

    if not len(a) or not len(b):
        return {"w1_over_mean": None, "ks": None}
    left, right = np.sort(a), np.sort(b)
    grid = np.sort(np.concatenate([left, right]))
    gap = np.abs(
        np.searchsorted(left, grid, side="right") / len(left)
        - np.searchsorted(right, grid, side="right") / len(right)
    )
    w1, mean = float((gap[:-1] * np.diff(grid)).sum()), float(left.mean())
    return {"w1_over_mean": w1 / mean if mean else None if w1 else 0.0, "ks": float(gap.max())}


def paired(a: pd.Series[int], b: pd.Series[int]) -> dict[str, float | None]:
    """Relative error request by request, percent of the reference: mean absolute, signed bias, P95 absolute."""
    import numpy as np

    reference = a.to_numpy(dtype=np.float64)
    change = b.to_numpy(dtype=np.float64) - reference
    usable = reference > 0
    if not usable.any():
        return {"mape_pct": None, "bias_pct": None, "p95_abs_pct": None}
    error = 100.0 * change[usable] / reference[usable]
    return {
        "mape_pct": float(np.abs(error).mean()),
        "bias_pct": float(100.0 * change.sum() / reference.sum()),
        "p95_abs_pct": float(np.quantile(np.abs(error), 0.95)),
    }


def completion_curves(ends_a: Values, ends_b: Values, lives_a: Values) -> dict[str, float | int | None]:
    """The signed area between the completion curves (ns), what it must equal, and |area| over the reference's lives."""
    import numpy as np

    times = np.concatenate([ends_a, ends_b])
    ups = np.concatenate([np.ones(len(ends_a), dtype=np.int64), -np.ones(len(ends_b), dtype=np.int64)])
    order = np.argsort(times, kind="stable")
    height = np.cumsum(ups[order])[:-1]
    width = np.diff(times[order])
    total = int(np.sum(lives_a))
    absolute = int((np.abs(height) * width).sum())
    return {
        "area_ns": int((height * width).sum()),
        "sum_of_differences_ns": int(np.sum(ends_b) - np.sum(ends_a)),
        "absolute_area_over_lifetime": absolute / total if total else None,
    }


def order_distance(a: Values, b: Values) -> float | None:
    """The share of pairs of requests that come in the other order, (1 - Kendall's tau) / 2; None below two."""
    import numpy as np

    count = len(a)
    if count < 2:
        return None
    seen: list[int] = []
    inverted = 0
    # By a, equal ones by b: of each request, those before it in a that come strictly after it in b.
    for value in b[np.lexsort((b, a))].tolist():
        place = bisect_right(seen, value)
        inverted += len(seen) - place
        seen.insert(place, value)
    return inverted / (count * (count - 1) // 2)


def of_decisions(decisions: Mapping[str, Any], aligned: Aligned) -> dict[str, float | None]:
    """How much of the longer run lies after the first difference, and the edit distance of the best alignment."""
    return {"after_first": 1 - decisions["common_prefix_ratio"], "edit": aligned.edit_distance}


def flat(tree: Mapping[str, Any]) -> dict[str, float]:
    """Every distance under its dotted name, as a number that is 0 for equal runs and never negative."""
    from lab.analysis.frames import scalars

    left_out = ("completions.area_ns", "completions.sum_of_differences_ns")
    out = {key: abs(value) for key, value in scalars(tree).items() if key not in left_out}
    if "interval_iou" in out:
        out["intervals"] = 1 - out.pop("interval_iou")
    return out


def interval_iou(a: pd.DataFrame, b: pd.DataFrame) -> float | None:
    """Overlap over union of the (request, stage) intervals of two runs; 1.0 when they coincide."""
    groups = [_by_stage(frame) for frame in (a, b)]
    lengths = [int((frame["end_ns"] - frame["start_ns"]).sum()) for frame in (a, b)]
    shared = sum(_overlap(pieces, groups[1].get(key, [])) for key, pieces in groups[0].items())
    union = sum(lengths) - shared
    return shared / union if union else None


def _by_stage(frame: pd.DataFrame) -> dict[tuple[str, str], list[tuple[int, int]]]:
    groups: dict[tuple[str, str], list[tuple[int, int]]] = {}
    columns = (frame[column].tolist() for column in ("id", "stage", "start_ns", "end_ns"))
    for request, stage, start, end in zip(*columns, strict=True):
        groups.setdefault((request, stage), []).append((start, end))
    return groups


def _overlap(left: list[tuple[int, int]], right: list[tuple[int, int]]) -> int:
    """Total overlap of two lists of disjoint intervals (short lists: one entry a visit)."""
    return sum(max(0, min(x[1], y[1]) - max(x[0], y[0])) for x in left for y in right)


def summary(
    done_a: pd.DataFrame, done_b: pd.DataFrame, pieces_a: pd.DataFrame, pieces_b: pd.DataFrame
) -> dict[str, Any]:
    """All distances of the matched requests (same index on both sides)."""
    from lab.analysis.frames import gaps_ns

    def values(frame: pd.DataFrame, column: str) -> NDArray[np.int64]:
        out: NDArray[np.int64] = frame[column].to_numpy(dtype="int64")
        return out

    ids = done_a.index
    return {
        "e2e": distribution(values(done_a, "e2e_ns"), values(done_b, "e2e_ns"))
        | paired(done_a["e2e_ns"], done_b["e2e_ns"]),
        "ttft": distribution(values(done_a, "ttft_ns"), values(done_b, "ttft_ns"))
        | paired(done_a["ttft_ns"], done_b["ttft_ns"]),
        "itl": distribution(gaps_ns(done_a), gaps_ns(done_b)),
        "completions": completion_curves(
            values(done_a, "last_token_ns"), values(done_b, "last_token_ns"), values(done_a, "e2e_ns")
        ),
        "order": {
            "first_token": order_distance(values(done_a, "first_token_ns"), values(done_b, "first_token_ns")),
            "completion": order_distance(values(done_a, "last_token_ns"), values(done_b, "last_token_ns")),
        },
        "interval_iou": interval_iou(pieces_a[pieces_a["id"].isin(ids)], pieces_b[pieces_b["id"].isin(ids)]),
    }
