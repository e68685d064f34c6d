"""Public traces, loaded by us, have the statistics other people's code computed."""

from __future__ import annotations

import pytest

from lab.control.request import Segment
from traces.registry import build

AZURE = {
    "azure_2023_code": (8819, 2.567, 13.2, (2047.85, 1469, 7436, 7437), (27.88, 13, 251)),
    "azure_2023_conv": (19366, 5.530, 1.09, (1154.70, 1020, 4142, 14050), (211.13, 129, 601, 1000)),
}


@pytest.mark.parametrize("name", AZURE)
def test_azure_2023_has_its_published_statistics(name, public_trace):
    workload = build(name, {"path": public_trace(f"{name}.csv.gz")})
    n, rate, cv, inputs, outputs = AZURE[name]
    stats = workload.stats()
    assert stats.n == len(workload) == n
    assert round(stats.rate, 3) == rate
    assert round(stats.iat_cv, 1 if cv > 10 else 2) == cv
    assert (round(stats.input.mean, 2), stats.input.p50, round(stats.input.p99), stats.input.max) == inputs
    seen = (round(stats.output.mean, 2), stats.output.p50, int(stats.output.p99), stats.output.max)
    assert seen[: len(outputs)] == outputs
    assert workload.source["clipped_prompts"] == workload.source["clipped_outputs"] == 0


def test_azure_arrivals_keep_all_seven_digits(public_trace):
    workload = build("azure_2023_code", {"path": public_trace("azure_2023_code.csv.gz"), "limit": 2})
    assert [request.arrival for request in workload.requests] == [0, 52_000_000]


@pytest.fixture(scope="module")
def mooncake(public_trace):
    return build("mooncake", {"path": public_trace("mooncake_conversation.jsonl.gz")})


def test_mooncake_has_its_published_statistics(mooncake):
    stats = mooncake.stats()
    assert stats.n == 12_031
    assert round(stats.span_s, 1) == 3537.0
    assert (round(stats.input.mean, 1), stats.input.p50, round(stats.input.p99)) == (12035.1, 6909, 85400)
    assert stats.input.max == 126_195
    assert (round(stats.output.mean, 1), stats.output.p50) == (342.6, 350)


def test_mooncake_prefixes_have_the_hit_ratios_of_an_infinite_cache(mooncake):
    """From the segments alone: a block is a segment, a hit is one that was seen with all before it."""
    seen: set[int] = set()
    accesses = hits = tokens = hit_tokens = capped_tokens = full = full_hits = 0
    per_request = []
    for request in mooncake.requests:
        pieces = [piece for piece in request.prompt.pieces if isinstance(piece, Segment)]
        assert all(piece.start == 0 and piece.length == 512 for piece in pieces[:-1])
        found = 0
        while found < len(pieces) and pieces[found].stream in seen:
            found += 1
        seen.update(piece.stream for piece in pieces)
        accesses += len(pieces)
        hits += found
        tokens += len(request.prompt)
        hit_tokens += sum(len(piece) for piece in pieces[:found])
        capped_tokens += 512 * min(found, (len(request.prompt) - 1) // 512)
        full += len(request.prompt) // 512
        full_hits += min(found, len(request.prompt) // 512)
        per_request.append(found / len(pieces))
    assert (accesses, len(seen)) == (288_500, 182_790)
    assert round(hits / accesses, 4) == 0.3664
    assert round(hit_tokens / tokens, 4) == 0.3736
    assert round(capped_tokens / tokens, 4) == 0.3734
    assert round(full_hits / full, 4) == 0.3819
    assert round(sum(per_request) / len(per_request), 4) == 0.3843


def test_mooncake_ties_keep_the_order_of_the_file(mooncake):
    assert len({request.arrival for request in mooncake.requests}) == 1_180
    ids = [request.id for request in mooncake.requests]
    assert ids == sorted(ids)
    assert mooncake.source["out_of_order"] == 0


def test_ids_that_leave_out_a_short_last_block_leave_its_tokens_private(public_trace):
    workload = build("mooncake", {"path": public_trace("agent40_mooncake.jsonl.gz")})
    blocks = [p for r in workload.requests for p in r.prompt.pieces if isinstance(p, Segment)]
    private = [r for r in workload.requests if len(r.prompt) % 512 and 0 < len(r.prompt.pieces[-1]) < 64]
    assert (len(workload), len(blocks)) == (2_687, 638_999 + 331)
    assert len({r.prompt.pieces[-1] for r in private}) == len(private) == 331


def test_tenants_trace_has_its_27_clients(public_trace):
    workload = build("tenants", {"path": public_trace("vtc_arena27.csv")})
    assert len(workload) == 1_500
    assert len({request.tenant for request in workload.requests}) == 27
    assert workload.stats().span_s == 600.0
