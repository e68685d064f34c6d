"""Requests on their way from one replica to another: KV over a shared link, and what a lost replica had. State path,
data plane.

A request that has its first token waits for room on the replica that is to decode it, then for the link, which
carries one transfer after another; its blocks are kept at the source until the last byte has arrived. A request whose
replica is lost keeps the tokens it has and is computed again elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import simpy

from lab.control.core import EngineCore
from lab.control.fleet import Fleet
from lab.control.gateway import Gateway
from lab.control.live import LiveRequest
from lab.control.observer import Transfer


@dataclass(frozen=True, slots=True)
class Link:
    """Bytes a second, and nanoseconds until the first byte is there. Those don't keep the next transfer waiting."""

    bytes_s: float
    latency_ns: int = 0

    def wire_ns(self, size: int) -> int:
        """How long so many bytes occupy the link."""
        return round(size / self.bytes_s * 1e9)


@dataclass(frozen=True, slots=True)
class Failure:
    """A replica by index is lost at `at`; `back` nanoseconds later another starts in its place (None: never)."""

    replica: int
    at: int
    back: int | None = None


@dataclass(slots=True, eq=False)
class _Move:
    """One request between two replicas."""

    old: LiveRequest
    source: EngineCore
    ready: int
    destination: EngineCore | None = None
    new: LiveRequest | None = None
    tokens: int = 0
    reserved: int = -1
    """When room was found; -1 while there is none."""
    called_off: bool = False


class Moves:
    """All requests that are between replicas."""

    def __init__(
        self,
        env: simpy.Environment,
        gateway: Gateway,
        fleet: Fleet,
        link: Link | None,
        wake: Callable[[int], None],
        idle: Callable[[], None],
    ) -> None:
        """`wake`: a replica may have something to do. `idle`: a move has ended."""
        self._env, self._gateway, self._fleet = env, gateway, fleet
        self._link, self._wake, self._idle = link, wake, idle
        self._wire = simpy.Resource(env, capacity=1)
        self.pending: dict[int, list[_Move]] = {}
        """By destination, moves that wait for room, in order."""
        self._homeless: list[_Move] = []
        """That no replica decodes now."""
        self._lost: list[LiveRequest] = []
        """Of lost replicas, requests that no other takes now."""
        self._moving: list[_Move] = []

    @property
    def active(self) -> bool:
        """Whether any request is between replicas."""
        return bool(self._moving or self.pending or self._homeless or self._lost)

    @property
    def moving(self) -> bool:
        """Whether any is that will get somewhere as things are."""
        return bool(self._moving or self.pending)

    def waits_for(self, index: int) -> bool:
        """Whether a move waits for room on this replica."""
        return index in self.pending

    # -- from prefill to decode ------------------------------------------------------------------------

    def begin(self, live: LiveRequest, source: EngineCore, now: int) -> None:
        """A request has its first token, and its KV at `source`."""
        self._place(_Move(live, source, now), now)

    def _place(self, move: _Move, now: int) -> None:
        found = self._gateway.place(move.old.request, now)
        core = self._fleet.ready(found[0]) if found is not None else None
        if core is None:
            self._homeless.append(move)
            return
        move.destination, move.new = core, core.relocation.adopt(move.old)
        self.pending.setdefault(core.replica, []).append(move)
        self.reserve(core.replica, now)

    def reserve(self, index: int, now: int) -> None:
        """Find room for those that wait for this replica; nobody overtakes the first."""
        waiting = self.pending.get(index, [])
        while waiting:
            move = waiting[0]
            assert move.destination is not None
            assert move.new is not None
            tokens = move.destination.relocation.reserve(move.new, move.old.computed, now)
            if tokens is None:
                return
            move.tokens, move.reserved = tokens, now
            del waiting[0]
            self._moving.append(move)
            self._env.process(self._send(move, move.destination, move.new))
        self.pending.pop(index, None)

    def _send(
        self, move: _Move, destination: EngineCore, new: LiveRequest
    ) -> Generator[simpy.Event, Any, None]:
        env, link = self._env, self._link
        assert link is not None
        capacity = move.source.capacity
        size = -(-move.tokens * capacity.block_bytes // capacity.block_size)
        sent = int(env.now)
        if move.tokens:
            with self._wire.request() as turn:
                yield turn
                sent = int(env.now)
                if not move.called_off:
                    yield env.timeout(link.wire_ns(size))
            yield env.timeout(link.latency_ns)
        self._moving.remove(move)
        if move.called_off:
            self._idle()
            return
        now, source = int(env.now), move.source
        new.transfers.append(
            Transfer(
                source.replica, destination.replica, move.tokens, size, move.ready, move.reserved, sent, now
            )
        )
        source.relocation.let_go(move.old.request.id, now)
        destination.relocation.arrive(new, now)
        self._wake(destination.replica)
        self._wake(source.replica)
        self._idle()

    # -- lost replicas ---------------------------------------------------------------------------------

    def lost(self, core: EngineCore, now: int) -> None:
        """Everything that this replica had, or that was on its way from or to it, is computed again elsewhere."""
        gone = core.relocation.evacuate(now)
        gone = [live for live in gone if all(live is not move.new for move in self._moving)]
        off = [move for move in self._moving if core in (move.source, move.destination)]
        off += self.pending.pop(core.replica, [])
        for index, waiting in list(self.pending.items()):
            off += [move for move in waiting if move.source is core]
            self.pending[index] = [move for move in waiting if move.source is not core]
            if not self.pending[index]:
                del self.pending[index]
        off += [move for move in self._homeless if move.source is core]
        self._homeless = [move for move in self._homeless if move.source is not core]
        for move in off:
            if move.called_off:
                continue
            move.called_off = True
            if move.source is not core:  # its KV is still there
                self._place(_Move(move.old, move.source, move.ready), now)
                continue
            if move.destination is not None and move.new is not None and move.reserved >= 0:
                move.destination.relocation.cancel(move.new, now)
                self._wake(move.destination.replica)
            move.old.enter("queue", now, "failed")
            gone.append(move.old)
        self._lost += gone
        self._take_up(now)

    def _take_up(self, now: int) -> None:
        """Send requests that lost their replica to another, while there is one."""
        waiting, self._lost = self._lost, []
        for live in waiting:
            found = self._gateway.again(live.request, now)
            core = self._fleet.ready(found[0]) if found is not None else None
            if core is None:
                self._lost.append(live)
                continue
            core.relocation.arrive(core.relocation.adopt(live), now)
            self._wake(core.replica)

    def somebody_is_up(self, now: int) -> None:
        """A replica is ready that wasn't."""
        self._take_up(now)
        homeless, self._homeless = self._homeless, []
        for move in homeless:
            self._place(move, now)

    def give_up(self, now: int) -> None:
        """No replica is left, and none will come: what is between replicas ends."""
        for move in self._homeless:
            move.source.relocation.let_go(move.old.request.id, now)
        left = [*(move.old for move in self._homeless), *self._lost]
        self._homeless, self._lost = [], []
        for live in left:
            self._gateway.lose(live, "rejected", "no replica is up", now)

    def interrupt(self, now: int) -> None:
        """The run is cut off: whoever is at no replica is recorded. (What is on the wire is at its destination.)"""
        left = [move.old for waiting in self.pending.values() for move in waiting]
        for live in [*left, *(move.old for move in self._homeless), *self._lost]:
            self._gateway.lose(live, "unfinished", "interrupted", max(now, live.phase_start))
