"""A run's timeline as integer columns, small enough to travel inside a page. Observation path.

    shared, tables = fitted(runs)    # which requests, which unit of time; a side's lanes, pieces, stretches, steps

A lane is a request, in order of arrival, the same in every side of a page. Its pieces tile its life, so only their
lengths are sent. What a step's batch held isn't sent step by step but as stretches: consecutive steps in which a
request computed equally many tokens. That is exact, and for a decode of 500 tokens it is one row. Small differences
instead of large numbers make the compressed columns small. `templates/columns.js` undoes all of this.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from lab.analysis.drawing import evenly
from lab.analysis.frames import RunLike, intervals, stages_of, table_of

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

    Ints = NDArray[np.int64]

Columns = dict[str, Any]
"""Column name -> int32 or uint8 array; all of one length."""

MOST_REQUESTS = 5000
"""Lanes of a page; more requests are thinned evenly, and the page says so."""
MOST_STEPS = 12_000
"""Bars a side in the strip of steps; beyond that neighbouring steps share a bar."""
MOST_BYTES = 900_000
"""What all columns may take in the page. Where they take more (batches that change all the time), both of the above
are halved until they fit."""

_LONGEST = 2_000_000_000
"""Ticks of the longest run: times fit into 31 bits."""


@dataclass(frozen=True)
class Shape:
    """What the sides of a page share."""

    ids: list[str]
    """Of the lanes, in order of arrival."""
    total: int
    """Requests there are, in the window."""
    stages: tuple[str, ...]
    tick_ns: int
    """Unit of all times: 1 us, or a power of ten more for a long run."""
    window_ns: tuple[int, int] | None
    """The part of the run that the page shows; None: all of it."""
    end_ns: int
    most_steps: int = MOST_STEPS


def fitted(
    runs: Sequence[RunLike], window_s: tuple[float, float] | None = None
) -> tuple[Shape, list[dict[str, Columns]]]:
    """The columns of each side, thinned as far as it takes to keep the page small."""
    requests, steps = MOST_REQUESTS, MOST_STEPS
    while True:
        shared = shape(runs, window_s, requests, steps)
        tables = [pack(run, shared) for run in runs]
        if _bytes(tables) <= MOST_BYTES or requests < 50:
            return shared, tables
        requests, steps = requests // 2, steps // 2


def _bytes(tables: Sequence[dict[str, Columns]]) -> int:
    """Of the columns as they will be in the page: compressed, in base 64."""
    columns = (column for side in tables for table in side.values() for column in table.values())
    return sum(4 * len(zlib.compress(column.tobytes(), 2)) // 3 for column in columns)


def shape(
    runs: Sequence[RunLike],
    window_s: tuple[float, float] | None = None,
    most_requests: int = MOST_REQUESTS,
    most_steps: int = MOST_STEPS,
) -> Shape:
    """Choose lanes and unit for runs laid over each other; the first is the reference for the order."""
    window = None if window_s is None else (round(window_s[0] * 1e9), round(window_s[1] * 1e9))
    ordered = runs[0].requests.sort_values(["arrival_ns", "seq"])
    known = ordered["id"].astype(str)
    if window is not None:
        inside = {
            str(name)
            for run in runs
            for name in run.requests.loc[
                (run.requests["arrival_ns"] < window[1]) & (run.requests["end_ns"] > window[0]), "id"
            ]
        }
        known = known[known.isin(inside)]
    ends = [int(run.requests["end_ns"].max()) for run in runs if len(run.requests)]
    ends += [int(steps["end_ns"].max()) for run in runs if len(steps := table_of(run, "steps", ["end_ns"]))]
    end, tick = max(ends, default=1), 1000
    while end // tick > _LONGEST:
        tick *= 10
    return Shape(
        known.iloc[evenly(len(known), most_requests)].tolist(),
        len(known),
        stages_of(*runs),
        tick,
        window,
        max(end, 1),
        most_steps,
    )


def pack(run: RunLike, shared: Shape) -> dict[str, Columns]:
    """Tables `lanes`, `pieces`, `stretches`, `steps` of one side; integers, times in ticks."""
    lanes, pieces = _lanes(run, shared)
    return {
        "lanes": lanes,
        "pieces": pieces,
        "stretches": _stretches(run, shared),
        "steps": _steps(run, shared),
    }


def _lanes(run: RunLike, shared: Shape) -> tuple[Columns, Columns]:
    import numpy as np
    import pandas as pd

    order = pd.Index(shared.ids)
    mine = run.requests.assign(id=run.requests["id"].astype(str)).drop_duplicates("id")
    mine = mine[mine["id"].isin(order)]
    parts = intervals(mine)
    lane = order.get_indexer(pd.Index(parts["id"]))
    by_lane = np.lexsort((parts["start_ns"].to_numpy(), lane))
    parts, lane = parts.iloc[by_lane], lane[by_lane]
    start, end = (parts[c].to_numpy(dtype=np.int64) // shared.tick_ns for c in ("start_ns", "end_ns"))
    known = mine.set_index("id").reindex(order)
    arrival = known["arrival_ns"].ffill().fillna(0).to_numpy(dtype=np.int64) // shared.tick_ns
    count = np.bincount(lane, minlength=len(order))
    lanes = {"arrival": np.diff(arrival, prepend=0), "pieces": count}
    for column in ("prompt_tokens", "output_tokens", "cached_tokens", "preemptions", "replica"):
        values = known[column] if column in known else pd.Series(0, index=order)
        lanes[column] = values.fillna(-1).to_numpy(dtype=np.int64)
    stage = pd.Index(shared.stages).get_indexer(pd.Index(parts["stage"]))
    pieces = {
        "length": end - start,
        "stage": stage,
        "first_step": parts["first_step"].to_numpy(dtype=np.int64),
        "last_step": parts["last_step"].to_numpy(dtype=np.int64),
    }
    return _small(lanes), _small(pieces)


def _stretches(run: RunLike, shared: Shape) -> Columns:
    """lane and first step (both less those before), replica, steps, tokens a step, start (position in tokens)."""
    import numpy as np
    import pandas as pd

    names = ("lane", "replica", "step", "steps", "tokens", "start")
    plans = table_of(run, "plans", ["step", "request", "start", "tokens"])
    if plans.empty:
        return _small(dict.fromkeys(names, np.empty(0, dtype=np.int64)))
    size = plans["request"].map(len).to_numpy()
    flat = {
        column: np.fromiter(chain.from_iterable(plans[column]), dtype=np.int64, count=int(size.sum()))
        for column in ("start", "tokens")
    }
    lane = pd.Index(shared.ids).get_indexer(pd.Index(list(chain.from_iterable(plans["request"]))))
    step = np.repeat(plans["step"].to_numpy(dtype=np.int64), size)
    replica = np.repeat(
        plans["replica"].to_numpy(dtype=np.int64) if "replica" in plans else np.zeros(len(plans), np.int64),
        size,
    )
    keep = np.flatnonzero(lane >= 0)
    keep = keep[np.lexsort((step[keep], replica[keep], lane[keep]))]
    lane, step, replica = lane[keep], step[keep], replica[keep]
    start, tokens = flat["start"][keep], flat["tokens"][keep]
    begins = np.ones(len(lane), dtype=bool)
    begins[1:] = (
        (lane[1:] != lane[:-1])
        | (replica[1:] != replica[:-1])
        | (step[1:] != step[:-1] + 1)
        | (tokens[1:] != tokens[:-1])
        | (start[1:] != start[:-1] + tokens[:-1])
    )
    first = np.flatnonzero(begins)
    length = np.diff(first, append=len(lane))
    found = (
        lane[first],
        replica[first],
        np.diff(step[first], prepend=0),
        length,
        tokens[first],
        start[first],
    )
    columns = dict(zip(names, found, strict=True))
    columns["lane"] = np.diff(columns["lane"], prepend=0)
    return _small(columns)


_SUMMED = ("prefill_tokens", "decode_tokens")
_LARGEST = ("batch", "waiting", "running")
_LAST = ("blocks_held", "blocks_cached", "blocks_free")


def _steps(run: RunLike, shared: Shape) -> Columns:
    """A row a bar, by replica and time: gap since the bar before, length, host and transfer (ticks), and the state."""
    import numpy as np

    steps = table_of(run, "steps", ["replica", "step", "start_ns", "end_ns", *_SUMMED, *_LARGEST, *_LAST])
    if shared.window_ns is not None:
        low, high = shared.window_ns
        steps = steps[(steps["start_ns"] < high) & (steps["end_ns"] > low)]
    steps = steps.sort_values(["replica", "start_ns"])
    together = -(-len(steps) // shared.most_steps) or 1
    place = steps.groupby("replica").cumcount() // together if len(steps) else steps["replica"]
    host = sum((_column(steps, f"{phase}_ns") for phase in ("plan", "prepare", "commit")), 0)
    frame = steps[["replica", "step", "start_ns", "end_ns", *_SUMMED, *_LARGEST, *_LAST]].assign(
        host=host, transfer=_column(steps, "transfer_ns"), count=1, last=steps["step"]
    )
    rules = {"step": "first", "last": "last", "start_ns": "first", "end_ns": "last"}
    rules |= dict.fromkeys((*_SUMMED, "host", "transfer", "count"), "sum")
    rules |= dict.fromkeys(_LARGEST, "max") | dict.fromkeys(_LAST, "last")
    if together > 1:
        frame = frame.groupby([frame["replica"], place.rename("place")], sort=True).agg(rules).reset_index()
    numbers = {name: frame[name].to_numpy(dtype=np.int64) for name in ("replica", *rules)}
    for name in ("start_ns", "end_ns", "host", "transfer"):
        numbers[name] = numbers[name] // shared.tick_ns
    first = np.append(True, numbers["replica"][1:] != numbers["replica"][:-1])[: len(frame)]
    before = np.where(first, 0, np.append(0, numbers["end_ns"][:-1])[: len(frame)])
    out = {
        "gap": numbers["start_ns"] - before,
        "length": numbers["end_ns"] - numbers["start_ns"],
        "step": np.diff(numbers["step"], prepend=0),
    }
    wanted = ("replica", "count", "host", "transfer", *_SUMMED, *_LARGEST, *_LAST)
    return _small(out | {name: numbers[name] for name in wanted})


def _column(steps: pd.DataFrame, name: str) -> Any:
    return steps.get(name, 0)


def _small(columns: dict[str, Ints]) -> Columns:
    """Bytes where the values are bytes, else 32 bits."""
    import numpy as np

    return {
        name: values.astype(
            np.uint8 if not len(values) or (values.min() >= 0 and values.max() < 256) else np.int32
        )
        for name, values in columns.items()
    }


def in_stage(run: RunLike, shared: Shape, edges: Ints) -> dict[str, NDArray[np.float64]]:
    """Mean number of requests in each stage between neighbouring edges (ns), of all requests, not the lanes alone."""
    import numpy as np

    pieces = intervals(run.requests)

    def gone(moments: Ints) -> NDArray[np.float64]:
        """Nanoseconds that have passed since each of these moments, added up, at each edge."""
        ordered = np.sort(moments)
        sums = np.append(0.0, np.cumsum(ordered, dtype=np.float64))
        past = np.searchsorted(ordered, edges, "right")
        return np.asarray(past * edges.astype(np.float64) - sums[past])

    out = {}
    for stage in shared.stages:
        own = pieces[pieces["stage"] == stage]
        spent = gone(own["start_ns"].to_numpy(dtype=np.int64)) - gone(own["end_ns"].to_numpy(dtype=np.int64))
        out[stage] = np.diff(spent) / np.maximum(1, np.diff(edges))
    return out
