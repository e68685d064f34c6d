"""Two distributions percentile by percentile, with a band that says how much of it is chance. Observation path.

With several runs a side (seeds, repeats) the i-th run of one side belongs to the i-th of the other: the error of a
percentile is the mean over the pairs, and the band Student's 95 % interval of that mean. With one run a side the
band is the 2.5 to 97.5 % range of a bootstrap over its matched requests: what other requests might have given, and
nothing of what another seed would have. Gaps between tokens hang together, so they get a band over seeds only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lab.analysis.frames import finished, gaps_ns, tpot_ns

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

RANKS = (*range(1, 100), 99.9)
RESAMPLES = 120

Pair = tuple["pd.DataFrame", "pd.DataFrame"]
"""Requests of both sides, as `frames.finished` gives them."""


def samples(requests: pd.DataFrame) -> dict[str, Floats]:
    """`ttft`, `e2e`, `tpot` and `itl` in milliseconds."""
    import numpy as np

    return {
        "ttft": requests["ttft_ns"].to_numpy(dtype=float) / 1e6,
        "e2e": requests["e2e_ns"].to_numpy(dtype=float) / 1e6,
        "tpot": np.asarray(tpot_ns(requests), dtype=np.float64) / 1e6,
        "itl": gaps_ns(requests).astype(float) / 1e6,
    }


def percentiles(pairs: Sequence[Pair]) -> pd.DataFrame:
    """One row a latency and percentile.

    Columns latency, percentile, a_ms, b_ms, error_ms, error_pct (of a), low_pct, high_pct (the band; NaN without
    one), basis (`seeds`, `requests` or empty), runs.
    """
    import numpy as np
    import pandas as pd

    several = [(samples(a), samples(b)) for a, b in pairs if len(a) and len(b)]
    tables = []
    for latency in ("ttft", "e2e", "tpot", "itl") if several else ():
        usable = [(a[latency], b[latency]) for a, b in several if len(a[latency]) and len(b[latency])]
        if not usable:
            continue
        left, right = (np.array([np.percentile(pair[i], RANKS) for pair in usable]) for i in (0, 1))
        errors = _percent(left, right)
        low = high = np.full(len(RANKS), np.nan)
        basis = ""
        if len(usable) > 1:
            low, high = _student(errors)
            basis = "seeds"
        elif latency != "itl":
            low, high = _bootstrap(*usable[0])
            basis = "requests"
        tables.append(
            pd.DataFrame(
                {
                    "latency": latency,
                    "percentile": RANKS,
                    "a_ms": left.mean(axis=0),
                    "b_ms": right.mean(axis=0),
                    "error_ms": (right - left).mean(axis=0),
                    "error_pct": errors.mean(axis=0),
                    "low_pct": low,
                    "high_pct": high,
                    "basis": basis,
                    "runs": len(usable),
                }
            )
        )
    columns = [
        "latency",
        "percentile",
        "a_ms",
        "b_ms",
        "error_ms",
        "error_pct",
        "low_pct",
        "high_pct",
        "basis",
        "runs",
    ]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=columns)


def summary(table: pd.DataFrame) -> dict[str, Any]:
    """p50, p90 and p99 of each latency, as plain values."""
    chosen = table[table["percentile"].isin((50.0, 90.0, 99.0))]
    out: dict[str, Any] = {}
    for row in chosen.to_dict("records"):
        cell = {
            key: row[key] for key in ("a_ms", "b_ms", "error_pct", "low_pct", "high_pct", "basis", "runs")
        }
        out.setdefault(str(row["latency"]), {})[f"p{row['percentile']:g}"] = cell
    return out


def matched(a: pd.DataFrame, b: pd.DataFrame) -> Pair:
    """The requests that finished in both tables, in the same order."""
    left, right = finished(a), finished(b)
    ids = left.index.intersection(right.index)
    return left.loc[ids], right.loc[ids]


def spread(runs: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and 95 % interval over runs of every number that all of them have; of two runs or more."""
    import numpy as np

    if len(runs) < 2:
        return {}
    shared = sorted(set(runs[0]).intersection(*runs[1:]))
    out = {}
    for name in shared:
        values = np.array([[run[name]] for run in runs], dtype=float)
        low, high = _student(values)
        out[name] = {"mean": float(values.mean()), "low": float(low[0]), "high": float(high[0])}
    return out


def _percent(left: Floats, right: Floats) -> Floats:
    import numpy as np

    with np.errstate(divide="ignore", invalid="ignore"):
        error: Floats = 100 * (right - left) / left
    return np.where(left == right, 0.0, np.where(np.isfinite(error), error, np.nan))


def _student(values: Floats) -> tuple[Floats, Floats]:
    """The 95 % interval of the mean over the first axis."""
    import numpy as np
    from scipy.special import stdtrit

    count = len(values)
    half = stdtrit(count - 1, 0.975) * values.std(axis=0, ddof=1) / np.sqrt(count)
    middle = values.mean(axis=0)
    return middle - half, middle + half


def _bootstrap(left: Floats, right: Floats) -> tuple[Floats, Floats]:
    import numpy as np

    if len(left) != len(right) or len(left) < 2:
        nothing = np.full(len(RANKS), np.nan)
        return nothing, nothing
    draw = np.random.default_rng(0)  # the same runs give the same band
    errors = np.empty((RESAMPLES, len(RANKS)))
    for i in range(RESAMPLES):
        chosen = draw.integers(0, len(left), len(left))
        errors[i] = _percent(np.percentile(left[chosen], RANKS), np.percentile(right[chosen], RANKS))
    low, high = np.percentile(errors, [2.5, 97.5], axis=0)
    return low, high
