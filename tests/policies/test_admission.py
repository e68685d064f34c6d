"""Admission: bounds that hold whatever comes, limits that move by their formulas, and what overload looks like."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lab import plugins
from lab.control.executor import Capacity
from lab.control.fleet import FleetSpec
from lab.control.request import Request
from lab.control.step import Limits
from lab.policy import AdmissionPolicy, Ended
from tests.policies.fleets import MS, SECOND, Outcome, poisson, request, simulate, view

NAMES = ["always", "token_bucket", "quota", "kv_watermark", "aimd", "gradient2", "slo_reject"]


def admission(name: str, **parameters: object) -> AdmissionPolicy:
    policy: AdmissionPolicy = plugins.create("admission", name, parameters)
    policy.rng = random.Random(0)
    return policy


def let_in(run: Outcome) -> list[Any]:
    return [record for record in run.recorder.requests if record.decision.admitted]


def met(run: Outcome) -> int:
    return sum(record.met_objectives for record in run.recorder.requests)


@pytest.mark.parametrize("name", NAMES)
def test_all_are_served_or_turned_away_with_a_reason_and_two_runs_are_alike(name: str) -> None:
    work = [
        Request(id=r.id, prompt=r.prompt, arrival=r.arrival, output_len=r.output_len, ttft_slo=200 * MS)
        for r in poisson(250, 80)
    ]
    one, two = (
        simulate(work, fleet=FleetSpec(2, 2), admission=name, routing="round_robin", capacity=Capacity(200))
        for _ in range(2)
    )
    assert one.recorder.requests == two.recorder.requests
    assert one.digests == two.digests
    for record in one.recorder.requests:
        assert record.outcome == ("finished" if record.decision.admitted else "rejected")
        assert record.reason
    assert let_in(one)


# -- rates -------------------------------------------------------------------------------------------------

arrivals = st.lists(
    st.tuples(st.integers(0, 24), st.integers(1, 12)), min_size=1, max_size=40
).map(lambda rows: [(sum(gap for gap, _ in rows[: i + 1]), size) for i, (_, size) in enumerate(rows)])  # fmt: skip
"""(time in eighths of a second, prompt tokens): every level is a binary fraction, so floats are exact."""


@given(arrivals, st.sampled_from([0.5, 2.0, 4.0]), st.sampled_from([1.0, 3.0, 8.0]), st.booleans())
def test_the_bucket_admits_what_an_exact_one_would_and_never_more_than_burst_and_rate(
    rows: list[tuple[int, int]], rate: float, burst: float, by_tokens: bool
) -> None:
    policy = admission("token_bucket", rate=rate, burst=burst, cost="tokens" if by_tokens else "requests")
    level, before, entered = Fraction(burst), 0, []
    for at, size in rows:
        price = size if by_tokens else 1
        level = min(Fraction(burst), level + Fraction(rate) * (at - before) / 8)
        before = at
        verdict = policy.admit(request(prompt=size), [view(0)], at * SECOND // 8)
        assert verdict.admit == (price <= level)
        assert ("the bucket holds" in verdict.reason) == (price > burst)
        if verdict.admit:
            level -= price
            entered.append((at, price))
    for i, (start, _) in enumerate(entered):
        for j in range(i, len(entered)):
            assert sum(price for _, price in entered[i : j + 1]) <= burst + rate * (entered[j][0] - start) / 8


@given(
    st.lists(st.tuples(st.integers(0, 8), st.integers(0, 2), st.integers(1, 20)), min_size=1, max_size=60),
    st.integers(1, 4),
    st.integers(0, 30),
)
def test_a_quota_counts_each_tenants_window(rows: list[tuple[int, int, int]], most: int, tokens: int) -> None:
    policy = admission("quota", requests=most, tokens=tokens, window_s=1.0)
    used: dict[tuple[int, str], list[int]] = {}
    now = 0
    for gap, tenant, size in rows:
        now += gap * SECOND // 8
        asked = request(prompt=size, tenant=f"t{tenant}")
        mine = used.setdefault((now // SECOND, asked.tenant), [])
        sent = sum(amount > 0 for amount in mine)
        expected = sent < most and not (tokens and sum(map(abs, mine)) >= tokens)
        assert policy.admit(asked, [view(0)], now).admit == expected
        if expected:
            mine.append(size)
            if gap % 2:  # some end at once, and what they generated counts, here as negative amounts
                policy.on_finish(asked, Ended("finished", 0, 1, 1, 3), now)
                mine.append(-3)


# -- memory ------------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(0, 100), st.integers(0, 300), st.integers(0, 4)), min_size=1, max_size=4),
    st.integers(1, 400),
    st.sampled_from([0.0, 0.05, 0.3]),
)
def test_the_watermark_looks_at_what_the_best_replica_would_have_left(
    rows: list[tuple[int, int, int]], prompt: int, watermark: float
) -> None:
    replicas = [
        view(
            i,
            blocks_free=free,
            tokens_to_compute=backlog,
            cached=lambda asked, hit=hit: min(16 * hit, prompt),
        )
        for i, (free, backlog, hit) in enumerate(rows)
    ]
    fits = any(
        free - -(-(backlog + prompt - min(16 * hit, prompt)) // 16) >= watermark * 100
        for free, backlog, hit in rows
    )
    policy = admission("kv_watermark", watermark=watermark)
    assert policy.admit(request(prompt=prompt), replicas, 0).admit == fits


def test_a_watermark_spares_preemptions() -> None:
    work = poisson(200, 100, prompt=80, output=80)

    def run(how: Any) -> Outcome:
        return simulate(work, fleet=FleetSpec(), admission=how, capacity=Capacity(70), limits=Limits(256, 32))

    def preempted(one: Outcome) -> float:
        return sum(record.preemptions for record in let_in(one)) / len(let_in(one))

    always, marked = run("always"), run({"name": "kv_watermark", "watermark": 0.2})
    assert preempted(always) > 0.3
    assert preempted(marked) < preempted(always) / 2
    assert 0 < len(let_in(marked)) < len(work)


# -- limits that adapt -------------------------------------------------------------------------------------

events = st.lists(
    st.one_of(
        st.none(), st.tuples(st.integers(1, 4000), st.sampled_from(["finished", "finished", "aborted"]))
    ),
    min_size=1,
    max_size=150,
)
"""None: somebody comes. Otherwise one of those in flight ends: latency in ms, and how."""


def follow(policy: Any, rows: Sequence[Any], react: Any, least: float, most: float, start: float) -> None:
    """Drive a limit and a copy of its rule side by side."""
    limit, in_flight = start, 0
    for row in rows:
        if row is None:
            admitted = policy.admit(request(), [view(0)], 0).admit
            assert admitted == (in_flight < int(limit))
            in_flight += admitted
        elif in_flight:
            latency, outcome = row
            limit = min(max(react(limit, in_flight, latency * MS, outcome != "finished"), least), most)
            in_flight -= 1
            policy.on_finish(request(), Ended(outcome, 0, latency * MS, 5000 * MS, 1), 0)
        assert policy.limit == pytest.approx(limit, rel=1e-12)
        assert policy.in_flight == in_flight


def busy(seed: int) -> list[Any]:
    """A long path on which the limit is nearly always reached, with spells of good and bad latency."""
    rng = random.Random(seed)
    return [
        None if rng.random() < 0.6 else (rng.randrange(1, 4000 if i // 100 % 2 else 300), "finished")
        for i in range(1000)
    ]


def aimd_rule() -> Any:
    def react(limit: float, in_flight: int, latency: int, dropped: bool) -> float:
        if dropped or latency > 2000 * MS:
            return limit * 9 // 10
        return limit + 1 if 2 * in_flight >= limit else limit

    return react


def gradient2_rule() -> Any:
    seen: list[int] = []
    decays: list[int] = []
    mean = 0.0

    def react(limit: float, in_flight: int, latency: int, dropped: bool) -> float:
        nonlocal mean
        seen.append(latency)
        # A window of 9: alpha is 2 / 10, and up to the fifth sample it is the mean of all.
        if len(seen) <= 5 and not decays:
            mean = sum(seen) / len(seen)
        else:
            mean += (latency - mean) * max(0.2, 1 / len(seen))
        if mean > 2 * latency:
            mean *= 0.95
            decays.append(1)
        if in_flight < limit / 2:
            return limit
        gradient = min(max(1.5 * mean / latency, 0.5), 1)
        return 0.8 * limit + 0.2 * (limit * gradient + 4)

    return react


@settings(max_examples=40)
@given(events)
@example(busy(1))
@example(busy(2))
def test_aimd_moves_by_its_formula(rows: list[Any]) -> None:
    follow(admission("aimd", start=6, most=12), rows, aimd_rule(), 1, 12, 6)


@settings(max_examples=40)
@given(events)
@example(busy(1))
@example(busy(2))
def test_gradient2_moves_by_its_formula(rows: list[Any]) -> None:
    policy = admission("gradient2", start=6, least=2, most=30, window=9)
    follow(policy, rows, gradient2_rule(), 2, 30, 6)


@pytest.mark.parametrize("name", ["aimd", "gradient2"])
@pytest.mark.parametrize("latency", ["ttft", "e2e"])
def test_an_adaptive_limit_bounds_latency_in_overload(name: str, latency: str) -> None:
    work = poisson(900, 250, prompt=64, output=8)  # about twice what one replica can do
    chosen = {"name": name, "latency": latency, "start": 10, "most": 40}
    if name == "aimd":
        chosen["timeout_ms"] = 300.0
    always, limited = (simulate(work, fleet=FleetSpec(), admission=how) for how in ("always", chosen))
    slow = sorted(record.end - record.request.arrival for record in let_in(limited))[-1]
    slow_always = sorted(record.end - record.request.arrival for record in let_in(always))[-1]
    assert slow < slow_always / 3
    # It isn't bought by idling: in the same time at least as much is served, to nine tenths.
    last = work[-1].arrival
    served = [sum(record.end <= last for record in let_in(run)) for run in (always, limited)]
    assert served[1] > 0.9 * served[0]


@pytest.mark.parametrize("name", ["aimd", "gradient2"])
def test_nothing_stays_in_flight_not_even_what_never_fits(name: str) -> None:
    work = poisson(60, 40)
    work.insert(30, request("giant", prompt=99_999, arrival=work[30].arrival))
    run = simulate(work, fleet=FleetSpec(2, 2), admission=name, routing="least_requests")
    policy: Any = run.control.gateway._admission
    assert policy.in_flight == 0
    assert len(let_in(run)) == 60


# -- objectives --------------------------------------------------------------------------------------------


def with_objective(count: int, rate: float, slo: int) -> list[Request]:
    return poisson(count, rate, prompt=200, output=6, ttft_slo=slo)


@pytest.mark.parametrize("foresee", ["prefill", "slots"])
def test_early_rejection_saves_those_let_in(foresee: str) -> None:
    work = with_objective(600, 200, 400 * MS)  # about twice what both replicas can do

    def run(how: Any) -> Outcome:
        return simulate(
            work, fleet=FleetSpec(2, 2), admission=how, routing="least_tokens", limits=Limits(256, 64)
        )

    always = run("always")
    early = run({"name": "slo_reject", "foresee": foresee})
    attained = [met(one) / len(let_in(one)) for one in (always, early)]
    assert attained[0] < 0.5
    assert attained[1] > 0.95
    assert met(early) > 2 * met(always)
    # What was foreseen came true.
    ratios = []
    for record in let_in(early):
        found = re.search(r"after (\d+) ms", record.decision.admit_reason)
        if found and int(found[1]) > 100:
            ratios.append((record.token_times[0] - record.request.arrival) / MS / int(found[1]))
    assert len(ratios) > 100
    assert sum(ratios) / len(ratios) == pytest.approx(1, abs=0.1)
    assert sum(0.75 < ratio < 1.25 for ratio in ratios) > 0.9 * len(ratios)


def test_foreseeing_the_wait_for_a_slot_rejects_what_prefill_alone_lets_in_too_late() -> None:
    work = poisson(300, 30, prompt=16, output=60, ttft_slo=400 * MS)  # few tokens to prefill, few slots

    def run(foresee: str) -> float:
        how = {"name": "slo_reject", "foresee": foresee}
        one = simulate(work, fleet=FleetSpec(), admission=how, limits=Limits(256, 2))
        return met(one) / len(let_in(one))

    assert run("prefill") < 0.5
    assert run("slots") > 0.8


def test_without_an_objective_or_an_estimate_everybody_enters() -> None:
    policy = admission("slo_reject")
    busy = view(0, tokens_to_compute=10_000, estimate=lambda prefill, decodes, context: prefill * MS)
    assert policy.admit(request(), [busy], 0).admit
    assert policy.admit(request(ttft_slo=1), [view(0, tokens_to_compute=10_000)], 0).admit
    assert not policy.admit(request(ttft_slo=9 * SECOND), [busy], 0).admit


def test_the_best_replica_and_its_cache_decide_and_the_factor_leaves_a_margin() -> None:
    def estimate(prefill: int, decodes: int, context: int) -> int:
        return prefill * MS

    busy = view(0, tokens_to_compute=500, estimate=estimate)
    warm = view(1, tokens_to_compute=20, cached=lambda asked: 48, estimate=estimate)
    asked = request(prompt=64, ttft_slo=40 * MS)
    assert not admission("slo_reject").admit(asked, [busy], 0).admit
    assert admission("slo_reject", factor=1.0).admit(asked, [busy, warm], 0).admit  # 20 + 64 - 48 = 36 ms
    assert not admission("slo_reject", factor=0.8).admit(asked, [busy, warm], 0).admit


@pytest.mark.parametrize(
    ("name", "parameters", "said"),
    [
        ("token_bucket", {"rate": 0.0}, "rate is 0.0; expected a finite number above 0"),
        ("token_bucket", {"burst": -1.0}, "burst is -1.0; expected a finite number above 0"),
        ("quota", {"requests": 0}, "requests is 0; expected at least 1"),
        ("quota", {"tokens": -1}, "tokens is -1; expected at least 0"),
        ("quota", {"window_s": 0.0}, "window_s is 0.0; expected a time in seconds above 0"),
        ("kv_watermark", {"watermark": 1.0}, "watermark is 1.0; expected at least 0 and below 1"),
        ("aimd", {"timeout_ms": 0.0}, "timeout_ms is 0.0; expected a finite number above 0"),
        ("aimd", {"backoff": 1.0}, "backoff is 1.0; expected a share between 0 and 1"),
        ("aimd", {"start": 0}, "start is 0; expected 1 <= least <= start <= most"),
        ("gradient2", {"tolerance": 0.5}, "tolerance is 0.5; expected a finite number, at least 1"),
        ("gradient2", {"window": 0}, "window is 0; expected at least 1"),
        ("slo_reject", {"factor": 0.0}, "factor is 0.0; expected a finite number above 0"),
    ],
)
def test_bad_values_are_refused(name: str, parameters: dict[str, object], said: str) -> None:
    with pytest.raises(Exception, match=said):
        plugins.create("admission", name, parameters)
