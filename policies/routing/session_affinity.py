"""session_affinity: a session stays with its replica; without one, the fewest requests.

Rule: rendezvous hashing: the replica whose hash with the session is greatest. Of n replicas one that comes takes
1/(n+1) of the sessions, one that goes gives only its own away.
Origin: Thaler and Ravishankar 1998; sticky sessions. Wins: later turns find their prefix cached; stale views don't
matter. Loses: long or many sessions on one replica; prefixes shared between sessions. Cost: O(replicas) hashes.
"""

from __future__ import annotations

from collections.abc import Sequence

from lab.policy import ReplicaView, Request, RoutingPolicy, stream_of
from policies.routing.common import least


class SessionAffinity(RoutingPolicy):
    """No table: the same session and replicas give the same answer, in any process."""

    def route(self, request: Request, replicas: Sequence[ReplicaView], now: int) -> tuple[int, str]:
        if not request.session:
            return least(replicas, lambda replica: replica.requests).index, "no session: fewest requests"
        home = max(
            replicas, key=lambda replica: (stream_of("home", request.session, replica.index), replica.index)
        )
        return home.index, "home of its session"
