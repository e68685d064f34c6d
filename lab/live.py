"""What a run shows of itself while it goes: a panel on a terminal, else a line now and then. Observation path.

Nothing is shown of a step: between steps, `due` compares the clock with the time of the next look, and only then is
anything read, added up or drawn. The first look comes after a second, so that a short run doesn't flash.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rich.console import Console as Rich

    from lab.assembly import ControlPlane
    from lab.control.observer import RequestRecord
    from lab.observe.recorder import Recorder
    from lab.observe.stream import Stream

PANEL_AFTER_S, PANEL_EVERY_S = 1.0, 0.5
LINE_EVERY_S = 10.0


@dataclass(frozen=True, slots=True)
class Sight:
    """A run at one moment."""

    done: int
    total: int
    """Requests that ended, and that there are."""
    steps: int
    now: int
    """The run's time, nanoseconds."""
    running: int = 0
    waiting: int = 0
    kv: float = 0.0
    """Share of the KV blocks that is referenced."""
    ttft: tuple[float, float] | None = None
    """Median and 99th percentile over the requests that finished so far, milliseconds."""

    @property
    def state(self) -> str:
        """All but the progress, in words."""
        said = f"{self.running} running, {self.waiting} waiting, KV {100 * self.kv:.0f} %"
        return said + (f", TTFT {_ms(self.ttft[0])} (p99 {_ms(self.ttft[1])})" if self.ttft else "")


class View(Protocol):
    """Where sights go."""

    def due(self) -> bool: ...
    def show(self, sight: Sight) -> None: ...


class Quantiles:
    """Percentiles of very many values in little room: each is kept to one part in fifty."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self._total = 0

    def add(self, values: Sequence[float]) -> None:
        """More values, each above 0."""
        for value in values:
            place = round(50 * math.log(value)) if value > 0 else -(10**6)
            self._counts[place] = self._counts.get(place, 0) + 1
        self._total += len(values)

    def at(self, share: float) -> float | None:
        """The value that this share of all lies at or below; None without any."""
        below = 0
        for place in sorted(self._counts):
            below += self._counts[place]
            if below >= share * self._total:
                return math.exp(place / 50) if place > -(10**6) else 0.0
        return None


class Watch:
    """Looks at a run: reads the control plane's own counts, and adds up only what is new since the last look."""

    def __init__(self, control: ControlPlane, recorder: Recorder | Stream, total: int) -> None:
        self._control, self._recorder, self._total = control, recorder, total
        self._ttft = Quantiles()
        self._seen = 0

    def look(self, now: int) -> Sight:
        """The run at this moment."""
        cores = self._control.fleet.cores
        steps = sum(core.steps for core in cores)
        running, waiting = sum(core.running for core in cores), sum(core.waiting for core in cores)
        kv = sum(core.pool.held for core in cores) / (sum(core.pool.total for core in cores) or 1)
        records: Sequence[Any] = getattr(self._recorder, "steps", ())
        if records and not steps:  # plans of a recorded run are executed: the core decides nothing
            last = records[-1]
            steps, running, waiting = len(records), last.running, last.waiting
            kv = last.blocks_held / ((last.blocks_free + last.blocks_cached + last.blocks_held) or 1)
        known: Sequence[RequestRecord] = getattr(self._recorder, "requests", ())
        fresh = known[self._seen :]
        self._seen = len(known)
        self._ttft.add([r.token_times[0] - r.request.arrival for r in fresh if r.token_times])
        median, high = self._ttft.at(0.5), self._ttft.at(0.99)
        ttft = None if median is None or high is None else (median / 1e6, high / 1e6)
        return Sight(self._recorder.ended, self._total, steps, now, running, waiting, kv, ttft)


class Lines:
    """A line every ten seconds, for pipes, logs and simple terminals."""

    def __init__(self, say: Callable[[str], None], what: str) -> None:
        self._say, self._what = say, what
        self._next = time.monotonic() + LINE_EVERY_S

    def due(self) -> bool:
        """Whether it is time for the next."""
        return time.monotonic() >= self._next

    def show(self, sight: Sight) -> None:
        """Say it."""
        self._next = time.monotonic() + LINE_EVERY_S
        progress = f"{self._what}: {sight.done}/{sight.total} requests, step {sight.steps}"
        self._say(f"{progress}, {sight.state}, {sight.now / 1e9:.1f} s")


class Panel:
    """A panel that is drawn in place, and gone when the run is over. `close` must be called."""

    def __init__(self, console: Callable[[], Rich], what: str) -> None:
        self._console, self._what = console, what
        self._began = time.monotonic()
        self._next = self._began + PANEL_AFTER_S
        self._before: tuple[float, int] = (self._began, 0)
        self._live: Any = None

    def due(self) -> bool:
        """Whether it is time to draw."""
        return time.monotonic() >= self._next

    def show(self, sight: Sight) -> None:
        """Draw it. The next time is counted from the end of drawing, so that drawing can't take over."""
        from rich.live import Live

        at = time.monotonic()
        since, steps = self._before
        rate = (sight.steps - steps) / max(at - since, 1e-9)
        self._before = (at, sight.steps)
        drawn = self._drawn(sight, rate, at - self._began)
        if self._live is None:
            self._live = Live(
                drawn,
                console=self._console(),
                auto_refresh=False,
                transient=True,
                redirect_stdout=sys.stdout.isatty(),  # what goes into a file or a pipe still goes there
            )
            self._live.start(refresh=True)
        else:
            self._live.update(drawn, refresh=True)
        self._next = time.monotonic() + PANEL_EVERY_S

    def close(self) -> None:
        """Take it away; the cursor comes back."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _drawn(self, sight: Sight, rate: float, elapsed: float) -> Any:
        from rich.panel import Panel as Box
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        left = elapsed * (sight.total - sight.done) / sight.done if sight.done else None
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", justify="right")
        grid.add_column(width=22)
        grid.add_column(no_wrap=True)
        share = f"{sight.done:,} of {sight.total:,}" + (f", {_time(left)} left" if left is not None else "")
        grid.add_row(
            "requests", ProgressBar(total=max(sight.total, 1), completed=sight.done, width=22), share
        )
        kv = ProgressBar(total=1.0, completed=min(sight.kv, 1.0), width=22, complete_style="cyan")
        grid.add_row("KV blocks", kv, f"{100 * sight.kv:.0f} % held")
        grid.add_row("batch", f"{sight.running:,} running", f"{sight.waiting:,} waiting")
        ttft = (
            (f"{_ms(sight.ttft[0])} median", f"{_ms(sight.ttft[1])} p99") if sight.ttft else ("none yet", "")
        )
        grid.add_row("TTFT so far", *ttft)
        grid.add_row("steps", f"{sight.steps:,}", f"{rate:,.0f} a second")
        grid.add_row("time", f"{_time(elapsed)} here", f"{sight.now / 1e9:,.1f} s in the run")
        return Box(grid, title=self._what, title_align="left", expand=False, border_style="dim")


def _ms(value: float) -> str:
    if value >= 10_000:
        return f"{value / 1000:,.1f} s"
    return f"{value:,.0f} ms" if value >= 10 else f"{value:.2f} ms"


def _time(seconds: float) -> str:
    whole = int(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
