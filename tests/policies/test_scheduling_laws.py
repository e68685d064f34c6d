"""Every shipped scheduling policy under whatever may surround it: all requests end, all blocks come back, it repeats.

Random victims and ways to preempt, wrong predictions, a host tier, prefix sharing, aborts, little memory: a
policy that relied on the default victim, on exact lengths or on being alone would stall, livelock or misuse its step.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from lab import plugins
from lab.control.request import Prompt, Request, Segment
from lab.policy import How, LengthPredictor, PreemptionPolicy, RequestView, SchedulingPolicy, Step
from policies.prediction.noisy import Noisy
from policies.prediction.oracle import Oracle
from tests.control.harness import Notes, commit, engine

POLICIES = plugins.names("policy")
VARIANTS: dict[str, dict[str, object]] = {
    "fcfs": {"backfill": True},
    "orca": {"reserve": "pow2"},
    "vllm_v1": {"long_prefill_threshold": 3, "order": "priority", "whole_prompt": True, "watermark": 0.1},
    "sarathi": {"chunk": 4},
    "mlfq": {"quantum": 1, "growth": 1.0, "promote_s": 1e-7},
    "priority": {"ageing_per_s": 1e7},
    "ltr": {"starve": 2, "period": 1},
    "vtc": {"charge": "predicted", "weights": {"t1": 3.0}},
    "drr": {"quantum": 5},
    "dlpm": {"quantum": 3},
    "mc_sf": {"by_arrival": True},
    "least_slack": {"floor": 1},
    "andes": {"horizon_s": 1e-7, "ttft_s": 1e-8, "tpot_s": 1e-8, "cap": 3},
    "srpt": {"prefill_cost": 2.0},
}
MADE = [pytest.param(name, {}, id=name) for name in POLICIES] + [
    pytest.param(name, params, id=f"{name}, tuned") for name, params in VARIANTS.items()
]


class Anybody(PreemptionPolicy):
    """Any victim, any way."""

    def victim(self, candidates: Sequence[RequestView], step: Step) -> RequestView:
        return self.rng.choice(list(candidates))

    def how(self, victim: RequestView, step: Step) -> How:
        return self.rng.choice(("recompute", "swap"))


def prepared(policy: SchedulingPolicy, seed: int) -> SchedulingPolicy:
    policy.rng = random.Random(seed)
    return policy


def play(name: str, params: dict[str, object], seed: int) -> tuple[Notes, list[str], int]:
    """A random workload with tight memory, to its end."""
    draw = random.Random(seed)
    victims = Anybody() if draw.random() < 0.7 else PreemptionPolicy()
    predictor: LengthPredictor = Noisy(sigma=1.0) if draw.random() < 0.5 else Oracle()
    victims.rng = predictor.rng = random.Random(seed)
    size = draw.choice([1, 3, 16])
    requests = []
    for i in range(draw.randint(2, 14)):
        shared = draw.choice([0, 0, 20, 35])
        head = (Segment(draw.randint(0, 1), 0, shared),) if shared else ()
        requests.append(
            Request(
                id=f"r{i}",
                prompt=Prompt((*head, Segment(100 + i, 0, draw.randint(1, 40)))),
                arrival=draw.choice([0, 0, draw.randint(0, 300)]),
                output_len=draw.randint(1, 25),
                tenant=f"t{draw.randint(0, 2)}",
                priority=draw.randint(0, 2),
                ttft_slo=draw.choice([None, 30, 300]),
                tpot_slo=draw.choice([None, 10]),
            )
        )
    requests.sort(key=lambda request: request.arrival)
    largest = max(len(r.prompt) + r.output_limit for r in requests)
    core, notes = engine(
        prepared(plugins.create("policy", name, params), seed),
        blocks=-(-largest // size) + draw.choice([0, 1, 5, 40]),
        block_size=size,
        token_budget=draw.choice([1, 5, 17, 60, 500]),
        max_seqs=draw.randint(1, 8),
        chunk=draw.choice([None, None, 1, 7]),
        capacity={"host_blocks": draw.choice([0, 0, 40]), "block_bytes": 1},
        prefix_cache=draw.random() < 0.7,
        preemption=victims,
        predictor=predictor,
    )
    aborts = {draw.randint(0, 60): f"r{draw.randint(0, 13)}" for _ in range(draw.choice([0, 0, 3]))}
    now, steps, digests, due = 0, 0, [], list(requests)
    while due or core.has_work:
        while due and due[0].arrival <= now:
            core.add(due[0], due[0].arrival)
            due.pop(0)
        plan = core.plan(now)
        core.check()
        if not plan:
            assert not core.has_work, core.stalled()
            now = due[0].arrival if due else now
            continue
        if plan.index in aborts:
            core.abort(aborts[plan.index], now)
        commit(core, plan, now + 10)
        core.check()
        digests.append(plan.digest)
        now += 10
        steps += 1
        assert steps < 5000, "no end in sight"
    assert core.pool.held == 0
    assert set(notes.requests) == {request.id for request in requests}
    for record in notes.requests.values():
        assert record.outcome == "aborted" or len(record.token_times) == record.request.output_limit
    return notes, digests, steps


@pytest.mark.parametrize(("name", "params"), MADE)
def test_every_request_ends_whoever_is_preempted_and_whatever_was_predicted(
    name: str, params: dict[str, object]
) -> None:
    for seed in range(12):
        play(name, params, seed)


@pytest.mark.parametrize(("name", "params"), MADE)
def test_the_same_run_takes_the_same_decisions(name: str, params: dict[str, object]) -> None:
    for seed in range(40, 46):
        assert play(name, params, seed)[1] == play(name, params, seed)[1]


@pytest.mark.parametrize("name", POLICIES)
def test_nothing_of_a_request_is_kept_after_its_end(name: str) -> None:
    """What a policy holds doesn't grow with the requests that it has seen."""
    policy = prepared(plugins.create("policy", name), 0)
    core, _ = engine(policy, blocks=30, block_size=4, token_budget=40, max_seqs=4, prefix_cache=False)

    def held() -> int:
        return sum(len(value) for value in vars(policy).values() if hasattr(value, "__len__"))

    now, after = 0, []
    for wave in range(6):
        for i in range(20):
            core.add(
                Request(
                    id=f"{wave}.{i}", prompt=Prompt.of([1] * 9), arrival=now, output_len=5, tenant=f"t{i % 3}"
                ),
                now,
            )
        while core.has_work:
            plan = core.plan(now)
            commit(core, plan, now + 10**9)
            now += 10**9
        after.append(held())
    assert after[-1] <= after[1] + 10, after
