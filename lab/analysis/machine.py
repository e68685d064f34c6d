"""How fast the machine was around a real run, against when the simulator was calibrated on it. Observation path."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lab.errors import RunError

if TYPE_CHECKING:
    from lab.analysis.frames import RunLike


def machine(run: RunLike) -> str:
    """Two sentences, of a simulation beside a real run that left probes in `cost.json`; else empty.

    The first says how far the machine had drifted, the second what of the simulated steps' time that is: an error of
    the prediction by so much is the machine's, and only what goes beyond can be the model's.
    """
    path: Path | None = getattr(run, "path", None)  # one that was never written has none
    if path is None or not (path / "cost.json").is_file():
        return ""
    try:
        found = json.loads((path / "cost.json").read_text(encoding="utf-8")).get("machine_ns")
    except (OSError, ValueError, AttributeError):
        return "How fast the machine was can't be told: cost.json can't be read."
    if not found or not found["after"]:
        return ""
    then, before, after = found["calibrated"], found["before"], found["after"]
    rows = sorted(before, key=int)
    times = {int(n): (before[n] + after[n]) / (2 * then[n]) for n in rows}
    apart = max(100 * (max(before[n], after[n]) / min(before[n], after[n]) - 1) for n in rows)
    told = ", ".join(f"{n} {100 * (longer - 1):+.0f} %" for n, longer in times.items())
    return (
        f"The machine against when it was calibrated, by fixed batches timed around the real run: rows {told}; "
        f"before and after lie up to {apart:.0f} % apart.{_drift(run, times)}"
    )


def _drift(run: RunLike, times: Mapping[int, float]) -> str:
    """How much longer all steps of a simulation would take with forward passes so many times as long: by their rows,
    a straight line over the logarithm between two. Empty where steps weren't recorded."""
    import numpy as np

    try:
        steps = run.steps
    except RunError:
        return ""
    rows = np.maximum(1, steps["prefill_tokens"].to_numpy() + steps["decode_tokens"].to_numpy())
    pace = np.interp(np.log(rows), [math.log(n) for n in times], list(times.values()))
    took = float((steps["end_ns"] - steps["start_ns"]).sum())
    change = 100 * float((steps["forward_ns"].to_numpy() * (pace - 1)).sum()) / took if took else 0.0
    return (
        f" At that pace the simulated steps' time would change by {change:+.1f} %: about so much of their error is the "
        "machine's drift, the rest the model's, or of moments between the probes."
    )
