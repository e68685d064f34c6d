"""The fitted linear cost model: each phase is a non-negative combination of a few facts about the batch.

Non-negative coefficients keep it physical: more work never takes less time. In the number of rows the forward pass is
a rising broken line: nearly flat while it is bound by reading weights, steep once it is bound by arithmetic, and with
the steps of a kernel that computes so many rows at once. Coefficients come from `sim.calibrate`, each with the interval
that resampled measurements give it. A batch larger than any that was measured is extrapolated, counted, and said after
the run.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from lab.control.executor import Capacity
from lab.control.plan import Decoding, StepPlan, StepTiming
from lab.control.request import Request
from lab.errors import ConfigError
from sim.cost.layout import share_scattered
from sim.cost.model import Batch

FORMAT = 5

Feature = Callable[[Batch], float]

KNOTS = (1, 2, 4, 8, 12, 16, 24, 32, 64, 128)
"""Rows at which the forward pass may become steeper or less so."""


def _ramp(low: int, high: int) -> Feature:
    """The rows beyond `low`, as far as `high`."""
    return lambda b: min(max(b.rows - low, 0), high - low)


RAMPS: dict[str, Feature] = {
    **{f"rows_{low}_to_{high}": _ramp(low, high) for low, high in pairwise(KNOTS)},
    f"rows_over_{KNOTS[-1]}": lambda b: max(0, b.rows - KNOTS[-1]),
}

FEATURES: dict[str, Feature] = {
    "step": lambda b: 1,
    "rows": lambda b: b.rows,
    "rows_over_8": lambda b: max(0, b.rows - 8),
    "rows_over_32": lambda b: max(0, b.rows - 32),
    **RAMPS,
    "seqs": lambda b: b.seqs,
    "samples": lambda b: b.samples,
    "decode_context": lambda b: b.decode_context,
    "first_context": lambda b: b.decode_context - b.reread,
    "decode_padded": lambda b: b.decode_padded,
    "prefill_pairs": lambda b: b.prefill_pairs,
    "prefill_context": lambda b: b.prefill_context,
    "new": lambda b: b.new,
}
ROWS_ALONE = "rows_alone"
"""Rows beyond half a tile, as long as one tile holds them all (`tile_rows` in what the fit says of its engine): while
our own product computes with one tile it fetches nothing ahead, so computing is added to waiting for weights. With
fewer rows it hides behind the waiting, with more the next weights are fetched meanwhile; there a batch gets cheaper as
it grows."""
SCATTERED = "scattered_context"
"""The decodes' context that lies in blocks apart from each other, as those of a pool in use do (`sim.cost.layout`), and
is read first: what is read again comes from the processor's cache, wherever it lies."""
FEW_CONTEXT, FEW_FIRST_CONTEXT = "few_context", "few_first_context"
"""The decodes' contexts where there are fewer decodes than `heads_apart_below` in what the fit says of its engine: too
few for all threads, so each head is read for itself, and a token costs more. At that number a batch gets cheaper as it
grows; everywhere else more work takes more time.

Of each kind there is a `first_` one, of tokens that nobody else of the batch has read. What is read again comes from
the processor's cache, so it costs less by the first reading's price: never more."""


def features(about: Mapping[str, Any]) -> Mapping[str, Feature]:
    """By name, those that can be told of batches of this engine."""
    few = int(about.get("heads_apart_below", 0))
    tile = int(about.get("tile_rows", 0))
    # Where attention reads blocks as they lie, nothing is padded; a fit that may think so takes uneven contexts for it.
    known = {name: told for name, told in FEATURES.items() if not (few and name == "decode_padded")}
    return {
        **known,
        ROWS_ALONE: lambda b: max(0, b.rows - tile // 2) if b.rows <= tile else 0,
        SCATTERED: lambda b: max(0, b.scattered - b.reread),
        FEW_CONTEXT: lambda b: b.decode_context if b.decodes < few else 0,
        FEW_FIRST_CONTEXT: lambda b: b.decode_context - b.reread if b.decodes < few else 0,
    }


PHASES: dict[str, tuple[str, ...]] = {
    "plan_ns": ("step", "seqs", "new"),
    "prepare_ns": ("step", "seqs", "rows", "decode_padded", "prefill_context", "new"),
    "forward_ns": (
        "step",
        *RAMPS,
        ROWS_ALONE,
        "seqs",
        "samples",
        "decode_context",
        "first_context",
        FEW_CONTEXT,
        FEW_FIRST_CONTEXT,
        SCATTERED,
        "decode_padded",
        "prefill_pairs",
        "prefill_context",
    ),
    "sample_ns": ("step", "samples"),
    "commit_ns": ("step", "seqs"),
}
"""Which features may explain which phase, in the order of `StepTiming`. (Two hinges on the rows are of older fits.)"""

REACH = ("rows", "seqs", "decode_context", "prefill_pairs")
"""What a batch is large in; beyond what was measured, the fit only continues its lines."""
OUTLIER = 1.345
"""Residuals beyond so many of their spreads count less than squared (Huber: 95 % efficient where noise is normal)."""
RESAMPLES = 200


@dataclass(frozen=True)
class LinearCost:
    """Coefficients in nanoseconds per unit of each feature, by phase, and where they come from."""

    coefficients: Mapping[str, Mapping[str, float]]
    measured_on: Mapping[str, Any] = field(default_factory=dict)
    """Machine, model, dtype, capacity and fit quality, for people and for the run's record."""
    intervals: Mapping[str, Mapping[str, tuple[float, float]]] = field(default_factory=dict)
    """Where 95 % of each coefficient's values lie when measurements are resampled, in the same units. Bounded features
    that resemble one another share their time as it comes: the true value lies outside more often than that says."""
    steps: list[int] = field(default_factory=lambda: [0], init=False, repr=False, compare=False)
    outside: Counter[str] = field(default_factory=Counter, init=False, repr=False, compare=False)
    """How often a batch was larger than any measured one, by what it was large in."""
    scattered: list[float] = field(default_factory=lambda: [0.0], init=False, repr=False, compare=False)
    """Which share of the decodes' context lies scattered in the run that is simulated."""
    _reach: tuple[float, ...] = field(init=False, repr=False, compare=False)
    _phases: list[list[tuple[float, Feature]]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Each phase as (coefficient, feature) pairs, since this runs once for every simulated step.
        share, known = self.scattered, dict(features(self.measured_on))
        measured = known[SCATTERED]
        known[SCATTERED] = lambda b: measured(b) or share[0] * (b.decode_context - b.reread)
        compiled = [
            [(value, known[name]) for name, value in self.coefficients[phase].items()] for phase in PHASES
        ]
        object.__setattr__(self, "_phases", compiled)
        most = self.measured_on.get("most", {})
        object.__setattr__(self, "_reach", tuple(float(most.get(name, float("inf"))) for name in REACH))

    def step_time(self, plan: StepPlan) -> StepTiming:
        return self.price(Batch.of(plan))

    def decode_time(self, decodes: Decoding) -> StepTiming:
        """The same of a step that is nothing but these decodes."""
        return self.price(Batch.of_decodes(decodes))

    def price(self, batch: Batch) -> StepTiming:
        """The same of a batch."""
        self.steps[0] += 1
        rows, seqs, context, pairs = self._reach
        if (
            batch.rows > rows
            or batch.seqs > seqs
            or batch.decode_context > context
            or batch.prefill_pairs > pairs
        ):
            for name, most in zip(REACH, self._reach, strict=True):
                self.outside[name] += getattr(batch, name) > most
        times = []
        for terms in self._phases:
            total = 0.0
            for value, feature in terms:
                total += value * feature(batch)
            times.append(round(total))
        plan_ns, prepare_ns, forward_ns, sample_ns, commit_ns = times
        return StepTiming(plan_ns, prepare_ns, forward_ns, sample_ns, commit_ns)

    def expects(self, requests: Iterable[Request], capacity: Capacity, pools: int = 1) -> None:
        """A run of these requests on so many such pools is to be simulated next."""
        if SCATTERED in self.coefficients["forward_ns"]:
            self.scattered[0] = share_scattered(requests, capacity, pools)

    def account(self) -> dict[str, Any]:
        """For the run's record: steps asked for, and how many of them lay beyond what was measured."""
        known = "most" in self.measured_on
        return {"steps": self.steps[0], "outside": dict(self.outside)} if known else {}

    def warnings(self) -> list[str]:
        """A sentence about that, where there is something to say."""
        found = {name: count for name, count in self.outside.items() if count}
        if not found:
            return []
        most = self.measured_on["most"]
        said = ", ".join(f"{name} over {most[name]:,.0f} in {count:,}" for name, count in found.items())
        return [
            f"Of {self.steps[0]:,} simulated steps, some are larger than any that was measured, and extrapolated: "
            f"{said}."
        ]

    @classmethod
    def fit(
        cls,
        samples: Mapping[str, Sequence[tuple[Batch, int]]],
        about: Mapping[str, Any],
        *,
        intervals: bool = True,
    ) -> LinearCost:
        """Robust regression of the *relative* error with coefficients >= 0.

        Least squares by Lawson and Hanson's method (scipy's nnls), reweighted until residuals far out have no more
        than a linear say (Huber). `samples` maps each phase to what was measured of it: (batch, nanoseconds).
        """
        import numpy as np

        known = features(about)
        coefficients: dict[str, dict[str, float]] = {}
        found: dict[str, dict[str, tuple[float, float]]] = {}
        rng = np.random.default_rng(0)
        for phase, possible in PHASES.items():
            names = [name for name in possible if name in known]
            y = np.array([max(float(took), 1.0) for _, took in samples[phase]])
            x = np.array([[float(known[name](batch)) for name in names] for batch, _ in samples[phase]])
            # Relative error, with a floor so that phases of a few microseconds don't rule the fit by noise.
            weight = 1.0 / np.maximum(y, np.median(y) * 0.2)
            scale = np.maximum(np.abs(x).max(axis=0), 1.0)
            rows, goal = x / scale * weight[:, None], y * weight
            solution, trust = _robust(rows, goal)
            coefficients[phase] = {n: float(v) for n, v in zip(names, solution / scale, strict=True) if v > 0}
            if intervals:
                low, high = _resampled(rows, goal, trust, rng)
                found[phase] = {
                    name: (float(a), float(b))
                    for name, a, b in zip(names, low / scale, high / scale, strict=True)
                    if name in coefficients[phase]
                }
        most = {name: max(float(FEATURES[name](b)) for b, _ in samples["forward_ns"]) for name in REACH}
        return cls(coefficients, {**about, "most": most}, found)

    def to_json(self) -> str:
        body = {"format": FORMAT, "coefficients_ns": self.coefficients, "measured_on": self.measured_on}
        if self.intervals:
            body["intervals_ns"] = self.intervals
        return json.dumps(body, indent=2, sort_keys=True) + "\n"

    @classmethod
    def load(cls, path: Path) -> LinearCost:
        """Read a calibration file. Raises `ConfigError` in one sentence when it can't be used."""
        try:
            body = json.loads(path.read_text())
            if body["format"] != FORMAT:
                raise ConfigError(f"calibration {path} has format {body['format']}; expected {FORMAT}")
            coefficients = {phase: dict(body["coefficients_ns"][phase]) for phase in PHASES}
            unknown = {name for terms in coefficients.values() for name in terms} - set(features({}))
            if unknown:
                raise ConfigError(
                    f"calibration {path} has unknown features {sorted(unknown)}; expected {list(features({}))}"
                )
            if any(value < 0 for terms in coefficients.values() for value in terms.values()):
                raise ConfigError(
                    f"calibration {path} has a negative coefficient; more work never takes less time"
                )
            intervals = {
                phase: {name: (float(low), float(high)) for name, (low, high) in terms.items()}
                for phase, terms in body.get("intervals_ns", {}).items()
            }
            return cls(coefficients, body["measured_on"], intervals)
        except OSError as error:
            raise ConfigError(f"calibration {path} can't be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"calibration {path} is malformed: {error}; make it again with cost.recalibrate=true"
            ) from error


def _robust(rows: Any, goal: Any) -> tuple[Any, Any]:
    """(solution >= 0, weight of each row): Huber's estimate by reweighted least squares."""
    import numpy as np
    from scipy.optimize import nnls

    trust = np.ones(len(goal))
    solution, _ = nnls(rows, goal)
    for _ in range(20):
        left = np.abs(goal - rows @ solution)
        spread = max(1.4826 * float(np.median(left)), 1e-6)
        trust = np.minimum(1.0, OUTLIER * spread / np.maximum(left, 1e-12))
        root = np.sqrt(trust)
        before = solution
        solution, _ = nnls(rows * root[:, None], goal * root)
        if np.allclose(solution, before, rtol=1e-6, atol=1e-12):
            break
    return solution, trust


def _resampled(rows: Any, goal: Any, trust: Any, rng: Any) -> tuple[Any, Any]:
    """95 % intervals of the solution when rows are drawn anew with replacement (Efron's percentiles)."""
    import numpy as np
    from scipy.optimize import nnls

    root = np.sqrt(trust)
    x, y = rows * root[:, None], goal * root
    draws = [rng.integers(0, len(y), len(y)) for _ in range(RESAMPLES)]
    found = np.array([nnls(x[draw], y[draw])[0] for draw in draws])
    return np.percentile(found, 2.5, axis=0), np.percentile(found, 97.5, axis=0)
