"""What several scheduling policies share: a queue of the waiting, and running in order of precedence."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence

from lab.policy import How, RequestId, RequestView, SchedulingPolicy, Shortage, Step
from policies.keyed_heap import Key, KeyedHeap

Most = Callable[[RequestView], int]
"""The most tokens that a request may get now; less than 1 ends the step's round."""


class QueueingPolicy(SchedulingPolicy):
    """Keeps the waiting requests ordered by `key`, through the hooks: `step.waiting` is never iterated."""

    def __init__(self) -> None:
        self.queue: KeyedHeap[RequestId] = KeyedHeap()

    def key(self, request: RequestView) -> Key:
        """Order of service; least first. Must end in (arrival, seq)."""
        return (request.arrival, request.seq)

    def on_arrival(self, request: RequestView, now: int) -> None:
        self.queue.push(request.id, self.key(request))

    def on_preempt(self, request: RequestView, how: How, now: int) -> None:
        self.queue.push(request.id, self.key(request))

    def on_finish(self, request: RequestView, reason: str, now: int) -> None:
        self.queue.remove(request.id)

    def admit_while_it_fits(self, step: Step) -> None:
        """Admit from the head of the queue; stop at the first that doesn't fit."""
        while self.queue and step.run(self.queue.peek()):
            self.queue.pop()


def is_decode(request: RequestView) -> bool:
    """Whether it waits for nothing but its next token."""
    return request.remaining == 1 and request.generated > 0


class Patience:
    """Who has waited too long: requests by when they began to wait, each answered for once, few at a time."""

    AT_ONCE = 16

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.since: deque[tuple[int, RequestView, int]] = deque()  # (since, who, its preemptions then)

    def begins(self, request: RequestView, now: int) -> None:
        """`now`, on any clock that doesn't go back."""
        self.since.append((now, request, request.preemptions))

    def over(self, now: int, queue: KeyedHeap[RequestId]) -> Iterator[RequestView]:
        """Those of the queue that have waited for `limit` on end; nobody if that is 0."""
        for _ in range(min(len(self.since), self.AT_ONCE)):
            since, request, preemptions = self.since[0]
            waits = request.id in queue and request.preemptions == preemptions and self.limit > 0
            if waits and now - since < self.limit:
                return
            self.since.popleft()
            if waits:
                yield request


def run_in_order(
    step: Step, order: Sequence[RequestView], most: Most | None = None, served: bool = False
) -> bool:
    """Run running requests in this order; when KV blocks run short, preempt among those not served yet.

    False if anything was preempted. Whom, the run's preemption policy says (the last, by default), but the
    first of the order is spared while there is another: it gets its blocks in the end, so somebody makes
    progress in every step, and whoever comes first and stays first ends. Nobody need be spared where others
    were `served` in this step before.
    """
    lost: set[RequestId] = set()
    for index, request in enumerate(order):
        if request.id in lost:
            continue
        limit = None if most is None else most(request)
        if limit is not None and limit < 1:
            break
        while (grant := step.run(request, limit)).short is Shortage.BLOCKS:
            rest = [other for other in order[index if served else max(index, 1) :] if other.id not in lost]
            victim = step.victim(rest or [request])
            step.preempt(victim)
            lost.add(victim.id)
            if victim is request:
                break
        if not grant and request.id not in lost:
            break
    return not lost


def run_running(step: Step, most: Most | None = None) -> bool:
    """Run the running: decodes, then the others in order of admission. False if anything was preempted.

    When KV blocks don't suffice for all decodes, all are run in order of admission, as in `run_in_order`.
    """
    rest = step.run_decodes()
    return run_in_order(step, rest, most, served=step.tokens_left < step.token_budget)


def repeat_if_settled(step: Step, queue: KeyedHeap[RequestId]) -> None:
    """Promise the same for the steps to come: nobody waits, or who waits has no slot until somebody ends."""
    if not queue:
        step.repeat(past_ends=True)
    elif not step.slots_left:
        step.repeat()


def run_merged(
    step: Step,
    queue: KeyedHeap[RequestId],
    key: Callable[[RequestView], Key],
    displaces: Callable[[RequestView, RequestView], bool],
    most: Most | None = None,
) -> None:
    """Serve running and waiting requests in one order of `key`, least first.

    Running requests that lack blocks preempt among those not served yet, as in `run_in_order`. A waiting
    request that lacks a slot or blocks preempts from the end only those that it `displaces`, and only if that
    makes room for all of it; otherwise it leaves the blocks that those behind it need for their next token, or
    they would be preempted for it all the same. So that no two push each other out in turn, `displaces` must
    not turn round between a pair before one of them got a token.
    """
    order = sorted(step.running.values(), key=key)
    lost: set[RequestId] = set()
    index, admitting, served = 0, True, False

    def needed(request: RequestView) -> int:
        behind = (other for other in order[index:] if not displaces(request, other))
        return sum(step.blocks_for(other, 1) for other in behind)

    while True:
        while index < len(order) and order[index].id in lost:
            index += 1
        # Whoever was preempted in this step waits behind all that is left of it.
        admitting = admitting and bool(queue) and queue.peek() not in lost
        if index == len(order) and not admitting:
            return
        first = admitting and (index == len(order) or queue.peek_key() < key(order[index]))
        request = step.waiting[queue.peek()] if first else order[index]
        limit = None if most is None else most(request)
        if limit is not None and limit < 1:
            return
        grant = step.run(request, limit, leave_free=needed(request) if first and not lost else 0)
        if grant:
            served = True
            if first:
                queue.pop()
            else:
                index += 1
            continue
        if grant.short is Shortage.TOKENS or (grant.short is Shortage.PAUSED and not first):
            return
        rest = [other for other in order[index:] if other.id not in lost]
        if first:
            victims = [other for other in rest if displaces(request, other)]
            enough = (
                grant.short is not Shortage.PAUSED and bool(victims) and step.fits_without(request, victims)
            )
            admitting = enough and displaces(request, rest[-1])
            if not admitting:
                continue
            victim = rest[-1]
        else:
            victim = step.victim(rest if served or len(rest) == 1 else rest[1:])
            admitting = False
        step.preempt(victim)
        lost.add(victim.id)
