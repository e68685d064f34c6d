"""Requests that go from one replica to another, as seen by one of the two. Request path, control plane.

A request leaves with its life so far (`hand_over`), its blocks kept until somebody has read them (`let_go`); or because
its replica is lost (`evacuate`). Where it goes, it is adopted; room is reserved for its KV, if any is to come; it
arrives, or is cancelled on the way. Who carries it is the driver's business (`sim.moves`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from lab.control.live import LiveRequest
from lab.control.request import Request, RequestId
from lab.state.blocks import Table

if TYPE_CHECKING:
    from lab.control.core import EngineCore


class Relocation:
    """One engine core's share of it."""

    def __init__(self, core: EngineCore) -> None:
        self._core = core
        self.taker: Callable[[LiveRequest, int], None] | None = None
        """Takes requests that have their first token: they go on elsewhere."""
        self.leaving: dict[RequestId, Table] = {}
        """Block tables of those that left, until `let_go`."""

    def request(self, request_id: RequestId) -> Request:
        """One that is here, in full."""
        return self._core._requests[request_id].request

    def hand_over(self, live: LiveRequest, now: int) -> None:
        """A request leaves with its life so far; whoever takes it says when its KV has been read."""
        assert self.taker is not None
        core = self._core
        self.leaving[live.request.id] = live.table
        if live.phase == "decode" and live.phase_start == now:  # entered with this very token
            live.phase, live.phase_cause = "queue", "transfer"
        else:
            live.enter("queue", now, "transfer")
        core._repeats = 0
        core._leave(live)
        core._call(core.policy.on_finish, live.view, "moved", now)
        del live.view
        self.taker(live, now)

    def let_go(self, request_id: RequestId, now: int) -> None:
        """The KV of a request that left has been read: its blocks are given back."""
        core = self._core
        core._evicting("on_evictable", core.pool.release, self.leaving.pop(request_id), now)

    def adopt(self, moved: LiveRequest) -> LiveRequest:
        """A request that another replica had, as it will be here: after `reserve` and `arrive`, or `arrive` alone."""
        core = self._core
        live = moved.moved(core._seq, core.pool.block_size)
        core._seq += 1
        live.keep = core._compression.keep(live.request)
        live.peak = core._compression.peak(live.keep)
        live.plain = live.plain and live.keep is None
        live.status = "coming"
        return live

    def reserve(self, live: LiveRequest, computed: int, now: int) -> int | None:
        """Blocks for a request whose KV, of so many tokens, is to come, and for its next token.

        Returns the tokens that have to be moved, beside those that the prefix cache holds; None while there is no room.
        """
        core = self._core
        pool = core.pool
        size = pool.block_size
        full = computed // size
        hits = pool.match(live.chain.upto(full), full) if pool.prefix_cache else []
        wanted = -(-live.known // size)
        if wanted - len(hits) + sum(block.refs == 0 for block in hits) > pool.available:
            return None
        pool.pin(hits, now, live.request)
        live.table, live.computed = Table(hits), computed
        while len(live.blocks) < wanted:
            live.blocks.append(core._evicting("victim", pool.take, now))
        self._expect(live)
        return computed - len(hits) * size

    def arrive(self, live: LiveRequest, now: int) -> None:
        """It is here, with the KV that blocks were reserved for, or with none; it waits from now on."""
        core = self._core
        if live.status == "coming":
            self._expect(live)
        if live.status != "held":
            return  # aborted on the way
        pool, size = core.pool, core.pool.block_size
        full = live.computed // size
        if pool.prefix_cache and live.blocks:
            core._evicting("on_cached", pool.publish_next, live.table, live.chain, full, now, live.request)
        if core._joins_late and core._in_flight is not None:
            core._late.append(live)
            core._repeats = 0
        else:
            core._let_in(live, now)

    def cancel(self, live: LiveRequest, now: int) -> None:
        """What was reserved for a request that won't come is given back."""
        core = self._core
        if live.status == "held":
            core._repeats = 0
            core._leave(live)
            core._evicting("on_evictable", core.pool.release, live.table, now)

    def gave_up(self, now: int) -> bool:
        """Where nothing can run, since requests that wait hold all blocks, the last of them is to be computed again."""
        core = self._core
        if core._running or core._paused or core._late:
            return False
        for live in reversed(core._waiting.values()):
            if live.blocks:
                core._load.to_compute += live.computed
                live.computed = 0
                live.preemptions += 1
                core._evicting("on_evictable", core.pool.release, live.table, now)
                live.table = Table()
                return True
        return False

    def evacuate(self, now: int) -> list[LiveRequest]:
        """This replica is lost, and all KV with it: whoever was here, in order of entry. The core is of no use then."""
        core = self._core
        found = list(core._requests.values())
        for live in found:
            live.sync()
            live.enter("queue", max(now, live.phase_start), "failed")
            core._leave(live)
        core._repeats = 0
        core._in_flight = None
        core._late.clear()
        self.leaving.clear()
        return found

    def _expect(self, live: LiveRequest) -> None:
        core = self._core
        core._load.to_compute += live.known - live.computed
        core._load.expected += max(live.predicted - len(live.output), 0)
        core._requests[live.request.id] = live
        live.status = "held"
        core._held += 1
        core._repeats = 0
