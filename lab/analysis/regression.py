"""Whether a run is worse than a baseline, by more than noise. Observation path.

The statistic. Each run gives one number a metric: for TTFT and E2E the mean over requests of ln(latency /
the baseline's geometric mean for the same request), which pairs requests and so takes the differences between
them out; for other metrics the logarithm of the run's value, or the value itself where it may be 0. Repeats are the
sample: the change is the candidate runs' mean less the baseline runs', with a Student t interval from their
pooled variance (n_a + n_b - 2 degrees of freedom). Where no time was measured there is no noise, and the interval
is the point. One run on each side of a measured comparison says nothing about noise, and no verdict is given.

A change is `worse` or `better` when the interval leaves 0 out and the change is beyond the tolerance; `same`
when the whole interval lies within the tolerance; `unsure` otherwise: more repeats would tell.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from lab.analysis.baseline import METRICS, Baseline, Measured, changes
from lab.errors import RunError

Verdict = Literal["same", "better", "worse", "changed", "unsure", "unknown"]
FAILS = ("worse", "changed")


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison. `change` and its interval are relative (0.1: a tenth more), or in `unit` where there is one."""

    kind: Literal["schedule", "performance", "fidelity"]
    name: str
    verdict: Verdict
    baseline: float | str | None = None
    candidate: float | str | None = None
    change: float | None = None
    low: float | None = None
    high: float | None = None
    unit: str = ""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Regression:
    """Everything that was compared, and what should be known of it."""

    rows: list[Row]
    notes: list[str]

    @property
    def failed(self) -> list[Row]:
        return [row for row in self.rows if row.verdict in FAILS]


def regress(
    baseline: Baseline,
    candidate: Baseline,
    *,
    tolerance: float = 0.02,
    points: float = 1.0,
    confidence: float = 0.99,
) -> Regression:
    """Hold a candidate's runs against a baseline's.

    `tolerance`: relative change of a metric that doesn't matter; `points`: the same for an error in percentage
    points. Raises `RunError` where the two ran different workloads or backends.
    """
    for key in ("workload", "backend"):
        if baseline.about[key] != candidate.about[key]:
            raise RunError(
                f"baseline '{baseline.name}' and the candidate differ in {key} ({baseline.about[key]} and "
                f"{candidate.about[key]}); nothing of them can be compared."
            )
    exact = baseline.exact and candidate.exact
    elsewhere = not exact and baseline.about["machine"] != candidate.about["machine"]
    notes = []
    options = changes(baseline.config, candidate.config)
    if options:
        notes.append(f"The configurations differ in {', '.join(options)}.")
    if elsewhere:
        notes.append(
            f"The baseline was measured on another machine ({baseline.about['machine']}): times aren't compared."
        )
    test = _Test(0.0 if exact else confidence, len(baseline.runs), len(candidate.runs))
    rows = [_schedule(baseline, candidate)]
    if not elsewhere:
        rows += _paired(baseline, candidate, test, tolerance)
        rows += _metrics(baseline, candidate, test, tolerance)
    rows += _fidelity(baseline, candidate, test, points)
    if any(row.verdict == "unknown" and row.kind != "schedule" for row in rows):
        notes.append("One run on each side: nothing is known of the noise. Give repeats.")
    return Regression(rows, notes)


@dataclass(frozen=True, slots=True)
class _Test:
    """Student's t for two groups of runs; `confidence` 0: numbers without noise."""

    confidence: float
    before: int
    after: int

    def interval(self, a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float] | None:
        """(change, low, high) of mean(b) - mean(a); None where the noise isn't known."""
        change = fmean(b) - fmean(a)
        if not self.confidence:
            return change, change, change
        degrees = len(a) + len(b) - 2
        if degrees < 1:
            return None
        from scipy import stats

        squares = sum((x - fmean(group)) ** 2 for group in (a, b) for x in group)
        error = math.sqrt(squares / degrees * (1 / len(a) + 1 / len(b)))
        half = float(stats.t.ppf((1 + self.confidence) / 2, degrees)) * error
        return change, change - half, change + half


def _verdict(change: float, low: float, high: float, worse: int, tolerance: float) -> Verdict:
    if -tolerance <= low and high <= tolerance:
        return "same"
    if low * high > 0 and abs(change) > tolerance:
        return "worse" if change * worse > 0 else "better"
    return "unsure"


def _row(
    kind: Literal["performance", "fidelity"],
    name: str,
    groups: tuple[Sequence[float], Sequence[float]],
    shown: tuple[float, float],
    test: _Test,
    worse: int,
    tolerance: float,
    unit: str = "",
) -> Row:
    found = test.interval(*groups)
    if found is None:
        return Row(kind, name, "unknown", *shown, unit=unit)
    change, low, high = found if unit else tuple(math.expm1(value) for value in found)
    return Row(kind, name, _verdict(change, low, high, worse, tolerance), *shown, change, low, high, unit)


def _paired(a: Baseline, b: Baseline, test: _Test, tolerance: float) -> list[Row]:
    rows = []
    for what in ("ttft", "e2e"):
        runs = [run.latencies_ns[what] for run in (*a.runs, *b.runs)]
        ids = [name for name in runs[0] if all(run.get(name, 0) > 0 for run in runs)]
        if not ids:
            continue
        logs = [[math.log(run[name]) for name in ids] for run in runs]
        middle = [fmean(column) for column in zip(*logs[: len(a.runs)], strict=True)]
        values = [fmean(x - m for x, m in zip(row, middle, strict=True)) for row in logs]
        shown = tuple(
            math.exp(fmean(map(fmean, part))) / 1e6 for part in (logs[: len(a.runs)], logs[len(a.runs) :])
        )
        groups = values[: len(a.runs)], values[len(a.runs) :]
        name = f"{what}, {len(ids)} paired requests, ms"
        rows.append(_row("performance", name, groups, (shown[0], shown[1]), test, +1, tolerance))
    return rows


def _metrics(a: Baseline, b: Baseline, test: _Test, tolerance: float) -> list[Row]:
    rows = []
    for key, worse in METRICS.items():
        groups = [[run.metrics[key] for run in side.runs if key in run.metrics] for side in (a, b)]
        if not all(groups):
            continue
        shown = fmean(groups[0]), fmean(groups[1])
        positive = all(value > 0 for group in groups for value in group)
        if positive:
            groups = [[math.log(value) for value in group] for group in groups]
        unit = "" if positive else "as counted"
        rows.append(_row("performance", key, (groups[0], groups[1]), shown, test, worse, tolerance, unit))
    return rows


def _fidelity(a: Baseline, b: Baseline, test: _Test, points: float) -> list[Row]:
    rows = []
    keys = [key for key in a.runs[0].errors_pct if all(key in run.errors_pct for run in (*a.runs, *b.runs))]
    for key in keys:
        groups = [[abs(run.errors_pct[key]) for run in side.runs] for side in (a, b)]
        shown = fmean(groups[0]), fmean(groups[1])
        rows.append(
            _row("fidelity", f"error of {key}", (groups[0], groups[1]), shown, test, +1, points, "points")
        )
    held = [run.parity for run in a.runs], [run.parity for run in b.runs]
    if all(held[0]):
        lost = not all(held[1])
        rows.append(
            Row("fidelity", "parity", "changed" if lost else "same", "holds", "lost" if lost else "holds")
        )
    return rows


def _schedule(a: Baseline, b: Baseline) -> Row:
    digests = [{run.digest for run in side.runs} for side in (a, b)]
    before, after = (
        next(iter(found))[:12] if len(found) == 1 else f"{len(found)} different" for found in digests
    )
    other = next((run for run in b.runs if run.digest not in digests[0]), None)
    verdict: Verdict = "changed"
    if other is None:
        verdict, note = "same", ""
    elif not a.exact and (len(a.runs) == 1 or len(digests[0]) > 1):
        verdict = "unknown"
        note = "not compared: decisions depend on measured times, and no repeats say they agree all the same"
    else:
        note = _parted(a.runs[0], other)
    return Row("schedule", "digest", verdict, before, after, note=note)


def _parted(a: Measured, b: Measured) -> str:
    """Between which marked steps two schedules part."""
    last = -1
    for step in sorted(map(int, a.marks.keys() & b.marks.keys())):
        if a.marks[str(step)] != b.marks[str(step)]:
            return f"the first other decision is in one of the steps {last + 1} to {step}"
        last = step
    return f"no other decision up to step {last}; they have {a.steps} and {b.steps} steps"
