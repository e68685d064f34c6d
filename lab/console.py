"""What a person sees while a command works: lines, and a progress bar or a panel where there is a terminal."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console as Rich

    from lab.live import View

EVERY_S = 0.1
PLAIN_EVERY_S = 10.0


def draws(stream: TextIO, environment: Mapping[str, str]) -> bool:
    """Whether to draw in place: on a terminal that can, for a person who didn't ask for plain text."""
    simple = environment.get("TERM", "") in ("", "dumb", "unknown")
    return stream.isatty() and not (simple or environment.get("NO_COLOR") or environment.get("CI"))


class Console:
    """Writes to stderr, so that what a command prints as its result can be piped."""

    def __init__(self) -> None:
        self._terminal = draws(sys.stderr, os.environ)
        self._rich: Rich | None = None

    def say(self, text: str) -> None:
        """One line."""
        if self._terminal:
            self._terminals().print(text, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)

    @contextmanager
    def live(self, what: str, total: int) -> Iterator[View]:
        """A view of a run that goes on: a panel on a terminal, else a line now and then."""
        from lab.live import Lines, Panel

        if not self._terminal:
            self.say(f"{what} ...")
            yield Lines(self.say, what)
            return
        panel = Panel(self._terminals, what)
        try:
            yield panel
        finally:
            panel.close()

    def _terminals(self) -> Rich:
        """One for all, so that what is said stands above what is drawn."""
        if self._rich is None:
            from rich.console import Console as Rich

            self._rich = Rich(stderr=True, highlight=False)
        return self._rich

    @contextmanager
    def progress(self, what: str, total: int) -> Iterator[Callable[[int, str], None]]:
        """A bar on a terminal, else a line now and then. Yields `update(done, note)`, which may be called often."""
        last = time.monotonic()
        if not self._terminal:
            self.say(f"{what} ...")

            def plain(done: int, note: str = "") -> None:
                nonlocal last
                now = time.monotonic()
                if now - last >= PLAIN_EVERY_S:
                    last = now
                    self.say(f"{what}: {done}/{total} {note}".rstrip())

            yield plain
            return

        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}", style="dim"),
        )
        with Progress(*columns, console=self._terminals()) as bar:
            task = bar.add_task(what, total=total, note="")

            def update(done: int, note: str = "") -> None:
                nonlocal last
                now = time.monotonic()
                if done >= total or now - last >= EVERY_S:
                    last = now
                    bar.update(task, completed=done, note=note)

            yield update
