"""Requests on their way from one replica to another: KV over shared links, and what a lost replica had. State path,
data plane.

A request that has its first token waits for room on the replica that is to decode it, then for the link, which
carries one transfer after another; its blocks are kept at the source until the last byte has arrived. A request whose
replica is lost keeps the tokens it has and is computed again elsewhere. Where KV is sent layer by layer
(`sim.layerwise`), the replica that is to decode is chosen when the prompt's first chunk begins; what arrives there
before there is room lies beside the pool.
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
from lab.control.plan import StepPlan
from lab.control.request import RequestId
from sim.layerwise import Stream
from sim.links import Link, Network
from sim.wires import Wire, Wires


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
    stream: Stream | None = None
    """What has been sending its KV while it was computed."""


class Moves:
    """All requests that are between replicas."""

    def __init__(
        self,
        env: simpy.Environment,
        gateway: Gateway,
        fleet: Fleet,
        link: Link | Network | None,
        wake: Callable[[int], None],
        idle: Callable[[], None],
    ) -> None:
        """`wake`: a replica may have something to do. `idle`: a move has ended."""
        self._env, self._gateway, self._fleet = env, gateway, fleet
        self._wake, self._idle = wake, idle
        self._wires = Wires(env, Network({(0, 0): link}) if isinstance(link, Link) else link)
        self.pending: dict[int, list[_Move]] = {}
        """By destination, moves that wait for room, in order."""
        self._homeless: list[_Move] = []
        """That no replica decodes now."""
        self._lost: list[LiveRequest] = []
        """Of lost replicas, requests that no other takes now."""
        self._moving: list[_Move] = []
        self._streams: dict[RequestId, Stream] = {}
        """Of prompts that are being computed, where KV is sent layer by layer."""
        self._wasted: dict[RequestId, int] = {}
        """Bytes that were sent of them in vain."""
        self.carried = 0
        """All bytes that went over links."""

    @property
    def active(self) -> bool:
        """Whether any request is between replicas."""
        return bool(self._moving or self.pending or self._homeless or self._lost)

    @property
    def moving(self) -> bool:
        """Whether any is that will get somewhere as things are."""
        return bool(self._moving or self.pending)

    def concern(self, core: EngineCore) -> bool:
        """Whether any request is on its way from or to this replica."""
        waiting = [move for moves in self.pending.values() for move in moves]
        return any(
            core in (move.source, move.destination) for move in (*self._moving, *waiting, *self._homeless)
        )

    def waits_for(self, index: int) -> bool:
        """Whether a move waits for room on this replica."""
        return index in self.pending

    @property
    def layerwise(self) -> bool:
        """Whether KV is sent while it is being computed."""
        return self._wires.layerwise

    def _way(self, source: EngineCore, destination: EngineCore) -> Wire:
        """The link between two replicas."""
        slots = self._fleet.slots
        return self._wires.between(slots[source.replica], slots[destination.replica])

    # -- while the prompt is being computed ------------------------------------------------------------

    def computing(self, source: EngineCore, plan: StepPlan, now: int, took: int) -> None:
        """A replica that prefills begins this step, which takes so long."""
        for name, how in plan.preempted:
            if how == "recompute" and name in self._streams:
                self._streams[name].restart()
        for name in plan.released:
            self._drop(name)
        for work in plan.items:
            stream = self._streams.get(work.request) or self._stream(work.request, source, now)
            if stream is not None:
                stream.chunk(work.start, work.tokens, now, took)

    def _stream(self, name: RequestId, source: EngineCore, now: int) -> Stream | None:
        """Begin to send a prompt's KV; None where nobody will need it, or nobody can take it now."""
        request = source.relocation.request(name)
        if request.output_limit == 1:
            return None
        found = self._gateway.place(request, now, early=True)
        core = self._fleet.ready(found[0]) if found is not None else None
        if core is None:
            return None
        skip = core.cached(request)
        stream = Stream(self._env, self._way(source, core), source, core.replica, skip, self._carry)
        self._streams[name] = stream
        return stream

    def _carry(self, size: int) -> None:
        self.carried += size

    def _drop(self, name: RequestId) -> None:
        """What has been sent of a prompt is of no use."""
        stream = self._streams.pop(name, None)
        if stream is not None:
            self._call_off(name, stream)

    def _call_off(self, name: RequestId, stream: Stream) -> None:
        stream.cancel()
        self._wasted[name] = self._wasted.get(name, 0) + stream.sent + stream.wasted

    # -- from prefill to decode ------------------------------------------------------------------------

    def begin(self, live: LiveRequest, source: EngineCore, now: int) -> None:
        """A request has its first token, and its KV at `source`."""
        move = _Move(live, source, now)
        stream = self._streams.get(live.request.id)
        core = self._fleet.ready(stream.destination) if stream is not None else None
        if stream is None or core is None:
            self._drop(live.request.id)
            self._place(move, now)
            return
        del self._streams[live.request.id]
        stream.finish(now)
        move.stream = stream
        self._settle(move, core, now)

    def _place(self, move: _Move, now: int) -> None:
        found = self._gateway.place(move.old.request, now)
        core = self._fleet.ready(found[0]) if found is not None else None
        if core is None:
            self._homeless.append(move)
            return
        self._settle(move, core, now)

    def _settle(self, move: _Move, core: EngineCore, now: int) -> None:
        """This replica is to decode it."""
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
        env, stream = self._env, move.stream
        wire = self._way(move.source, destination)
        capacity, name = move.source.capacity, move.old.request.id
        tokens, sent, late = move.tokens, int(env.now), 0
        if stream is not None:
            yield stream.over
            tokens = max(tokens - (move.old.computed - stream.skip), 0)  # cached there then, and not any more
            late = max(stream.last + wire.link.latency_ns - int(env.now), 0)
            sent = max(sent, stream.resumed)
        size = -(-tokens * capacity.block_bytes // capacity.block_size)
        if tokens:
            yield from wire.turn()
            if stream is None or stream.resumed < 0:
                sent = int(env.now)
            if not move.called_off:
                yield from wire.carry(0, size)
                self.carried += size
            wire.done()
            late = wire.link.latency_ns
        if tokens or late:
            yield env.timeout(late)
        self._moving.remove(move)
        if move.called_off:
            self._idle()
            return
        now, source = int(env.now), move.source
        size += self._wasted.pop(name, 0) + (0 if stream is None else stream.sent + stream.wasted)
        new.transfers.append(
            Transfer(
                source.replica, destination.replica, move.tokens, size, move.ready, move.reserved, sent, now
            )
        )
        source.relocation.let_go(name, now)
        destination.relocation.arrive(new, now)
        self._wake(destination.replica)
        self._wake(source.replica)
        self._idle()

    # -- lost replicas ---------------------------------------------------------------------------------

    def lost(self, core: EngineCore, now: int) -> None:
        """Everything that this replica had, or that was on its way from or to it, is computed again elsewhere."""
        for name, stream in list(self._streams.items()):
            if core is stream.source or core.replica == stream.destination:
                self._drop(name)
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
            if move.stream is not None:
                self._call_off(move.old.request.id, move.stream)
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
