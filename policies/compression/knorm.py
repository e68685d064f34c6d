"""knorm: keys of small norm.

Rule: in each layer, give up the blocks whose keys have the largest mean L2 norm, over tokens and KV heads: such keys
get little attention, in most layers of most models.
Origin: Devoto et al., arXiv:2406.11430, who choose tokens, not blocks, and for each head. Wins: needs no queries and no
attention weights, so it suits fused kernels. Loses: knows nothing of what is asked, and nothing of order: without
`recent` a block may go as soon as it is full. Cost: data plane, O(tokens kept) for each compaction.
"""

from __future__ import annotations

from typing import Any

from policies.compression.common import WithBudget


class KeyNorm(WithBudget):
    """`budget`, `sinks` and `recent` in tokens, rounded up to whole blocks."""

    def __init__(self, budget: int = 1024, sinks: int = 0, recent: int = 0) -> None:
        super().__init__(budget, sinks, recent)

    @staticmethod
    def score(keys: Any, query: Any) -> Any:
        return -keys.norm(dim=-1).mean(-1)
