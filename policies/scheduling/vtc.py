"""vtc: virtual token counter: whoever has been served least, in weighted tokens, is served next.

Rule: a tenant's counter grows by input_weight x prompt tokens on admission and output_weight a token generated,
over its weight. The tenant of the least counter has its oldest admitted, until one doesn't fit. Who comes back from
having none waiting is lifted to the least counter of those that have (or of the last that had), so nobody saves up.
Origin: Sheng et al., OSDI'24. Two tenants that always have requests waiting differ in service by no more than
2 max(input_weight x longest prompt, output_weight x KV tokens).
Wins: isolation of tenants. Loses: cache locality; a tenant's bursts wait.
Cost: O(running log tenants) a step, O(log tenants + log waiting) an admission.
"""

from __future__ import annotations

from typing import Literal

from lab.policy import RequestId, RequestView, Step
from policies.keyed_heap import Key, KeyedHeap
from policies.scheduling.tenants import TenantQueues


class VirtualTokenCounter(TenantQueues):
    """`weights`: tenants' shares, else 1. `charge=predicted`: expected output on admission, settled up later."""

    def __init__(
        self,
        charge: Literal["actual", "predicted"] = "actual",
        input_weight: float = 1.0,
        output_weight: float = 2.0,
        weights: dict[str, float] | None = None,
    ) -> None:
        super().__init__(input_weight, output_weight)
        if charge not in ("actual", "predicted"):
            raise ValueError(f"charge is {charge!r}; expected 'actual' or 'predicted'")
        if not all(weight > 0 for weight in (weights or {}).values()):
            raise ValueError(f"weights is {weights}; expected all to be more than 0")
        self.ahead, self.weights = charge == "predicted", dict(weights or {})
        self.counters: dict[str, float] = {}
        self.active: KeyedHeap[str] = KeyedHeap()
        self.last = ""  # to cease to be active
        self.prepaid: dict[RequestId, int] = {}  # output tokens charged and not generated yet

    def turn(self, tenant: str) -> Key:
        return (self.counters[tenant], *self.queues[tenant].peek_key())

    def joined(self, tenant: str) -> None:
        floor = self.active.peek_key()[0] if self.active else self.counters.get(self.last, 0.0)
        self.counters[tenant] = max(self.counters.get(tenant, 0.0), floor)

    def waits(self, tenant: str) -> None:
        self.active.push(tenant, self.turn(tenant))

    def left(self, tenant: str) -> None:
        self.active.remove(tenant)
        self.last = tenant

    def charge(self, tenant: str, service: float) -> None:
        self.counters[tenant] += service / self.weights.get(tenant, 1.0)
        if tenant in self.active:
            self.active.push(tenant, self.turn(tenant))

    def on_tokens(self, request: RequestView, computed: int, generated: int, now: int) -> None:
        if generated and self.prepaid.get(request.id):
            self.prepaid[request.id] -= 1
        else:
            super().on_tokens(request, computed, generated, now)

    def on_finish(self, request: RequestView, reason: str, now: int) -> None:
        super().on_finish(request, reason, now)
        self.charge(request.tenant, -self.output_weight * self.prepaid.pop(request.id, 0))

    def schedule(self, step: Step) -> None:
        if not self.run_running(step):
            return
        while self.active:
            request = step.waiting[self.queues[self.active.peek()].peek()]
            if not self.admit(step, request.id):
                break
            if self.ahead and not request.preemptions:
                self.prepaid[request.id] = request.expected_output
                self.charge(request.tenant, self.output_weight * request.expected_output)
