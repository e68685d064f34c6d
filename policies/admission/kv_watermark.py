"""kv_watermark: no entry while KV memory is nearly full everywhere.

Rule: admit if on some replica the free blocks, less those that the backlog and this prompt will take, stay at or above
`watermark` of all blocks. Cached prompt tokens take none.
Origin: the 1 % watermark of vLLM's block manager, moved to the gateway. Wins: few preemptions under bursts.
Loses: sees memory only, not time; outputs still grow past the mark. Cost: O(replicas) look-ups of the prompt's blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

from lab.policy import AdmissionPolicy, ReplicaView, Request, Verdict


class KvWatermark(AdmissionPolicy):
    """`watermark`: share of blocks to keep free."""

    def __init__(self, watermark: float = 0.05) -> None:
        if not 0 <= watermark < 1:
            raise ValueError(f"watermark is {watermark}; expected at least 0 and below 1")
        self._watermark = watermark

    def admit(self, request: Request, replicas: Sequence[ReplicaView], now: int) -> Verdict:
        def left(replica: ReplicaView) -> float:
            tokens = replica.tokens_to_compute + len(request.prompt) - replica.cached(request)
            return (replica.blocks_free - -(-tokens // replica.block_size)) / replica.blocks_total

        best = max(map(left, replicas))
        return Verdict(best >= self._watermark, f"would leave {best:.1%} of the blocks free")
