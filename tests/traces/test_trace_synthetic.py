"""Synthetic arrivals and lengths have the moments they were asked for, from independent seeded streams."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.errors import ConfigError, TraceError
from traces.registry import build

SIGMAS = 4.5  # with fixed seeds these are not flaky; a wrong distribution is tens of sigmas away


def gaps_s(workload):
    return np.diff([request.arrival for request in workload.requests]) / 1e9


def lengths(workload):
    prompts = [len(request.prompt) for request in workload.requests]
    return np.array(prompts), np.array([request.output_len for request in workload.requests])


@pytest.mark.parametrize(("name", "cv"), [("poisson", 1.0), ("gamma", 0.5), ("gamma", 3.0)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gaps_have_the_mean_and_variance_asked_for(name, cv, seed):
    n, rate = 20_000, 7.0
    options = {"n": n, "rate": rate, "seed": seed} | ({"cv": cv} if name == "gamma" else {})
    gaps = gaps_s(build(name, options))
    assert abs(gaps.mean() * rate - 1) < SIGMAS * cv / math.sqrt(n)
    kurtosis = 3 + 6 * cv**2  # of a gamma distribution
    assert abs(gaps.var() * (rate / cv) ** 2 - 1) < SIGMAS * math.sqrt((kurtosis - 1) / n)


def test_poisson_gaps_are_exponential_and_independent():
    gaps = gaps_s(build("poisson", {"n": 20_000, "rate": 2.0, "seed": 5}))
    for multiple in (0.5, 1.0, 2.0):
        share = math.exp(-multiple)
        assert abs((gaps > multiple / 2.0).mean() - share) < SIGMAS * math.sqrt(
            share * (1 - share) / len(gaps)
        )
    assert abs(np.corrcoef(gaps[1:], gaps[:-1])[0, 1]) < SIGMAS / math.sqrt(len(gaps))


def test_lognormal_lengths_have_their_mean_and_cv():
    lengths_of = {"kind": "lognormal", "mean": 400.0, "cv": 0.8, "high": 1_000_000}
    prompts, outputs = lengths(build("poisson", {"n": 20_000, "prompt": lengths_of}))
    assert abs(prompts.mean() / 400 - 1) < SIGMAS * 0.8 / math.sqrt(20_000)
    assert abs(prompts.std() / prompts.mean() / 0.8 - 1) < 0.05
    assert abs(outputs.mean() / 64 - 1) < SIGMAS / math.sqrt(20_000)
    assert abs(np.corrcoef(prompts, outputs)[0, 1]) < SIGMAS / math.sqrt(20_000)


def test_uniform_lengths_reach_both_ends_and_fixed_ones_are_fixed():
    options = {
        "n": 2_000,
        "prompt": {"kind": "uniform", "low": 5, "high": 9},
        "output": {"kind": "fixed", "mean": 7},
    }
    prompts, outputs = lengths(build("poisson", options))
    assert set(prompts) == {5, 6, 7, 8, 9}
    assert set(outputs) == {7}


@given(
    n=st.integers(1, 60),
    more=st.integers(0, 60),
    seed=st.integers(0, 2**32),
    name=st.sampled_from(["poisson", "gamma"]),
)
@settings(max_examples=25, deadline=None)
def test_a_longer_run_begins_with_the_shorter_one(n, more, seed, name):
    options = {"seed": seed, "tenants": 3, "priorities": 2, "prefix_tokens": 8, "prefix_groups": 4}
    short, long = build(name, {**options, "n": n}), build(name, {**options, "n": n + more})
    assert long.requests[:n] == short.requests


def test_each_component_draws_from_a_stream_of_its_own():
    plain = build("poisson", {"n": 50}).requests
    busy = {
        "prompt": {"kind": "uniform", "high": 50},
        "prefix_tokens": 10,
        "prefix_groups": 3,
        "tenants": 4,
        "priorities": 5,
    }
    other = build("poisson", {"n": 50, **busy}).requests
    assert [r.arrival for r in plain] == [r.arrival for r in other]
    assert [r.output_len for r in plain] == [r.output_len for r in other]
    assert [len(r.prompt) for r in plain] != [len(r.prompt) for r in other]


def test_the_seed_decides_and_nothing_else():
    assert build("gamma", {"seed": 3}) == build("gamma", {"seed": 3})
    first, second = build("gamma", {"seed": 3}).requests, build("gamma", {"seed": 4}).requests
    assert [r.arrival for r in first] != [r.arrival for r in second]
    assert {r.prompt.pieces[-1].stream for r in first}.isdisjoint(r.prompt.pieces[-1].stream for r in second)


def test_requests_of_a_group_share_their_prefix_and_nothing_more():
    workload = build(
        "poisson", {"n": 300, "prefix_tokens": 32, "prefix_groups": 3, "tenants": 2, "priorities": 3}
    )
    assert {r.prompt.pieces[0].length for r in workload.requests} == {32}
    assert len({r.prompt.pieces[0] for r in workload.requests}) == 3
    assert len({r.prompt.pieces[1].stream for r in workload.requests}) == 300
    assert {r.tenant for r in workload.requests} == {"t0", "t1"}
    assert {r.priority for r in workload.requests} == {0, 1, 2}


def test_shares_say_how_often_and_classes_bring_their_objectives():
    options = {
        "n": 4000,
        "tenants": 3,
        "tenant_shares": [6, 3, 1],
        "priorities": 2,
        "priority_shares": [1.0, 4.0],
        "ttft_slo_ms": [500, 8000.5],
        "tpot_slo_ms": [50, 200],
    }
    requests = build("poisson", options).requests
    counts = [sum(r.tenant == f"t{i}" for r in requests) for i in range(3)]
    assert [count / 4000 for count in counts] == pytest.approx([0.6, 0.3, 0.1], abs=0.025)
    assert sum(r.priority for r in requests) / 4000 == pytest.approx(0.8, abs=0.025)
    objectives = {(r.priority, r.ttft_slo, r.tpot_slo) for r in requests}
    assert objectives == {(0, 500_000_000, 50_000_000), (1, 8_000_500_000, 200_000_000)}
    plain = build("poisson", {"n": 4000, "tenants": 3, "priorities": 2}).requests
    assert [(r.arrival, r.output_len) for r in plain] == [(r.arrival, r.output_len) for r in requests]
    assert {r.ttft_slo for r in plain} == {None}
    assert build("poisson", {**options, "n": 50}).requests == requests[:50]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"tenants": 2, "tenant_shares": [1]}, r"^trace\.tenant_shares is \[1\.0\]; expected one number > 0"),
        ({"tenants": 2, "tenant_shares": [1, 0]}, r"^trace\.tenant_shares is \[1\.0, 0\.0\]"),
        ({"tenant_shares": [float("nan")]}, r"^trace\.tenant_shares is \[nan\]"),
        ({"priorities": 2, "priority_shares": [1, 2, 3]}, r"for each of the priorities$"),
        ({"ttft_slo_ms": [-5]}, r"^trace\.ttft_slo_ms is \[-5\.0\]"),
        ({"tpot_slo_ms": 3}, r"^trace\.tpot_slo_ms is 3; expected a list"),
        ({"tpot_slo_ms": ["x"]}, r"^trace\.tpot_slo_ms\.0 is 'x'; expected a number"),
    ],
)
def test_shares_and_objectives_that_make_no_sense_are_named(options, named):
    with pytest.raises(ConfigError, match=named):
        build("poisson", {"n": 5, **options})


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("rate", -1.0),
        ("rate", 0.0),
        ("rate", math.nan),
        ("rate", math.inf),
        ("n", 0),
        ("n", -5),
        ("cv", 0.0),
        ("seed", -1),
        ("rate_scale", 0.0),
        ("rate_scale", -2.0),
        ("rate_scale", math.inf),
        ("limit", 0),
        ("offset", -1),
        ("max_prompt", 0),
        ("tenants", 0),
        ("prefix_groups", 0),
        ("prefix_tokens", -1),
    ],
)
def test_an_option_that_makes_no_sense_is_named_with_its_value(option, value):
    with pytest.raises(ConfigError, match=rf"^trace\.{option} is {value}; expected "):
        build("gamma", {option: value})


@pytest.mark.parametrize(
    ("lengths_of", "named"),
    [
        ({"kind": "normal"}, r"trace\.prompt\.kind is 'normal'; expected one of fixed, lognormal, uniform"),
        ({"low": 0}, r"trace\.prompt\.low is 0;"),
        ({"low": 10, "high": 9}, r"trace\.prompt\.high is 9; expected an integer >= trace\.prompt\.low=10"),
        ({"mean": -1}, r"trace\.prompt\.mean is -1\.0;"),
        ({"cv": 0}, r"trace\.prompt\.cv is 0\.0;"),
        ({"men": 3}, r"unknown option 'trace\.prompt\.men'; did you mean 'trace\.prompt\.mean'"),
    ],
)
def test_a_length_distribution_that_makes_no_sense_is_named(lengths_of, named):
    with pytest.raises(ConfigError, match=named):
        build("poisson", {"prompt": lengths_of})


EXTREMES = [
    0,
    1,
    -1,
    7,
    10**9,
    2**63,
    10**30,
    10**400,
    0.5,
    1e-300,
    1e300,
    math.inf,
    -math.inf,
    math.nan,
    None,
    "x",
    True,
]
OPTIONS = [
    "limit",
    "offset",
    "rate_scale",
    "max_prompt",
    "max_output",
    "rate",
    "cv",
]
OPTIONS += ["seed", "prefix_tokens", "prefix_groups", "tenants", "priorities", "prompt"]


@given(st.dictionaries(st.sampled_from(OPTIONS), st.sampled_from(EXTREMES), min_size=1, max_size=3))
@settings(max_examples=300, deadline=None)
def test_any_options_build_a_workload_or_name_the_one_that_makes_no_sense(options):
    try:
        workload = build("gamma", {"n": 5, **options})
    except (ConfigError, TraceError) as error:
        message = str(error)
    else:
        assert 1 <= len(workload) <= 5
        assert workload.requests[0].arrival == 0
        workload.stats()
        return
    assert any(f"trace.{name}" in message for name in options)
