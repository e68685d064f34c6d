"""The few of Arrow's functions that recording needs. Observation path.

`pyarrow.compute` writes three hundred Python functions when it is imported, which takes 20 ms; what they call is there
without them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np


def joined(*parts: Any, between: str = "", skip: bool = False) -> Any:
    """Texts and columns of texts, one after another, as a column; a null makes null, or is left out (`skip`)."""
    arrow = _arrow()
    options = arrow.JoinOptions("skip" if skip else "emit_null", "")
    return arrow.call_function("binary_join_element_wise", [*parts, between], options)


def taken(column: Any, order: Any) -> Any:
    """The values of a column at these places (numpy)."""
    return _arrow().call_function("array_take", [column, order])


def written(column: Any) -> Any:
    """Whole numbers as texts; small ones, if all of them are, are looked up."""
    import pyarrow as pa

    if isinstance(column, np.ndarray):
        if len(column) and column.min() >= 0 and column.max() < _SMALL:
            return taken(_texts(), column)
        column = pa.array(column)
    arrow = _arrow()
    return arrow.call_function("cast", [column], arrow.CastOptions.safe(pa.string()))


_SMALL = 4096


@cache
def _texts() -> Any:
    import pyarrow as pa

    return pa.array([str(number) for number in range(_SMALL)])


@cache
def _arrow() -> Any:
    try:
        from pyarrow import _compute
    except ImportError:  # another version's affair
        from pyarrow import compute

        return compute
    return _compute
