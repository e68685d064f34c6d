"""Two policies, as small as they get: one for scheduling, one for eviction."""

from __future__ import annotations

from lab.policy import BlockId, BlockView, EvictionPolicy, RequestView, Step
from policies.scheduling.common import QueueingPolicy, run_in_order


class NewestFirst(QueueingPolicy):
    """Of those that wait, the latest arrival first. `width` is the most that may run at once."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"width is {width}; expected at least 1")
        self.width = width

    def key(self, request: RequestView) -> tuple[int, int]:
        return (-request.arrival, -request.seq)

    def schedule(self, step: Step) -> None:
        if not run_in_order(step, list(step.running.values())):
            return
        while self.queue and len(step.running) < self.width and step.run(self.queue.peek()):
            self.queue.pop()


class AnyBlock(EvictionPolicy):
    """Drop any candidate, each as likely as the others. What an eviction policy has to beat."""

    def __init__(self) -> None:
        self._candidates: list[BlockId] = []

    def victim(self, now: int) -> BlockId:
        return self.rng.choice(self._candidates)

    def on_evictable(self, block: BlockView, now: int) -> None:
        self._candidates.append(block.id)

    def on_pinned(self, block: BlockView, now: int) -> None:
        self._candidates.remove(block.id)

    def on_dropped(self, block: BlockView, now: int) -> None:
        if block.id in self._candidates:
            self._candidates.remove(block.id)
