"""A request while the engine has it: tokens known and computed, blocks held, and the life it has led.

Request path, control plane. `LiveRequest` belongs to the engine; policies get its read-only `View`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lab.control.observer import Decision, Interval, Outcome, Phase, RequestRecord, Transfer
from lab.control.plan import TokenLogprobs
from lab.control.request import Request, RequestId
from lab.control.token_times import TokenTimes
from lab.policy import NEVER, KvKeep
from lab.state.blocks import Block, Table
from lab.state.prefix import ContentChain

if TYPE_CHECKING:
    from lab.control.decodes import Decodes


class View:
    """Read-only and always current; implements `lab.policy.RequestView`."""

    __slots__ = ("_live", "arrival", "id", "priority", "prompt_tokens", "seq")

    def __init__(self, live: LiveRequest) -> None:
        self._live = live
        self.id: RequestId = live.request.id
        self.seq: int = live.seq
        self.arrival: int = live.request.arrival
        self.priority: int = live.request.priority
        self.prompt_tokens: int = live.prompt_tokens

    @property
    def tenant(self) -> str:
        return self._live.request.tenant

    @property
    def session(self) -> str:
        return self._live.request.session

    @property
    def ttft_slo(self) -> int | None:
        return self._live.request.ttft_slo

    @property
    def tpot_slo(self) -> int | None:
        return self._live.request.tpot_slo

    @property
    def known(self) -> int:
        return self._live.now().known

    @property
    def computed(self) -> int:
        return self._live.now().computed

    @property
    def kept(self) -> int:
        live = self._live.now()
        return live.computed - live.dropped

    @property
    def remaining(self) -> int:
        live = self._live.now()
        return live.known - live.computed

    @property
    def generated(self) -> int:
        live = self._live.now()
        return live.known - live.prompt_tokens

    @property
    def expected_output(self) -> int:
        live = self._live.now()
        return max(live.predicted, live.known - live.prompt_tokens + 1)

    @property
    def preemptions(self) -> int:
        return self._live.preemptions

    @property
    def blocks(self) -> int:
        return len(self._live.table.blocks)

    @property
    def host_blocks(self) -> int:
        return len(self._live.host)

    @property
    def granted(self) -> int:
        return self._live.granted_now

    def __repr__(self) -> str:
        live = self._live.now()
        return f"<request '{self.id}' {live.status}, {live.computed} of {live.known} tokens computed>"


class LiveRequest:
    """The engine's own record of one request. `computed` chases `known`; that is all there is to phases."""

    __slots__ = (
        "aborting",
        "cached_blocks",
        "cached_tokens",
        "chain",
        "computed",
        "computed_tokens",
        "decision",
        "decodes",
        "dropped",
        "dropped_tokens",
        "granted",
        "group",
        "host",
        "intervals",
        "keep",
        "known",
        "logprobs",
        "mark",
        "output",
        "peak",
        "phase",
        "phase_cause",
        "phase_first",
        "phase_last",
        "phase_start",
        "plain",
        "predicted",
        "preemptions",
        "prompt_tokens",
        "request",
        "seen",
        "seq",
        "since",
        "status",
        "steady",
        "table",
        "token_times",
        "transfers",
        "view",
    )
    __deletable__ = ["view"]  # noqa: RUF012  # which mypyc wants to know

    def __init__(
        self, request: Request, seq: int, decision: Decision, block_size: int, predicted: int
    ) -> None:
        self.request, self.seq, self.decision = request, seq, decision
        self.predicted = predicted
        """Output tokens, as foreseen on arrival."""
        self.status = "waiting"
        self.prompt_tokens = len(request.prompt)
        self.known = self.prompt_tokens
        self.computed = 0
        self.dropped = self.dropped_tokens = 0
        """Of the computed tokens, those whose KV was given up: now, and in its whole life."""
        self.keep: KvKeep | None = None
        self.peak = NEVER
        """What KV compression lets it keep, and the most tokens of KV that it then ever holds."""
        self.granted = 0
        """Tokens granted in the step being built."""
        self.table = Table()
        self.host: list[int] = []
        """Host blocks that hold the KV of its `computed` tokens while it waits swapped out."""
        self.output: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        stream = request.output_stream if request.output_len is not None else None
        self.chain = ContentChain(request.prompt, block_size, request.cache_salt, self.output, stream)
        self.seen = False
        """The data plane has been told of this request."""
        self.aborting = False
        self.group: list[LiveRequest] = []
        """The sequences of its parent that are here, itself included; empty if it has none."""
        self.cached_tokens = self.cached_blocks = self.computed_tokens = self.preemptions = 0
        self.token_times = TokenTimes()
        self.intervals: list[Interval] = []
        self.transfers: list[Transfer] = []
        self.phase: Phase = "queue"
        self.phase_start, self.phase_cause = request.arrival, "arrival"
        self.phase_first = self.phase_last = -1
        self.decodes: Decodes | None = None
        """Where its counters are kept while it decodes in steady state: `sync` brings its own up to date."""
        self.since = 0
        """The grant up to which they are."""
        self.mark = 0
        """Its `weight`, once it has decoded in steady state."""
        self.steady = 0
        """Order of joining the decodes in steady state; 0 while it isn't one of them."""
        self.plain = (
            request.output_len is not None
            and request.sampling.logprobs is None
            and predicted >= request.output_limit
        )
        """Whether its decoding is one token after another and nothing else, up to a length known beforehand."""
        self.view = View(self)

    def now(self) -> LiveRequest:
        """Itself, with all counters up to date."""
        if self.decodes is not None:
            self.sync()
        return self

    def sync(self) -> None:
        """Derive its counters from the clock of the decodes that it belongs to."""
        decodes = self.decodes
        if decodes is None or (grants := decodes.clock - self.since) == 0:
            return
        first, last = self.since - decodes.base, decodes.clock - decodes.base
        self.known += grants
        self.computed += grants
        self.computed_tokens += grants
        self.output += [0] * grants
        self.token_times.share(decodes.times, first, last)
        if self.phase_first < 0:
            self.phase_first = decodes.steps[first]
        self.phase_last = decodes.steps[last - 1]
        self.since = decodes.clock

    @property
    def blocks(self) -> list[Block]:
        """The device blocks that it holds."""
        return self.table.blocks

    @property
    def granted_now(self) -> int:
        """Tokens granted in the step being built or in flight, on its own or together with others."""
        return self.granted or int(self.decodes is not None and self.decodes.granted)

    @property
    def samples_after(self) -> bool:
        """Whether what is granted reaches the last known token, so that the step yields the next one."""
        return self.computed + self.granted == self.known

    def enter(self, phase: Phase, now: int, cause: str = "") -> None:
        """Close the current interval at `now` and open the next; the intervals tile the request's life."""
        self.close(now)
        self.phase, self.phase_start, self.phase_cause = phase, now, cause
        self.phase_first = self.phase_last = -1

    def close(self, now: int) -> None:
        self.intervals.append(
            Interval(self.phase, self.phase_start, now, self.phase_cause, self.phase_first, self.phase_last)
        )

    def worked(self, step: int) -> None:
        if self.phase_first < 0:
            self.phase_first = step
        self.phase_last = step

    def record(self, outcome: Outcome, reason: str, now: int) -> RequestRecord:
        """The whole life, closed at `now`."""
        self.sync()
        self.close(now)
        return RequestRecord(
            request=self.request,
            seq=self.seq,
            decision=self.decision,
            outcome=outcome,
            reason=reason,
            end=now,
            cached_tokens=self.cached_tokens,
            cached_blocks=self.cached_blocks,
            computed_tokens=self.computed_tokens,
            preemptions=self.preemptions,
            predicted_output=self.predicted,
            dropped_tokens=self.dropped_tokens,
            token_times=self.token_times,
            intervals=tuple(self.intervals),
            output=tuple(self.output),
            logprobs=tuple(self.logprobs),
            transfers=tuple(self.transfers),
        )

    def moved(self, seq: int, block_size: int) -> LiveRequest:
        """The same request in another engine: the life it has led, and nothing computed there yet."""
        self.sync()
        new = LiveRequest(self.request, seq, self.decision, block_size, self.predicted)
        new.output += self.output
        new.token_times = self.token_times.copy()
        for name in _LIFE:
            value = getattr(self, name)
            setattr(new, name, list(value) if isinstance(value, list) else value)
        return new


_LIFE = (
    "cached_blocks", "cached_tokens", "computed_tokens", "dropped_tokens", "intervals", "known", "logprobs",
    "phase", "phase_cause", "phase_start", "preemptions", "transfers",
)  # fmt: skip
"""What of a request doesn't depend on where it is."""
