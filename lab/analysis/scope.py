"""What of two runs can be compared at all: a run that ended early and another workload leave less than all.

Observation path. Comparable are requests that were asked alike (id, arrival, prompt and output length) and, of
a partial run, those that had ended in it; of its steps those that both runs took.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lab.analysis.frames import RunLike, asked, finished, gaps_ns, tpot_ns

if TYPE_CHECKING:
    import pandas as pd

_ASKED = ("arrival_ns", "prompt_tokens", "output")


@dataclass(frozen=True)
class Scope:
    """What is compared, and what isn't."""

    partial: tuple[bool, bool]
    only: tuple[list[str], list[str]]
    """Requests that one workload alone has."""
    unlike: list[str]
    """Requests of both workloads that are asked unlike in arrival or lengths."""
    contents: bool
    """The workloads differ in their prompts' contents alone."""
    ids: frozenset[str] | None = field(repr=False)
    """The requests to compare; None for all."""

    @property
    def same_workload(self) -> bool:
        return not (any(self.only) or self.unlike or self.contents)

    @property
    def whole(self) -> bool:
        """Whether the two runs, all of them, are of the same work."""
        return self.same_workload and not any(self.partial)

    def to_json(self) -> dict[str, Any]:
        return {
            "whole": self.whole,
            "same_workload": self.same_workload,
            "requests": None if self.ids is None else len(self.ids),
            "unlike": len(self.unlike),
        }


@dataclass(frozen=True)
class Part:
    """A run cut to what is compared; a `RunLike` itself."""

    whole: RunLike
    requests: pd.DataFrame
    steps: pd.DataFrame
    plans: pd.DataFrame
    metrics: dict[str, Any]

    @property
    def config(self) -> Any:
        return self.whole.config

    @property
    def partial(self) -> str | bool | None:
        return self.whole.partial

    @property
    def path(self) -> Any:
        return getattr(self.whole, "path", None)


def scope(a: RunLike, b: RunLike) -> Scope:
    """What can be compared of two runs."""
    tables = [asked(run) for run in (a, b)]
    known = all(table is not None for table in tables)
    left, right = (
        (run.requests.drop_duplicates("id") if table is None or not known else table).set_index("id")
        for run, table in zip((a, b), tables, strict=True)
    )
    columns = list(_ASKED) if known else list(_ASKED[:2])
    both = left.index.intersection(right.index, sort=False)
    partial = (bool(a.partial), bool(b.partial))
    missing = [left.index.difference(right.index), right.index.difference(left.index)]
    # Without a workload to go by, what a partial run never came to is not known to be missing.
    only = tuple([] if partial[1 - i] and not known else [str(x) for x in missing[i]] for i in (0, 1))
    unlike = (left.loc[both, columns] != right.loc[both, columns]).any(axis=1).to_numpy()
    different = any(only) or bool(unlike.any())
    ids: frozenset[str] | None = None
    if different or any(partial):
        kept = {str(i) for i in both[~unlike]}
        for run, early in zip((a, b), partial, strict=True):
            if early:
                kept &= set(run.requests.loc[run.requests["outcome"] != "unfinished", "id"].astype(str))
        ids = frozenset(kept)
    contents = not different and _contents_differ(a, b)
    return Scope(partial, (only[0], only[1]), [str(i) for i in both[unlike]], contents, ids)


def cut(a: RunLike, b: RunLike, found: Scope) -> tuple[RunLike, RunLike]:
    """Both runs without what can't be compared; two whole runs without a like request stay whole."""
    if found.ids is None or not (found.ids or any(found.partial)):
        return a, b
    steps = _common_steps(a, b) if any(found.partial) else None
    return _part(a, found.ids, steps), _part(b, found.ids, steps)


def _contents_differ(a: RunLike, b: RunLike) -> bool:
    from lab.analysis.runs import Run

    if not (isinstance(a, Run) and isinstance(b, Run)) or asked(a) is None or asked(b) is None:
        return False
    return not a.prompts_as_in(b)


def _common_steps(a: RunLike, b: RunLike) -> pd.DataFrame:
    """(replica, step) of the steps that both runs took."""
    keys = ["replica", "step"]
    return a.steps[keys].merge(b.steps[keys], on=keys)


def _part(run: RunLike, ids: frozenset[str], steps: pd.DataFrame | None) -> Part:
    requests = run.requests[run.requests["id"].isin(ids)]
    taken, plans = run.steps, run.plans
    if steps is not None:
        taken = _these(taken, steps)
        plans = _these(plans, steps)
    return Part(run, requests, taken, plans, request_metrics(requests) if ids else dict(run.metrics))


def _these(frame: pd.DataFrame, steps: pd.DataFrame) -> pd.DataFrame:
    keys = ["replica", "step"] if "replica" in frame else ["step"]
    kept: pd.DataFrame = frame.merge(steps[keys].drop_duplicates(), on=keys)  # in the frame's own order
    return kept


def request_metrics(requests: pd.DataFrame) -> dict[str, Any]:
    """Those of `metrics.json` that each request has of its own, under the same keys and by the same formulas.

    Rates and what belongs to the whole engine are left out: a part of the requests has none.
    """
    import pandas as pd

    done = finished(requests)
    scheduled = requests[requests["first_scheduled_ns"].notna()]
    prompt = int(scheduled["prompt_tokens"].sum())
    counts = requests["outcome"].value_counts()
    samples = {
        "ttft_ms": done["ttft_ns"],
        "tpot_ms": tpot_ns(done),
        "itl_ms": pd.Series(gaps_ns(done)),
        "e2e_ms": done["e2e_ns"],
        "queue_ms": done["first_scheduled_ns"] - done["arrival_ns"],
    }
    return {
        "requests": {name: int(counts.get(name, 0)) for name in ("finished", "rejected", "aborted")},
        **{name: _stats(values) for name, values in samples.items()},
        "kv": {"prefix_hit_ratio_tokens": int(scheduled["cached_tokens"].sum()) / prompt if prompt else None},
        "preemptions": int(requests["preemptions"].sum()),
    }


def _stats(values_ns: pd.Series[Any]) -> dict[str, float | None]:
    if values_ns.empty:
        return dict.fromkeys(("mean", "p50", "p90", "p99"))
    ms = values_ns.astype("float64") / 1e6
    return {"mean": float(ms.mean()), **{f"p{rank}": float(ms.quantile(rank / 100)) for rank in (50, 90, 99)}}
