"""consistent_hash: a session, or a prompt's beginning, has a place on a ring; the load is bounded.

Rule: from the key's place clockwise, the first replica with fewer requests than the cap, ceil(c * mean): the mean
counts the new request too. The key is the session, else the first `prefix` tokens of the prompt.
Origin: consistent hashing with bounded loads (Mirrokni, Thorup, Zadimoghaddam 2016); prefix-hash routing of serving
gateways. Wins: cached prefixes without hot spots; no state but the ring. Loses: a key that overflows meets a cold
cache; equal counts aren't equal work. Cost: O(log) to find the place, then the replicas that are full.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence

from lab.policy import ReplicaView, Request, RoutingPolicy, stream_of
from policies.routing.common import beginning


class ConsistentHash(RoutingPolicy):
    """`c`: cap as a multiple of the mean, at least 1. `points`: places on the ring for each replica."""

    def __init__(self, c: float = 1.25, prefix: int = 256, points: int = 64) -> None:
        if not 1 <= c < math.inf:
            raise ValueError(f"c is {c}; expected a finite number, at least 1")
        for name, value in (("prefix", prefix), ("points", points)):
            if value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1")
        self._c, self._prefix, self._points = c, prefix, points
        self._indices: tuple[int, ...] = ()
        self._places: list[int] = []
        self._owners: list[int] = []

    def route(self, request: Request, replicas: Sequence[ReplicaView], now: int) -> tuple[int, str]:
        indices = tuple(replica.index for replica in replicas)
        if indices != self._indices:
            self._build(indices)
        key = stream_of("session", request.session) if request.session else beginning(request, self._prefix)
        load = {replica.index: replica.requests for replica in replicas}
        cap = math.ceil(self._c * (sum(load.values()) + 1) / len(load))
        place = bisect_right(self._places, key)
        passed: dict[int, None] = {}
        for step in range(len(self._owners)):
            owner = self._owners[(place + step) % len(self._owners)]
            if load[owner] < cap:
                return owner, f"{load[owner]} requests of {cap} allowed, {len(passed)} full before it"
            passed[owner] = None
        raise AssertionError("somebody has no more than the mean")

    def _build(self, indices: tuple[int, ...]) -> None:
        ring = sorted((stream_of("place", index, n), index) for index in indices for n in range(self._points))
        self._indices = indices
        self._places = [place for place, _ in ring]
        self._owners = [owner for _, owner in ring]
