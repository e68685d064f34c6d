"""Python's cycle collector, which has next to nothing to collect here. All planes."""

from __future__ import annotations

import atexit
import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def collector_at_rest() -> Iterator[None]:
    """Let it look seldom: what a start, a trace and a simulation make has next to no cycles, and looking through all
    that lives took a third of a simulation's time, and a tenth of its start's."""
    before = gc.get_threshold()
    atexit.unregister(gc.freeze)
    atexit.register(gc.freeze)  # or Python looks through it all once more, only to end
    gc.freeze()  # without a look before it: what the start leaves behind is next to nothing
    gc.set_threshold(200_000, 50, 100)
    try:
        yield
    finally:
        gc.freeze()  # what was made counts as old: else the next object made would have all of it looked through
        gc.set_threshold(*before)
        gc.unfreeze()
