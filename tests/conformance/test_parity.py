"""The hinge of the diptych: the real engine's durations, replayed in the simulator, give its every decision."""

from __future__ import annotations

import dataclasses

import pytest

from lab.control.request import SamplingParams
from real_engine.models.loading import LoadedModel
from tests.conformance.sides import Setting, conversation, run_real, run_replayed


@pytest.mark.parametrize("prefix_cache", [True, False], ids=["cache", "nocache"])
@pytest.mark.parametrize("blocks", [400, 45], ids=["ample", "tight"])
@pytest.mark.parametrize("eviction", ["lru", "fifo", "lfu"])
@pytest.mark.parametrize("policy", ["fcfs", "prefill_first", "sjf", "priority", "edf"])
def test_replayed_durations_give_identical_digests(
    policy: str, eviction: str, blocks: int, prefix_cache: bool, tiny: LoadedModel
) -> None:
    setting = Setting(policy, eviction, blocks, prefix_cache)
    requests = conversation()
    real = run_real(setting, tiny, requests)
    sim, cost = run_replayed(setting, tiny, requests, real)
    assert cost.parity(len(sim.steps))
    assert [step.plan.digest for step in sim.steps] == [step.plan.digest for step in real.steps]
    # Not the decisions alone: every timestamp and every count is the same, the real token ids aside.
    assert [dataclasses.replace(r, output=()) for r in sim.requests] == [
        dataclasses.replace(r, output=()) for r in real.requests
    ]
    assert sim.steps == real.steps
    outcomes = {record.request.id: record.outcome for record in real.requests}
    assert outcomes.pop("giant") == "rejected"
    assert set(outcomes.values()) == {"finished"}
    # The setting does what its name says, or the test would show less than it claims.
    preemptions = sum(len(step.plan.preempted) for step in real.steps)
    hits = sum(record.cached_tokens for record in real.requests)
    if policy != "priority":  # which preempts for slots too
        assert (preemptions > 0) == (blocks == 45)
    assert (hits > 0) == prefix_cache
    if prefix_cache and blocks == 45:
        assert sum(step.evicted for step in real.steps) > 0


@pytest.mark.parametrize("prefix_cache", [True, False], ids=["cache", "nocache"])
@pytest.mark.parametrize("host_blocks", [0, 60], ids=["recompute", "swap"])
def test_several_outputs_of_a_request_take_the_same_decisions(
    host_blocks: int, prefix_cache: bool, tiny: LoadedModel
) -> None:
    setting = Setting(blocks=45, prefix_cache=prefix_cache, host_blocks=host_blocks)
    requests = [dataclasses.replace(r, n=1 + i % 3) for i, r in enumerate(conversation(14))]
    real = run_real(setting, tiny, requests)
    sim, cost = run_replayed(setting, tiny, requests, real)
    assert cost.parity(len(sim.steps))
    assert sim.steps == real.steps
    assert sum(step.plan.copied_blocks for step in real.steps) > 5
    assert sum(len(step.plan.preempted) for step in real.steps) > 0
    finished = [r for r in real.requests if r.outcome == "finished"]
    assert len(finished) == sum(r.n for r in requests if r.id != "giant")


def test_a_run_that_stopped_by_text_and_tokens_replays_by_its_own_outputs(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Numbers:
        """A tokenizer whose text of a token is its number."""

        def decode(self, ids: list[int]) -> str:
            return "".join(f"{token} " for token in ids)

    monkeypatch.setattr(type(tiny), "tokenizer", lambda self: Numbers())
    setting = Setting(blocks=45)
    hot = SamplingParams(temperature=1.5, min_tokens=2)
    requests = [
        dataclasses.replace(
            r,
            output_len=None,
            max_tokens=r.output_limit + 2,
            stop=("1 ", "7 "),
            stop_ids=tuple(range(100, 110)),
            sampling=dataclasses.replace(hot, seed=i),
            n=1 + i % 2,
        )
        for i, r in enumerate(conversation())
    ]
    real = run_real(setting, tiny, requests)
    reasons = [r.reason for r in real.requests]
    assert reasons.count("stop") > 5
    assert reasons.count("length") > 1
    assert min(len(r.output) for r in real.requests if r.reason == "stop") == 3
    outputs = {r.request.id: (r.output, r.reason == "stop") for r in real.requests}
    sim, cost = run_replayed(setting, tiny, requests, real, outputs)
    assert cost.parity(len(sim.steps))
    assert sim.steps == real.steps
    assert sim.requests == real.requests
