"""A prompt's KV on its way while it is being computed: layer by layer. State path, data plane.

A step's layers are taken to be done one after another, evenly over its time. Whenever the link is free, what is
computed and not yet sent goes as one piece, and then others have their turn. So over a fast link the last layer is all
that is left when the prompt is done, and a slow one is never idle from the first layer on. Origin: Splitwise
(arXiv:2311.18677), Mooncake (arXiv:2407.00079).
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import simpy

from lab.control.core import EngineCore
from sim.wires import Wire


class Stream:
    """From one request's source to one destination. Counts in units: one layer's KV of one token."""

    def __init__(
        self,
        env: simpy.Environment,
        wire: Wire,
        source: EngineCore,
        destination: int,
        skip: int,
        carried: Callable[[int], None],
    ) -> None:
        """`skip`: leading tokens that the destination has cached. `carried` hears of all bytes that went over the
        link."""
        self.source, self.destination, self.skip = source, destination, skip
        self._env, self._wire, self._layers = env, wire, wire.link.layers
        self._carried = carried
        self.wasted = 0
        """Bytes that were sent in vain: the prompt lost its KV and was computed again."""
        self.last = -1
        """When the last piece so far was on the wire as a whole."""
        self.resumed = -1
        """When, with the prompt done, a piece was first on the wire; -1 if none was."""
        self.over = env.event()
        """Nothing is left to send, or it was called off."""
        self.tokens = 0
        """Computed, once the chunk is that is being computed."""
        self._base = self._chunk = 0
        """Units a layer: of earlier chunks, and of the chunk that began at `_began` and takes `_took`."""
        self._began = self._took = 0
        self._sent, self._life = 0, 0
        self._done = self._cancelled = self._on_wire = False
        self._news: simpy.Event | None = None
        env.process(self._run())

    # -- what is told ----------------------------------------------------------------------------------

    def chunk(self, start: int, tokens: int, now: int, took: int) -> None:
        """Tokens `start .. start + tokens` are computed from `now` on; all before them are."""
        if start < self.tokens:
            self.restart()
        self._base = max(start - self.skip, 0)
        self._chunk = max(start + tokens - self.skip, 0) - self._base
        self._began, self._took, self.tokens = now, took, start + tokens
        self._wake()

    def restart(self) -> None:
        """The KV computed so far is gone."""
        self.wasted += self.size(self._sent)
        self._sent = self._base = self._chunk = self.tokens = 0
        self._life += 1

    def finish(self, now: int) -> None:
        """The prompt is computed: what is left of it goes now."""
        self._done = True
        if self._on_wire:
            self.resumed = now
        self._wake()

    def cancel(self) -> None:
        """What isn't on the wire yet won't be."""
        self._cancelled = True
        self._wake()
        if not self.over.triggered:
            self.over.succeed()

    # -- what was sent ---------------------------------------------------------------------------------

    @property
    def sent(self) -> int:
        """Bytes at the destination."""
        return self.size(self._sent)

    def size(self, units: int) -> int:
        """Bytes of the first so many units."""
        capacity = self.source.capacity
        return -(-units * capacity.block_bytes // (capacity.block_size * self._layers))

    def _ready(self, now: int) -> tuple[int, int | None]:
        """(units that could be at the destination, when there will be more)."""
        layers, passed = self._layers, now - self._began
        if passed >= self._took:
            return layers * (self._base + self._chunk), None
        done = passed * layers // self._took
        more = self._began - (-(done + 1) * self._took // layers)
        return layers * self._base + done * self._chunk, more

    def _wake(self) -> None:
        if self._news is not None:
            self._news.succeed()
            self._news = None

    def _run(self) -> Generator[simpy.Event, Any, None]:
        env = self._env
        while not self._cancelled:
            ready, more = self._ready(int(env.now))
            if ready > self._sent:
                yield from self._wire.turn()
                yield from self._piece()
                self._wire.done()
            elif more is not None:
                yield env.timeout(more - env.now)
            elif self._done:
                break
            else:
                self._news = env.event()
                yield self._news
        if not self.over.triggered:
            self.over.succeed()

    def _piece(self) -> Generator[simpy.Event, Any, None]:
        """All that is ready, now that the link is free."""
        ready, life = self._ready(int(self._env.now))[0], self._life
        if self._cancelled or ready <= self._sent:
            return
        if self._done and self.resumed < 0:
            self.resumed = int(self._env.now)
        before, after = self.size(self._sent), self.size(ready)
        self._on_wire = True
        yield from self._wire.carry(before, after)
        self._on_wire, self.last = False, int(self._env.now)
        self._carried(after - before)
        if life == self._life:
            self._sent = ready
        else:
            self.wasted += after - before
