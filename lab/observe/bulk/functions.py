"""The few of Arrow's functions that recording needs. Observation path.

`pyarrow.compute` writes three hundred Python functions when it is imported, which takes 20 ms; what they call is there
without them.
"""

from __future__ import annotations

from typing import Any

try:
    from pyarrow._compute import CastOptions, JoinOptions, call_function
except ImportError:  # another version's affair
    from pyarrow.compute import CastOptions, JoinOptions, call_function


def joined(*parts: Any, between: str = "", skip: bool = False) -> Any:
    """Texts and columns of texts, one after another, as a column; a null makes null, or is left out (`skip`)."""
    options = JoinOptions("skip" if skip else "emit_null", "")
    return call_function("binary_join_element_wise", [*parts, between], options)


def taken(column: Any, order: Any) -> Any:
    """The values of a column at these places (numpy)."""
    return call_function("array_take", [column, order])


def written(column: Any) -> Any:
    """Numbers as texts."""
    import pyarrow as pa

    return call_function("cast", [column], CastOptions.safe(pa.string()))
