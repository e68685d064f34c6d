"""tova: what the latest token attends to.

Rule: in each layer, give up the blocks with the least attention weight of the latest query, averaged over heads.
Origin: TOVA, token omission via attention (Oren et al., arXiv:2401.06104), who drop one token for each that comes;
here a block goes when another is full, by the weights of that moment. Wins: keeps sinks and recent tokens by itself
where the model attends to them, and old ones that still matter. Loses: one query decides; what it doesn't ask for is
gone; attention is computed once more. Cost: data plane, O(tokens kept) for each compaction.
"""

from __future__ import annotations

from typing import Any

from policies.compression.common import WithBudget


class Tova(WithBudget):
    """`budget`, `sinks` and `recent` in tokens, rounded up to whole blocks."""

    needs_query = True

    def __init__(self, budget: int = 1024, sinks: int = 0, recent: int = 0) -> None:
        super().__init__(budget, sinks, recent)

    @staticmethod
    def score(keys: Any, query: Any) -> Any:
        layers, _, kv_heads, dim = keys.shape
        grouped = query.reshape(layers, kv_heads, -1, dim)
        logits = grouped @ keys.permute(0, 2, 3, 1)  # [layers, kv_heads, heads of each, tokens]
        return logits.softmax(-1).mean((1, 2))
