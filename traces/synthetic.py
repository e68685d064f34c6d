"""Synthetic workloads: Poisson and gamma arrivals with seeded lengths. Request path.

Every component draws from a random stream of its own, named and derived from the seed, and draws one value
a request in order. So a longer run begins with the shorter one, and changing how prompts are drawn moves
neither arrivals nor outputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from lab.control.request import Segment, stream_of
from traces.files import MAX_SECONDS, MAX_TOKENS
from traces.shape import Row, ShapeOptions, assemble, require
from traces.workload import Workload

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MOST_REQUESTS = 10_000_000  # several GB of requests
_KINDS = ("fixed", "lognormal", "uniform")


@dataclass
class Lengths:
    """A distribution of token counts."""

    kind: str = "lognormal"
    """`fixed` (mean), `uniform` (low to high, both included) or `lognormal` (mean, cv, kept in low..high)."""
    mean: float = 256.0
    cv: float = 1.0
    """Standard deviation over mean, before the result is rounded and kept in low..high."""
    low: int = 1
    high: int = 4096

    def check(self, option: str) -> None:
        """ConfigError naming the option and the value that make no sense."""
        require(self.kind in _KINDS, f"{option}.kind", f"'{self.kind}'", f"one of {', '.join(_KINDS)}")
        most = f"at most {MAX_TOKENS}"
        require(1 <= self.low <= MAX_TOKENS, f"{option}.low", self.low, f"an integer >= 1, {most}")
        good = self.low <= self.high <= MAX_TOKENS
        require(good, f"{option}.high", self.high, f"an integer >= trace.{option}.low={self.low}, {most}")
        if self.kind != "uniform":
            require(1 <= self.mean <= MAX_TOKENS, f"{option}.mean", self.mean, f"a number >= 1, {most}")
        if self.kind == "lognormal":
            require(0 < self.cv <= 1000, f"{option}.cv", self.cv, "a number > 0, at most 1000")

    def draw(self, rng: np.random.Generator, n: int) -> NDArray[np.int64]:
        """`n` token counts, each >= 1."""
        import numpy as np

        if self.kind == "fixed":
            return np.full(n, round(self.mean), dtype=np.int64)
        if self.kind == "uniform":
            return rng.integers(self.low, self.high, size=n, dtype=np.int64, endpoint=True)
        variance = math.log1p(self.cv**2)  # of ln X, so that X has the mean and cv asked for
        raw = rng.lognormal(math.log(self.mean) - variance / 2, math.sqrt(variance), size=n)
        return np.clip(np.rint(raw), self.low, self.high).astype(np.int64)


@dataclass
class PoissonOptions(ShapeOptions):
    """Independent arrivals at a mean rate."""

    n: int = 200
    """Requests to generate (`limit` and `offset` then choose among them)."""
    rate: float = 1.0
    """Mean arrivals per second."""
    seed: int = 0
    prompt: Lengths = field(default_factory=Lengths)
    """Tokens of each request's own text; a shared prefix comes on top."""
    output: Lengths = field(default_factory=lambda: Lengths(mean=64.0))
    prefix_tokens: int = 0
    """Length of a shared system prompt; 0 for none."""
    prefix_groups: int = 1
    """Number of different system prompts, each as likely as the others."""
    tenants: int = 1
    """Tenants t0, t1, ..., as likely as `tenant_shares` says."""
    tenant_shares: list[float] = field(default_factory=list)
    """How much each tenant sends, as weights; empty: all the same."""
    priorities: int = 1
    """Priority classes 0, 1, ..., as likely as `priority_shares` says."""
    priority_shares: list[float] = field(default_factory=list)
    """How frequent each class is, as weights; empty: all the same."""
    ttft_slo_ms: list[float] = field(default_factory=list)
    """TTFT objective of each priority class; empty: the run's for all."""
    tpot_slo_ms: list[float] = field(default_factory=list)
    """TPOT objective of each priority class; empty: the run's for all."""


@dataclass
class GammaOptions(PoissonOptions):
    """Arrivals with gamma-distributed gaps: bursty above cv 1, steady below."""

    cv: float = 2.0
    """Coefficient of variation of the gaps between arrivals; 1 is Poisson."""


def random_stream(seed: int, *names: object) -> np.random.Generator:
    """The random stream of one named component: independent of all others of the same seed."""
    import numpy as np

    return np.random.default_rng(np.random.SeedSequence([seed, stream_of("random", *names)]))


def load_synthetic(name: str, options: PoissonOptions) -> Workload:
    """Poisson arrivals, or gamma ones when the options carry a `cv`. The first request arrives at 0."""
    require(1 <= options.n <= MOST_REQUESTS, "n", options.n, f"an integer from 1 to {MOST_REQUESTS}")
    require(1e-9 <= options.rate <= 1e9, "rate", options.rate, "requests per second > 0, at most 1e9")
    require(options.seed >= 0, "seed", options.seed, "an integer >= 0")
    good = 0 <= options.prefix_tokens <= MAX_TOKENS
    require(good, "prefix_tokens", options.prefix_tokens, f"an integer from 0 to {MAX_TOKENS}")
    for option in ("prefix_groups", "tenants", "priorities"):
        value = getattr(options, option)
        require(1 <= value <= MOST_REQUESTS, option, value, f"an integer from 1 to {MOST_REQUESTS}")
    for option in ("tenant_shares", "priority_shares", "ttft_slo_ms", "tpot_slo_ms"):
        values = getattr(options, option)
        whose = "tenants" if option == "tenant_shares" else "priorities"
        good = all(0 < value <= 1e9 for value in values) and len(values) in (0, getattr(options, whose))
        require(good, option, values, f"one number > 0, at most 1e9, for each of the {whose}")
    if isinstance(options, GammaOptions):
        require(1e-6 <= options.cv <= 1000, "cv", options.cv, "a number > 0, from 1e-6 to 1000")
    options.prompt.check("prompt")
    options.output.check("output")
    shape_fields = set(ShapeOptions.__dataclass_fields__)
    drawn = {key: value for key, value in asdict(options).items() if key not in shape_fields}
    return assemble(name, _rows(options), options.shape(), {"trace": name, **drawn})


def _rows(options: PoissonOptions) -> Iterator[Row]:
    import numpy as np

    def stream(component: str) -> np.random.Generator:
        return random_stream(options.seed, component)

    n = options.n
    if isinstance(options, GammaOptions):
        form = options.cv**-2
        gaps = stream("gamma gaps").gamma(form, 1 / (form * options.rate), size=n - 1)
    else:
        gaps = stream("poisson gaps").exponential(1 / options.rate, size=n - 1)
    seconds = np.concatenate([[0.0], np.cumsum(gaps)])
    require(seconds[-1] <= MAX_SECONDS, "rate", options.rate, f"one that offers n={n} within {MAX_SECONDS} s")
    arrivals = np.rint(seconds * 1e9).astype(np.int64)
    prompts = options.prompt.draw(stream("prompt"), n)
    outputs = options.output.draw(stream("output"), n)
    groups = stream("prefix group").integers(options.prefix_groups, size=n)
    tenants = _classes(stream("tenant"), options.tenants, options.tenant_shares, n)
    priorities = _classes(stream("priority"), options.priorities, options.priority_shares, n)
    ttft_slos = [round(value * 1e6) for value in options.ttft_slo_ms]
    tpot_slos = [round(value * 1e6) for value in options.tpot_slo_ms]
    for index in range(n):
        own = Segment(stream_of("synthetic", options.seed, index), 0, int(prompts[index]))
        pieces: tuple[Segment, ...] = (own,)
        if options.prefix_tokens:
            shared = stream_of("synthetic prefix", options.seed, int(groups[index]))
            pieces = (Segment(shared, 0, options.prefix_tokens), own)
        yield Row(
            int(arrivals[index]),
            pieces,
            int(outputs[index]),
            tenant=f"t{tenants[index]}",
            priority=int(priorities[index]),
            ttft_slo_ns=ttft_slos[priorities[index]] if ttft_slos else None,
            tpot_slo_ns=tpot_slos[priorities[index]] if tpot_slos else None,
        )


def _classes(rng: np.random.Generator, count: int, shares: list[float], n: int) -> NDArray[np.int64]:
    """`n` draws of one of `count` classes, with these weights if there are any."""
    import numpy as np

    if not shares:
        return rng.integers(count, size=n)
    bounds = np.cumsum(shares)
    return np.searchsorted(bounds[:-1] / bounds[-1], rng.random(n), side="right")
