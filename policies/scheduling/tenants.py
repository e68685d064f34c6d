"""What the fair policies share: a queue for each tenant."""

from __future__ import annotations

from lab.policy import How, RequestId, RequestView, SchedulingPolicy, Step
from policies.keyed_heap import KeyedHeap
from policies.scheduling.common import run_running


class TenantQueues(SchedulingPolicy):
    """Keeps the waiting requests of each tenant by arrival. A tenant is *active* while it has some.

    A subclass says whose turn it is: `joined`, `waits` and `left` tell it of active tenants, `charge` of service in
    weighted tokens: a prompt's on its first admission (computing it again serves nobody), an output's as it comes.
    """

    def __init__(self, input_weight: float, output_weight: float) -> None:
        for name, value in (("input_weight", input_weight), ("output_weight", output_weight)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} is {value}; expected at least 0")
        if input_weight == output_weight == 0:
            raise ValueError("input_weight and output_weight are 0; expected one to be more")
        self.input_weight, self.output_weight = input_weight, output_weight
        self.queues: dict[str, KeyedHeap[RequestId]] = {}

    def joined(self, tenant: str) -> None:
        """A request arrives, the only one of its tenant to wait."""

    def waits(self, tenant: str) -> None:
        """It is active, and the first of its waiting requests may be another."""

    def left(self, tenant: str) -> None:
        """Its last waiting request was admitted, or has gone."""

    def charge(self, tenant: str, service: float) -> None:
        """It was served this much."""

    def prompt_tokens(self, step: Step, request: RequestView) -> int:
        """What of a prompt is charged; asked right before its admission."""
        return request.prompt_tokens

    def on_arrival(self, request: RequestView, now: int) -> None:
        if request.tenant not in self.queues:
            self.joined(request.tenant)
        self.on_preempt(request, "recompute", now)

    def on_preempt(self, request: RequestView, how: How, now: int) -> None:
        queue = self.queues.setdefault(request.tenant, KeyedHeap())
        queue.push(request.id, (request.arrival, request.seq))
        self.waits(request.tenant)

    def on_tokens(self, request: RequestView, computed: int, generated: int, now: int) -> None:
        if generated:
            self.charge(request.tenant, self.output_weight * generated)

    def on_finish(self, request: RequestView, reason: str, now: int) -> None:
        self.remove(request)

    def remove(self, request: RequestView) -> None:
        queue = self.queues.get(request.tenant)
        if queue and request.id in queue:
            queue.remove(request.id)
            if queue:
                self.waits(request.tenant)
            else:
                del self.queues[request.tenant]
                self.left(request.tenant)

    def admit(self, step: Step, name: RequestId) -> bool:
        """Admit this waiting request and charge its tenant, if it fits."""
        request = step.waiting[name]
        tokens = self.prompt_tokens(step, request)
        if not step.run(request):
            return False
        if not request.preemptions:
            self.charge(request.tenant, self.input_weight * tokens)
        self.remove(request)
        return True

    def run_running(self, step: Step) -> bool:
        """Running requests by admission; whether new ones may follow."""
        return run_running(step) and step.slots_left > 0 and step.tokens_left > 0
