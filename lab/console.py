"""What a person sees while a command works: lines, and a progress bar where there is a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

EVERY_S = 0.1
PLAIN_EVERY_S = 10.0


class Console:
    """Writes to stderr, so that what a command prints as its result can be piped."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()

    def say(self, text: str) -> None:
        """One line."""
        if self._terminal:
            from rich.console import Console as Rich

            Rich(stderr=True, highlight=False).print(text, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)

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

        from rich.console import Console as Rich
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}", style="dim"),
        )
        with Progress(*columns, console=Rich(stderr=True)) as bar:
            task = bar.add_task(what, total=total, note="")

            def update(done: int, note: str = "") -> None:
                nonlocal last
                now = time.monotonic()
                if done >= total or now - last >= EVERY_S:
                    last = now
                    bar.update(task, completed=done, note=note)

            yield update
