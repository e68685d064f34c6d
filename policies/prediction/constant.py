"""constant: the same length for everybody: what a policy that needs lengths does without any.

Wins: nothing; the other end of the scale from oracle. O(1).
"""

from __future__ import annotations

from lab.policy import LengthPredictor, Request


class Constant(LengthPredictor):
    """`tokens` of output."""

    def __init__(self, tokens: int = 256) -> None:
        if tokens < 1:
            raise ValueError(f"tokens is {tokens}; expected at least 1")
        self.tokens = tokens

    def predict(self, request: Request, now: int) -> int:
        return self.tokens
