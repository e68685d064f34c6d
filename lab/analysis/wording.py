"""How numbers and names are said wherever a comparison is put in words. Observation path."""

from __future__ import annotations


def percent(value: float | None) -> str:
    """`+4.2 %`; an exact zero says so, an undefined error is a dash."""
    if value is None:
        return "-"
    if value == 0:
        return "0 %"
    if abs(value) < 0.05:
        return f"{value:+.2g} %"
    return f"{value:+.1f} %" if abs(value) < 1000 else f"{value:+.0f} %"


def names(ids: list[str], most: int = 4) -> str:
    """`r1, r2 and 5 more`."""
    head = ", ".join(ids[:most])
    return head if len(ids) <= most else f"{head} and {len(ids) - most} more"
