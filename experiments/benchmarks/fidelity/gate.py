"""The regression gate: no error may grow by more than its noise, nor what a mechanism is worth.

A baseline holds, under dotted names, every error in percent, each with its noise: nothing but rounding where no time
was measured, else how far the repeats' errors lay apart. An error fails when its size exceeds the baseline's by
more than the larger of the two noises (then and now) and `ALLOWED`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.benchmarks.fidelity.ablations import LATENCIES
from lab.errors import RunError

FORMAT = 1
FILE = Path("experiments") / "baselines" / "fidelity.json"
ROUNDING = 0.05
"""Points, where the same code gives the same numbers."""
ALLOWED = 1.0
"""Points, where time was measured: calibration, too, is a measurement."""

Errors = dict[str, tuple[float, float]]
"""Name to (error, noise)."""


def flatten(found: Mapping[str, Any]) -> Errors:
    """The errors of what a benchmark found, by part: `run`, `kernels`, `own`; and what each
    mechanism is worth, `ablations`."""
    errors: Errors = {}
    if "run" in found:
        part = found["run"]
        errors |= {f"run.{name}": (value, ROUNDING) for name, value in part["errors_pct"].items()}
        errors |= {f"run.curve.{name}": (gap["distance"], ROUNDING) for name, gap in part["curves"].items()}
        blocks = part["blocks"]
        errors["run.KV blocks"] = (100.0 * (blocks["computed"] / blocks["measured"] - 1), ROUNDING)
    for device, row in found.get("kernels", {}).items():
        errors |= {f"kernels.{device}.{k}": (v, ROUNDING) for k, v in row["physical_pct"].items()}
        errors[f"kernels.{device}.interpolation"] = (row["interpolation_pct"], ROUNDING)
    for workload, table in found.get("ablations", {}).items():
        for mechanism, row in table.items():
            if not mechanism.startswith("("):
                noise = max(ALLOWED, row["apart"]) if "apart" in row else ROUNDING
                errors |= {
                    f"ablations.{workload}.{mechanism}.{name}": (row[name], noise) for name in LATENCIES
                }
    for workload, row in found.get("own", {}).get("workloads", {}).items():
        for name, value in row["errors_pct"].items():
            errors[f"own.{workload}.{name}"] = (value, max(ALLOWED, row["spread_pct"][name]))
    return errors


def record(found: Mapping[str, Any], path: Path) -> None:
    """Keep what was found as the baseline; parts that weren't measured now stay as they were."""
    kept = _read(path) if path.is_file() else {}
    parts = {name.partition(".")[0] for name in flatten(found)}
    errors = {name: item for name, item in kept.items() if name.partition(".")[0] not in parts}
    errors |= flatten(found)
    body = {
        "format": FORMAT,
        "errors": {
            name: {"error": round(e, 3), "noise": round(n, 3)} for name, (e, n) in sorted(errors.items())
        },
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


def check(found: Mapping[str, Any], path: Path) -> list[str]:
    """Sentences about what grew. Raises `RunError` where there is no baseline, or none of what was found is in it."""
    before, now = _read(path), flatten(found)
    common = before.keys() & now.keys()
    if not common:
        raise RunError(f"the baseline '{path}' has none of the errors that were found; record it first.")
    grown = []
    for name in sorted(common):
        (old, old_noise), (new, new_noise) = before[name], now[name]
        allowed = max(old_noise, new_noise)
        if abs(new) > abs(old) + allowed:
            grown.append(f"{name}: {old:+.2f} has become {new:+.2f}, by more than its noise of {allowed:.2f}")
    return grown


def _read(path: Path) -> Errors:
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        if body["format"] != FORMAT:
            raise RunError(f"the baseline '{path}' has format {body['format']}; expected {FORMAT}.")
        return {name: (float(row["error"]), float(row["noise"])) for name, row in body["errors"].items()}
    except OSError as error:
        raise RunError(f"the baseline '{path}' can't be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"the baseline '{path}' is malformed: {error}.") from error
