"""Where KV lies: side by side in a pool that is new, scattered in one that was in use. Data plane.

A pool hands out its blocks in order until each was taken once, so a prompt's lie side by side; what it takes back it
hands out again in the order of release and eviction, and hardly two neighbours meet any more. A plan names only the
blocks that are new to it, so no batch says how scattered its context is. What a run as a whole will ask for does.
"""

from __future__ import annotations

from collections.abc import Iterable

from lab.control.executor import Capacity
from lab.control.request import Request, Segment

ENOUGH = 50
"""A pool handed out so many times over is as good as always scattered: no need to count on."""


def share_scattered(requests: Iterable[Request], capacity: Capacity, pools: int = 1) -> float:
    """The share of what these requests write into `pools` such pools that goes into blocks handed out before: 0 .. 1.

    Text that several have in common is written once, as with a prefix cache. Where the length of an answer isn't
    known before it ends, only prompts count.
    """
    room = capacity.blocks * capacity.block_size * pools
    written: dict[int, int] = {}
    total = 0
    for request in requests:
        for piece in request.prompt.pieces:
            if isinstance(piece, Segment):
                far = written.get(piece.stream, 0)
                total += max(0, piece.start + piece.length - far)
                written[piece.stream] = max(far, piece.start + piece.length)
            else:
                total += len(piece)
        total += request.output_len or 0
        if total > ENOUGH * room:
            return 1.0
    return max(0.0, 1 - room / total) if total else 0.0
