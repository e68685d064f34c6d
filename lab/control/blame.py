"""Whose fault: an exception out of a policy becomes one sentence with its name and its own line. Control plane."""

from __future__ import annotations

import os
import traceback

from lab.errors import PolicyError

_CONTROL, _STATE = (os.path.join("lab", folder) for folder in ("control", "state"))


def blame(error: BaseException, policy: str, doing: str, eviction: str = "") -> PolicyError:
    """`policy` is who was called, `doing` what for; `eviction` is who the block pool may have called in turn."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if _CONTROL not in f.filename and _STATE not in f.filename]
    last = (own or list(frames))[-1]
    if eviction and own and any(_STATE in f.filename for f in frames[: list(frames).index(last)]):
        policy = f"eviction policy '{eviction}'"
    text = f": {error}" if str(error) else ""
    return PolicyError(
        f"{policy} raised {type(error).__name__}{text} ({doing}) at {last.filename}:{last.lineno}"
    )
