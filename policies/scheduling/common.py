"""What several scheduling policies share: a queue of the waiting, and running in order of precedence."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lab.policy import How, RequestId, RequestView, SchedulingPolicy, Shortage, Step
from policies.keyed_heap import Key, KeyedHeap


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


def run_in_order(step: Step, order: Sequence[RequestView]) -> bool:
    """Run running requests in this order; when KV blocks run short, preempt from its end.

    False if anything was preempted. The first of the order always gets its blocks in the end, so somebody
    makes progress in every step.
    """
    end = len(order)
    for index, request in enumerate(order):
        if index >= end:
            break
        while (grant := step.run(request)).short is Shortage.BLOCKS:
            end -= 1
            step.preempt(order[end])
            if end == index:
                return False
        if not grant:
            break
    return end == len(order)


def run_merged(
    step: Step,
    queue: KeyedHeap[RequestId],
    key: Callable[[RequestView], Key],
    displaces: Callable[[RequestView, RequestView], bool],
) -> None:
    """Serve running and waiting requests in one order of `key`, least first.

    Running requests that lack blocks preempt from the end of the order. A waiting request that lacks a slot
    or blocks preempts from the end only those that it `displaces`, and only if that makes room for all of it.
    """
    order = sorted(step.running.values(), key=key)
    index, end = 0, len(order)
    admitting = True
    while True:
        # Whoever was preempted in this step waits behind all that is left of it.
        admitting = admitting and bool(queue) and all(queue.peek() != lost.id for lost in order[end:])
        if index == end and not admitting:
            return
        if admitting and (index == end or queue.peek_key() < key(order[index])):
            head = step.waiting[queue.peek()]
            grant = step.run(head)
            if grant:
                queue.pop()
                continue
            if grant.short is Shortage.TOKENS:
                return
            victims = [request for request in order[index:end] if displaces(head, request)]
            enough = grant.short is not Shortage.PAUSED and bool(victims) and step.fits_without(head, victims)
            if enough and displaces(head, order[end - 1]):
                end -= 1
                step.preempt(order[end])
            else:
                admitting = False
            continue
        grant = step.run(order[index])
        if grant.short is Shortage.BLOCKS:
            end -= 1
            step.preempt(order[end])
            admitting = False
            continue
        if not grant:
            return
        index += 1
