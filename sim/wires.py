"""Links at work: who waits for which, and for the switch that some of them share. Data plane, state path.

A transfer waits for its link, then for the switch. It has the switch for `bytes / switch`, and its link for that or
`bytes / link`, whichever is longer: alone it goes at the slower of the two, and all together never get more through
the switch than that carries. A link whose first transfer waits for the switch waits too.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import simpy

from sim.links import Link, Network


class Switch:
    """One that several links share; it serves who comes first."""

    def __init__(self, env: simpy.Environment, bytes_s: float) -> None:
        self.queue = simpy.Resource(env, capacity=1)
        self.link = Link(bytes_s)


class Wire:
    """One link's queue. Who waited for `turn` then goes on with `carry`, and ends with `done`."""

    def __init__(self, env: simpy.Environment, link: Link, switch: Switch | None = None) -> None:
        self.link = link
        self._env, self._switch = env, switch
        self._queue = simpy.Resource(env, capacity=1)
        self._held: list[tuple[simpy.Resource, Any]] = []

    def turn(self) -> Generator[simpy.Event, Any, None]:
        """Wait until the link, and the switch if there is one, are free."""
        for queue in (self._queue, *(() if self._switch is None else (self._switch.queue,))):
            asked = queue.request()
            yield asked
            self._held.append((queue, asked))

    def carry(self, before: int, after: int) -> Generator[simpy.Event, Any, None]:
        """Send bytes `before .. after` of something."""
        took = self.link.wire_ns(after) - self.link.wire_ns(before)
        if self._switch is not None:
            through = self._switch.link.wire_ns(after) - self._switch.link.wire_ns(before)
            yield self._env.timeout(through)
            self._release()
            took -= through
        if self._switch is None or took > 0:
            yield self._env.timeout(took)

    def done(self) -> None:
        """Let the next one go."""
        while self._held:
            self._release()

    def _release(self) -> None:
        queue, asked = self._held.pop()
        queue.release(asked)


class Wires:
    """All links of a network, by need."""

    def __init__(self, env: simpy.Environment, network: Network | None) -> None:
        self.network = network
        self._env = env
        self._wires: dict[tuple[int, int], Wire] = {}
        shared = None if network is None else network.switch_bytes_s
        self._switch = None if shared is None else Switch(env, shared)

    @property
    def layerwise(self) -> bool:
        """Whether KV is sent while it is being computed."""
        return self.network is not None and any(link.layers for link in self.network.links.values())

    def between(self, source: int, destination: int) -> Wire:
        """The link between two places of the topology."""
        assert self.network is not None
        way = self.network.way(source, destination)
        if way not in self._wires:
            switch = self._switch if way[0] != way[1] else None
            self._wires[way] = Wire(self._env, self.network.links[way], switch)
        return self._wires[way]
