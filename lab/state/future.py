"""What is still to come: knowledge that only a bound may have. State path, control plane.

Belady's rule needs to know when a block is used next. A run whose requests are all known beforehand can say.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

from lab.control.request import Request, RequestId
from lab.policy import NEVER
from lab.state.prefix import ContentChain


class KnownFuture:
    """`lab.policy.Future` over requests given in order of arrival. O(1) amortised, 8 bytes a block use.

    A use is in the future until its request is `passed`, or the block itself is `used`.
    """

    def __init__(self, requests: Iterable[Request], block_size: int) -> None:
        self._uses: dict[bytes, deque[int]] = {}
        self._position: dict[RequestId, int] = {}
        self._passed = bytearray()
        for request in requests:
            chain = ContentChain(request.prompt, block_size, request.cache_salt, (), None)
            self.add(request.id, chain.upto(len(request.prompt) // block_size))

    def add(self, request_id: RequestId, keys: Sequence[bytes]) -> None:
        """One more request, after all others; `keys[1:]` are its blocks, as in `ContentChain.keys`."""
        position = len(self._passed)
        self._position[request_id] = position
        self._passed.append(0)
        for key in keys[1:]:
            self._uses.setdefault(key, deque()).append(position)

    def next_use(self, key: bytes) -> int:
        """Position of the next request to come whose prompt holds this block; else `NEVER`."""
        uses = self._uses.get(key)
        while uses:
            if not self._passed[uses[0]]:
                return uses[0]
            uses.popleft()
        return NEVER

    def passed(self, request_id: RequestId) -> None:
        """The request has come: none of its uses lies ahead any more. Unknown ids are ignored."""
        position = self._position.get(request_id)
        if position is not None:
            self._passed[position] = 1

    def used(self, key: bytes) -> None:
        """The nearest use of this block has come, while its request has others ahead."""
        if self.next_use(key) != NEVER:
            self._uses[key].popleft()
