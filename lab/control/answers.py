"""What policies are told as values: the answer to `Step.run`, and what a replica looks like from afar. Control plane.

`lab.policy` is where policies import them from.
"""

from __future__ import annotations

import enum
from collections.abc import Callable

from lab.control.request import Request
from lab.frozen import frozen


class Shortage(enum.Enum):
    """What ran short when a grant came back empty."""

    TOKENS = "tokens"
    SLOTS = "slots"
    BLOCKS = "blocks"
    PAUSED = "paused"


@frozen
class Grant:
    """Answer of `Step.run`: `tokens` granted, or none and what ran short. Falsy when nothing was granted."""

    tokens: int
    short: Shortage | None = None

    def __bool__(self) -> bool:
        return self.tokens > 0


def _none_cached(request: Request) -> int:
    return 0


def _no_estimate(prefill_tokens: int, decodes: int, context_tokens: int) -> int:
    return 0


@frozen
class ReplicaView:
    """A ready replica as admission, routing and scaling see it.

    `as_of` is when this was true: routers see stale state. `index` names the replica and isn't its position
    in the list, since replicas come and go.
    """

    index: int
    as_of: int
    running: int
    waiting: int
    blocks_free: int
    """Free or evictable."""
    blocks_total: int
    block_size: int = 16
    max_seqs: int = 1
    token_budget: int = 512
    """Most requests that run at once there, and most tokens of one step."""
    tokens_to_compute: int = 0
    """Known tokens not yet computed, of all that wait or run: the prefill backlog, and one for each decode."""
    tokens_expected: int = 0
    """Output tokens still to come, as far as the length predictor foresees."""
    context_tokens: int = 0
    """Tokens with KV, of all that run."""
    cached: Callable[[Request], int] = _none_cached
    """Prompt tokens of a request that this replica's prefix cache held at `as_of`."""
    estimate: Callable[[int, int, int], int] = _no_estimate
    """As `Step.estimate`, from this replica's steps: (prefill_tokens, decodes, context_tokens) -> ns."""
    role: str = "mixed"
    """`mixed`, or of a split fleet `prefill` or `decode`. Routing sees only those that do what is asked for."""

    @property
    def requests(self) -> int:
        return self.running + self.waiting
