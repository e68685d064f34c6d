"""The committed chat sample: reproducible, causal, and full of shared prefixes."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import traces
from lab.control.request import Segment
from traces import make_sample
from traces.registry import build

SAMPLE = Path(traces.__file__).parent / "samples" / "chat.jsonl"


def by_session(workload):
    ordered = sorted(workload.requests, key=lambda request: (request.session, request.arrival, request.id))
    return [list(turns) for _, turns in itertools.groupby(ordered, key=lambda request: request.session)]


def follows(before, after):
    """Does `after` quote all of `before`, then its output, then add text nobody else has?"""
    said = (*before.prompt.pieces, Segment(before.output_stream, 0, before.output_len))
    return after.prompt.pieces[: len(said)] == said and len(after.prompt.pieces) == len(said) + 1


def test_the_committed_sample_is_what_the_generator_writes(tmp_path):
    make_sample.main(["--out", str(tmp_path / "again.jsonl")])
    assert (tmp_path / "again.jsonl").read_bytes() == SAMPLE.read_bytes()


@pytest.mark.parametrize(
    "options", [{}, {"limit": 48}, {"rate_scale": 3.0}, {"max_output": 5}, {"limit": 100}]
)
def test_every_turn_begins_with_the_turn_before_it_and_its_output(options):
    pairs = [pair for turns in by_session(build("chat", options)) for pair in itertools.pairwise(turns)]
    assert len(pairs) > 20
    assert all(follows(before, after) for before, after in pairs)
    assert all(before.arrival < after.arrival for before, after in pairs)


def reuse(workload, block=16):
    """Share of prompt tokens an endless cache holds already, in whole blocks, all but the last token."""
    seen: set[tuple[int, ...]] = set()
    total = hit = 0
    for request in workload.requests:
        said = Segment(request.output_stream, 0, request.output_len - 1) if request.output_len > 1 else ()
        prompt = request.prompt.token_ids(50_000)
        whole = prompt + type(request.prompt)((said,)).token_ids(50_000)
        found = 0
        while (found + 1) * block < len(prompt) and tuple(prompt[: (found + 1) * block]) in seen:
            found += 1
        hit += found * block
        total += len(prompt)
        seen.update(tuple(whole[:end]) for end in range(block, len(whole) + 1, block))
    return hit / total


def test_the_first_48_requests_are_a_small_busy_chat_service():
    workload = build("chat", {"limit": 48})
    stats = workload.stats()
    assert 1.0 <= stats.rate <= 1.5
    assert sum(len(turns) > 1 for turns in by_session(workload)) >= 8
    assert reuse(workload) >= 0.30
    assert 30 <= stats.output.mean <= 50
    assert len({request.tenant for request in workload.requests}) == 4


def test_the_sample_stays_small_enough_for_a_cpu():
    workload = build("chat")
    assert len(workload) == 300
    assert max(len(request.prompt) + request.output_len for request in workload.requests) < 1500
    assert max(request.output_len for request in workload.requests) <= 128


def test_sessions_share_system_prompts_by_name():
    first = [turns[0].prompt.pieces for turns in by_session(build("chat"))]
    assert len({pieces[0] for pieces in first}) == 3
    assert len({pieces[1].stream for pieces in first}) == len(first)


@given(rate_scale=st.floats(0.05, 50))
@settings(max_examples=30, deadline=None)
def test_rescaling_moves_sessions_and_never_the_time_inside_them(rate_scale):
    plain, scaled = build("chat", {"limit": 60}), build("chat", {"limit": 60, "rate_scale": rate_scale})
    before = {request.id: request for request in plain.requests}
    for turns in by_session(scaled):
        start = before[turns[0].id].arrival
        assert turns[0].arrival == round(start / rate_scale)
        assert all(turn.arrival - turns[0].arrival == before[turn.id].arrival - start for turn in turns)
    assert scaled.source["rate_scale"] == rate_scale


@given(limit=st.integers(1, 1200))
@settings(max_examples=30, deadline=None)
def test_clipping_keeps_the_first_tokens_and_is_recorded(limit):
    plain, clipped = build("chat", {"limit": 40}), build("chat", {"limit": 40, "max_prompt": limit})
    for whole, cut in zip(plain.requests, clipped.requests, strict=True):
        assert cut.prompt.token_ids(999) == whole.prompt.token_ids(999)[:limit]
    assert clipped.source["clipped_prompts"] == sum(len(request.prompt) > limit for request in plain.requests)


def test_a_clipped_output_is_what_the_next_turn_quotes():
    workload = build("chat", {"max_output": 5})
    assert {request.output_len for request in workload.requests} == {5}
    assert workload.source["clipped_outputs"] == sum(r.output_len > 5 for r in build("chat").requests)


def test_loading_twice_gives_the_same_workload_and_provenance():
    assert build("chat", {"limit": 30}) == build("chat", {"limit": 30})
    assert build("chat").source["path"] == "traces/samples/chat.jsonl"
