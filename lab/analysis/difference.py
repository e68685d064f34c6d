"""What a comparison of two runs found, as one value: `lab.analysis.diff` makes it, verdicts and pages read it.

Observation path. `a` is the reference, `b` the candidate, every difference is b - a.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.analysis.aligned import Aligned
from lab.analysis.clocks import Skew
from lab.analysis.distributions import summary
from lab.analysis.files import write_atomic
from lab.analysis.frames import PARTS
from lab.analysis.scope import Scope

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class Diff:
    """What `diff` found; its repr is the verdict.

    `keys` name the sides in the mappings (`real`, `sim` or `a`, `b`), `labels` in print.
    """

    keys: tuple[str, str]
    labels: tuple[str, str]
    partial: tuple[bool, bool]
    scope: Scope
    """What of the two runs is compared, where it isn't all."""
    metrics: dict[str, dict[str, float | None]]
    """Each scalar of metrics.json: both sides' values and `error_pct` (b against a; None where undefined)."""
    decisions: dict[str, Any]
    alignment: dict[str, Any]
    """How many requests were matched by id, and what could not be."""
    requests: pd.DataFrame
    """One row a matched request (index id): per latency and part, nanoseconds of both sides and the difference."""
    waits: pd.DataFrame
    """One row a waiting interval, matched by request, cause and visit."""
    aligned: Aligned
    """Which step belongs to which."""
    attribution: dict[str, Any]
    """`e2e` and `ttft` over the parts of a request, `steps` over the phases of a step; signed ms, b - a."""
    percentiles: pd.DataFrame
    """Each latency percentile by percentile, with its band (`lab.analysis.distributions`)."""
    spread: dict[str, dict[str, float]]
    """Several runs a side: each metric's error (percent) over the pairs: `mean`, and the 95 % interval's ends."""
    residuals: pd.DataFrame
    """One row a pair of steps that did the same work: shape and durations (`lab.analysis.residuals`)."""
    terms: pd.DataFrame
    """Which fact about a batch each phase's residual is proportional to."""
    counterfactual: dict[str, dict[str, float]] | None
    """Per headline metric: total = duration + decision. None when nothing was re-simulated, or with other rules than
    b's."""
    parity: bool | None
    """Whether replaying a's durations gave a's plan digests; None when not tried."""
    replay_divergence: dict[str, Any] | None
    """Where b's rules part from a's decisions although the durations are a's: no clock is to blame there."""
    distances: dict[str, Any]
    noise: dict[str, Any] | None
    """How far repeats of the reference lie apart, and each distance as a multiple; None without repeats."""
    measured: bool
    """Whether a side was measured, so that chance had a part in it."""
    configuration: dict[str, dict[str, Any]]
    """Options that differ between the two runs."""
    clocks: tuple[list[Skew], list[Skew]]
    """Of a side that several ranks computed: each rank's clock against rank 0's."""

    @property
    def moved(self) -> list[str]:
        """The parts of a request worth showing: queue, prefill and decode, and any other with a difference."""
        return [
            part
            for part in PARTS
            if part in ("queue", "prefill", "decode") or self.attribution["e2e"]["stages"][part]["share"]
        ]

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        """Every table as a DataFrame by name, as `--out` writes them. Columns end in their unit (`_ns`, `_ms`)."""
        from lab.analysis.diff_tables import tables

        return tables(self)

    def __repr__(self) -> str:
        from lab.analysis.verdict import verdict

        return "\n".join(
            [f"Diff({' -> '.join(self.labels)})", *(f"- {sentence}" for sentence in verdict(self))]
        )

    def to_json(self) -> dict[str, Any]:
        """The content of diff.json: plain values, sorted keys, null where a number is undefined."""
        tree = {
            "schema": 1,
            "sides": dict(zip(("a", "b"), self.labels, strict=True)),
            "partial": dict(zip(self.keys, self.partial, strict=True)),
            "scope": self.scope.to_json(),
            "metrics": self.metrics,
            "decisions": self.decisions,
            "requests": self.alignment,
            "steps": self.aligned.summary(),
            "percentiles": summary(self.percentiles),
            "spread": self.spread,
            "terms": self.terms.to_dict("records"),
            "attribution": self.attribution,
            "counterfactual": self.counterfactual,
            "replay": {"parity": self.parity, "first_divergence": self.replay_divergence},
            "distances": self.distances,
            "noise": self.noise,
            "configuration": self.configuration,
            "clocks": {
                key: [skew._asdict() for skew in side]
                for key, side in zip(self.keys, self.clocks, strict=True)
            },
        }
        plain: dict[str, Any] = _plain(tree)
        return plain

    def write(self, path: str | Path) -> None:
        """Write diff.json atomically. Raises `RunError` when that can't be done."""
        write_atomic(Path(path), json.dumps(self.to_json(), indent=2, sort_keys=True, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    """JSON's own types: numpy scalars unwrapped, what is not finite as None, keys in order."""
    if isinstance(value, Mapping):
        return {str(key): _plain(value[key]) for key in sorted(value, key=str)}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "item") and not isinstance(value, (str, bytes)):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, (str, int, bool)) or value is None else str(value)
