"""Mean and percentiles of samples, interpolated linearly between order statistics (numpy's default). Observation path.

Samples are nanoseconds, results milliseconds. What has no sample is None, never NaN or 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

PERCENTILES = (50, 90, 99)
NAMES = ("mean", *(f"p{rank}" for rank in PERCENTILES))


def ratio(part: float, whole: float) -> float | None:
    """None of nothing."""
    return part / whole if whole else None


def stats(samples_ns: Sequence[float]) -> dict[str, float | None]:
    """`mean`, `p50`, `p90`, `p99` of samples, in ms."""
    if not samples_ns:
        return dict.fromkeys(NAMES)
    import numpy as np

    samples = np.asarray(samples_ns, dtype=np.float64)
    values = [samples.mean(), *np.percentile(samples, PERCENTILES)]
    return {name: float(value) / 1e6 for name, value in zip(NAMES, values, strict=True)}


def folded_stats(folded: Sequence[tuple[Any, Any]]) -> dict[str, float | None]:
    """The same of (values, how often each occurred), in several parts."""
    import numpy as np

    if not sum(len(values) for values, _ in folded):
        return stats([])
    values = np.concatenate([values for values, _ in folded])
    order = np.argsort(values, kind="stable")
    values, counts = values[order], np.concatenate([counts for _, counts in folded])[order]
    ends = np.cumsum(counts)
    number = int(ends[-1])

    def at(rank: float) -> float:
        """Linear between order statistics, as numpy does it."""
        place = rank / 100 * (number - 1)
        low = math.floor(place)
        below, above = (
            values[np.searchsorted(ends, n, side="right")] for n in (low, min(low + 1, number - 1))
        )
        return float(below + (above - below) * (place - low))

    mean = float((values.astype(np.float64) * counts).sum() / number)
    found = [mean, *map(at, PERCENTILES)]
    return {name: value / 1e6 for name, value in zip(NAMES, found, strict=True)}
