"""The fitted linear cost model: each phase is a non-negative combination of a few facts about the batch.

Non-negative coefficients keep it physical: more work never takes less time. Two hinges on the number of
rows let the forward pass be flat while it is bound by reading weights and steep once it is bound by
arithmetic. Coefficients come from `sim.calibrate`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lab.control.plan import Decoding, StepPlan, StepTiming
from lab.errors import ConfigError
from sim.cost.model import Batch

FORMAT = 2

Feature = Callable[[Batch], float]

FEATURES: dict[str, Feature] = {
    "step": lambda b: 1,
    "rows": lambda b: b.rows,
    "rows_over_8": lambda b: max(0, b.rows - 8),
    "rows_over_32": lambda b: max(0, b.rows - 32),
    "seqs": lambda b: b.seqs,
    "samples": lambda b: b.samples,
    "decode_context": lambda b: b.decode_context,
    "decode_padded": lambda b: b.decode_padded,
    "prefill_pairs": lambda b: b.prefill_pairs,
    "prefill_context": lambda b: b.prefill_context,
}

PHASES: dict[str, tuple[str, ...]] = {
    "plan_ns": ("step", "seqs"),
    "prepare_ns": ("step", "seqs", "rows", "decode_padded", "prefill_context"),
    "forward_ns": tuple(FEATURES),
    "sample_ns": ("step", "samples"),
    "commit_ns": ("step", "seqs"),
}
"""Which features may explain which phase, in the order of `StepTiming`."""


@dataclass(frozen=True)
class LinearCost:
    """Coefficients in nanoseconds per unit of each feature, by phase, and where they come from."""

    coefficients: Mapping[str, Mapping[str, float]]
    measured_on: Mapping[str, Any] = field(default_factory=dict)
    """Machine, model, dtype, capacity and fit quality, for people and for the run's record."""
    _phases: list[list[tuple[float, Feature]]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Each phase as (coefficient, feature) pairs, since this runs once for every simulated step.
        compiled = [
            [(value, FEATURES[name]) for name, value in self.coefficients[phase].items()] for phase in PHASES
        ]
        object.__setattr__(self, "_phases", compiled)

    def step_time(self, plan: StepPlan) -> StepTiming:
        return self._price(Batch.of(plan))

    def decode_time(self, decodes: Decoding) -> StepTiming:
        """The same of a step that is nothing but these decodes."""
        return self._price(Batch.of_decodes(decodes))

    def _price(self, batch: Batch) -> StepTiming:
        times = []
        for terms in self._phases:
            total = 0.0
            for value, feature in terms:
                total += value * feature(batch)
            times.append(round(total))
        return StepTiming(*times)

    @classmethod
    def fit(cls, samples: Mapping[str, Sequence[tuple[Batch, int]]], about: Mapping[str, Any]) -> LinearCost:
        """Least squares of the *relative* error with coefficients >= 0 (Lawson-Hanson, scipy's nnls).

        `samples` maps each phase to what was measured of it: (batch, nanoseconds).
        """
        import numpy as np
        from scipy.optimize import nnls

        coefficients: dict[str, dict[str, float]] = {}
        for phase, names in PHASES.items():
            y = np.array([max(float(took), 1.0) for _, took in samples[phase]])
            x = np.array([[float(FEATURES[name](batch)) for name in names] for batch, _ in samples[phase]])
            # Relative error, with a floor so that phases of a few microseconds don't rule the fit by noise.
            weight = 1.0 / np.maximum(y, np.median(y) * 0.2)
            scale = np.maximum(np.abs(x).max(axis=0), 1.0)
            solution, _ = nnls(x / scale * weight[:, None], y * weight)
            coefficients[phase] = {n: float(v) for n, v in zip(names, solution / scale, strict=True) if v > 0}
        return cls(coefficients, about)

    def to_json(self) -> str:
        body = {"format": FORMAT, "coefficients_ns": self.coefficients, "measured_on": self.measured_on}
        return json.dumps(body, indent=2, sort_keys=True) + "\n"

    @classmethod
    def load(cls, path: Path) -> LinearCost:
        """Read a calibration file. Raises `ConfigError` in one sentence when it can't be used."""
        try:
            body = json.loads(path.read_text())
            if body["format"] != FORMAT:
                raise ConfigError(f"calibration {path} has format {body['format']}; expected {FORMAT}")
            coefficients = {phase: dict(body["coefficients_ns"][phase]) for phase in PHASES}
            unknown = {name for terms in coefficients.values() for name in terms} - set(FEATURES)
            if unknown:
                raise ConfigError(
                    f"calibration {path} has unknown features {sorted(unknown)}; expected {list(FEATURES)}"
                )
            if any(value < 0 for terms in coefficients.values() for value in terms.values()):
                raise ConfigError(
                    f"calibration {path} has a negative coefficient; more work never takes less time"
                )
            return cls(coefficients, body["measured_on"])
        except OSError as error:
            raise ConfigError(f"calibration {path} can't be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"calibration {path} is malformed: {error}; make it again with cost.recalibrate=true"
            ) from error
