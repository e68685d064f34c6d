"""Policies that break one contract each, as people do. `lab.testing` has to find every one of them."""

from __future__ import annotations

import random
from collections.abc import Sequence

from lab.policy import (
    AdmissionPolicy,
    BlockId,
    BlockView,
    CompressionPolicy,
    FleetView,
    How,
    KvKeep,
    LengthPredictor,
    PreemptionPolicy,
    ReplicaView,
    Request,
    RequestView,
    RoutingPolicy,
    ScalingPolicy,
    SchedulingPolicy,
    Step,
    Verdict,
)
from policies.eviction.lru import Lru
from policies.scheduling.common import run_in_order
from policies.scheduling.fcfs import Fcfs


class NeedsWidth(Fcfs):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width


class ForgetsAborts(Fcfs):
    """A request that is aborted while it waits stays in the queue."""

    def on_finish(self, request: RequestView, reason: str, now: int) -> None:
        pass


class DividesByTheRest(Fcfs):
    """Fails when the batch is empty."""

    def schedule(self, step: Step) -> None:
        self.share = step.token_budget // len(step.running)
        super().schedule(step)


class RaisesOnPreemption(Fcfs):
    def on_preempt(self, request: RequestView, how: How, now: int) -> None:
        raise RuntimeError("nobody preempts my requests")


class RunsTwice(Fcfs):
    """Gives what is left of the budget to the first request, which has had its share."""

    def schedule(self, step: Step) -> None:
        super().schedule(step)
        for request in step.running.values():
            if step.tokens_left and request.remaining > request.granted:
                step.run(request)


class LosesThePreempted(Fcfs):
    """A preempted request is never queued again."""

    def on_preempt(self, request: RequestView, how: How, now: int) -> None:
        pass


class WaitsForCompany(Fcfs):
    """Runs nothing until two requests are there: the last one starves."""

    def schedule(self, step: Step) -> None:
        if len(step.running) + len(step.waiting) >= 2:
            super().schedule(step)


class TakesTurnsForEver(Fcfs):
    """Preempts what has run for one step, so that a long prompt begins again and again."""

    def schedule(self, step: Step) -> None:
        for request in list(step.running.values()):
            if request.remaining > 1:
                step.preempt(request)
                return
        super().schedule(step)


class InsistsWithoutEnd(Fcfs):
    """Asks again until it is given something."""

    def schedule(self, step: Step) -> None:
        for request in list(step.running.values()):
            while not step.run(request):
                pass
        self.admit_while_it_fits(step)


class DrawsFromTheWorld(SchedulingPolicy):
    """Random without `self.rng`."""

    def schedule(self, step: Step) -> None:
        everybody = [*step.running.values(), *step.waiting.values()]
        random.shuffle(everybody)
        for request in everybody:
            step.run(request)


class OrderOfASet(SchedulingPolicy):
    """Depends on the hashes of the ids, which differ from process to process."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def on_arrival(self, request: RequestView, now: int) -> None:
        self.names.add(request.id)

    def on_finish(self, request: RequestView, reason: str, now: int) -> None:
        self.names.discard(request.id)

    def schedule(self, step: Step) -> None:
        for name in self.names:
            step.run(name)


class OrderOfAddresses(SchedulingPolicy):
    """Ties end in `id()`."""

    def schedule(self, step: Step) -> None:
        everybody = [*step.running.values(), *step.waiting.values()]
        for request in sorted(everybody, key=lambda r: (-r.generated, id(r))):
            step.run(request)


class WritesOnViews(Fcfs):
    """Ages its requests in place."""

    def on_arrival(self, request: RequestView, now: int) -> None:
        request.priority = 0  # type: ignore[misc]
        request.arrival = 0  # type: ignore[misc]
        super().on_arrival(request, now)


class RaisesTheBudget(Fcfs):
    def schedule(self, step: Step) -> None:
        step.tokens_left = 1000  # type: ignore[misc]
        super().schedule(step)


class FreesBlocksItself(Fcfs):
    """Reaches behind the view."""

    def on_tokens(self, request: RequestView, computed: int, generated: int, now: int) -> None:
        request._live.blocks.clear()  # type: ignore[attr-defined]


class WalksTheQueue(SchedulingPolicy):
    """Right, and slow."""

    def schedule(self, step: Step) -> None:
        if run_in_order(step, list(step.running.values())):
            for request in sorted(step.waiting.values(), key=lambda r: (r.arrival, r.seq)):
                if not step.run(request):
                    break


class RemembersEverybody(Fcfs):
    """Right, and grows."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, int] = {}

    def on_arrival(self, request: RequestView, now: int) -> None:
        self.seen[request.id] = now
        super().on_arrival(request, now)


class EvictsPinned(Lru):
    """Forgets that a block was taken up again."""

    def on_pinned(self, block: BlockView, now: int) -> None:
        pass


class EvictsNothing(Lru):
    def victim(self, now: int) -> BlockId:
        return None  # type: ignore[return-value]


class EvictionRaises(Lru):
    def on_hit(self, block: BlockView, now: int) -> None:
        raise KeyError(block.id)


class WritesOnBlocks(Lru):
    def on_cached(self, block: BlockView, now: int) -> None:
        block.depth = 0 if block.depth else 7  # type: ignore[misc]


class PicksAStranger(PreemptionPolicy):
    def victim(self, candidates: Sequence[RequestView], step: Step) -> RequestView:
        return next(iter(step.waiting.values()), candidates[0])


class UnknownMode(PreemptionPolicy):
    def how(self, victim: RequestView, step: Step) -> How:
        return "compress"  # type: ignore[return-value]


class KeepsAShare(CompressionPolicy):
    def keep(self, request: Request, block_size: int) -> KvKeep | None:
        return len(request.prompt) / 2  # type: ignore[return-value]


class KeepsNothingOfTheShort(CompressionPolicy):
    def keep(self, request: Request, block_size: int) -> KvKeep | None:
        return KvKeep(len(request.prompt) // block_size // 2)


class PredictsNothing(LengthPredictor):
    def predict(self, request: Request, now: int) -> int:
        return request.output_limit - 1


class PredictsFractions(LengthPredictor):
    def predict(self, request: Request, now: int) -> int:
        return len(request.prompt) / 2  # type: ignore[return-value]


class LearnsByDividing(LengthPredictor):
    def __init__(self) -> None:
        self.mean = 1.0

    def predict(self, request: Request, now: int) -> int:
        return max(1, round(self.mean))

    def on_finish(self, request: Request, generated: int, now: int) -> None:
        self.mean = generated / (now - now)


class SaysYes(AdmissionPolicy):
    def admit(self, request: Request, replicas: Sequence[ReplicaView], now: int) -> Verdict:
        return True  # type: ignore[return-value]


class GivesNoReason(AdmissionPolicy):
    def admit(self, request: Request, replicas: Sequence[ReplicaView], now: int) -> Verdict:
        return Verdict(replicas[0].waiting < 1, "")


class BelievesViewsAreFresh(AdmissionPolicy):
    def admit(self, request: Request, replicas: Sequence[ReplicaView], now: int) -> Verdict:
        if any(replica.as_of != now for replica in replicas):
            raise ValueError("a view from the past")
        return Verdict(True, "fresh")


class RoutesByPosition(RoutingPolicy):
    def route(self, request: Request, replicas: Sequence[ReplicaView], now: int) -> tuple[int, str]:
        return len(replicas) - 1, "the last"


class RoutesByHash(RoutingPolicy):
    """Python's `hash` of text differs from process to process."""

    def route(self, request: Request, replicas: Sequence[ReplicaView], now: int) -> tuple[int, str]:
        return replicas[hash(request.id) % len(replicas)].index, "by hash"


class SortsTheReplicas(RoutingPolicy):
    """In place: the list isn't its own."""

    def route(self, request: Request, replicas: Sequence[ReplicaView], now: int) -> tuple[int, str]:
        replicas.sort(key=lambda r: -r.index)  # type: ignore[attr-defined]
        return replicas[0].index, "the highest"


class ScalesToFractions(ScalingPolicy):
    def target(self, fleet: FleetView, now: int) -> tuple[int, str]:
        return sum(r.requests for r in fleet.replicas) / 4, "load"  # type: ignore[return-value]


class ScalesByArrivals(ScalingPolicy):
    """Fails when nobody came."""

    def target(self, fleet: FleetView, now: int) -> tuple[int, str]:
        return len(fleet.replicas) + 4 // fleet.arrived, "arrivals"
