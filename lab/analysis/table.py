"""The one printed table: both sides and the error of each metric, then the verdict. Observation path."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TextIO

from lab.analysis.clocks import say, skews
from lab.analysis.difference import Diff
from lab.analysis.frames import RunLike, name, scalars
from lab.analysis.verdict import verdict
from lab.analysis.wording import percent

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

WIDTH = 100

_LATENCIES = {"ttft_ms": "TTFT", "tpot_ms": "TPOT", "itl_ms": "ITL", "e2e_ms": "E2E"}
_QUANTILES = ("p50", "p90", "p99")
_OTHERS = (
    (
        ("throughput.requests_per_s", "Throughput", "requests/s"),
        ("throughput.output_tokens_per_s", "", "output tokens/s"),
        ("throughput.total_tokens_per_s", "", "total tokens/s"),
    ),
    (
        ("kv.prefix_hit_ratio_tokens", "Prefix hit rate", "of prompt tokens"),
        ("kv.prefix_hit_ratio_blocks", "", "of full blocks"),
        ("kv.peak_blocks", "KV use", "peak blocks held"),
        ("kv.evictions", "", "evictions"),
        ("preemptions", "Preemptions", ""),
        ("swapped_blocks", "", "blocks swapped"),
    ),
    (
        ("energy.kwh_per_million_output_tokens", "Energy (estimate)", "kWh/M output"),
        ("cost.usd_per_million_output_tokens", "Cost (estimate)", "USD/M output"),
        ("transfer.bytes", "KV transfers", "bytes"),
        ("transfer_queue_ms.p99", "", "queue p99, ms"),
        ("transfer_wire_ms.p99", "", "wire p99, ms"),
    ),
    (
        ("fleet.most_replicas", "Fleet", "most replicas"),
        ("fleet.cold_starts", "", "cold starts"),
        ("fleet.failures", "", "failures"),
        ("fleet.replica_seconds", "", "replica-seconds"),
    ),
    (
        ("requests.finished", "Requests", "finished"),
        ("requests.rejected", "", "rejected"),
        ("requests.aborted", "", "aborted"),
        ("steps", "Steps", ""),
        ("duration_s", "Run", "seconds"),
    ),
)

Row = tuple[str, str, str]
"""(metric name, what to print, unit or statistic)."""


def rows(known: Mapping[str, object], values: Callable[[str], list[Any]]) -> Iterator[list[Row]]:
    """The rows that these metrics can fill, in the sections of the table; nothing of fleets and swapping where
    there were none. `values` of a metric: one for each side."""
    if "swapped_blocks" in known and not any(values("swapped_blocks")):
        known = {key: value for key, value in known.items() if key != "swapped_blocks"}
    for key in [key for key in known if key.startswith(("energy.", "cost.", "transfer"))]:
        if not any(values(key)):
            known = {other: value for other, value in known.items() if other != key}
    if "fleet.most_replicas" in known and max(values("fleet.most_replicas")) < 2:
        known = {key: value for key, value in known.items() if not key.startswith("fleet.")}
    for metric, label in _LATENCIES.items():
        found = [(f"{metric}.{q}", "", f"{q}, ms") for q in _QUANTILES if f"{metric}.{q}" in known]
        yield _labelled(label, found)
    good = sorted(key for key in known if key.split(".")[0].startswith("goodput"))
    throughput, *rest = _OTHERS
    yield [row for row in throughput if row[0] in known] + _labelled(
        "Goodput", [(key, "", _unit(key)) for key in good]
    )
    for section in rest:
        yield [row for row in section if row[0] in known]


def _unit(key: str) -> str:
    """`goodput.requests_per_s` -> `requests/s`."""
    return key.rpartition(".")[2].replace("_per_", "/").replace("_", " ")


def _labelled(label: str, found: list[Row]) -> list[Row]:
    return [(key, label if i == 0 else "", unit) for i, (key, _, unit) in enumerate(found)]


def number(value: float | None, key: str = "") -> str:
    """A value as people read it: counts whole, ratios in percent, else four significant digits or better."""
    if value is None:
        return "-"
    if "_ratio" in key or key.endswith(".attainment"):
        return f"{100 * value:.1f} %"
    if isinstance(value, int) or (float(value).is_integer() and abs(value) >= 1000):
        return f"{int(value):,}"
    size = abs(value)
    return f"{value:,.0f}" if size >= 10_000 else f"{value:,.1f}" if size >= 100 else f"{value:.3f}"


def comparison_table(diff: Diff, *, plain: bool = False) -> Table:
    """Both sides of every headline metric with the candidate's error."""
    from rich.text import Text

    table = _table(plain)
    for label in diff.labels:
        table.add_column(Text(label), justify="right", overflow="fold", max_width=24)
    table.add_column("error", justify="right", no_wrap=True)
    for section in rows(diff.metrics, lambda key: [diff.metrics[key][side] or 0 for side in diff.keys]):
        for key, label, unit in section:
            cell = diff.metrics[key]
            error = cell["error_pct"]
            style = "" if plain else _style(key, error)
            values = (number(cell[side], key) for side in diff.keys)
            table.add_row(label, unit, *values, f"[{style}]{percent(error)}[/]" if style else percent(error))
        if section:
            table.add_section()
    return table


def run_table(run: RunLike, *, plain: bool = False) -> Table:
    """The same metrics of one run alone."""
    from rich.text import Text

    table = _table(plain)
    table.add_column(Text(name(run)), justify="right")
    metrics = scalars(run.metrics)
    for section in rows(metrics, lambda key: [metrics[key]]):
        for key, label, unit in section:
            table.add_row(label, unit, number(metrics[key], key))
        if section:
            table.add_section()
    return table


def show(what: Diff | RunLike, file: TextIO | None = None, *, verdict_first: bool = False) -> None:
    """Print a comparison with its verdict, or one run's table. Colour on a terminal only; plain text elsewhere."""
    console = _console(file or sys.stdout)
    plain = not console.is_terminal
    if isinstance(what, Diff):
        if not verdict_first:
            console.print(comparison_table(what, plain=plain))
        for sentence in verdict(what):
            console.print(f"- {sentence}", markup=False, highlight=False)
        if verdict_first:
            console.print(comparison_table(what, plain=plain))
        return
    console.print(run_table(what, plain=plain))
    if what.partial:
        console.print("- Partial run: it ended early; the table covers what was recorded.", highlight=False)
    engine = what.config.get("engine") or {}
    if engine.get("tensor_parallel", 1) * engine.get("pipeline_parallel", 1) > 1:
        for wrong in [skew for skew in skews(what) if skew.wrong]:
            console.print(f"- Clock skew: {say(wrong)}.", markup=False, highlight=False)


def _console(file: TextIO) -> Console:
    from rich.console import Console

    console = Console(file=file, force_jupyter=False)  # to the file, in a notebook too
    if not console.is_terminal or console.width > WIDTH:
        console.width = WIDTH
    return console


def _table(plain: bool) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.ASCII2 if plain else box.SIMPLE_HEAD, header_style="" if plain else "bold")
    table.add_column("metric", no_wrap=True)
    table.add_column("", no_wrap=True, style="" if plain else "dim")
    return table


def _style(key: str, error: float | None) -> str:
    if error is None or key.startswith(("requests.", "steps")):
        return ""
    return "green" if abs(error) < 5 else "yellow" if abs(error) < 15 else "red"
