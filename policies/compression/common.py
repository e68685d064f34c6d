"""What the compression policies share: a budget in tokens, kept in whole blocks."""

from __future__ import annotations

from lab.policy import CompressionPolicy, KvKeep, Request


class WithBudget(CompressionPolicy):
    """Keep `budget` tokens, of which the first `sinks` and the last `recent` always; each rounded up to whole
    blocks. The block that isn't full yet comes on top. A block is kept or given up whole."""

    def __init__(self, budget: int = 1024, sinks: int = 0, recent: int = 0) -> None:
        if budget < 1:
            raise ValueError(f"budget is {budget}; expected at least 1 token")
        for name, value in (("sinks", sinks), ("recent", recent)):
            if not 0 <= value <= budget:
                raise ValueError(f"{name} is {value}; expected from 0 to the budget, {budget}")
        self.budget, self.sinks, self.recent = budget, sinks, recent

    def keep(self, request: Request, block_size: int) -> KvKeep | None:
        budget, sinks, recent = (-(-n // block_size) for n in (self.budget, self.sinks, self.recent))
        return KvKeep(max(budget, sinks + recent), sinks, recent)
