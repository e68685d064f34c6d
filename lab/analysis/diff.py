"""Two runs laid over each other: where they part, by how much, and why. Observation path.

`a` is the reference (the real run, the older commit, the baseline), `b` the candidate. Every difference is
b - a: positive means the candidate is slower or larger.

Attribution is exact. A request's parts tile its life, so the difference of its latency is the sum of the
differences of its parts; the residual is 0 ns unless a run broke that rule, and then it is shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lab.analysis import distances as distance
from lab.analysis.aligned import align
from lab.analysis.attribution import attribute, per_request, step_phases
from lab.analysis.clocks import skews
from lab.analysis.counterfactual import counterfactual, same_durations
from lab.analysis.decisions import compare_decisions
from lab.analysis.difference import Diff
from lab.analysis.distributions import matched, percentiles, spread
from lab.analysis.frames import RunLike, backend, finished, intervals, leaves, scalars, sides
from lab.analysis.noise import noise_floor
from lab.analysis.parts import waits
from lab.analysis.residuals import residuals, terms
from lab.analysis.scope import cut, scope
from lab.errors import ConfigError

if TYPE_CHECKING:
    import pandas as pd

_VOLATILE = ("run.", "backend")
"""Where a run lies and what executes it: differ by design, and stand in `keys` and `labels`."""


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
    alike = same_durations(full, steps, configuration)
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
        else counterfactual(left, right, resimulated, exchanged, alike),
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


def _configuration(
    a: Mapping[str, Any], b: Mapping[str, Any], keys: tuple[str, str]
) -> dict[str, dict[str, Any]]:
    left, right = dict(leaves(a)), dict(leaves(b))
    return {
        name: {keys[0]: left.get(name), keys[1]: right.get(name)}
        for name in sorted(set(left) | set(right))
        if left.get(name) != right.get(name) and not name.startswith(_VOLATILE)
    }
