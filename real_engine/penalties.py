"""What changes a sequence's logits before its token is chosen: bias, penalties, a least length. Data plane.

The definitions are transformers' (repetition), OpenAI's (presence, frequency, bias) and vLLM's (which tokens count:
repetition over prompt and output, the others over the output alone). The order stands in `SamplingParams`. Which
tokens were seen how often is kept as the sequence grows, so a step costs as much as there are different tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lab.control.request import Request
from lab.errors import ExecutorError

Row = NDArray[np.float32]


class Adjustment:
    """One sequence's changes to its logits, up to date with its tokens."""

    def __init__(self, request: Request, prompt: Sequence[int], vocab_size: int) -> None:
        """Raises `ExecutorError` for a bias on a token that isn't in the vocabulary."""
        how = self._how = request.sampling
        for token, _ in how.logit_bias:
            if token >= vocab_size:
                raise ExecutorError(
                    f"request '{request.id}' has a logit bias on token {token}; expected ids within "
                    f"0 .. {vocab_size - 1}"
                )
        self._biased = np.array([token for token, _ in how.logit_bias], np.int64)
        self._bias = np.array([bias for _, bias in how.logit_bias], np.float32)
        stops = sorted({token for token in request.stop_ids if token < vocab_size})
        self._barred = np.array(stops if request.output_len is None else [], np.int64)
        self._generated = 0
        self._counting = (
            how.repetition_penalty != 1 or how.presence_penalty != 0 or how.frequency_penalty != 0
        )
        seen = np.unique(np.asarray(prompt, np.int64)) if self._counting else np.zeros(0, np.int64)
        self._used = len(seen)
        room = self._used + request.output_limit if self._counting else 0
        self._ids = np.zeros(room, np.int64)
        self._ids[: self._used] = seen
        self._times = np.zeros(room, np.float32)
        """How often each of `_ids` stands in the output."""
        self._place: dict[int, int] = {token: i for i, token in enumerate(seen.tolist())}

    @staticmethod
    def needed(request: Request) -> bool:
        """Whether this request's logits are changed at all."""
        how = request.sampling
        return how.penalised or (how.min_tokens > 0 and request.output_len is None and bool(request.stop_ids))

    def append(self, token: int) -> None:
        """A token was generated."""
        self._generated += 1
        if not self._counting:
            return
        place = self._place.setdefault(token, self._used)
        if place == self._used:
            self._ids[place] = token
            self._used += 1
        self._times[place] += 1

    def apply(self, logits: Row) -> Row:
        """A changed copy of a row `[vocab]` of logits. What can't be drawn is -infinity."""
        row: Row = logits.copy()
        how = self._how
        if len(self._biased):
            np.add.at(row, self._biased, self._bias)
        if self._counting:
            ids, times = self._ids[: self._used], self._times[: self._used]
            values = row[ids]
            if how.repetition_penalty != 1:
                penalty = np.float32(how.repetition_penalty)
                values = np.where(values < 0, values * penalty, values / penalty)
            values -= np.float32(how.frequency_penalty) * times
            values -= np.float32(how.presence_penalty) * (times > 0)
            row[ids] = values
        if self._generated < how.min_tokens:
            row[self._barred] = -np.inf
        return row
