"""vllm_v1: vLLM v1's scheduler: one token budget, no phases, and a cap on what a long prompt takes of a step.

Rule: running requests first, each at most `long_prefill_threshold` tokens: those that decode, then those amid their
prompt, each kind in order of admission. (vLLM takes all in order of admission. The grants are the same unless the token
budget runs short amid the running: there an earlier prompt goes before later decodes.) When blocks run short the last
of the running is preempted and the step admits nobody. Otherwise waiting requests by arrival (`fcfs`) or by (priority,
arrival) (`priority`), until the first that doesn't fit. Under `priority` the victim is the one of the largest
(priority, arrival). Preempted requests return by arrival, which under `fcfs` is vLLM's "to the front of the queue".
With `whole_prompt` nobody is admitted before blocks are free for all of its prompt, not for its first chunk alone
(vLLM's `scheduler_reserve_full_isl`, on by default in 0.19), and `watermark` of all blocks stay free beside it.
Origin: vllm/v1/core/sched/scheduler.py. Wins: the default that others are measured against; the cap lets
short prompts pass a long one. Loses: without the cap one chunk can take all that running requests leave.
Cost: O(running log running) a step, O(log waiting) an admission.
"""

from __future__ import annotations

from typing import Literal

from lab.policy import RequestId, RequestView, Step
from policies.keyed_heap import Key
from policies.scheduling.common import QueueingPolicy, repeat_if_settled, run_in_order, run_running


class VllmV1(QueueingPolicy):
    """`long_prefill_threshold` 0 is no cap, as in vLLM."""

    def __init__(
        self,
        long_prefill_threshold: int = 0,
        order: Literal["fcfs", "priority"] = "fcfs",
        whole_prompt: bool = False,
        watermark: float = 0.0,
    ) -> None:
        super().__init__()
        if long_prefill_threshold < 0:
            raise ValueError(f"long_prefill_threshold is {long_prefill_threshold}; expected at least 0")
        if order not in ("fcfs", "priority"):
            raise ValueError(f"order is {order!r}; expected 'fcfs' or 'priority'")
        if not 0 <= watermark < 1:
            raise ValueError(f"watermark is {watermark}; expected at least 0, below 1")
        self.cap = long_prefill_threshold or None
        self.by_priority = order == "priority"
        self.whole_prompt, self.watermark = whole_prompt, watermark

    def key(self, request: RequestView) -> Key:
        return (request.priority if self.by_priority else 0, request.arrival, request.seq)

    def schedule(self, step: Step) -> None:
        cap = self.cap
        most = None if cap is None else lambda request: cap
        if self.by_priority:  # sorted, so that the last is the victim
            ran = run_in_order(step, sorted(step.running.values(), key=self.key), most)
        else:
            ran = run_running(step, most)
        if ran:
            while self.queue:
                head = self.queue.peek()
                spare = int(self.watermark * step.blocks_total) if step.running else 0
                if not self.fits(step, head, spare) or not step.run(head, cap, leave_free=spare):
                    break
                self.queue.pop()
            repeat_if_settled(step, self.queue)

    def fits(self, step: Step, request: RequestId, spare: int) -> bool:
        if not self.whole_prompt or not step.slots_left or not step.tokens_left:  # `run` says what lacks then
            return True
        rest = step.waiting[request].remaining - step.cached(request)
        return step.blocks_for(request, rest) + spare <= step.blocks_left
