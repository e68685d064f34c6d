"""online: learnt from the requests that ended: a quantile of the outputs of the same tenant and prompt size.

Rule: the last `memory` output lengths are kept for each tenant and power of two of prompt length, for each tenant,
and for all; the answer is the `quantile` of the narrowest of these that holds at least 8, else `start`.
Origin: history-based prediction. Wins: real workloads, in which a tenant repeats itself; looks at nothing that a
server doesn't know. Loses: requests that end early are seen first, so it begins too low. O(log memory).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque

from lab.policy import LengthPredictor, Request

ENOUGH = 8


class Online(LengthPredictor):
    """`quantile=0.5` is the median; a higher one rather foresees too much than too little."""

    def __init__(self, quantile: float = 0.5, memory: int = 256, start: int = 256) -> None:
        if not 0 <= quantile <= 1:
            raise ValueError(f"quantile is {quantile}; expected in [0, 1]")
        if memory < ENOUGH:
            raise ValueError(f"memory is {memory}; expected at least {ENOUGH}")
        if start < 1:
            raise ValueError(f"start is {start}; expected at least 1")
        self.quantile, self.memory, self.start = quantile, memory, start
        self.seen: dict[tuple[object, ...], tuple[deque[int], list[int]]] = {}  # as they came; sorted

    def groups(self, request: Request) -> list[tuple[object, ...]]:
        """The narrowest first."""
        return [(request.tenant, len(request.prompt).bit_length()), (request.tenant,), ()]

    def predict(self, request: Request, now: int) -> int:
        for group in self.groups(request):
            lengths = self.seen[group][1] if group in self.seen else []
            if len(lengths) >= ENOUGH:
                return max(lengths[min(int(self.quantile * len(lengths)), len(lengths) - 1)], 1)
        return self.start

    def on_finish(self, request: Request, generated: int, now: int) -> None:
        for group in self.groups(request):
            recent, lengths = self.seen.setdefault(group, (deque(), []))
            recent.append(generated)
            insort(lengths, generated)
            if len(recent) > self.memory:
                del lengths[bisect_left(lengths, recent.popleft())]
