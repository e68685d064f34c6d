"""What of an error is one of durations and what of decisions, from runs simulated with one side's durations.

Observation path.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lab.analysis.frames import RunLike, backend, scalars

if TYPE_CHECKING:
    import pandas as pd

HEADLINES = (
    "e2e_ms.mean",
    "e2e_ms.p99",
    "ttft_ms.mean",
    "ttft_ms.p99",
    "tpot_ms.mean",
    "throughput.output_tokens_per_s",
)
"""Metrics whose error is split into duration and decision."""

ENOUGH_STEPS = 20
"""So many steps of the same work that took exactly the same time on both sides show one cost model."""


def same_durations(
    runs: tuple[RunLike, RunLike], steps: pd.DataFrame, configuration: Mapping[str, Any]
) -> bool:
    """Whether both runs were simulated with one cost model: as configured, and in every step that did the same work."""
    told = any(key.partition(".")[0] in ("cost", "model", "mechanisms") for key in configuration)
    simulated = all(backend(run) == "sim" for run in runs)
    return simulated and not told and len(steps) >= ENOUGH_STEPS and not steps["residual_ns"].any()


def counterfactual(
    a: RunLike, b: RunLike, ab: RunLike, ba: RunLike | None, alike: bool
) -> dict[str, dict[str, float]]:
    """`ab` is b's decisions with a's durations, `ba` a's decisions with b's.

    Two factors, two orders of changing them; each factor gets the mean of what it does first and last (Shapley).
    Without `ba`, one order: durations are put right first, and what remains is decision. `interaction` is how far
    the two orders disagree: the part of the difference that takes both to change.

    Of two runs with one cost model (`alike`) all of it is decision: after a divergence a re-simulation borrows
    durations from steps of similar shape, and what that costs is no error of either run.
    """
    left, right, mixed = scalars(a.metrics), scalars(b.metrics), scalars(ab.metrics)
    other = None if ba is None else scalars(ba.metrics)
    split = {}
    for name in HEADLINES:
        if not (name in left and name in right and name in mixed):
            continue
        m_a, m_b, m_ab = left[name], right[name], mixed[name]
        cell = {"total": m_b - m_a, "duration": m_b - m_ab, "decision": m_ab - m_a}
        if alike:
            cell |= {"duration": 0.0, "decision": m_b - m_a}
        elif other is not None and name in other:
            m_ba = other[name]
            cell |= {
                "duration": ((m_b - m_ab) + (m_ba - m_a)) / 2,
                "decision": ((m_ab - m_a) + (m_b - m_ba)) / 2,
                "interaction": (m_b - m_ab) - (m_ba - m_a),
            }
        split[name] = cell
    return split
