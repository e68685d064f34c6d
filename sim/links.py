"""What KV moves over from replica to replica. Data plane, state path."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Link:
    """Bytes a second, and nanoseconds until the first byte is there. Those don't keep the next transfer waiting."""

    bytes_s: float
    latency_ns: int = 0
    layers: int = 0
    """Parts that a prompt's KV is sent in while it is being computed; 0: as a whole, afterwards."""

    def wire_ns(self, size: int) -> int:
        """How long so many bytes occupy the link."""
        return round(size / self.bytes_s * 1e9)


@dataclass(frozen=True, slots=True)
class Network:
    """A link for each pair of nodes that KV moves between, and for each node inside of which it does."""

    links: Mapping[tuple[int, int], Link]
    """By (node of the source, node of the destination): each way has its own."""
    nodes: tuple[int, ...] = ()
    """Of each place of the topology; none: all are on node 0, and share one link."""
    switch_bytes_s: float | None = None
    """All that the links between different nodes carry together; None: they share nothing."""

    def way(self, source: int, destination: int) -> tuple[int, int]:
        """Which link lies between two places."""
        return (self.nodes[source], self.nodes[destination]) if self.nodes else (0, 0)
