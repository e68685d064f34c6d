"""Where two runs' decisions part, and what each side saw and did there. Observation path.

Plan digests are chained, so equal digests at a step mean equal decisions up to it. Up to the first
difference both control planes were in the same state except for the clock; so what differs there is the
clock (earlier durations), what had arrived by then, or the rule itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lab.analysis.around import limits, neighbours, queue_and_running, reasons
from lab.analysis.frames import RunLike, items, table_of
from lab.analysis.kept import Kept

if TYPE_CHECKING:
    import pandas as pd

_STATE = ("running", "waiting", "blocks_free", "blocks_cached", "blocks_held", "evicted")

AT_A_LIMIT = 3
"""So many steps with exactly the most of a run show a limit."""

MOST_REASONS = 8
"""Requests left out that are accounted for, on each side."""


def compare_decisions(a: RunLike, b: RunLike, keys: tuple[str, str]) -> dict[str, Any]:
    """First divergent step (None when equal), steps of each, common prefix ratio, and the divergence in detail."""
    common, longest, first = 0, 0, None
    steps = [table_of(run, "steps", ["replica", "step", "digest", "start_ns"]) for run in (a, b)]
    chains = _chains(steps[0]), _chains(steps[1])
    for replica in sorted(set(chains[0]) | set(chains[1])):
        left, right = (chain.get(replica, []) for chain in chains)
        equal = next((i for i, (x, y) in enumerate(zip(left, right, strict=False)) if x[:2] != y[:2]), None)
        if equal is None:
            equal = min(len(left), len(right))
        common += equal
        longest += max(len(left), len(right))
        if equal < max(len(left), len(right)):
            step, _, now = (left if equal < len(left) else right)[equal]
            first = min(first, (now, step, replica)) if first else (now, step, replica)
    return {
        "first_divergent_step": None if first is None else first[1],
        "replicas": len(set(chains[0]) | set(chains[1])),
        "steps": {keys[0]: len(steps[0]), keys[1]: len(steps[1])},
        "common_prefix_ratio": common / longest if longest else 1.0,
        "first_divergence": None if first is None else _describe(a, b, keys, first[1], first[2]),
    }


def _chains(steps: pd.DataFrame) -> dict[int, list[tuple[int, str, int]]]:
    """(step, digest, start) of each replica, in order."""
    chains: dict[int, list[tuple[int, str, int]]] = {}
    ordered = steps.sort_values(["replica", "step"])
    columns = (ordered[column] for column in ("replica", "step", "digest", "start_ns"))
    for replica, step, digest, start in zip(*columns, strict=True):
        chains.setdefault(int(replica), []).append((int(step), str(digest), int(start)))
    return chains


def _describe(a: RunLike, b: RunLike, keys: tuple[str, str], step: int, replica: int) -> dict[str, Any]:
    left, right = _step(a, step, replica), _step(b, step, replica)
    detail: dict[str, Any] = {"step": step, "replica": replica, keys[0]: left, keys[1]: right}
    detail["around"] = {key: neighbours(run, step, replica) for key, run in zip(keys, (a, b), strict=True)}
    detail["reasons"] = []
    if left is None or right is None:
        return detail | {"cause": "ended", "difference": None, "arrived_only": {keys[0]: [], keys[1]: []}}
    works = [{item["request"]: item for item in side["work"]} for side in (left, right)]
    both = [request for request in works[0] if request in works[1]]
    amount = ("start", "tokens", "samples")
    difference: dict[str, Any] = {
        "work": _only(list(works[0]), list(works[1]), keys),
        "changed": {
            request: {key: work[request]["tokens"] for key, work in zip(keys, works, strict=True)}
            for request in both
            if any(works[0][request][field] != works[1][request][field] for field in amount)
        },
        "blocks": [request for request in both if works[0][request]["blocks"] != works[1][request]["blocks"]],
        "order": both != [request for request in works[1] if request in works[0]],
    }
    for field in ("admitted", "preempted", "rejected"):
        difference[field] = _only(left[field], right[field], keys)
    for seen, run, key, missing in (
        (left, a, *_other(keys, 0, difference)),
        (right, b, *_other(keys, 1, difference)),
    ):
        detail["reasons"] += reasons(run, seen, missing, key)
    arrived_only = _only(_arrived(a, left["now_ns"], replica), _arrived(b, right["now_ns"], replica), keys)
    same_clock = left["now_ns"] == right["now_ns"]
    cause = "arrivals" if any(arrived_only.values()) else "rule" if same_clock else "clock"
    return detail | {"cause": cause, "difference": difference, "arrived_only": arrived_only}


def _other(keys: tuple[str, str], side: int, difference: dict[str, Any]) -> tuple[str, list[str]]:
    """A side's key, and the first requests that the other side worked on and it did not."""
    return keys[side], difference["work"][keys[1 - side]][:MOST_REASONS]


def _step(run: RunLike, step: int, replica: int) -> dict[str, Any] | None:
    """What one side saw and did at a step; None where the run has no such step."""
    steps = run.steps[(run.steps["step"] == step) & (run.steps["replica"] == replica)]
    if steps.empty:
        return None
    row = steps.iloc[0]
    seen: dict[str, Any] = {"now_ns": int(row["start_ns"])} | {name: int(row[name]) for name in _STATE}
    seen["queue"], seen["running_set"] = queue_and_running(run, seen["now_ns"], replica)
    seen["limits"] = limits(run)
    seen["most_tokens"], seen["most_running"] = (
        _most(counts)
        for counts in (run.steps["prefill_tokens"] + run.steps["decode_tokens"], run.steps["running"])
    )
    plans = _plan(run, step, replica)
    if plans.empty:
        return seen | {"work": [], "admitted": [], "preempted": [], "rejected": []}
    plan = plans.iloc[0]
    columns = (items(plan[column]) for column in ("request", "start", "tokens", "samples", "blocks"))
    seen["work"] = [
        {
            "request": str(request),
            "start": int(start),
            "tokens": int(tokens),
            "samples": bool(samples),
            "blocks": [int(block) for block in items(blocks)],
        }
        for request, start, tokens, samples, blocks in zip(*columns, strict=True)
    ]
    for field in ("admitted", "preempted", "rejected"):
        seen[field] = [str(request) for request in items(plan[field])]
    return seen


def _most(counts: pd.Series[int]) -> int | None:
    """What no step went beyond and some reached: a limit, whatever the configuration says. None if few reached it."""
    top = int(counts.max())
    return top if int((counts == top).sum()) >= AT_A_LIMIT else None


def _plan(run: RunLike, step: int, replica: int) -> pd.DataFrame:
    """The row of `plans`, or none."""
    if isinstance(run, Kept):
        return run.plan(step, replica)
    recorded = table_of(run, "plans", ["step", "replica"])
    plans = recorded[recorded["step"] == step]
    return plans[plans["replica"] == replica] if "replica" in plans else plans


def _only(left: list[str], right: list[str], keys: tuple[str, str]) -> dict[str, list[str]]:
    """Names that stand on one side alone, in that side's order."""
    in_left, in_right = set(left), set(right)
    return {
        keys[0]: [name for name in left if name not in in_right],
        keys[1]: [name for name in right if name not in in_left],
    }


def _arrived(run: RunLike, now: int, replica: int) -> list[str]:
    """The requests that had come to this replica, or were turned away at the gateway (replica -1)."""
    requests = getattr(run, "whole", run).requests  # also those that aren't compared
    there = (requests["arrival_ns"] <= now) & requests["replica"].isin([replica, -1])
    return sorted(str(request) for request in requests.loc[there, "id"])
