"""Fairness between tenants: service over time, Jain's index, VTC's difference. Observation path.

Service of a request is its prompt tokens + 2 x its output tokens, as in VTC (OSDI'24), spread evenly from its first
token to its end. All of it is summed over windows of the time in which requests arrive, so that two policies on
one workload are looked at through the same windows; what is served after the last arrival doesn't count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

OUTPUT_WEIGHT = 2
WINDOWS = 19
"""VTC's evaluation looks at ten minutes through 19 windows of one minute, 28.5 s apart."""
WIDTH, STRIDE = 0.1, 0.0475
"""Of one window and between two, as parts of the whole: those of VTC's evaluation."""


@dataclass(frozen=True)
class Service:
    """By window (rows) and tenant (columns), in units of service a second."""

    tenants: list[str]
    middles_s: Floats
    received: Floats
    arrived: Floats
    """What requests that arrive within the window ask for."""
    wanted: Floats
    """What arrives, and what is still due at the window's beginning."""

    @property
    def difference(self) -> Floats:
        """VTC's D of each window: sum over tenants of min(most received - received, |arrived - received|)."""
        import numpy as np

        most = self.received.max(axis=1, keepdims=True)
        lacking = np.minimum(most - self.received, np.abs(self.arrived - self.received))
        return np.asarray(lacking.sum(axis=1), dtype=np.float64)

    @property
    def jain(self) -> Floats:
        """Jain's index of each window, over tenants that want anything: of received / max-min fair share.

        The shares divide what all together received: 1 where nobody could get more but from one who has less.
        A window in which nobody wants or gets anything is fair.
        """
        import numpy as np

        found = []
        for received, wanted in zip(self.received, self.wanted, strict=True):
            share = max_min(float(received.sum()), wanted)
            some = share > 0
            found.append(jain(received[some] / share[some]))
        return np.array(found)


def service(requests: pd.DataFrame) -> Service:
    """From a run's requests. Those that weren't finished count with what they were given until their end."""
    import numpy as np

    tenants = sorted(requests["tenant"].unique())
    column = requests["tenant"].map({tenant: index for index, tenant in enumerate(tenants)}).to_numpy()
    arrival = requests["arrival_ns"].to_numpy(dtype=np.float64) / 1e9
    end = requests["end_ns"].to_numpy(dtype=np.float64) / 1e9
    served = (requests["output_tokens"] > 0).to_numpy()
    first = np.where(served, requests["first_token_ns"].to_numpy(dtype=np.float64) / 1e9, end)
    worth = (requests["prompt_tokens"] + OUTPUT_WEIGHT * requests["output_tokens"]).to_numpy(dtype=np.float64)
    worth = np.where(served, worth, 0.0)
    begin, length = float(arrival.min(initial=0.0)), float(np.ptp(arrival)) if len(arrival) else 0.0
    starts = begin + np.arange(WINDOWS) * STRIDE * length
    width = max(WIDTH * length, 1e-9)
    shape = (WINDOWS, len(tenants))
    received, arrived, wanted = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    for row, low in enumerate(starts):
        high = low + width
        here = _done(high, first, end) - _done(low, first, end)
        new = (arrival >= low) & (arrival < high)
        due = np.where(arrival < high, 1.0 - _done(low, first, end), 0.0)
        for table, amount in ((received, here), (arrived, new), (wanted, due)):
            table[row] = np.bincount(column, weights=worth * amount, minlength=len(tenants)) / width
    middles = np.asarray(starts + width / 2, dtype=np.float64)
    return Service(tenants, middles, received, arrived, wanted)


def jain(values: Floats) -> float:
    """(sum x)^2 / (n sum x^2): 1 where all are equal, 1/n where one has everything; 1 for nobody."""
    squares = float((values**2).sum())
    return float(values.sum()) ** 2 / (len(values) * squares) if squares else 1.0


def max_min(total: float, wanted: Floats) -> Floats:
    """Max-min fair shares of `total` (water filling): nobody gets more than wanted, the rest is shared evenly."""
    import numpy as np

    shares = np.zeros(len(wanted))
    left = total
    for place, index in enumerate(np.argsort(wanted, kind="stable")):
        shares[index] = min(float(wanted[index]), left / (len(wanted) - place))
        left -= float(shares[index])
    return shares


def _done(at: float, first: Floats, end: Floats) -> Floats:
    """The part of each request's service that it has received by then."""
    import numpy as np

    span = end - first
    part = (at - first) / np.where(span > 0, span, 1.0)
    return np.asarray(np.where(span > 0, np.clip(part, 0.0, 1.0), at > first), dtype=np.float64)
