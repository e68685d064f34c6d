"""The simulated data plane alone."""

from __future__ import annotations

from lab.control.executor import Capacity
from lab.control.plan import GENESIS, StepPlan, StepTiming, Work
from lab.control.request import Prompt, Request, synthetic_token
from sim.executor import SimExecutor


class Free:
    """Steps take no time."""

    def step_time(self, plan: StepPlan) -> StepTiming:
        return StepTiming(0, 0, 0, 0, 0)


def test_a_name_that_is_used_again_in_the_plan_that_releases_it_is_the_new_request() -> None:
    executor = SimExecutor(Free(), Capacity(8))
    request = Request(id="x", prompt=Prompt.of([1, 2]), max_tokens=5, stop_ids=(0,))
    expected = synthetic_token(request.output_stream, 2, executor.capacity.vocab_size)
    for index, released in enumerate(((), ("x",))):
        work = (Work("x", 0, 2, True, (0,)),)
        plan = StepPlan(index, 0, work, GENESIS, new=(request,), admitted=("x",), released=released)
        executor.plan_ns(plan)
        assert executor.execute(plan).tokens == (expected,)
