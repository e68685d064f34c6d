"""Plans travel whole: what comes out equals what went in, and so does its digest."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.control.plan import GENESIS, Move, StepPlan, TokenLogprobs, Work, digest_of
from lab.control.request import Prompt, Request, SamplingParams, Segment
from lab.control.wire import codec, decode, decode_logprobs, encode, encode_logprobs
from lab.errors import ExecutorError

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
counts = st.integers(0, 2**40)
ids = st.lists(st.integers(0, 2**31 - 1), max_size=5).map(tuple)
floats = st.floats(0, 4, allow_nan=False)
segments = st.builds(Segment, st.integers(0, 2**64 - 1), counts, st.integers(1, 999))
prompts = st.lists(segments | st.lists(st.integers(0, 2**31), min_size=1).map(tuple), min_size=1, max_size=4)
sampling = st.builds(
    SamplingParams,
    temperature=floats,
    top_k=counts,
    top_p=st.floats(0.001, 1),
    min_p=st.floats(0, 1),
    seed=st.integers(0, 2**63),
    logprobs=st.none() | st.integers(0, 20),
)
requests = st.builds(
    Request,
    id=names,
    prompt=prompts.map(lambda pieces: Prompt(tuple(pieces))),
    arrival=counts,
    max_tokens=st.integers(1, 999),
    output_len=st.none() | st.integers(1, 999),
    stop_ids=ids,
    sampling=sampling,
    tenant=names,
    session=names,
    priority=st.integers(-5, 5),
    ttft_slo=st.none() | counts,
    tpot_slo=st.none() | counts,
    cache_salt=names,
)
work = st.builds(Work, names, counts, st.integers(1, 999), st.booleans(), ids)
moves = st.builds(Move, names, st.lists(st.tuples(counts, counts), max_size=4).map(tuple))
pairs = st.lists(st.tuples(names, names), max_size=3).map(tuple)
plans = st.builds(
    StepPlan,
    index=counts,
    now=counts,
    work=st.lists(work, max_size=5).map(tuple),
    digest=st.just(GENESIS),
    new=st.lists(requests, max_size=3).map(tuple),
    admitted=st.lists(names, max_size=3).map(tuple),
    preempted=pairs,
    rejected=pairs,
    released=st.lists(names, max_size=3).map(tuple),
    swap_out=st.lists(moves, max_size=2).map(tuple),
    swap_in=st.lists(moves, max_size=2).map(tuple),
)


@settings(max_examples=200, deadline=None)
@given(plans)
def test_a_plan_comes_back_equal_and_with_an_equal_digest(plan: StepPlan) -> None:
    back = decode(encode(plan))
    assert back == plan
    assert hash(back) == hash(plan)
    assert encode(back) == encode(plan)
    assert digest_of(GENESIS, back) == digest_of(GENESIS, plan)


def test_log_probabilities_come_back_bit_for_bit() -> None:
    said = {"a": TokenLogprobs(-0.1, ((3, -0.30000000000000004), (4, -1e-300))), "b": TokenLogprobs(-1.0)}
    assert decode_logprobs(encode_logprobs(said)) == said


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        b"{}",
        b"[1,2]",
        encode(StepPlan(1, 2, (), GENESIS))[:-1],
        encode(StepPlan(1, 2, (), GENESIS)).replace(b"[1,2,", b'["1",2,'),
        encode(StepPlan(1, 2, (Work("a", 0, 1, True),), GENESIS)).replace(b"true", b"1"),
    ],
)
def test_bytes_that_are_no_plan_are_refused_in_a_sentence(data: bytes) -> None:
    with pytest.raises(ExecutorError, match="should be a plan"):
        decode(data)


def test_a_field_that_could_not_travel_is_refused_when_it_is_declared() -> None:
    @dataclass
    class Odd:
        what: object

    with pytest.raises(TypeError, match="can't be sent"):
        codec(Odd)
