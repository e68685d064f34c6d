"""prefill_first: whenever a waiting prompt fits, run prompts only; otherwise run decodes only.

Rule: prompts are computed whole, by arrival, while the token budget, the slots and the KV blocks (less a
watermark) allow; a step with prompts has no decodes. When KV runs short, the latest arrival is preempted. A
prompt longer than the whole budget is computed in pieces, in steps of its own.
Origin: vLLM v0 (SOSP'23), hence its other name, vllm_v0. Wins: time to first token. Loses: running requests
stall while prompts are computed ("generation stall"), so the tail of inter-token latency grows with load.
Cost: O(running log running) a step, O(log waiting) an admission.
"""

from __future__ import annotations

from lab.policy import Shortage, Step
from policies.scheduling.common import QueueingPolicy, run_in_order


class PrefillFirst(QueueingPolicy):
    """prompts before decodes, never both in one step, as vLLM v0 scheduled (prefill_first under its other name).

    `watermark` is the share of KV blocks kept free when a prompt is admitted beside running requests.
    """

    def __init__(self, watermark: float = 0.01) -> None:
        super().__init__()
        if not 0 <= watermark < 1:
            raise ValueError(f"watermark is {watermark}; expected in [0, 1)")
        self.watermark = watermark

    def schedule(self, step: Step) -> None:
        running = sorted(step.running.values(), key=self.key)
        unfinished = [request for request in running if request.remaining > 1 or not request.generated]
        if not run_in_order(step, unfinished):
            return
        while self.queue:
            head = self.queue.peek()
            spare = int(self.watermark * step.blocks_total) if step.running else 0
            grant = step.run(head, whole=True, leave_free=spare)
            if grant.short is Shortage.TOKENS and step.tokens_left == step.token_budget:
                grant = step.run(head, leave_free=spare)
            if not grant:
                break
            self.queue.pop()
        if step.tokens_left == step.token_budget:
            run_in_order(step, running)
