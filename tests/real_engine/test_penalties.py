"""Bias, penalties and least lengths against transformers' own logits processors, and by their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.control.request import Prompt, Request, SamplingParams
from lab.errors import ExecutorError
from real_engine.penalties import Adjustment
from real_engine.sampler import sample

VOCAB = 40
texts = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=30)


def adjustment(prompt: list[int], output: list[int], how: SamplingParams, **options: object) -> Adjustment:
    request = Request(id="a", prompt=Prompt.of(prompt), max_tokens=60, sampling=how, **options)  # type: ignore[arg-type]
    made = Adjustment(request, prompt, VOCAB)
    for token in output:
        made.append(token)
    return made


def logits(seed: int) -> torch.Tensor:
    return torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(seed)) * 4


@settings(max_examples=60, deadline=None)
@given(texts, texts, st.floats(0.3, 3), st.integers(0, 99))
def test_repetition_counts_prompt_and_output_as_transformers_does(
    prompt: list[int], output: list[int], penalty: float, seed: int
) -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    row = logits(seed)
    wanted = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt + output]), row.clone())
    got = adjustment(prompt, output, SamplingParams(repetition_penalty=penalty)).apply(row[0].numpy())
    torch.testing.assert_close(torch.from_numpy(got), wanted[0])


@settings(max_examples=40, deadline=None)
@given(texts, st.lists(st.integers(0, VOCAB - 1), max_size=8), st.integers(0, 9))
def test_no_stop_token_can_be_drawn_before_min_tokens(
    prompt: list[int], output: list[int], least: int
) -> None:
    from transformers import MinNewTokensLengthLogitsProcessor

    row = logits(1)
    theirs = MinNewTokensLengthLogitsProcessor(len(prompt), least, [3, 7])  # type: ignore[arg-type]
    wanted = theirs(torch.tensor([prompt + output]), row.clone())
    how = SamplingParams(min_tokens=least)
    got = adjustment(prompt, output, how, stop_ids=(3, 7)).apply(row[0].numpy())
    torch.testing.assert_close(torch.from_numpy(got), wanted[0])


def test_bias_is_transformers_sequence_bias_of_single_tokens() -> None:
    from transformers import SequenceBiasLogitsProcessor

    row, bias = logits(2), {2: 5.0, 9: -3.5, 39: 100.0}
    theirs = SequenceBiasLogitsProcessor({(token,): value for token, value in bias.items()})
    wanted = theirs(torch.tensor([[1, 2]]), row.clone())
    got = adjustment([1], [2], SamplingParams(logit_bias=tuple(bias.items()))).apply(row[0].numpy())
    torch.testing.assert_close(torch.from_numpy(got), wanted[0])


@settings(max_examples=60, deadline=None)
@given(texts, texts, st.floats(-2, 2), st.floats(-2, 2), st.integers(0, 99))
def test_presence_and_frequency_count_the_output_alone(
    prompt: list[int], output: list[int], presence: float, frequency: float, seed: int
) -> None:
    row = logits(seed)[0].numpy()
    how = SamplingParams(presence_penalty=presence, frequency_penalty=frequency)
    wanted = [x - frequency * output.count(t) - presence * (t in output) for t, x in enumerate(row.tolist())]
    np.testing.assert_allclose(adjustment(prompt, output, how).apply(row), wanted, rtol=1e-4, atol=1e-4)


def test_the_order_is_bias_then_repetition_then_the_rest() -> None:
    how = SamplingParams(
        repetition_penalty=2.0, presence_penalty=0.25, frequency_penalty=0.5, logit_bias=((1, 3.0),)
    )
    row = np.array([1.0, -1.0] + [0.0] * (VOCAB - 2), np.float32)
    assert adjustment([0], [1, 1], how).apply(row)[:2].tolist() == [0.5, (-1 + 3) / 2 - 2 * 0.5 - 0.25]


def test_changed_rows_draw_from_what_is_left_and_report_the_models_own_logprobs() -> None:
    row = logits(3)
    best = int(row.argmax())
    for how in (
        SamplingParams(logit_bias=((best, -1000.0),), logprobs=1),
        SamplingParams(logit_bias=((best, -1000.0),), logprobs=1, temperature=0.5),
    ):
        change = {1: adjustment([0], [], how)}
        tokens, logprobs = sample(row.repeat(2, 1), ["x", "a"], [SamplingParams(), how], [1, 1], change)
        assert tokens[0] == best != tokens[1]
        own = torch.log_softmax(row[0], -1)
        assert logprobs["a"].chosen == pytest.approx(float(own[tokens[1]]))
        assert logprobs["a"].top[0][0] == best


def test_a_row_with_nothing_left_to_draw_names_the_request() -> None:
    how = SamplingParams(min_tokens=2)
    change = {0: adjustment([0], [], how, stop_ids=tuple(range(VOCAB)))}
    with pytest.raises(ExecutorError, match=r"request 'a': .* leave no token to draw"):
        sample(logits(1), ["a"], [how], [1], change)


def test_a_bias_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(ExecutorError, match=r"bias on token 40; expected ids within 0 \.\. 39"):
        adjustment([0], [], SamplingParams(logit_bias=((VOCAB, 1.0),)))


@pytest.mark.parametrize(
    "wrong",
    [
        {"repetition_penalty": 0.0},
        {"presence_penalty": float("nan")},
        {"frequency_penalty": float("inf")},
        {"min_tokens": -1},
    ],
)
def test_values_out_of_range_are_refused_by_name(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"sampling parameter {next(iter(wrong))} is"):
        SamplingParams(**wrong)  # type: ignore[arg-type]
