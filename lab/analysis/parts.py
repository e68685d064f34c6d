"""Where each request's time went, cut so that the pieces add up to it exactly. Observation path.

The stages of `frames` tile a request's life. Prefill and decode are cut further by what the engine did meanwhile:
its steps tile its time into phases, so each nanosecond of a stage belongs to the host (planning, preparing,
committing, and time between steps), to KV transfers, or to the model. What an interval holds of each is a difference
of running sums: no sampling, no residual.

`cache` is a counterfactual cut of prefill. Where the prefix cache supplied a request more tokens on one side than on
the other, those tokens times the price of a prompt token were saved; prefill is then what it would have been
without. The price is fitted to the steps of both sides, so this one number is an estimate, the sum stays exact.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lab.analysis.frames import PARTS, STEP_PHASES, RunLike, intervals, table_of

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

    Ints = NDArray[np.int64]

_HOST, _TRANSFER, _MODEL = range(3)
_KIND = {"plan": _HOST, "transfer": _TRANSFER, "prepare": _HOST, "commit": _HOST}
"""What is not named here is the model's; time between steps is the host's."""

_FIT_STEPS = 4000


class Engine:
    """What one replica did at each moment, as running sums over its time."""

    def __init__(self, steps: pd.DataFrame) -> None:
        import numpy as np

        ordered = steps.sort_values("start_ns")
        start = ordered["start_ns"].to_numpy(dtype=np.int64)
        lengths = [
            ordered[f"{phase}_ns"].to_numpy(dtype=np.int64)
            if f"{phase}_ns" in ordered
            else np.zeros_like(start)
            for phase in STEP_PHASES
        ]
        # [steps, phases + 1]: where each phase begins, and where the last one ends
        edges = np.column_stack([start, *(start + total for total in np.cumsum(lengths, axis=0))])
        kinds = np.tile([*(_KIND.get(phase, _MODEL) for phase in STEP_PHASES), _HOST], len(start))
        self._edges: Ints = np.maximum.accumulate(edges.ravel())  # steps that overlap count once
        self._kinds: Ints = kinds
        spans = np.diff(self._edges)
        self._sums = [
            np.concatenate([[0], np.cumsum(np.where(kinds[:-1] == kind, spans, 0))]) for kind in range(3)
        ]

    def until(self, kind: int, times: Ints) -> Ints:
        """Nanoseconds of this kind from the first step to each of these moments."""
        import numpy as np

        at = np.searchsorted(self._edges, times, side="right") - 1
        inside = np.where(self._kinds[at] == kind, times - self._edges[at], 0)
        out: Ints = self._sums[kind][at] + inside
        # Before its first step an engine is its host's; it has no running requests then.
        return np.where(at < 0, (times - self._edges[0]) * (kind == _HOST), out)


def part_times(run: RunLike, done: pd.DataFrame, pieces: pd.DataFrame, until: str) -> pd.DataFrame:
    """Nanoseconds of each part but `cache` of each request, up to the moment in its column `until` (index id).

    `pieces` are the run's `intervals`. A request that changed replicas is judged by where it ended.
    """
    import numpy as np
    import pandas as pd

    of = pieces[pieces["id"].isin(done.index)]
    limit = done[until].reindex(of["id"]).to_numpy()
    start, end = (np.minimum(of[c].to_numpy(dtype=np.int64), limit) for c in ("start_ns", "end_ns"))
    runs = of["stage"].isin(("prefill", "decode")).to_numpy()
    steps = table_of(run, "steps", ["replica", "start_ns"])
    host, transfer = np.zeros(len(of), dtype=np.int64), np.zeros(len(of), dtype=np.int64)
    where = done["replica"].reindex(of["id"]).to_numpy()
    for replica, own in steps.groupby("replica"):
        mine = runs & (where == replica)
        engine = Engine(own)
        for kind, out in ((_HOST, host), (_TRANSFER, transfer)):
            out[mine] = engine.until(kind, end[mine]) - engine.until(kind, start[mine])
    table = pd.DataFrame({"id": of["id"].to_numpy(), "host": host, "transfer": transfer})
    own_stage = of["stage"].to_numpy()
    rest = end - start - host - transfer
    for part in PARTS[:-2]:
        table[part] = np.where(own_stage == part, rest, 0)
    summed = table.groupby("id").sum()
    return summed.reindex(index=done.index, columns=list(PARTS), fill_value=0).astype("int64")


def credit_cache(
    tables: tuple[pd.DataFrame, pd.DataFrame], done: tuple[pd.DataFrame, pd.DataFrame], price: float
) -> None:
    """Move what more cached tokens saved from prefill to `cache`, in place; requests alike on both sides."""
    import numpy as np

    cached = [frame["cached_tokens"].to_numpy(dtype=np.int64) for frame in done]
    common = np.minimum(*cached)
    for table, tokens in zip(tables, cached, strict=True):
        saved = np.rint((tokens - common) * price).astype(np.int64)
        table["cache"] = -saved
        table["prefill"] += saved


def token_price(*runs: RunLike) -> float:
    """Nanoseconds that one more prompt token adds to a step: non-negative least squares over each run's steps."""
    import numpy as np
    from scipy.optimize import nnls

    prices = []
    for run in runs:
        steps = table_of(run, "steps", ["prefill_tokens"])
        steps = steps[steps["prefill_tokens"] > 0] if len(steps) else steps
        if steps.empty:
            continue
        steps = steps.iloc[:: -(-len(steps) // _FIT_STEPS)]
        took = (steps["end_ns"] - steps["start_ns"]).to_numpy(dtype=float)
        tokens = steps["prefill_tokens"].to_numpy(dtype=float)
        if len(steps) < 8:
            prices.append(float(took.sum() / tokens.sum()))
            continue
        columns = [np.ones(len(steps)), tokens]
        columns += [steps[c].to_numpy(dtype=float) for c in ("decode_tokens", "context_tokens")]
        scale = np.array([max(float(np.abs(c).max()), 1.0) for c in columns])
        fit, _ = nnls(np.column_stack(columns) / scale, took)
        prices.append(float(fit[1] / scale[1]))
    return float(np.mean(prices)) if prices else 0.0


def waits(a: RunLike, b: RunLike, ids: pd.Index[str]) -> pd.DataFrame:
    """Waiting intervals side by side: the k-th of a request that began for the same cause.

    Columns id, stage (`queue` until first scheduled, `preempted`, `swapped`), visit (from 0), start_ns_a, wait_ns_a,
    start_ns_b, wait_ns_b, delta_ns. An interval of one side alone has no numbers on the other.
    """
    sides = []
    for run, key in ((a, "a"), (b, "b")):
        pieces = intervals(run.requests)
        own = pieces[pieces["id"].isin(ids) & pieces["stage"].isin(PARTS[:3])]
        own = own.sort_values(["id", "start_ns"], kind="stable")
        own = own.assign(visit=own.groupby(["id", "stage"]).cumcount(), wait=own["end_ns"] - own["start_ns"])
        named = own[["id", "stage", "visit", "start_ns", "wait"]].rename(
            columns={"start_ns": f"start_ns_{key}", "wait": f"wait_ns_{key}"}
        )
        sides.append(named.astype({f"start_ns_{key}": "Int64", f"wait_ns_{key}": "Int64"}))
    both = sides[0].merge(sides[1], on=["id", "stage", "visit"], how="outer")
    return both.assign(delta_ns=both["wait_ns_b"] - both["wait_ns_a"])
