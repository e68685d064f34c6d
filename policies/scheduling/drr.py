"""drr: deficit round robin over tenants, in weighted tokens.

Rule: the tenants that have requests waiting stand in a ring. The first is served, by arrival, while its deficit is
above 0; prompts are charged on admission, output token by token, so it may fall below. Once it is 0 or less, one
`quantum` is added and the tenant goes to the end of the ring. Who comes back to the ring brings debt along, but no
credit. When the request whose turn it is doesn't fit, nobody passes it.
Origin: Shreedhar and Varghese 1995; charged after the fact because output lengths are unknown, as the "modified"
DRR that VTC (OSDI'24) is compared with. Wins: fair in the long run, at O(1). Loses: coarse: service comes in
bursts of a quantum.
Cost: O(running) a step; O(1) an admission, plus one turn of the ring for each quantum charged.
"""

from __future__ import annotations

from collections import OrderedDict

from lab.policy import Step
from policies.scheduling.tenants import TenantQueues


class DeficitRoundRobin(TenantQueues):
    """`quantum=0` stands for a twentieth of the KV cache's tokens."""

    def __init__(self, quantum: int = 0, input_weight: float = 1.0, output_weight: float = 2.0) -> None:
        super().__init__(input_weight, output_weight)
        if quantum < 0:
            raise ValueError(f"quantum is {quantum}; expected at least 0")
        self.quantum = quantum
        self.ring: OrderedDict[str, None] = OrderedDict()
        self.deficit: dict[str, float] = {}

    def joined(self, tenant: str) -> None:
        self.deficit[tenant] = min(self.deficit.get(tenant, 0.0), 0.0)

    def waits(self, tenant: str) -> None:
        self.ring.setdefault(tenant)

    def left(self, tenant: str) -> None:
        del self.ring[tenant]

    def charge(self, tenant: str, service: float) -> None:
        self.deficit[tenant] -= service

    def schedule(self, step: Step) -> None:
        quantum = self.quantum or max(step.blocks_total * step.block_size // 20, 1)
        if not self.run_running(step):
            return
        while self.ring:
            tenant = next(iter(self.ring))
            if self.deficit[tenant] <= 0:
                self.deficit[tenant] += quantum
                self.ring.move_to_end(tenant)
            elif not self.admit(step, self.queues[tenant].peek()):
                break
