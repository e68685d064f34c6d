"""Two runs laid over each other: where they part, by how much, and why. Observation path.

`a` is the reference (the real run, the older commit, the baseline), `b` the candidate. Every difference is
b - a: positive means the candidate is slower or larger.

Attribution is exact. A request's stages tile its life, so the difference of its latency is the sum of the
differences of its stages; the residual is 0 ns unless a run broke that rule, and then it is shown.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.analysis import distances as distance
from lab.analysis.decisions import compare_decisions
from lab.analysis.files import write_atomic
from lab.analysis.frames import (
    STAGES,
    STEP_PHASES,
    RunLike,
    finished,
    intervals,
    leaves,
    scalars,
    sides,
    stage_times,
)
from lab.analysis.scope import Scope, cut, scope

if TYPE_CHECKING:
    import pandas as pd

HEADLINES = ("e2e_ms.mean", "ttft_ms.mean", "tpot_ms.mean", "throughput.output_tokens_per_s")
"""Metrics whose error is split into duration and decision."""

_VOLATILE = ("run.", "backend")
"""Where a run lies and what executes it: differ by design, and stand in `keys` and `labels`."""


@dataclass(frozen=True)
class Diff:
    """What `diff` found. `keys` name the sides in the mappings (`real`, `sim` or `a`, `b`), `labels` in print."""

    keys: tuple[str, str]
    labels: tuple[str, str]
    partial: tuple[bool, bool]
    scope: Scope
    """What of the two runs is compared, where it isn't all."""
    metrics: dict[str, dict[str, float | None]]
    """Each scalar of metrics.json: both sides' values and `error_pct` (b against a; None where undefined)."""
    decisions: dict[str, Any]
    alignment: dict[str, Any]
    """How many requests were matched by id, and what could not be."""
    requests: pd.DataFrame
    """One row a matched request (index id): per latency and stage, nanoseconds of both sides and the difference."""
    attribution: dict[str, Any]
    """`e2e` and `ttft` over the stages of a request, `steps` over the phases of a step; signed ms, b - a."""
    counterfactual: dict[str, dict[str, float]] | None
    """Per headline metric: total = duration + decision. None when nothing was re-simulated."""
    parity: bool | None
    """Whether replaying a's durations gave a's plan digests; None when not tried."""
    distances: dict[str, Any]
    configuration: dict[str, dict[str, Any]]
    """Options that differ between the two runs."""

    def to_json(self) -> dict[str, Any]:
        """The content of diff.json: plain values, sorted keys, null where a number is undefined."""
        tree = {
            "schema": 1,
            "sides": dict(zip(("a", "b"), self.labels, strict=True)),
            "partial": dict(zip(self.keys, self.partial, strict=True)),
            "scope": self.scope.to_json(),
            "metrics": self.metrics,
            "decisions": self.decisions,
            "requests": self.alignment,
            "attribution": self.attribution,
            "counterfactual": self.counterfactual,
            "replay": {"parity": self.parity},
            "distances": self.distances,
            "configuration": self.configuration,
        }
        plain: dict[str, Any] = _plain(tree)
        return plain

    def write(self, path: str | Path) -> None:
        """Write diff.json atomically. Raises `RunError` when that can't be done."""
        write_atomic(Path(path), json.dumps(self.to_json(), indent=2, sort_keys=True, allow_nan=False) + "\n")


def diff(a: RunLike, b: RunLike, resimulated: RunLike | None = None, parity: bool | None = None) -> Diff:
    """Compare run `b` with the reference `a`.

    `resimulated` is b's configuration and policy driven with a's step durations. It splits each headline
    error in two: what stays when the durations are right is decision error, what goes is duration error.
    It also answers `parity` (equal decisions under equal durations), unless the caller knows already.

    Of partial runs and of different workloads only what they have in common is compared, and nothing is made
    of `resimulated`: it ran other work than the reference.
    """
    keys, labels = sides(a, b)
    whole, found = (a, b), scope(a, b)
    a, b = cut(a, b, found)
    if not found.whole:
        resimulated = parity = None
    done = finished(a.requests), finished(b.requests)
    ids = done[0].index.intersection(done[1].index)
    if found.ids is not None:
        ids = ids[ids.isin(found.ids)]
    matched_a, matched_b = (frame.loc[ids] for frame in done)
    pieces = intervals(a.requests), intervals(b.requests)
    requests = _per_request(keys, (matched_a, matched_b), pieces)
    if resimulated is not None and parity is None:
        parity = compare_decisions(a, resimulated, ("a", "b"))["first_divergent_step"] is None
    return Diff(
        keys=keys,
        labels=labels,
        partial=found.partial,
        scope=found,
        metrics=_metrics(a.metrics, b.metrics, keys),
        decisions=compare_decisions(a, b, keys),
        alignment=_alignment(*((a, b) if any(found.partial) else whole), ids, keys),
        requests=requests,
        attribution={
            "e2e": _attribute(requests, "e2e"),
            "ttft": _attribute(requests, "ttft"),
            "steps": _step_phases(a.steps, b.steps, keys),
        },
        counterfactual=None if resimulated is None else _counterfactual(a, b, resimulated),
        parity=parity,
        distances=distance.summary(matched_a, matched_b, *pieces),
        configuration=_configuration(a.config, b.config, keys),
    )


def _metrics(
    a: Mapping[str, Any], b: Mapping[str, Any], keys: tuple[str, str]
) -> dict[str, dict[str, float | None]]:
    left, right = scalars(a), scalars(b)
    table: dict[str, dict[str, float | None]] = {}
    for name in sorted(set(left) | set(right)):
        x, y = left.get(name), right.get(name)
        error = None
        if x is not None and y is not None:
            error = 100.0 * (y - x) / abs(x) if x else 0.0 if y == x else None
        table[name] = {keys[0]: x, keys[1]: y, "error_pct": error}
    return table


def _alignment(a: RunLike, b: RunLike, ids: pd.Index[Any], keys: tuple[str, str]) -> dict[str, Any]:
    """What was matched; and ids on one side only, unlike outcomes and unlike work, which could not be."""
    left, right = (
        run.requests.drop_duplicates("id").set_index("id", drop=False).sort_index() for run in (a, b)
    )
    both = left.index.intersection(right.index)
    x, y = left.loc[both], right.loc[both]
    unlike = x["outcome"].to_numpy() != y["outcome"].to_numpy()
    work = (x["prompt_tokens"].to_numpy() != y["prompt_tokens"].to_numpy()) | (
        x["arrival_ns"].to_numpy() != y["arrival_ns"].to_numpy()
    )
    lengths = x["output_tokens"].to_numpy() != y["output_tokens"].to_numpy()
    return {
        "matched": len(ids),
        "only": {
            keys[0]: [str(i) for i in left.index.difference(right.index)],
            keys[1]: [str(i) for i in right.index.difference(left.index)],
        },
        "unlike_outcome": [str(i) for i in both[unlike]],
        "unlike_work": [str(i) for i in both[work | (lengths & ~unlike)]],
        "unfinished_on_both": int(
            ((x["outcome"] != "finished").to_numpy() & (y["outcome"] != "finished").to_numpy()).sum()
        ),
    }


def _per_request(
    keys: tuple[str, str], done: tuple[pd.DataFrame, pd.DataFrame], pieces: tuple[pd.DataFrame, pd.DataFrame]
) -> pd.DataFrame:
    """Columns `<what>_ns_<side>` and `<what>_delta_ns`, for e2e, ttft and each stage of either."""
    import pandas as pd

    columns: dict[str, pd.Series[int]] = {}
    for latency, until in (("e2e", "last_token_ns"), ("ttft", "first_token_ns")):
        tables = [
            stage_times(frame, piece, until).assign(total=frame[f"{latency}_ns"])
            for frame, piece in zip(done, pieces, strict=True)
        ]
        for stage in ("total", *STAGES):
            what = latency if stage == "total" else f"{latency}_{stage}"
            for key, table in zip(keys, tables, strict=True):
                columns[f"{what}_ns_{key}"] = table[stage]
            columns[f"{what}_delta_ns"] = tables[1][stage] - tables[0][stage]
    context = done[0][["arrival_ns", "prompt_tokens", "output_tokens"]]
    return pd.concat([context, pd.DataFrame(columns, index=done[0].index)], axis=1)


def _attribute(requests: pd.DataFrame, latency: str) -> dict[str, Any]:
    """Signed ms by stage, and B_k: a stage's share of the absolute differences (ecosystem: Scalasca's severity)."""
    deltas = {stage: requests[f"{latency}_{stage}_delta_ns"] for stage in STAGES}
    absolute = {stage: int(delta.abs().sum()) for stage, delta in deltas.items()}
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
            stage: {
                "total_ms": int(delta.sum()) / 1e6,
                "mean_ms": int(delta.sum()) / 1e6 / count if count else 0.0,
                "share": absolute[stage] / moved if moved else 0.0,
            }
            for stage, delta in deltas.items()
        },
    }


def _step_phases(a: pd.DataFrame, b: pd.DataFrame, keys: tuple[str, str]) -> dict[str, Any]:
    """Where the run's span went on each side: the phases of its steps, and the idle time between them."""

    def spent(steps: pd.DataFrame) -> dict[str, int]:
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


def _counterfactual(a: RunLike, b: RunLike, resimulated: RunLike) -> dict[str, dict[str, float]]:
    left, right, between = scalars(a.metrics), scalars(b.metrics), scalars(resimulated.metrics)
    return {
        name: {
            "total": right[name] - left[name],
            "duration": right[name] - between[name],
            "decision": between[name] - left[name],
        }
        for name in HEADLINES
        if name in left and name in right and name in between
    }


def _configuration(
    a: Mapping[str, Any], b: Mapping[str, Any], keys: tuple[str, str]
) -> dict[str, dict[str, Any]]:
    left, right = dict(leaves(a)), dict(leaves(b))
    return {
        name: {keys[0]: left.get(name), keys[1]: right.get(name)}
        for name in sorted(set(left) | set(right))
        if left.get(name) != right.get(name) and not name.startswith(_VOLATILE)
    }


def _plain(value: Any) -> Any:
    """JSON's own types: numpy scalars unwrapped, what is not finite as None, keys in order."""
    if isinstance(value, Mapping):
        return {str(key): _plain(value[key]) for key in sorted(value, key=str)}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "item") and not isinstance(value, (str, bytes)):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, (str, int, bool)) or value is None else str(value)
