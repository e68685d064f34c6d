"""dlpm: deficit longest prefix match: the cache's favourite among the tenants that are not ahead of their share.

Rule: a tenant is eligible while its deficit is above 0. Of the eligible tenants' waiting requests (up to 128 in
all, the oldest of each tenant), the one with the most cached tokens is admitted next. Only tokens that the cache
doesn't supply are charged, and output token by token. When no tenant that has requests waiting is eligible, each
of them gets `quantum` more, until one is.
Origin: arXiv 2501.14312 (single worker). Wins: most of lpm's hits with a bound on unfairness: a larger quantum
is nearer to lpm, a smaller one nearer to vtc. Loses: latency of what is not cached.
Cost: O(running + tenants) a step; with room for more, a look-up of the prefix for each of up to 128 that wait.
"""

from __future__ import annotations

from lab.policy import RequestId, RequestView, Step
from policies.scheduling.tenants import TenantQueues

LIMIT = 128


class DeficitPrefixMatch(TenantQueues):
    """`quantum` is in weighted tokens."""

    def __init__(self, quantum: int = 1024, input_weight: float = 1.0, output_weight: float = 2.0) -> None:
        super().__init__(input_weight, output_weight)
        if quantum < 1:
            raise ValueError(f"quantum is {quantum}; expected at least 1")
        self.quantum = quantum
        self.deficit: dict[str, float] = {}

    def joined(self, tenant: str) -> None:
        self.deficit[tenant] = min(self.deficit.get(tenant, 0.0), 0.0)  # debt is kept, credit isn't

    def charge(self, tenant: str, service: float) -> None:
        self.deficit[tenant] -= service

    def prompt_tokens(self, step: Step, request: RequestView) -> int:
        return request.prompt_tokens - step.cached(request)

    def eligible(self) -> list[str]:
        """Tenants whose turn it may be; topped up until there is one."""
        best = max(self.deficit[tenant] for tenant in self.queues)
        if best <= 0:
            rounds = int(-best // self.quantum) + 1
            for tenant in self.queues:
                self.deficit[tenant] += rounds * self.quantum
        return [tenant for tenant in self.queues if self.deficit[tenant] > 0]

    def window(self, step: Step) -> list[RequestView]:
        tenants = sorted(self.eligible(), key=lambda tenant: self.queues[tenant].peek_key())[:LIMIT]
        names: list[RequestId] = []
        for tenant in tenants:
            names += self.queues[tenant].first(LIMIT // len(tenants))
        views = [step.waiting[name] for name in names]
        return sorted(views, key=lambda view: (-step.cached(view), view.arrival, view.seq))

    def schedule(self, step: Step) -> None:
        if not self.run_running(step):
            return
        while self.queues:
            before = len(step.running)
            for request in self.window(step):
                if self.deficit[request.tenant] > 0 and not self.admit(step, request.id):
                    return
            if len(step.running) == before or not (step.slots_left and step.tokens_left):
                return
