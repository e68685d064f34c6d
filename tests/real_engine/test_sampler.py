"""The sampler against brute force: what each filter keeps, and that draws follow the distribution."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.control.request import GREEDY, SamplingParams
from lab.errors import ExecutorError
from real_engine.sampler import distribution, sample, uniform

rows = st.lists(st.floats(-8, 8), min_size=2, max_size=30, unique=True)
params = st.builds(
    SamplingParams,
    temperature=st.floats(0.2, 3),
    top_k=st.integers(0, 35),
    top_p=st.floats(0.05, 1),
    min_p=st.floats(0, 1),
)


def brute(logits: list[float], p: SamplingParams) -> dict[int, float]:
    """Token -> probability, straight from the definitions."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    if p.top_k:
        order = order[: p.top_k]
    top = logits[order[0]]
    weights = {i: math.exp((logits[i] - top) / p.temperature) for i in order}
    total = sum(weights.values())
    probability = {i: w / total for i, w in weights.items()}
    kept, mass = [], 0.0
    for i in order:
        if p.top_p < 1 and kept and mass >= p.top_p:
            break
        kept.append(i)
        mass += probability[i]
    kept = [i for i in kept if probability[i] >= p.min_p * probability[order[0]]]
    total = sum(probability[i] for i in kept)
    return {i: probability[i] / total for i in kept}


@settings(max_examples=200, deadline=None)
@given(rows, params)
def test_filters_keep_what_their_definitions_say(logits: list[float], p: SamplingParams) -> None:
    got, ids = distribution(torch.tensor(logits, dtype=torch.float64), p)
    mine = {int(i): float(x) for i, x in zip(ids, got, strict=True) if x > 0}
    wanted = brute(logits, p)
    # A cumulative sum on the very edge of top_p may fall to either side.
    assert set(mine) ^ set(wanted) <= {min(mine, key=lambda i: mine[i]), min(wanted, key=lambda i: wanted[i])}
    if set(mine) == set(wanted):
        for i, x in wanted.items():
            assert mine[i] == pytest.approx(x, rel=1e-6)


def test_draws_follow_the_distribution() -> None:
    p = SamplingParams(temperature=1.0, seed=5)
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0, 0.5]])
    count = 20_000
    seen = [0] * 5
    for position in range(count):
        tokens, _ = sample(logits, ["a"], [p], [position])
        seen[tokens[0]] += 1
    expected = torch.softmax(logits[0], dim=-1) * count
    chi = sum((s - float(e)) ** 2 / float(e) for s, e in zip(seen, expected, strict=True))
    assert chi < 18.5, f"chi-square {chi:.1f} over 4 degrees of freedom is beyond its 99.9th percentile"


def test_uniform_numbers_are_uniform_and_repeat() -> None:
    values = [uniform(3, position) for position in range(10_000)]
    assert values == [uniform(3, position) for position in range(10_000)]
    assert all(0 <= value < 1 for value in values)
    assert abs(sum(values) / len(values) - 0.5) < 4 / math.sqrt(12 * len(values))
    assert uniform(3, 1) != uniform(4, 1)


@settings(max_examples=50, deadline=None)
@given(st.lists(rows, min_size=1, max_size=1), st.integers(1, 5), params, st.integers(0, 500))
def test_a_row_is_drawn_alike_alone_and_among_others(
    row: list[list[float]], others: int, p: SamplingParams, position: int
) -> None:
    alone, _ = sample(torch.tensor(row), ["a"], [p], [position])
    crowd = torch.tensor(row * 1 + [[float(j) for j in range(len(row[0]))]] * others)
    among, _ = sample(crowd, ["a", *"bcdef"[:others]], [p] + [GREEDY] * others, [position] * (others + 1))
    assert among[0] == alone[0]


def test_greedy_takes_the_largest_and_reports_logprobs_when_asked() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0], [0.0, 0.0, 5.0]])
    tokens, logprobs = sample(logits, ["a", "b"], [SamplingParams(logprobs=2), GREEDY], [4, 4])
    assert tokens == [1, 2]
    assert set(logprobs) == {"a"}
    wanted = torch.log_softmax(logits[0], dim=-1)
    assert logprobs["a"].chosen == pytest.approx(float(wanted[1]))
    assert [token for token, _ in logprobs["a"].top] == [1, 2]
    assert [value for _, value in logprobs["a"].top] == pytest.approx([float(wanted[1]), float(wanted[2])])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_without_a_number_to_choose_by_name_the_request(bad: float) -> None:
    logits = torch.tensor([[1.0, 2.0], [bad, 0.0]])
    with pytest.raises(ExecutorError, match="request 'broken': the logits at position 9"):
        sample(logits, ["fine", "broken"], [GREEDY, GREEDY], [3, 9])


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}, {"min_p": 2.0}, {"logprobs": -1}],
)
def test_parameters_out_of_range_are_refused_by_name(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"sampling parameter {next(iter(wrong))} is"):
        SamplingParams(**wrong)  # type: ignore[arg-type]
