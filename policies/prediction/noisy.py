"""noisy: the true output length times exp(sigma Z), Z standard normal: an oracle of any chosen quality.

Origin: the usual robustness study of size-based scheduling; sigma 0.5 keeps a Kendall tau of about 0.65 with the
truth on the Azure conversation trace, 1 of 0.44, 2 of 0.25. A request's error depends on the run's seed and its id
alone, not on when it came, so two policies face the same errors. O(1).
"""

from __future__ import annotations

import math
from random import Random

from lab.policy import LengthPredictor, Request, stream_of


class Noisy(LengthPredictor):
    """`sigma=0` is the oracle."""

    def __init__(self, sigma: float = 0.5) -> None:
        if not 0 <= sigma <= 10:
            raise ValueError(f"sigma is {sigma}; expected in [0, 10]")
        self.sigma = sigma
        self.seed: int | None = None

    def predict(self, request: Request, now: int) -> int:
        if self.seed is None:
            self.seed = self.rng.getrandbits(64)
        z = Random(stream_of(self.seed, request.id)).gauss(0.0, 1.0)
        return max(round(min(request.output_limit * math.exp(self.sigma * z), 1e9)), 1)
