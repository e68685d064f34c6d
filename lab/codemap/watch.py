"""A small simulation, and who called what while it ran. Observation path.

Python tells of every call (`sys.setprofile`); those of a stop on the map are noted, with the line that called
and the stops they happened inside. So the order, the callers and the counts of the map are what ran, not what
somebody wrote down.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, cast

from lab.codemap.stops import Stop, stops
from lab.observe.source import ROOT

WORDS = (
    "backend=sim",
    "cost=reference",
    "policy=fcfs",
    "eviction=lfu",
    "preemption=last",
    "preemption.mode=swap",
    "predictor=oracle",
    "routing=round_robin",
    "scaling=queue_threshold",
    "fleet.most=2",
    "kv.blocks=24",
    "kv.host_blocks=24",
    "trace=poisson",
    "trace.n=12",
    "trace.rate=40",
    "trace.prompt.mean=60",
    "trace.output.mean=40",
)
"""A run of a fraction of a second in which KV blocks run short: it evicts, swaps, and starts a second replica."""

_PACKAGES = ("lab/", "sim/", "policies/")


@dataclass
class Visit:
    """What the run showed of one function. `caller` is (file, line, function) of its first call."""

    symbol: str
    caller: tuple[str, int, str]
    calls: int = 0
    inside: Counter[str] = field(default_factory=Counter)
    """Calls that happened inside another visited function, at any depth."""
    under: Counter[str] = field(default_factory=Counter)
    """Calls by the nearest visited function around them."""
    callers: set[tuple[str, int]] = field(default_factory=set)
    """Files and lines that called it."""


@dataclass(frozen=True)
class Watched:
    """A run and what was seen of it: visits in the order of the first call."""

    words: tuple[str, ...]
    visits: dict[str, Visit]
    steps: int
    requests: int
    spans: Counter[str]
    """Spans by name."""
    ran: Any
    """`lab.session.Ran`: the recorder, and what spans are made from."""

    def calls(self, symbol: str) -> int:
        visit = self.visits.get(symbol)
        return visit.calls if visit else 0

    @property
    def policies(self) -> list[Visit]:
        """The points where a policy was asked, in order."""
        return [visit for symbol, visit in self.visits.items() if symbol.startswith("policies/")]


def seam(symbol: str) -> str:
    """`policies/eviction/lfu.py:Lfu.victim` is at the seam `eviction`."""
    return symbol.split("/")[1]


def watched(words: Sequence[str] = WORDS, on: Sequence[Stop] | None = None) -> Watched:
    """Run `python -m lab.experiment WORDS` in a temporary directory, watched. It prints nothing.

    `words` must ask for `backend=sim`. Raises what a run raises.
    """
    import tempfile

    with tempfile.TemporaryDirectory(prefix="diptych-tour-") as temporary:
        run, watch = prepared(words, Path(temporary) / "run"), _Watch(stops() if on is None else on)
        with watch.watching():
            ran = run()
    from lab.observe.spans import spans

    return Watched(
        tuple(words),
        watch.visits,
        len(ran.recorder.steps),
        len(ran.recorder.requests),
        Counter(row.name for row in spans(ran.recorder, ran.info, links=False)),
        ran,
    )


def prepared(words: Sequence[str], path: Path) -> Callable[[], Any]:
    """The run of these words, to be called: what is imported and read first isn't part of any path."""
    import lab.observe.parquet
    import lab.observe.prometheus  # noqa: F401  # imported by a run when it saves
    from lab import compose, plugins
    from lab.assembly import EngineSpec
    from lab.console import Console
    from lab.experiment import config_yaml, workload
    from lab.session import Side, run_side

    with compose.composer() as composer:
        cfg = composer.config(composer.jobs(list(words), sweep=False)[0])
    requests, source = workload(cfg)
    with contextlib.redirect_stderr(io.StringIO()):
        backend = cast("Any", plugins.load_object("backend", cfg.backend))(cfg, Console(), None)
    side = Side(
        backend=backend,
        spec=EngineSpec.of(dataclasses.asdict(cfg)),
        requests=requests,
        config_text=config_yaml(cfg),
        model=cfg.model.name,
        source=source,
    )
    return lambda: run_side(side, path, None)


class _Watch:
    """Notes calls of the stops, and of policies by anything that isn't one."""

    def __init__(self, on: Sequence[Stop]) -> None:
        self.visits: dict[str, Visit] = {}
        self._stops = {stop.symbol for stop in on}
        self._known: dict[CodeType, str] = {}
        self._begun: dict[FrameType, None] = {}
        """Generators that have begun; kept, so that none ends inside something else."""
        self._files: dict[str, str] = {}
        self._root = f"{ROOT}/"

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        before = sys.getprofile()
        sys.setprofile(self._called)
        try:
            yield
        finally:
            sys.setprofile(before)

    def _called(self, frame: FrameType, event: str, _: object) -> None:
        if event != "call":
            return
        symbol = self._known.get(frame.f_code)
        if symbol is None:
            symbol = self._known[frame.f_code] = self._symbol(frame.f_code)
        if not symbol or frame.f_back is None:
            return
        if frame.f_code.co_flags & inspect.CO_GENERATOR:
            if frame in self._begun:
                return  # it goes on, or is put away
            self._begun[frame] = None
        around = list(self._around(frame.f_back))
        if symbol.startswith("policies/") and self._file(frame.f_back.f_code).startswith("policies/"):
            return  # a policy's own helpers
        visit = self.visits.get(symbol)
        caller = frame.f_back
        where = (self._file(caller.f_code), caller.f_lineno)
        if visit is None:
            visit = self.visits[symbol] = Visit(symbol, (*where, caller.f_code.co_qualname))
        visit.calls += 1
        visit.callers.add(where)
        visit.inside.update(dict.fromkeys(around, 1))
        if around:
            visit.under[around[0]] += 1

    def _around(self, frame: FrameType | None) -> Iterator[str]:
        """Visited functions around a frame, the nearest first."""
        while frame is not None:
            symbol = self._known.get(frame.f_code, "")
            if symbol in self.visits:
                yield symbol
            frame = frame.f_back

    def _symbol(self, code: CodeType) -> str:
        """The symbol to note; `""` for code that isn't on the map."""
        file = self._file(code)
        if not file.startswith(_PACKAGES):
            return ""
        symbol = f"{file}:{code.co_qualname}"
        if symbol in self._stops:
            return symbol
        method = code.co_qualname.rpartition(".")[2]
        asked = file.startswith("policies/") and file.count("/") == 2 and not method.startswith(("_", "on_"))
        return symbol if asked and "<" not in symbol and "." in code.co_qualname else ""

    def _file(self, code: CodeType) -> str:
        """Relative to the checkout, through whatever link it was imported."""
        name = code.co_filename
        if name not in self._files:
            self._files[name] = os.path.realpath(name).removeprefix(self._root)
        return self._files[name]
