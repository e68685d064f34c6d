"""A recorded run simulated again, with its own durations or another's; `lab.diff` reaches it by name. Data plane."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lab.assembly import EngineSpec
from lab.config import MechanismsConfig
from lab.errors import ReplayError
from sim.backend import SimBackend
from sim.recorded import recorded_capacity, recorded_cost, recorded_outputs

if TYPE_CHECKING:
    from lab.analysis.frames import RunLike
    from lab.analysis.runs import Run


def resimulate(run_b: Run, run_a: Run, out: Path | None) -> RunLike:
    """Run b's workload, configuration and policies with a's step durations; into run directory `out` if there is one.

    With b = a (or equal in all but durations) this is the parity test: the plan digests must be a's. Where outputs
    weren't forced, b's own tokens and ends are used again: they are what its decisions followed.
    """
    import yaml

    from lab.analysis.kept import Kept
    from lab.analysis.runs import load
    from lab.session import Side, keep_side, run_side

    config = dict(run_b.config)
    if (config.get("topology") or {}).get("groups") or (config.get("fleet") or {}).get("failures"):
        raise ReplayError(
            f"run '{run_b.path}' has replica groups or failures, and only a fleet of equal replicas can be simulated "
            "again with another's durations"
        )
    capacity = recorded_capacity(run_b)
    backend = SimBackend(
        recorded_cost(run_a),
        capacity,
        "replayed",
        {"cost": "replay", "recorded": run_a.path.name},
        recorded_outputs(run_b) if config.get("output_lengths") == "stop" else None,
        MechanismsConfig(api_ms=float(config.get("mechanisms", {}).get("api_ms", 0.0))),
    )
    side = Side(
        backend=backend,
        spec=EngineSpec.of(config),
        requests=run_b.workload(),
        config_text=yaml.safe_dump({**config, "backend": "sim"}, sort_keys=False),
        model=str(config.get("model", {}).get("name", "")),
    )
    if out is None:
        return Kept(keep_side(side), config, capacity.block_size)
    run_side(side, out, None)
    return load(out)
