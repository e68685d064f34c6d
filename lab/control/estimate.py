"""How long a step will take, learnt from those that were. State path, control plane.

Policies that reason about time need it, and get the same answer on both sides: it depends on committed
durations alone, so a simulation that replays a run's durations replays its estimates too.
"""

from __future__ import annotations

from collections import deque

MEMORY = 512
"""Steps kept for when somebody asks; older ones are forgotten unread."""

_SCALE = (1.0, 256.0, 16.0, 16384.0)
"""Units of the terms, so that all four are of order one and the fit is well conditioned."""


class StepEstimate:
    """duration = a + b * prefill tokens + c * decodes + d * context tokens, by recursive least squares.

    Seeing a step is an append; the arithmetic (a 4 x 4 update for each step seen) is done when an estimate is
    asked for, so a run whose policies never ask pays next to nothing.
    """

    def __init__(self) -> None:
        self._seen: deque[tuple[int, int, int, int]] = deque(maxlen=MEMORY)
        self._weights = [0.0] * 4
        self._spread = [[1e4 if row == column else 0.0 for column in range(4)] for row in range(4)]
        self._asked: tuple[float, ...] | None = None

    def saw(self, prefill_tokens: int, decodes: int, context_tokens: int, duration_ns: int) -> None:
        """A step of this composition took this long."""
        self._seen.append((prefill_tokens, decodes, context_tokens, duration_ns))

    def __call__(self, prefill_tokens: int, decodes: int, context_tokens: int) -> int:
        """Nanoseconds; 0 before the first step was seen."""
        while self._seen:
            self._learn(*self._seen.popleft())
            self._asked = None
        if self._asked is None:
            # No term of a step's cost is negative: one that the fit made so is noise.
            self._asked = tuple(max(w, 0.0) / s for w, s in zip(self._weights, _SCALE, strict=True))
        a, b, c, d = self._asked
        return round(1e6 * (a + b * prefill_tokens + c * decodes + d * context_tokens))

    def _learn(self, prefill_tokens: int, decodes: int, context_tokens: int, duration_ns: int) -> None:
        x = (1.0, prefill_tokens / _SCALE[1], decodes / _SCALE[2], context_tokens / _SCALE[3])
        spread = self._spread
        sx = [sum(p * v for p, v in zip(row, x, strict=True)) for row in spread]
        norm = 1.0 + sum(v * s for v, s in zip(x, sx, strict=True))
        error = duration_ns / 1e6 - sum(w * v for w, v in zip(self._weights, x, strict=True))
        for row in range(4):
            gain = sx[row] / norm
            self._weights[row] += gain * error
            for column in range(4):
                spread[row][column] -= gain * sx[column]
