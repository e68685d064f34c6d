"""A step's result, carried out on the requests: tokens received, KV given up, ends. Request path, control plane."""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import TYPE_CHECKING, Literal

from lab.control.decodes import WorkList
from lab.control.flight import InFlight
from lab.control.live import LiveRequest
from lab.control.plan import StepPlan, StepResult, TokenLogprobs, Work
from lab.control.request import RequestId
from lab.frozen import frozen

if TYPE_CHECKING:
    from lab.control.core import EngineCore


@frozen
class Emission:
    """One generated token on its way out; `finished` says why it was the last one, if it was."""

    request: RequestId
    token: int
    finished: Literal["length", "stop"] | None
    logprobs: TokenLogprobs | None = None


def carry_out(core: EngineCore, flight: InFlight, result: StepResult, now: int) -> list[Emission]:
    """Everything that a committed step does to those it worked on. Returns the generated tokens in plan order."""
    plan, wanted = flight.plan, flight.samples
    core.estimate.saw(flight.prefill_tokens, flight.decode_tokens, flight.context_tokens, now - plan.now)
    load = core._load
    computed = flight.prefill_tokens + flight.decode_tokens
    load.to_compute += wanted - computed
    load.context += computed
    tokens = iter(result.tokens)
    emissions: list[Emission] = []
    if plan.compactions:
        _compact(core, plan, now)
    if plan.decodes.seqs:
        _advance(core, plan, now)
        tokens = iter(result.tokens[plan.decodes.seqs :])
    work: list[tuple[LiveRequest, Work]] = []
    if flight.work:
        work = list(zip(flight.work, plan.items, strict=True))
    if flight.together:
        # All of them have their token before any of them ends, as where they are kept as sums.
        received = [
            (live, item, *_apply(core, live, item, tokens, plan.index, now, result.stopped))
            for live, item in work[: flight.together]
        ]
        for live, item, token, finished in received:
            _conclude(core, live, item, token, finished, result, emissions, now)
    for live, item in work[flight.together :]:
        token, finished = _apply(core, live, item, tokens, plan.index, now, result.stopped)
        _conclude(core, live, item, token, finished, result, emissions, now)
    return emissions


def _advance(core: EngineCore, plan: StepPlan, now: int) -> None:
    """Every decode in steady state has its next token; some end with it."""
    if isinstance(plan.work, WorkList):
        plan.work.close()
    core._load.expected -= plan.decodes.seqs
    for live in core._decodes.advance(plan.index, now):
        if live.aborting:
            core._end(live, "aborted", "aborted", now)
        else:
            core._end(live, "finished", "length", now)


def _apply(
    core: EngineCore,
    live: LiveRequest,
    work: Work,
    tokens: Iterator[int],
    step: int,
    now: int,
    stopped: Container[RequestId],
) -> tuple[int, Literal["length", "stop"] | None]:
    """A request's work is done: its token, if that gave one, and why that was the last."""
    live.granted = 0
    live.computed += work.tokens
    live.computed_tokens += work.tokens
    live.worked(step)
    if not work.samples:
        return 0, None
    token = next(tokens)
    return token, _receive(core, live, token, now, stopped)


def _conclude(
    core: EngineCore,
    live: LiveRequest,
    work: Work,
    token: int,
    finished: Literal["length", "stop"] | None,
    result: StepResult,
    emissions: list[Emission],
    now: int,
) -> None:
    """Tell of what `_apply` did, and end the request if it was the last."""
    if work.samples:
        logprobs = result.logprobs.get(work.request)
        if logprobs is not None:
            live.logprobs.append(logprobs)
        if not live.aborting:
            emissions.append(Emission(work.request, token, finished, logprobs))
    if core._on_tokens is not None:
        core._call(core._on_tokens, live.view, work.tokens, int(work.samples), now)
    if live.aborting:
        core._end(live, "aborted", "aborted", now)
    elif finished is not None:
        core._end(live, "finished", finished, now)
    if core._held and live.group and work.samples:
        core._ripe[live.request.parent] = None
    if live.status == "ended":
        return
    if work.samples and core.relocation.taker is not None:
        core.relocation.hand_over(live, now)
        return
    if work.samples and live.plain and not live.steady:
        core._decodes.join(live)


def _receive(
    core: EngineCore, live: LiveRequest, token: int, now: int, stopped: Container[RequestId]
) -> Literal["length", "stop"] | None:
    """One generated token arrives at `now`; says whether it was the last. `stopped`: those ended by their text."""
    live.known += 1
    live.output.append(token)
    live.token_times.append(now)
    core._load.expected -= len(live.output) <= live.predicted
    request = live.request
    if request.output_len is None and (
        (token in request.stop_ids and len(live.output) > request.sampling.min_tokens)
        or request.id in stopped
    ):
        return "stop"
    if live.known - live.prompt_tokens >= request.output_limit:
        return "length"
    if live.phase == "prefill":
        live.enter("decode", now)
    return None


def _compact(core: EngineCore, plan: StepPlan, now: int) -> None:
    """Requests let go of what the data plane has given up."""
    for item in plan.compactions:
        live, end = core._requests[item.request], item.sinks + len(item.blocks)
        gone = live.blocks[item.sinks : end]
        del live.blocks[item.sinks : end]
        live.dropped += item.tokens
        live.dropped_tokens += item.tokens
        core._load.context -= item.tokens
        core._evicting("on_evictable", core.pool.release, gone, now)
