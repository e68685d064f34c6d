"""What scaling policies share: times given in seconds."""

from __future__ import annotations


def nanoseconds(name: str, seconds: float, least: int = 0) -> int:
    """A parameter in seconds as nanoseconds; `ValueError` below `least` nanoseconds."""
    if not (0 <= seconds < float("inf") and round(seconds * 1e9) >= least):
        bound = "at least 0" if least == 0 else "above 0"
        raise ValueError(f"{name} is {seconds}; expected a time in seconds, {bound}")
    return round(seconds * 1e9)
