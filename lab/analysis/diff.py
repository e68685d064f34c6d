"""Two runs laid over each other: where they part, by how much, and why. Observation path.

`a` is the reference (the real run, the older commit, the baseline), `b` the candidate. Every difference is
b - a: positive means the candidate is slower or larger.

Attribution is exact. A request's parts tile its life, so the difference of its latency is the sum of the
differences of its parts; the residual is 0 ns unless a run broke that rule, and then it is shown.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.analysis import distances as distance
from lab.analysis.aligned import Aligned, align
from lab.analysis.attribution import attribute, per_request, step_phases
from lab.analysis.clocks import Skew, skews
from lab.analysis.decisions import compare_decisions
from lab.analysis.distributions import matched, percentiles, spread, summary
from lab.analysis.files import write_atomic
from lab.analysis.frames import PARTS, RunLike, backend, finished, intervals, leaves, scalars, sides
from lab.analysis.noise import noise_floor
from lab.analysis.parts import waits
from lab.analysis.residuals import residuals, terms
from lab.analysis.scope import Scope, cut, scope
from lab.errors import ConfigError

if TYPE_CHECKING:
    import pandas as pd

HEADLINES = (
    "e2e_ms.mean",
    "e2e_ms.p99",
    "ttft_ms.mean",
    "ttft_ms.p99",
    "tpot_ms.mean",
    "throughput.output_tokens_per_s",
)
"""Metrics whose error is split into duration and decision."""

ENOUGH_STEPS = 20
"""So many steps of the same work that took exactly the same time on both sides show one cost model."""

_VOLATILE = ("run.", "backend")
"""Where a run lies and what executes it: differ by design, and stand in `keys` and `labels`."""


@dataclass(frozen=True, repr=False)
class Diff:
    """What `diff` found; its repr is the verdict.

    `keys` name the sides in the mappings (`real`, `sim` or `a`, `b`), `labels` in print.
    """

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
    """One row a matched request (index id): per latency and part, nanoseconds of both sides and the difference."""
    waits: pd.DataFrame
    """One row a waiting interval, matched by request, cause and visit."""
    aligned: Aligned
    """Which step belongs to which."""
    attribution: dict[str, Any]
    """`e2e` and `ttft` over the parts of a request, `steps` over the phases of a step; signed ms, b - a."""
    percentiles: pd.DataFrame
    """Each latency percentile by percentile, with its band (`lab.analysis.distributions`)."""
    spread: dict[str, dict[str, float]]
    """Several runs a side: each metric's error (percent) over the pairs: `mean`, and the 95 % interval's ends."""
    residuals: pd.DataFrame
    """One row a pair of steps that did the same work: shape and durations (`lab.analysis.residuals`)."""
    terms: pd.DataFrame
    """Which fact about a batch each phase's residual is proportional to."""
    counterfactual: dict[str, dict[str, float]] | None
    """Per headline metric: total = duration + decision. None when nothing was re-simulated, or with other rules than
    b's."""
    parity: bool | None
    """Whether replaying a's durations gave a's plan digests; None when not tried."""
    replay_divergence: dict[str, Any] | None
    """Where b's rules part from a's decisions although the durations are a's: no clock is to blame there."""
    distances: dict[str, Any]
    noise: dict[str, Any] | None
    """How far repeats of the reference lie apart, and each distance as a multiple; None without repeats."""
    measured: bool
    """Whether a side was measured, so that chance had a part in it."""
    configuration: dict[str, dict[str, Any]]
    """Options that differ between the two runs."""
    clocks: tuple[list[Skew], list[Skew]]
    """Of a side that several ranks computed: each rank's clock against rank 0's."""

    @property
    def moved(self) -> list[str]:
        """The parts of a request worth showing: queue, prefill and decode, and any other with a difference."""
        return [
            part
            for part in PARTS
            if part in ("queue", "prefill", "decode") or self.attribution["e2e"]["stages"][part]["share"]
        ]

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        """Every table as a DataFrame by name, as `--out` writes them. Columns end in their unit (`_ns`, `_ms`)."""
        from lab.analysis.diff_tables import tables

        return tables(self)

    def __repr__(self) -> str:
        from lab.analysis.verdict import verdict

        return "\n".join(
            [f"Diff({' -> '.join(self.labels)})", *(f"- {sentence}" for sentence in verdict(self))]
        )

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
            "steps": self.aligned.summary(),
            "percentiles": summary(self.percentiles),
            "spread": self.spread,
            "terms": self.terms.to_dict("records"),
            "attribution": self.attribution,
            "counterfactual": self.counterfactual,
            "replay": {"parity": self.parity, "first_divergence": self.replay_divergence},
            "distances": self.distances,
            "noise": self.noise,
            "configuration": self.configuration,
            "clocks": {
                key: [skew._asdict() for skew in side]
                for key, side in zip(self.keys, self.clocks, strict=True)
            },
        }
        plain: dict[str, Any] = _plain(tree)
        return plain

    def write(self, path: str | Path) -> None:
        """Write diff.json atomically. Raises `RunError` when that can't be done."""
        write_atomic(Path(path), json.dumps(self.to_json(), indent=2, sort_keys=True, allow_nan=False) + "\n")


def diff(
    a: RunLike | Sequence[RunLike],
    b: RunLike | Sequence[RunLike],
    resimulated: RunLike | None = None,
    parity: bool | None = None,
    *,
    exchanged: RunLike | None = None,
    noise: Sequence[RunLike] = (),
) -> Diff:
    """Compare run `b` with the reference `a`.

    `resimulated` is b's configuration and policy driven with a's step durations. It splits each headline
    error in two: what stays when the durations are right is decision error, what goes is duration error.
    It also answers `parity` (equal decisions under equal durations), unless the caller knows already.
    `exchanged` is the converse, a's configuration and policy with b's durations: with both, the split is the mean
    over the two orders.

    Either side may be several runs, of seeds or repeats, the i-th of one belonging to the i-th of the other: the
    first pair is taken apart, and all of them give the bands. `noise` are repeats of the (first) reference, which
    say how far two such runs lie apart by chance.

    Of partial runs and of different workloads only what they have in common is compared, and nothing is made
    of `resimulated`: it ran other work than the reference.
    """
    many_a, many_b = several(a), several(b)
    if len(many_a) != len(many_b):
        raise ConfigError(
            f"{len(many_a)} runs are to be compared with {len(many_b)}; expected as many on both sides: the first "
            "of one belongs to the first of the other, and so on."
        )
    first_a, first_b = many_a[0], many_b[0]
    keys, labels = sides(first_a, first_b)
    full, found = (first_a, first_b), scope(first_a, first_b)
    left, right = cut(first_a, first_b, found)
    if not found.whole:
        resimulated = exchanged = parity = None
    done = finished(left.requests), finished(right.requests)
    ids = done[0].index.intersection(done[1].index)
    if found.ids is not None:
        ids = ids[ids.isin(found.ids)]
    both = done[0].loc[ids], done[1].loc[ids]
    pieces = intervals(left.requests), intervals(right.requests)
    requests = per_request(keys, (left, right), both, pieces)
    replayed = None if resimulated is None else compare_decisions(left, resimulated, keys)
    if replayed is not None and parity is None:
        parity = replayed["first_divergent_step"] is None
    aligned = align(left, right)
    decisions = compare_decisions(left, right, keys)
    parted = decisions["first_divergence"]
    if parity and parted is not None and parted["cause"] == "rule":
        resimulated = exchanged = (
            None  # b's rules aren't those of its configuration: they were never run again
        )
    steps = residuals(left, right, aligned)
    configuration = _configuration(left.config, right.config, keys)
    alike = _same_durations(full, steps, configuration)
    distances = distance.summary(*both, *pieces) | {"decisions": distance.of_decisions(decisions, aligned)}
    pairs = [both, *(matched(x.requests, y.requests) for x, y in zip(many_a[1:], many_b[1:], strict=True))]
    return Diff(
        keys=keys,
        labels=labels,
        partial=found.partial,
        scope=found,
        metrics=_metrics(left.metrics, right.metrics, keys),
        decisions=decisions,
        alignment=_alignment(*((left, right) if any(found.partial) else full), ids, keys),
        requests=requests,
        waits=waits(left, right, ids),
        aligned=aligned,
        attribution={
            "e2e": attribute(requests, "e2e"),
            "ttft": attribute(requests, "ttft"),
            "steps": step_phases(left, right, keys),
        },
        percentiles=percentiles(pairs),
        spread=_spread(many_a, many_b),
        residuals=steps,
        terms=terms(steps),
        counterfactual=None
        if resimulated is None
        else _counterfactual(left, right, resimulated, exchanged, alike),
        parity=parity,
        replay_divergence=None if replayed is None else replayed["first_divergence"],
        distances=distances,
        noise=noise_floor([first_a, *noise], distances) if noise else None,
        measured=any(backend(run) == "real" for run in full),
        configuration=configuration,
        clocks=(skews(first_a), skews(first_b)),
    )


def several(runs: RunLike | Sequence[RunLike]) -> list[RunLike]:
    """One run or some, as a list. Raises `ConfigError` where there is none."""
    out = list(runs) if isinstance(runs, Sequence) else [runs]
    if not out:
        raise ConfigError("there is no run to compare; expected one or more on each side.")
    return out


def _spread(a: Sequence[RunLike], b: Sequence[RunLike]) -> dict[str, dict[str, float]]:
    """For each metric the mean error over the pairs of runs, percent of the reference, with its 95 % interval."""
    errors = []
    for left, right in zip(a, b, strict=True):
        table = _metrics(left.metrics, right.metrics, ("a", "b"))
        errors.append({k: c["error_pct"] for k, c in table.items() if c["error_pct"] is not None})
    return spread(errors)


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


def _same_durations(
    runs: tuple[RunLike, RunLike], steps: pd.DataFrame, configuration: Mapping[str, Any]
) -> bool:
    """Whether both runs were simulated with one cost model: as configured, and in every step that did the same work."""
    told = any(key.partition(".")[0] in ("cost", "model", "mechanisms") for key in configuration)
    simulated = all(backend(run) == "sim" for run in runs)
    return simulated and not told and len(steps) >= ENOUGH_STEPS and not steps["residual_ns"].any()


def _counterfactual(
    a: RunLike, b: RunLike, ab: RunLike, ba: RunLike | None, alike: bool
) -> dict[str, dict[str, float]]:
    """`ab` is b's decisions with a's durations, `ba` a's decisions with b's.

    Two factors, two orders of changing them; each factor gets the mean of what it does first and last (Shapley).
    Without `ba`, one order: durations are put right first, and what remains is decision. `interaction` is how far
    the two orders disagree: the part of the difference that takes both to change.

    Of two runs with one cost model (`alike`) all of it is decision: after a divergence a re-simulation borrows
    durations from steps of similar shape, and what that costs is no error of either run.
    """
    left, right, mixed = scalars(a.metrics), scalars(b.metrics), scalars(ab.metrics)
    other = None if ba is None else scalars(ba.metrics)
    split = {}
    for name in HEADLINES:
        if not (name in left and name in right and name in mixed):
            continue
        m_a, m_b, m_ab = left[name], right[name], mixed[name]
        cell = {"total": m_b - m_a, "duration": m_b - m_ab, "decision": m_ab - m_a}
        if alike:
            cell |= {"duration": 0.0, "decision": m_b - m_a}
        elif other is not None and name in other:
            m_ba = other[name]
            cell |= {
                "duration": ((m_b - m_ab) + (m_ba - m_a)) / 2,
                "decision": ((m_ab - m_a) + (m_b - m_ba)) / 2,
                "interaction": (m_b - m_ab) - (m_ba - m_a),
            }
        split[name] = cell
    return split


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
