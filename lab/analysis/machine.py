"""How fast the machine was around a real run, against when the simulator was calibrated on it. Observation path."""

from __future__ import annotations

import json

from lab.analysis.runs import Run


def machine(run: Run) -> str:
    """A sentence, of a simulation beside a real run that left probes in `cost.json`; else empty."""
    path = run.path / "cost.json"
    found = json.loads(path.read_text(encoding="utf-8")).get("machine_ns") if path.is_file() else None
    if not found or not found["after"]:
        return ""
    then, before, after = found["calibrated"], found["before"], found["after"]
    rows = sorted(before, key=int)
    longer = [100 * ((before[n] + after[n]) / (2 * then[n]) - 1) for n in rows]
    apart = max(100 * (max(before[n], after[n]) / min(before[n], after[n]) - 1) for n in rows)
    told = ", ".join(f"{n} {change:+.0f} %" for n, change in zip(rows, longer, strict=True))
    return (
        f"The machine against when it was calibrated, by fixed batches timed around the real run: rows {told}; "
        f"before and after lie up to {apart:.0f} % apart."
    )
