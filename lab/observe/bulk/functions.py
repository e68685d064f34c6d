"""The few of Arrow's functions that recording needs. Observation path.

`pyarrow.compute` writes three hundred Python functions when it is imported, which takes 20 ms; what they call is there
without them.
"""

from __future__ import annotations

from functools import cache
from typing import Any


def joined(*parts: Any, between: str = "", skip: bool = False) -> Any:
    """Texts and columns of texts, one after another, as a column; a null makes null, or is left out (`skip`)."""
    arrow = _arrow()
    options = arrow.JoinOptions("skip" if skip else "emit_null", "")
    return arrow.call_function("binary_join_element_wise", [*parts, between], options)


def taken(column: Any, order: Any) -> Any:
    """The values of a column at these places (numpy)."""
    return _arrow().call_function("array_take", [column, order])


def written(column: Any) -> Any:
    """Numbers as texts."""
    import pyarrow as pa

    arrow = _arrow()
    return arrow.call_function("cast", [column], arrow.CastOptions.safe(pa.string()))


@cache
def _arrow() -> Any:
    try:
        from pyarrow import _compute
    except ImportError:  # another version's affair
        from pyarrow import compute

        return compute
    return _compute
