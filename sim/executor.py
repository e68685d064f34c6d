"""The simulated data plane: a cost model in place of a device. Data plane, state path."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TypeAlias

from lab.control.coast import Price
from lab.control.executor import Capacity
from lab.control.plan import StepPlan, StepResult, StepTiming
from lab.control.request import Request, RequestId, synthetic_token
from sim.cost.model import CostModel

Output: TypeAlias = tuple[tuple[int, ...], bool]
_NOTHING: Output = ((), False)
_NONE: Mapping[RequestId, Output] = MappingProxyType({})


class SimExecutor:
    """Implements `Executor`, and `ControlTimer` for the control plane's modelled share of each step.

    Tokens carry no meaning here. Where the output length is forced they are 0; otherwise they are drawn
    from the request's own synthetic text, so that different requests' outputs don't share cache blocks. Texts
    don't end here either, unless `outputs` says what a recorded run gave: each request's tokens, and whether it
    stopped after them.
    """

    def __init__(
        self, cost: CostModel, capacity: Capacity, outputs: Mapping[RequestId, Output] = _NONE
    ) -> None:
        self.capacity = capacity
        self._cost, self._outputs = cost, outputs
        self._unforced: dict[RequestId, Request] = {}
        self._timing = StepTiming(0, 0, 0, 0, 0)
        self.decode_time: Price | None = getattr(cost, "decode_time", None)
        """How long a step of nothing but decodes takes, where the cost model can say that from their sums."""

    def another(self, replica: int) -> SimExecutor:
        """A data plane like this one, for another replica."""
        own = getattr(self._cost, "another", None)  # one that knows a replica's steps from the others'
        return SimExecutor(self._cost if own is None else own(replica), self.capacity, self._outputs)

    def start(self) -> None:
        """Modelled time needs no stopwatch."""

    def plan_ns(self, plan: StepPlan) -> int:
        self._timing = self._cost.step_time(plan) if plan else StepTiming(0, 0, 0, 0, 0)
        return self._timing.plan_ns

    def commit_ns(self, plan: StepPlan) -> int:
        return self._timing.commit_ns

    def execute(self, plan: StepPlan) -> StepResult:
        for name in plan.released:  # before what is new, which may reuse a name
            self._unforced.pop(name, None)
        for request in plan.new:
            if request.output_len is None:
                self._unforced[request.id] = request
        stopped: frozenset[RequestId] = frozenset()
        if self._unforced:
            sampling = [(work.request, work.start + work.tokens) for work in plan.work if work.samples]
            tokens = tuple(self._token(name, position) for name, position in sampling)
            if self._outputs:
                stopped = frozenset(name for name, position in sampling if self._stops(name, position))
        else:
            tokens = (0,) * plan.samples
        timing = self._timing
        return StepResult(
            tokens,
            timing.prepare_ns,
            timing.forward_ns,
            timing.sample_ns,
            transfer_ns=timing.transfer_ns,
            compact_ns=timing.compact_ns,
            stopped=stopped,
            terms=timing.terms,
        )

    def close(self) -> None:
        self._unforced.clear()

    def _token(self, name: RequestId, position: int) -> int:
        request = self._unforced.get(name)
        if request is None:
            return 0
        tokens, index = self._outputs.get(name, _NOTHING)[0], position - len(request.prompt)
        if index < len(tokens):
            return tokens[index]
        return synthetic_token(request.output_stream, position, self.capacity.vocab_size)

    def _stops(self, name: RequestId, position: int) -> bool:
        """Whether the token at this position was a recorded request's last one, after which it stopped."""
        request = self._unforced.get(name)
        tokens, stopped = self._outputs.get(name, _NOTHING)
        return stopped and request is not None and position - len(request.prompt) == len(tokens) - 1
