"""What sets apart the policies that are fair to tenants: vtc, drr, lpm, dlpm."""

from __future__ import annotations

import random

import pytest

from lab.control.request import Request
from lab.policy import LengthPredictor
from policies.scheduling.dlpm import DeficitPrefixMatch
from policies.scheduling.drr import DeficitRoundRobin
from policies.scheduling.lpm import LongestPrefixMatch
from policies.scheduling.vtc import VirtualTokenCounter
from tests.control.harness import drain, engine, request, step
from tests.policies.plans import add, names


def test_vtc_counts_prompts_on_admission_and_outputs_by_token() -> None:
    policy = VirtualTokenCounter()
    core, _ = engine(policy)
    core.add(request("a", 10, output=4, tenant="x"), 0)
    seen = []
    for n in range(4):
        step(core, n)
        seen.append(policy.counters["x"])
    assert seen == [12, 14, 16, 18]


def test_vtc_serves_the_tenant_that_got_least() -> None:
    core, notes = engine(VirtualTokenCounter(), max_seqs=1)
    for i in range(6):
        core.add(request(f"hog{i}", 30, output=3, tenant="hog"), 0)
    for i in range(2):
        core.add(request(f"one{i}", 30, output=3, tenant="one"), 0)
    drain(core)
    assert list(notes.requests)[:5] == ["hog0", "one0", "hog1", "one1", "hog2"]


def test_vtc_lifts_who_comes_back_to_the_least_counter_of_those_that_wait() -> None:
    policy = VirtualTokenCounter()
    core, _ = engine(policy, max_seqs=1)
    for i in range(9):
        core.add(request(f"b{i}", 20, output=5, tenant="busy"), 0)
    for n in range(20):
        step(core, n)
    level = policy.counters["busy"]
    core.add(request("late", 20, output=5, tenant="late"), 30)
    assert policy.counters["late"] == level > 0
    # With nobody waiting, to that of the tenant that was last to wait.
    drain(core, 40)
    last = policy.counters[policy.last]
    core.add(request("later", 20, output=5, tenant="later"), 9000)
    assert policy.counters["later"] == last


def test_vtc_with_predictions_charges_ahead_and_settles_in_the_end() -> None:
    class Wrong(LengthPredictor):
        def predict(self, request: Request, now: int) -> int:
            return {"over": 10, "under": 2}[request.id]

    policy = VirtualTokenCounter(charge="predicted")
    core, _ = engine(policy, predictor=Wrong())
    add(core, request("over", 5, output=4, tenant="o"), request("under", 5, output=4, tenant="u"))
    step(core)
    assert policy.counters == {"o": 5 + 20, "u": 5 + 4}
    drain(core, 10)
    assert policy.counters == {"o": 5 + 8, "u": 5 + 8}


@pytest.mark.parametrize("blocks", [40, 400])
@pytest.mark.parametrize("seed", range(4))
def test_vtc_bound_on_the_difference_in_service_of_two_backlogged_tenants(seed: int, blocks: int) -> None:
    """|W_f - W_g| <= 2 max(w_p longest prompt, w_q KV tokens), over every interval in which both have some waiting."""
    rng = random.Random(seed)
    policy = VirtualTokenCounter()
    core, _ = engine(policy, blocks=blocks, block_size=4, max_seqs=rng.randint(2, 30), token_budget=64)
    count, longest = {"f": 0, "g": 0}, 60
    shapes = {"f": (40, longest, 1, 9), "g": (1, 10, 5, 40)}

    def refill(now: int) -> None:
        for tenant, (a, b, c, d) in shapes.items():
            while len(policy.queues.get(tenant, ())) < 3:
                name = f"{tenant}{count[tenant]}"
                core.add(request(name, rng.randint(a, b), output=rng.randint(c, d), tenant=tenant), now)
                count[tenant] += 1

    refill(0)
    apart = []
    for n in range(800):
        step(core, n)
        apart.append(policy.counters["f"] - policy.counters["g"])
        refill(n)
    assert max(apart) - min(apart) <= 2 * max(longest, 2 * blocks * 4)
    assert policy.counters["f"] > 1000


def test_vtc_weights_divide_service() -> None:
    policy = VirtualTokenCounter(weights={"gold": 3.0})
    core, notes = engine(policy, max_seqs=1)
    for i in range(40):
        core.add(request(f"gold{i}", 10, output=5, tenant="gold"), 0)
        core.add(request(f"tin{i}", 10, output=5, tenant="tin"), 0)
    while len(notes.requests) < 40:
        step(core)
    assert sum(name.startswith("gold") for name in notes.requests) in (29, 30, 31)


def test_drr_serves_in_bursts_of_a_quantum_and_evenly_in_the_long_run() -> None:
    policy = DeficitRoundRobin(quantum=100)
    core, notes = engine(policy, max_seqs=1)
    for i in range(60):
        core.add(request(f"big{i}", 36, output=2, tenant="big"), 0)  # 40 each
        core.add(request(f"small{i}", 6, output=2, tenant="small"), 0)  # 10 each
    while len(notes.requests) < 60:
        step(core)
    ended = list(notes.requests)
    assert ended[:4] == ["big0", "big1", "big2", "small0"]  # 120 of 100: 20 are owed
    service = {"big": 0, "small": 0}
    for name in ended:
        service["big" if name.startswith("big") else "small"] += 40 if name.startswith("big") else 10
    assert abs(service["big"] - service["small"]) <= 140


def test_lpm_takes_the_longest_cached_prefix_first_and_by_arrival_when_many_wait() -> None:
    text = list(range(96))
    for crowd, expected in ((0, ["full", "half", "cold"]), (126, ["cold", "half", "full"])):
        core, notes = engine(LongestPrefixMatch(), max_seqs=1)
        core.add(request("warm", [*text, 1], output=1), 0)
        step(core)
        core.add(request("cold", [7] * 90, output=1), 10)
        core.add(request("half", [*text[:48], 2, 3], output=1), 10)
        core.add(request("full", [*text, 2, 3], output=1), 10)
        for i in range(crowd):
            core.add(request(f"c{i}", [8] * 9, output=1), 10)
        for n in range(3):
            step(core, 20 + n)
        if crowd:
            assert list(notes.requests)[1] == "cold"  # 129 wait; from the next on, 128
        else:
            assert list(notes.requests)[1:] == expected


def test_dlpm_keeps_a_tenant_with_a_hot_prefix_from_starving_the_others() -> None:
    text = list(range(64))
    ended = {}
    for policy in (LongestPrefixMatch(), DeficitPrefixMatch(quantum=20), DeficitPrefixMatch(quantum=10**6)):
        core, notes = engine(policy, max_seqs=1)
        core.add(request("warm", [*text, 1], output=1, tenant="hot"), 0)
        step(core)
        for i in range(12):
            core.add(request(f"hot{i}", [*text, 100 + i], output=3, tenant="hot"), 10)
        core.add(request("cold", [7] * 10, output=3, tenant="cold"), 10)
        drain(core, 10)
        ended[policy] = list(notes.requests).index("cold")
    lpm, fair, greedy = ended.values()
    assert lpm == greedy == 13
    assert fair <= 6


def test_dlpm_stops_serving_a_tenant_in_the_middle_of_a_step_once_its_deficit_is_spent() -> None:
    text = list(range(64))
    core, _ = engine(DeficitPrefixMatch(quantum=1), max_seqs=2)
    core.add(request("warm", [*text, 1], output=1, tenant="other"), 0)
    step(core)
    for i in range(3):
        core.add(request(f"hot{i}", [*text, 100 + i], output=3, tenant="hot"), 10)
    core.add(request("cold", [7] * 10, output=3, tenant="cold"), 10)
    assert names(step(core, 10)) == ["hot0", "cold"]


def test_dlpm_charges_only_what_the_cache_does_not_supply() -> None:
    text = list(range(64))
    policy = DeficitPrefixMatch(quantum=1000)
    core, _ = engine(policy, max_seqs=1)
    core.add(request("warm", [*text, 1], output=1, tenant="u"), 0)
    step(core)
    assert policy.deficit["u"] == 1000 - 65 - 2
    core.add(request("again", [*text, 2, 3], output=1, tenant="u"), 10)
    step(core, 10)
    # It came back to no credit, was topped up, and paid for 2 prompt tokens: 64 were cached.
    assert policy.deficit["u"] == 1000 - 2 - 2
