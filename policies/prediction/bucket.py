"""bucket: which power of two the true output length lies under, right with a given probability.

Rule: bucket i holds lengths in (2^(i-1), 2^i]; the answer is the bucket's upper edge, or its middle. When wrong,
it is off by one bucket, either way alike. Origin: length classification, as in S3 (arXiv 2306.06000) or SSJF.
A request's error depends on the run's seed and its id alone. O(1).
"""

from __future__ import annotations

from random import Random
from typing import Literal

from lab.policy import LengthPredictor, Request, stream_of


class Bucket(LengthPredictor):
    """`edge=upper` never foresees too little while it is right."""

    def __init__(self, accuracy: float = 1.0, edge: Literal["upper", "middle"] = "upper") -> None:
        if not 0 <= accuracy <= 1:
            raise ValueError(f"accuracy is {accuracy}; expected in [0, 1]")
        if edge not in ("upper", "middle"):
            raise ValueError(f"edge is {edge!r}; expected 'upper' or 'middle'")
        self.accuracy, self.edge = accuracy, edge
        self.seed: int | None = None

    def predict(self, request: Request, now: int) -> int:
        if self.seed is None:
            self.seed = self.rng.getrandbits(64)
        draw = Random(stream_of(self.seed, request.id))
        bucket = (request.output_limit - 1).bit_length()
        if draw.random() >= self.accuracy:
            bucket = max(bucket + draw.choice((-1, 1)), 0)
        upper = 1 << bucket
        return upper if self.edge == "upper" else max((upper // 2 + upper) // 2, 1)
