"""Ctrl-C and SIGTERM: the first one ends the work, no further one costs what was recorded. Control plane."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


def reason(error: KeyboardInterrupt) -> str:
    """Which signal it was."""
    return str(error.args[0]) if error.args else "Ctrl-C"


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Within, SIGTERM ends the work as Ctrl-C does: by `KeyboardInterrupt`."""

    def end(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(NAMES[signal.SIGTERM])

    with _handling({signal.SIGTERM: end}):
        yield


def deaf() -> None:
    """From now on no signal interrupts: the program is on its way out, and another Ctrl-C can't hurry it."""
    if threading.current_thread() is threading.main_thread():
        for number in NAMES:
            signal.signal(number, signal.SIG_IGN)


class OneInterrupt:
    """Within, one signal interrupts by `KeyboardInterrupt`; from then on, or from `saving` on, signals wait.

    A signal that came while saving is raised at the end, unless one was raised before.
    """

    def __init__(self) -> None:
        self._open = True
        self._late: str | None = None
        self._stack = contextlib.ExitStack()

    def saving(self) -> None:
        """From here on nothing interrupts."""
        self._open = False

    def __enter__(self) -> OneInterrupt:
        self._stack.enter_context(_handling(dict.fromkeys(NAMES, self._told)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        if self._late is not None and error is None:
            raise KeyboardInterrupt(self._late)

    def _told(self, number: int, frame: FrameType | None) -> None:
        name = NAMES[signal.Signals(number)]
        if not self._open:
            self._late = name
            return
        self._open = False
        raise KeyboardInterrupt(name)


@contextlib.contextmanager
def _handling(handlers: dict[signal.Signals, Any]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only the main thread may, or is told
        yield
        return
    before = {number: signal.getsignal(number) for number in handlers}
    for number, handler in handlers.items():
        if before[number] in (signal.SIG_IGN, None):  # as under nohup: ignored it was, ignored it stays
            del before[number]
        else:
            signal.signal(number, handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
