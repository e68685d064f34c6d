"""The replicas behind the gateway: which there are, what routers see of them, and when more start or some go.

Request path, control plane. Sans-IO like the engine core: the driver brings replicas to life at the times
that `look` returns, and says when a draining one is empty.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from lab.control.blame import blame
from lab.control.core import EngineCore
from lab.control.observer import FleetEvent, Observer
from lab.errors import PolicyError
from lab.policy import FleetView, ReplicaView, ScalingPolicy
from lab.topology import Scaled

FAILED = "failed"
"""Why a replica is gone that was lost."""
IN_PLACE_OF = "in place of "
"""Why another starts then; the lost one's index follows."""


@dataclass(frozen=True, slots=True)
class FleetSpec:
    """How many replicas, and how well the gateway sees them."""

    replicas: int = 1
    """Ready at the beginning, and the least there will be."""
    most: int = 1
    cold_start: int = 0
    """Nanoseconds from the decision until a new replica is ready."""
    refresh: int = 0
    """Views are taken anew when older than this many nanoseconds; 0: always current."""
    noise: float = 0.0
    """Log-standard deviation of the counts in views."""
    roles: tuple[str, ...] = ()
    """What the replicas of the beginning are there for, in their order (`lab.topology`); none: all are `mixed`."""
    groups: tuple[Scaled, ...] = ()
    """Groups that are scaled apart; none: all replicas are scaled together, if at all."""


class Fleet:
    """Replicas by index; indices are never used again. Scaling drains the emptiest and recalls before it starts."""

    def __init__(
        self,
        make: Callable[[int, int], EngineCore],
        scaling: ScalingPolicy,
        spec: FleetSpec,
        *,
        rng: random.Random | None = None,
        observer: Observer | None = None,
        scalings: Sequence[ScalingPolicy] = (),
    ) -> None:
        """`make` gets a replica's index, and its place in the topology (`slots`). `scalings`: of each group that is
        scaled apart."""
        self.spec, self.scaling = spec, scaling
        self._scalings = list(scalings)
        self.slots: dict[int, int] = {}
        """By index, a replica's place among those of the beginning; what is started later takes the place of one."""
        self._make, self._rng = make, rng or random.Random(0)
        self._observer = observer or Observer()
        self._ready: dict[int, EngineCore] = {}
        self._starting: dict[int, int] = {}
        self._draining: dict[int, EngineCore] = {}
        self._lost: set[int] = set()
        self._next = 0
        self._views: list[ReplicaView] = []
        self._taken: int | None = None
        self._arrived = self._finished = self._met = self._rejected = 0
        if not (isinstance(scaling.interval, int) and scaling.interval > 0):
            raise PolicyError(
                f"scaling policy '{type(scaling).__name__}': interval is {scaling.interval!r}; "
                "expected nanoseconds, an integer above 0"
            )
        for _ in range(spec.replicas):
            self.slots[self._next] = self._next
            self._ready[self._next] = self._make(self._next, self._next)
            self._tell(0, self._next, "ready", spec.replicas, "initial")
            self._next += 1
        self._first = self._ready[0]

    @property
    def core(self) -> EngineCore:
        """The first replica: the only one, where there is just one."""
        return self._first

    @property
    def cores(self) -> list[EngineCore]:
        """All replicas that hold or take requests."""
        return [*self._ready.values(), *self._draining.values()]

    def ready(self, index: int) -> EngineCore | None:
        """The replica of this index, if requests may be sent there."""
        return self._ready.get(index)

    def role(self, index: int) -> str:
        """What a replica is there for."""
        return self.spec.roles[self.slots[index]] if self.spec.roles else "mixed"

    def draining(self, index: int) -> bool:
        return index in self._draining

    def arrived(self) -> None:
        """A request came to the gateway."""
        self._arrived += 1

    def rejected(self) -> None:
        """It was turned away."""
        self._rejected += 1

    def ended(self, met: bool) -> None:
        """A request ended; `met`: within its objectives."""
        self._finished += 1
        self._met += met

    # -- what is seen ----------------------------------------------------------------------------------

    def views(self, now: int) -> list[ReplicaView]:
        """The ready replicas as the gateway sees them: as old, and as blurred, as the spec says."""
        if self._taken is None or now - self._taken >= self.spec.refresh:
            self._taken = now
            views = [core.view(now) for core in self._ready.values()]
            plain = not (self.spec.roles or self.spec.refresh or self.spec.noise)
            self._views = views if plain else [self._blurred(self._told(view)) for view in views]
        return list(self._views)

    def _told(self, view: ReplicaView) -> ReplicaView:
        core = self._ready[view.index]
        if self.spec.roles:
            view = replace(view, role=self.role(view.index))
        if not self.spec.refresh:
            return view
        then = core.pool.keys()  # a copy: what the cache held when this view was taken
        return replace(view, cached=lambda request: core.cached(request, then))

    def _blurred(self, view: ReplicaView) -> ReplicaView:
        if not self.spec.noise:
            return view

        def blur(count: int) -> int:
            return round(count * math.exp(self.spec.noise * self._rng.gauss(0.0, 1.0)))

        return replace(
            view,
            running=blur(view.running),
            waiting=blur(view.waiting),
            blocks_free=min(blur(view.blocks_free), view.blocks_total),
            tokens_to_compute=blur(view.tokens_to_compute),
            tokens_expected=blur(view.tokens_expected),
            context_tokens=blur(view.context_tokens),
        )

    # -- what changes ----------------------------------------------------------------------------------

    def look(self, now: int) -> list[tuple[int, int]]:
        """Ask the scaling policy, of each group that is scaled apart, and act on it. Returns (index, time it will be
        ready) of what starts."""
        told = (self._arrived, self._finished, self._met, self._rejected)
        self._arrived = self._finished = self._met = self._rejected = 0
        if not self.spec.groups:
            return self._ask(None, self.scaling, told, now)
        started = []
        for group, scaling in zip(self.spec.groups, self._scalings, strict=True):
            started += self._ask(group, scaling, told, now)
        return started

    def _ask(
        self, group: Scaled | None, scaling: ScalingPolicy, told: tuple[int, int, int, int], now: int
    ) -> list[tuple[int, int]]:
        least, most, called = self.spec.replicas, self.spec.most, ""
        views = self.views(now)
        if group is not None:
            least, most, called = group.least, group.most, group.group
            views = [view for view in views if self._within(group, view.index)]
            if not views:  # lost, all of them: nothing to look at
                return self._grow(group, least, f"{called}: none is ready", now)
        starting = len(self._those(group, self._starting))
        draining = len(self._those(group, self._draining))
        seen = FleetView(tuple(views), starting, draining, least, most, *told, group=called)
        name = type(scaling).__name__
        try:
            answer = scaling.target(seen, now)
        except Exception as error:
            raise blame(error, f"scaling policy '{name}'", f"at {now / 1e9:.3f} s") from error
        if not (isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[0], int)):
            raise PolicyError(
                f"scaling policy '{name}': target() returned {answer!r}; expected (replicas, reason)"
            )
        target, reason = min(max(answer[0], least), most), str(answer[1])
        if group is not None:
            reason = f"{called}: {reason}"
        return self._grow(group, target, reason, now) + self._shrink(group, target, reason, now)

    def _within(self, group: Scaled | None, index: int) -> bool:
        """Whether a replica is one of the group's."""
        return group is None or group.first <= self.slots[index] < group.first + group.least

    def _those(self, group: Scaled | None, indices: Iterable[int]) -> list[int]:
        return [index for index in indices if self._within(group, index)]

    def _up(self, group: Scaled | None) -> int:
        """How many are ready or starting."""
        return len(self._those(group, self._ready)) + len(self._those(group, self._starting))

    def _grow(self, group: Scaled | None, target: int, reason: str, now: int) -> list[tuple[int, int]]:
        started = []
        while self._up(group) < target:
            recalled = self._those(group, self._draining)
            if recalled:
                index = max(recalled)
                self._ready[index] = self._draining.pop(index)
                self._changed(now, index, "recall", target, reason)
                continue
            index, self._next = self._next, self._next + 1
            self.slots[index] = 0 if group is None else group.first
            self._starting[index] = now + self.spec.cold_start
            self._tell(now, index, "start", target, reason)
            started.append((index, self._starting[index]))
        return started

    def _shrink(self, group: Scaled | None, target: int, reason: str, now: int) -> list[tuple[int, int]]:
        while self._up(group) > target:
            starting = self._those(group, self._starting)
            if starting:
                index = max(starting)
                del self._starting[index]
                self._tell(now, index, "gone", target, reason)
                continue
            ready = self._those(group, self._ready)
            index = min(ready, key=lambda i: (self._ready[i].waiting + self._ready[i].running, -i))
            self._draining[index] = self._ready.pop(index)
            self._changed(now, index, "drain", target, reason)
        return []

    def started(self, index: int, now: int) -> EngineCore | None:
        """A replica's cold start is over; None if it was called off meanwhile."""
        if self._starting.pop(index, None) is None:
            return None
        self._ready[index] = self._make(index, self.slots[index])
        self._changed(now, index, "ready", len(self._ready), "cold start over")
        return self._ready[index]

    def left(self, index: int, now: int) -> None:
        """A draining replica is empty and gone."""
        del self._draining[index]
        self._tell(now, index, "gone", len(self._ready), "drained")

    def fail(self, index: int, now: int) -> EngineCore | None:
        """A replica is lost; None if it isn't up."""
        core = self._ready.pop(index, None) or self._draining.pop(index, None)
        if core is not None:
            self._lost.add(index)
            self._changed(now, index, "gone", len(self._ready), FAILED)
        return core

    def lost(self, index: int) -> bool:
        """Whether it failed."""
        return index in self._lost

    def replace(self, lost: int, now: int) -> tuple[int, int]:
        """Start another in the place of one that was lost. Returns (index, time it will be ready)."""
        index, self._next = self._next, self._next + 1
        self.slots[index] = self.slots[lost]
        self._starting[index] = now + self.spec.cold_start
        self._tell(now, index, "start", len(self._ready) + len(self._starting), f"{IN_PLACE_OF}{lost}")
        return index, self._starting[index]

    def close(self, now: int) -> None:
        """The run is over: what is still up goes."""
        for index in sorted([*self._ready, *self._starting, *self._draining]):
            self._tell(now, index, "gone", 0, "end of run")

    def _changed(self, now: int, index: int, event: str, target: int, reason: str) -> None:
        self._taken = None  # a gateway knows which replicas it has, however stale the rest
        self._tell(now, index, event, target, reason)

    def _tell(self, now: int, index: int, event: str, target: int, reason: str) -> None:
        self._observer.on_fleet(FleetEvent(now, index, event, target, reason))
