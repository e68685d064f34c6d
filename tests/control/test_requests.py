"""Synthetic text: one token at a time and a whole segment at once are the same, and prompts keep their length."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.control.request import Prompt, Request, Segment, synthetic_token


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**40), st.integers(1, 50), st.integers(2, 200_000))
def test_a_segment_has_the_tokens_of_its_positions(stream: int, start: int, length: int, vocab: int) -> None:
    prompt = Prompt((Segment(stream, start, length), (1, 0)))
    wanted = [synthetic_token(stream, start + i, vocab) for i in range(length)]
    assert prompt.token_ids(vocab) == [*wanted, 1, 0]
    assert len(prompt) == length + 2


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"prompt": Prompt(())}, "empty prompt"),
        ({"arrival": -1}, "arrives at -1 ns"),
        ({"output_len": 0}, "may generate 0 tokens"),
        ({"max_tokens": 0}, "may generate 0 tokens"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(wrong: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=f"request 'a' .*{words}"):
        Request(id="a", **{"prompt": Prompt.of([1]), **wrong})  # type: ignore[arg-type]
