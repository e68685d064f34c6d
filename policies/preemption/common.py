"""What all victim choices share: what becomes of the victim's KV."""

from __future__ import annotations

from typing import Literal

from lab.policy import How, PreemptionPolicy, RequestView, Step

Mode = Literal["recompute", "swap", "break_even"]


class WithMode(PreemptionPolicy):
    """`mode`: drop the victim's KV and compute it again, park it in host memory, or whichever takes less time.

    Swapping counts only with a host tier (`kv.host_blocks`). The break-even compares moving its blocks out and
    back with computing its tokens in one step, less the cost of an empty step, as learnt so far (the rule of
    vLLM v0's and InferCept's analysis).
    """

    def __init__(self, mode: Mode = "recompute") -> None:
        self.mode = mode

    def how(self, victim: RequestView, step: Step) -> How:
        if self.mode == "break_even":
            return "swap" if swap_time(victim, step) < recompute_time(victim, step) else "recompute"
        return self.mode


def swap_time(victim: RequestView, step: Step) -> int:
    """Nanoseconds to move its KV out and back."""
    return 2 * step.swap_time(-(-victim.kept // step.block_size))


def recompute_time(victim: RequestView, step: Step) -> int:
    """Nanoseconds to compute its tokens again; 0 while step times are unknown."""
    tokens = victim.computed
    return step.estimate(tokens, 0, tokens) - step.estimate()
