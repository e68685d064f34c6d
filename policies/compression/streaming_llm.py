"""streaming_llm: the first tokens and the most recent ones.

Rule: keep `sinks` tokens from the beginning, on which attention rests whatever they say, and the latest of the rest,
`budget` in all; the oldest block in between goes. Keys keep the positions they were computed at, where the paper counts
positions within the cache: the same while the model's longest context isn't passed.
Origin: StreamingLLM (Xiao et al., arXiv:2309.17453). Wins: memory and time per token stay bounded however long a text
goes on; fluent; no scores to compute and nothing to move. Loses: whatever was said in between is forgotten for good.
Cost: O(1).
"""

from __future__ import annotations

from policies.compression.common import WithBudget


class StreamingLlm(WithBudget):
    """`budget` and `sinks` in tokens, rounded up to whole blocks."""

    def __init__(self, budget: int = 1024, sinks: int = 4) -> None:
        super().__init__(budget, sinks)
