"""How far two runs of one experiment lie apart by chance: what every distance is to be held against. Observation path.

A measured run never repeats itself: step durations jitter, so arrivals fall into other steps, and decisions part
although nothing is wrong. The noise floor of a distance is its median over all pairs of repeats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from lab.analysis import distances as distance
from lab.analysis.aligned import align
from lab.analysis.decisions import compare_decisions
from lab.analysis.distributions import matched
from lab.analysis.frames import RunLike, intervals, name
from lab.analysis.scope import scope
from lab.errors import RunError


def noise_floor(repeats: Sequence[RunLike], found: Mapping[str, Any]) -> dict[str, Any]:
    """`repeats` (two or more runs of one workload), and `found`, the distances to be judged.

    runs, pairs, first_divergent_step (median over the pairs that part; None where none does), and for each distance
    `distance`, `floor` and `ratio` (None where the floor is 0). Raises `RunError` for a run of another workload.
    """
    import numpy as np

    steps: list[int] = []
    floors: dict[str, list[float]] = {}
    pairs = list(combinations(repeats, 2))
    for a, b in pairs:
        like = scope(a, b)
        if not like.whole:
            why = "is partial" if any(like.partial) else "is of another workload"
            raise RunError(
                f"run '{getattr(b, 'path', None) or name(b)}' is no repeat of "
                f"'{getattr(a, 'path', None) or name(a)}': one of them {why}; expected the same experiment, run again"
            )
        decisions = compare_decisions(a, b, ("a", "b"))
        if decisions["first_divergent_step"] is not None:
            steps.append(decisions["first_divergent_step"])
        summary = distance.summary(
            *matched(a.requests, b.requests), intervals(a.requests), intervals(b.requests)
        )
        summary["decisions"] = distance.of_decisions(decisions, align(a, b))
        for key, value in distance.flat(summary).items():
            floors.setdefault(key, []).append(value)
    table = {}
    for key, value in distance.flat(found).items():
        if key in floors:
            floor = float(np.median(floors[key]))
            table[key] = {"distance": value, "floor": floor, "ratio": value / floor if floor else None}
    return {
        "runs": len(repeats),
        "pairs": len(pairs),
        "parted": len(steps),
        "first_divergent_step": float(np.median(steps)) if steps else None,
        "distances": table,
    }
