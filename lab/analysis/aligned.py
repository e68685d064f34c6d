"""Which step of one run corresponds to which of the other. Observation path.

Steps with equal plan digests correspond: digests are chained, so that is the common beginning of the two runs.
After it, a step is the set of tokens it computes, each known by its request and its position. Two steps are as
similar as the weighted Jaccard index of their tokens, J = common / together (1: the same work). The best alignment
keeps the order of both runs and has the largest sum of J. It is that of Needleman and Wunsch with a cost of 1 - J
for a pair and 1/2 for a step left alone, found exactly and without a band: a token is computed once in a run (or
again after a preemption), so pairs with J > 0 are few, and the heaviest ascending chain through them takes
O(pairs log steps) time. Of each step's partners only the `PARTNERS` most similar are candidates.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from lab.analysis.frames import RunLike, items, table_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

    Ints = NDArray[np.int64]

PARTNERS = 8
"""Candidates that each step keeps, the most similar."""

_PREEMPTED, _REJECTED = -1, -2
"""Positions that stand for being preempted and rejected: decisions that compute nothing are decisions too."""


@dataclass(frozen=True)
class Aligned:
    """Steps of two runs side by side."""

    pairs: pd.DataFrame
    """replica, step_a, step_b, similarity (J), plan (`equal` digests, same `work`, `similar`), in order."""
    alone: tuple[int, int]
    """Steps without a partner, on each side."""
    edit_distance: float | None
    """0 for equal decisions, 1 where no token is computed at the same place: 1 - 2 * sum of J / all steps."""
    by_work: bool
    """False where a side kept no plans: then only equal digests are aligned."""

    def summary(self) -> dict[str, Any]:
        kinds = self.pairs["plan"].value_counts()
        return {
            **{kind: int(kinds.get(kind, 0)) for kind in ("equal", "work", "similar")},
            "alone": list(self.alone),
            "edit_distance": self.edit_distance,
            "by_work": self.by_work,
        }


@dataclass(frozen=True)
class Items:
    """The work of some plans, an entry an item. `row` counts the plans, `request` numbers the names."""

    row: Ints
    request: Ints
    start: Ints
    tokens: Ints

    def where(self, mask: NDArray[np.bool_]) -> Items:
        return Items(self.row[mask], self.request[mask], self.start[mask], self.tokens[mask])


def align(a: RunLike, b: RunLike) -> Aligned:
    """Align the steps of two runs, each replica with its namesake."""
    import pandas as pd

    columns = ["replica", "step", "digest"]
    steps = [table_of(run, "steps", columns).sort_values(["replica", "step"]) for run in (a, b)]
    plans = [_plans(run) for run in (a, b)]
    by_work = all(plan is not None for plan in plans)
    parts = []
    for replica in sorted(set(steps[0]["replica"]) | set(steps[1]["replica"])):
        own = [side[side["replica"] == replica] for side in steps]
        numbers = [side["step"].to_numpy(dtype="int64") for side in own]
        digests = [side["digest"].to_numpy() for side in own]
        shorter = min(len(side) for side in digests)
        unlike = (digests[0][:shorter] != digests[1][:shorter]).nonzero()[0]
        equal = int(unlike[0]) if len(unlike) else shorter
        parts.append(_pairs(replica, numbers[0][:equal], numbers[1][:equal], 1.0, "equal"))
        rest = [side[equal:] for side in numbers]
        if by_work and all(len(side) for side in rest):
            left, right, similarity = _by_work([p for p in plans if p is not None], int(replica), rest)
            kind = ["work" if value == 1 else "similar" for value in similarity]
            parts.append(_pairs(replica, left, right, similarity, kind))
    pairs = pd.concat(parts, ignore_index=True) if parts else _pairs(0, [], [], [], [])
    counts = len(steps[0]), len(steps[1])
    total = float(pairs["similarity"].sum())
    return Aligned(
        pairs,
        (counts[0] - len(pairs), counts[1] - len(pairs)),
        1 - 2 * total / sum(counts) if sum(counts) and (by_work or total == counts[0] == counts[1]) else None,
        by_work,
    )


def _pairs(replica: int, left: Any, right: Any, similarity: Any, kind: Any) -> pd.DataFrame:
    import pandas as pd

    frame = pd.DataFrame({"step_a": left, "step_b": right}, dtype="int64")
    frame = frame.assign(similarity=similarity, plan=kind).astype({"similarity": "float64"})
    frame.insert(0, "replica", int(replica))
    return frame


def _plans(run: RunLike) -> pd.DataFrame | None:
    columns = ["step", "request", "start", "tokens", "preempted", "rejected"]
    plans = table_of(run, "plans", columns)
    if plans.empty and len(table_of(run, "steps", ["step"])):
        return None
    return plans if "replica" in plans else plans.assign(replica=0)


def flat(column: Iterable[Any]) -> list[Any]:
    """The entries of a list column, one after another."""
    cells = (cell.tolist() if hasattr(cell, "tolist") else items(cell) for cell in column)
    return list(chain.from_iterable(cells))


def work_items(
    plans: list[pd.DataFrame], wanted: list[Ints], *, decisions: bool = False
) -> tuple[Items, Items]:
    """The work of these steps of two tables of plans; both number the requests alike.

    `decisions` adds an item of one token for each preemption and rejection.
    """
    import numpy as np
    import pandas as pd

    names: list[str] = []
    rows, starts, tokens, sizes = [], [], [], []
    for frame, steps in zip(plans, wanted, strict=True):
        own = frame.set_index("step").reindex(steps)
        parts = [("request", None)] + ([("preempted", _PREEMPTED), ("rejected", _REJECTED)] * decisions)
        row, start, count = [], [], []
        for column, mark in parts:
            called = flat(own[column])
            names += called
            row.append(np.repeat(np.arange(len(own)), [len(items(cell)) for cell in own[column]]))
            plain = mark is None
            start.append(np.array(flat(own["start"]) if plain else [mark] * len(called), dtype=np.int64))
            count.append(np.array(flat(own["tokens"]) if plain else [1] * len(called), dtype=np.int64))
        rows.append(np.concatenate(row))
        starts.append(np.concatenate(start))
        tokens.append(np.concatenate(count))
        sizes.append(len(rows[-1]))
    codes = pd.factorize(np.array(names, dtype=object))[0].astype(np.int64)
    cut = sizes[0]
    return (
        Items(rows[0].astype(np.int64), codes[:cut], starts[0], tokens[0]),
        Items(rows[1].astype(np.int64), codes[cut:], starts[1], tokens[1]),
    )


def _by_work(plans: list[pd.DataFrame], replica: int, steps: list[Ints]) -> tuple[Ints, Ints, Any]:
    import numpy as np

    own = [frame[frame["replica"] == replica] for frame in plans]
    left, right = work_items(own, steps, decisions=True)
    counts = [len(side) for side in steps]
    m, n, common = _overlaps(left, right, counts[1])
    size = [
        np.bincount(side.row, weights=side.tokens, minlength=count)
        for side, count in zip((left, right), counts, strict=True)
    ]
    similarity = common / (size[0][m] + size[1][n] - common)
    keep = _most_similar(m, similarity) | _most_similar(n, similarity)
    m, n, similarity = m[keep], n[keep], similarity[keep]
    chosen = heaviest_chain(m, n, similarity)
    return steps[0][m[chosen]], steps[1][n[chosen]], similarity[chosen]


def _overlaps(left: Items, right: Items, columns: int) -> tuple[Ints, Ints, Any]:
    """(step of left, step of right, tokens in common) of every pair with some."""
    import numpy as np
    import pandas as pd

    found: list[tuple[Any, Any, Any]] = []
    one = [side.tokens == 1 for side in (left, right)]
    singles, chunks = [
        [s.where(m) for s, m in zip((left, right), ms, strict=True)] for ms in (one, [~o for o in one])
    ]
    tables = [pd.DataFrame({"key": (s.request << 32) + s.start + 8, "row": s.row}) for s in singles]
    both = tables[0].merge(tables[1], on="key")
    found.append((both["row_x"].to_numpy(), both["row_y"].to_numpy(), np.ones(len(both))))
    for x, y in ((chunks[0], chunks[1]), (chunks[0], singles[1]), (singles[0], chunks[1])):
        if x is singles[0]:
            x = _below(x, y)
        elif y is singles[1]:
            y = _below(y, x)
        if not (len(x.row) and len(y.row)):
            continue
        frames = [
            pd.DataFrame({"request": s.request, "row": s.row, "start": s.start, "end": s.start + s.tokens})
            for s in (x, y)
        ]
        pair = frames[0].merge(frames[1], on="request")
        edges = {c: pair[c].to_numpy(dtype=np.int64) for c in ("start_x", "end_x", "start_y", "end_y")}
        common = np.minimum(edges["end_x"], edges["end_y"]) - np.maximum(edges["start_x"], edges["start_y"])
        hit = common > 0
        found.append(
            (pair["row_x"].to_numpy()[hit], pair["row_y"].to_numpy()[hit], common.astype(float)[hit])
        )
    m, n, weight = (np.concatenate(part) for part in zip(*found, strict=True))
    keys, place = np.unique(m.astype(np.int64) * columns + n, return_inverse=True)
    return keys // columns, keys % columns, np.bincount(place, weights=weight, minlength=len(keys))


def _below(singles: Items, chunks: Items) -> Items:
    """Of single tokens, those that some chunk of the same request could hold: few, without recomputation."""
    import numpy as np

    most = np.zeros(1 + max(singles.request.max(initial=0), chunks.request.max(initial=0)), dtype=np.int64)
    np.maximum.at(most, chunks.request, chunks.start + chunks.tokens)
    return singles.where((singles.start >= 0) & (singles.start < most[singles.request]))


def _most_similar(group: Ints, similarity: Any) -> NDArray[np.bool_]:
    """Which entries are among the `PARTNERS` largest of their group."""
    import numpy as np

    order = np.lexsort((-similarity, group))
    sorted_group = group[order]
    first = np.searchsorted(sorted_group, sorted_group, side="left")
    keep = np.zeros(len(group), dtype=bool)
    keep[order[np.arange(len(order)) - first < PARTNERS]] = True
    return keep


def heaviest_chain(m: Ints, n: Ints, weight: Any) -> list[int]:
    """Positions of the entries that ascend strictly in both `m` and `n` with the largest sum of positive weights.

    The frontier holds, by ascending n, the best sums of chains ending there: what neither ends earlier nor sums to
    more is dropped, so each entry is one binary search.
    """
    import numpy as np

    order = np.lexsort(
        (-n, m)
    )  # within an m from the largest n down: an entry never continues one of its own m
    ends: list[int] = []
    sums: list[float] = []
    tops: list[int] = []
    before = [-1] * len(order)
    for position, end, value in zip(order.tolist(), n[order].tolist(), weight[order].tolist(), strict=True):
        place = bisect_left(ends, end)
        total = value
        if place:
            total += sums[place - 1]
            before[position] = tops[place - 1]
        if place < len(ends) and ends[place] == end and sums[place] >= total:
            continue
        last = place
        while last < len(ends) and sums[last] <= total:
            last += 1
        ends[place:last], sums[place:last], tops[place:last] = [end], [total], [position]
    chosen = []
    at = tops[-1] if tops else -1
    while at >= 0:
        chosen.append(at)
        at = before[at]
    return chosen[::-1]
