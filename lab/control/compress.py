"""KV compression as counts: how many tokens a request keeps, and which blocks come free. State path, control plane.

A request that is to keep B blocks gives up its surplus at the end of each step: between two steps it holds at most
B full blocks and one that isn't full; within a step, its chunk besides. What is decided depends on counts alone. The
data plane chooses whose content goes, and moves what stays, so that the blocks that come free are always those right
after the sinks (`lab.control.plan.Compaction`).
"""

from __future__ import annotations

from lab.control.blame import blame
from lab.control.live import LiveRequest
from lab.control.plan import Compaction
from lab.control.request import Request
from lab.errors import ConfigError, PolicyError
from lab.policy import NEVER, CompressionPolicy, KvKeep


class Compression:
    """The run's compression policy, asked and held to its word. `name` is what the data plane knows it by."""

    def __init__(
        self,
        policy: CompressionPolicy | None,
        name: str,
        block_size: int,
        token_budget: int,
        prefix_cache: bool,
    ) -> None:
        kind = type(policy or CompressionPolicy())
        self._policy = policy if kind.keep is not CompressionPolicy.keep else None
        self._who = f"compression policy '{name or kind.__name__}'"
        self._rule = (
            (name or f"{kind.__module__}:{kind.__qualname__}")
            if kind.score is not CompressionPolicy.score
            else ""
        )
        self._block_size, self._token_budget = block_size, token_budget
        if self._policy is not None and prefix_cache:
            raise ConfigError(
                f"{self._who} overwrites blocks that the prefix cache would share; expected kv.prefix_cache=false"
            )

    def keep(self, request: Request) -> KvKeep | None:
        """What the policy lets this request keep; None: everything."""
        if self._policy is None:
            return None
        where = f"in keep, request '{request.id}'"
        try:
            found = self._policy.keep(request, self._block_size)
        except PolicyError:
            raise
        except Exception as error:
            raise blame(error, self._who, where) from error
        if found is not None and not isinstance(found, KvKeep):
            raise PolicyError(f"{self._who}: keep() returned {found!r}; expected a KvKeep or None")
        return found

    def peak(self, keep: KvKeep | None) -> int:
        """The most tokens of KV held at once: B full blocks, one that lacks a token, and a whole step's tokens."""
        if keep is None:
            return NEVER
        return (keep.blocks + 1) * self._block_size - 1 + self._token_budget

    def surplus(self, live: LiveRequest) -> Compaction | None:
        """What the request gives up when its granted tokens are computed."""
        keep, size = live.keep, self._block_size
        assert keep is not None
        count = (live.computed + live.granted - live.dropped) // size - keep.blocks
        if count < 1:
            return None
        if any(block.refs > 1 for block in live.blocks):
            raise PolicyError(
                f"{self._who} can't shorten {live.view!r}, which shares KV blocks with another request"
            )
        gone = tuple(block.id for block in live.blocks[keep.sinks : keep.sinks + count])
        return Compaction(live.request.id, gone, count * size, keep.sinks, keep.recent, self._rule)

    def check(self, live: LiveRequest) -> None:
        """Between two steps no request holds more than it may. Raises AssertionError."""
        held = live.computed - live.dropped
        assert live.keep is None or held < (live.keep.blocks + 1) * self._block_size, (
            f"{live.view!r} holds KV of {held} tokens and may keep {live.keep}"
        )
        assert 0 <= live.dropped <= live.computed, f"{live.view!r} has dropped {live.dropped} tokens"
