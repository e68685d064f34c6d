"""The results of a study as one tidy table: a row a run, its keys first, then every number of `metrics.json`.

Beside the metrics of each run stand those that need a second run: `percent_of_srpt`, mean E2E of `srpt` with true
lengths over the policy's (100: as good; a bound for one server, only a mark for batches); for evictors
`percent_of_belady` = (h - h_fifo) / (h_belady - h_fifo) and `part_of_belady` = h / h_belady, h being prefix hits
a block access. Observation path.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from lab.analysis.fairness import service
from lab.analysis.frames import scalars
from lab.analysis.runs import Run, load
from lab.analysis.table import number
from lab.errors import RunError

if TYPE_CHECKING:
    import pandas as pd

    from lab.control.observer import FleetEvent
    from lab.studies import StudyRun

KEYS = ("study", "workload", "name")
HITS = "kv.prefix_hit_ratio_blocks"
E2E = "e2e_ms.mean"

LATENCY_COLUMNS = {
    "name": "",
    "ttft_ms.p50": "TTFT p50",
    "ttft_ms.p99": "p99",
    "tpot_ms.p50": "TPOT p50",
    "tpot_ms.p99": "p99",
    "itl_ms.p99": "ITL p99",
    "e2e_ms.mean": "E2E mean",
    "goodput.attainment": "SLOs met",
    "preemptions": "preempted",
    "throughput.output_tokens_per_s": "tokens/s",
    "energy.kwh_per_million_output_tokens": "kWh/M",
    "cost.usd_per_million_output_tokens": "USD/M",
    "fairness.difference_max": "D max",
    "fairness.jain": "Jain",
    "percent_of_srpt": "% of SRPT",
}
"""Columns of the printed table, in ms."""


def collect(runs: Sequence[StudyRun]) -> pd.DataFrame:
    """One row a run, in the order of `runs`."""
    import pandas as pd

    rows = []
    for run in runs:
        loaded = load(run.path)
        row: dict[str, Any] = {"study": run.study, "workload": run.workload, "name": run.name}
        row |= {**dict(run.axes), **scalars(loaded.metrics)}
        if (run.path / "requests.parquet").is_file():
            row |= _fairness(loaded) | _load(loaded)
        rows.append({**row, "run": "/".join(run.path.parts[-2 - len(run.axes) :])})
    frame = pd.DataFrame(rows)
    return _against_bounds(frame, axes(runs), runs)


def axes(runs: Sequence[StudyRun]) -> list[str]:
    """The columns that tell apart runs of one name on one workload."""
    return [key for key, _ in runs[0].axes] if runs else []


def is_cache(frame: pd.DataFrame) -> bool:
    """Whether the study replayed block accesses, without time."""
    return E2E not in frame


def write(path: Path, frame: pd.DataFrame) -> None:
    """`results.csv` and `results.parquet`. Raises `RunError`."""
    from lab.analysis.files import write_atomic

    write_atomic(path / "results.csv", frame.to_csv(index=False))
    try:
        frame.to_parquet(path / ".results.tmp", index=False)
        (path / ".results.tmp").replace(path / "results.parquet")
    except OSError as error:
        raise RunError(f"can't write '{path / 'results.parquet'}': {error.strerror or error}") from error


def show(frame: pd.DataFrame, file: TextIO | None = None) -> None:
    """Print a table for each workload, the best first."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(file=file or sys.stdout, highlight=False)
    if not console.is_terminal:
        console.width = 132
    for title, head, rows in tables(frame):
        table = Table(
            title=title,
            title_justify="left",
            title_style="bold",
            box=box.SIMPLE_HEAD if console.is_terminal else box.ASCII2,
        )
        for index, label in enumerate(head):
            table.add_column(label, justify="right" if index else "left", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        console.print(table)


def tables(frame: pd.DataFrame) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Title, head and rows of each workload's table, as text, the best first."""
    for workload, part in frame.groupby("workload", sort=False):
        if is_cache(frame):
            yield _hits(str(workload), part)
        else:
            yield _latencies(str(workload), part)


def mean_by_name(part: pd.DataFrame) -> pd.DataFrame:
    """One row a name: the mean over seeds and axes of every number."""
    return part.groupby("name", sort=False).mean(numeric_only=True)


def remarks(runs: Sequence[StudyRun]) -> Iterator[str]:
    """What must be known beside the numbers: whose step times, and requests that weren't served."""
    machines: dict[str, int] = {}
    unserved: list[str] = []
    for run in runs:
        loaded = load(run.path)
        fit = loaded.environment.get("backend", {}).get("calibration")
        if fit is not None:
            said = f"{fit.get('model')} on {fit.get('cpu')}, {fit.get('threads')} threads, {fit.get('dtype')}"
            spread = fit.get("quality", {}).get("repeat_spread_pct")
            said += f", equal batches within {spread} %" if spread is not None else ""
            machines[said] = machines.get(said, 0) + 1
        lost = {key: n for key, n in loaded.metrics["requests"].items() if key != "finished" and n}
        if lost:
            unserved.append(f"{run}: " + ", ".join(f"{n} {key}" for key, n in lost.items()))
    for said, count in machines.items():
        where = (
            "" if len(machines) == 1 else f" ({count} of {len(runs)} runs: not comparable with the others)"
        )
        yield f"Step times: fitted to {said}{where}."
    if unserved:
        yield (
            "Not all requests were finished, and latencies are of those that were: "
            + "; ".join(unserved)
            + "."
        )


# --- rows ----------------------------------------------------------------------------------------------


def _fairness(run: Run) -> dict[str, float]:
    found = service(run.requests)
    if len(found.tenants) < 2:
        return {}
    return {
        "fairness.difference_max": float(found.difference.max()),
        "fairness.difference_mean": float(found.difference.mean()),
        "fairness.jain": float(found.jain.mean()),
        "fairness.jain_min": float(found.jain.min()),
    }


def _load(run: Run) -> dict[str, float]:
    """How busy the engines were while requests arrived."""
    arrivals = run.requests["arrival_ns"]
    first, last = int(arrivals.min()), int(arrivals.max())
    return {"busy": busy(run.steps, run.fleet_events(), first, last)} if first < last else {}


def busy(steps: pd.DataFrame, events: Sequence[FleetEvent], first: int, last: int) -> float:
    """Time in steps over time up, of all replicas together, between two times (ns)."""
    working = (steps["end_ns"].clip(first, last) - steps["start_ns"].clip(first, last)).sum()
    begun: dict[int, int] = {}
    gone: dict[int, int] = {}
    for event in events:
        begun.setdefault(event.replica, event.at)
        if event.event == "gone":
            gone[event.replica] = event.at
    up = sum(
        max(0, min(gone.get(replica, last), last) - max(start, first)) for replica, start in begun.items()
    )
    return float(working) / (up or last - first)


def _against_bounds(frame: pd.DataFrame, keys: list[str], runs: Sequence[StudyRun]) -> pd.DataFrame:
    """The columns that compare with the bound of the same workload, axes and seed."""
    import re

    if is_cache(frame):
        marks = {"belady": "belady", "fifo": "fifo"}
        value = HITS
    else:
        # With guessed lengths srpt is no mark.
        true = all(re.search(r"^predictor:\n  name: oracle$", run.config_text, re.M) for run in runs)
        marks, value = ({"srpt": "srpt"} if true else {}), E2E
    for mark, name in marks.items():
        bound = frame[frame["name"] == name].set_index(["workload", *keys])[value]
        index = frame.set_index(["workload", *keys]).index
        frame[f"_{mark}"] = bound.reindex(index).to_numpy() if len(bound) else float("nan")
    if "_srpt" in frame:
        frame["percent_of_srpt"] = 100 * frame["_srpt"] / frame[E2E]
    if "_belady" in frame:
        room = frame["_belady"] - frame["_fifo"]
        frame["percent_of_belady"] = (100 * (frame[HITS] - frame["_fifo"]) / room).where(room > 0)
        frame["part_of_belady"] = frame[HITS] / frame["_belady"].where(frame["_belady"] > 0)
    return frame[[column for column in frame if not str(column).startswith("_")]]


# --- printed -------------------------------------------------------------------------------------------


def _latencies(workload: str, part: pd.DataFrame) -> tuple[str, list[str], list[list[str]]]:
    means = mean_by_name(part).sort_values(E2E)
    shown = [key for key in LATENCY_COLUMNS if key == "name" or (key in means and means[key].notna().any())]
    rows = [[str(name), *(_cell(means.loc[name, key], key) for key in shown[1:])] for name in means.index]
    busy = f", busy {100 * part['busy'].mean():.0f} % of the time" if "busy" in part else ""
    repeats = f", means of {len(part) // len(means)} runs" if len(part) > len(means) else ""
    title = f"{workload}: times in ms, least mean E2E first{busy}{repeats}"
    return title, [LATENCY_COLUMNS[key] for key in shown], rows


def _hits(workload: str, part: pd.DataFrame) -> tuple[str, list[str], list[list[str]]]:
    sizes = sorted(part["kv.blocks"].unique()) if "kv.blocks" in part else []
    by_name = mean_by_name(part).sort_values(HITS, ascending=False)
    rows = []
    for name in by_name.index:
        own = part[part["name"] == name]
        cells = [f"{100 * own.loc[own['kv.blocks'] == size, HITS].mean():.1f}" for size in sizes]
        more = [_cell(by_name.loc[name].get(key), key) for key in (HITS, "percent_of_belady")]
        rows.append([str(name), *cells, *more])
    title = f"{workload}: hits in % of block accesses by blocks of cache, most hits first"
    return title, ["", *(str(size) for size in sizes), "mean", "% of Belady"], rows


def _cell(value: Any, key: str) -> str:
    if value is None or value != value:
        return "-"
    if key.startswith("percent_of"):
        return f"{value:.1f}"
    if key == "preemptions" or key.startswith("fairness.difference"):
        return f"{value:,.0f}"
    return f"{value:.3f}" if key.startswith("fairness.jain") else number(float(value), key)
