"""A recorded run simulated again, with its own durations or another's; `lab.diff` reaches it by name. Data plane."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab import topology
from lab.assembly import EngineSpec
from lab.config import MechanismsConfig
from sim.backend import SimBackend
from sim.network import failures, network
from sim.recorded import (
    recorded_capacities,
    recorded_capacity,
    recorded_cost,
    recorded_costs,
    recorded_outputs,
)

if TYPE_CHECKING:
    from lab.analysis.frames import RunLike
    from lab.analysis.runs import Run


def resimulate(run_b: Run, run_a: Run, out: Path | None) -> RunLike:
    """Run b's workload, configuration and policies with a's step durations; into run directory `out` if there is one.

    b's topology, links, failures and scaling stay; of a's steps those of the group of the same name lend their
    durations, else those of the same role, else all. With b = a (or equal in all but durations) this is the parity
    test: the plan digests must be a's. Where outputs weren't forced, b's own tokens and ends are used again: they are
    what its decisions followed.
    """
    import yaml

    from lab.analysis.kept import Kept
    from lab.analysis.runs import load
    from lab.session import Side, keep_side, run_side

    config = dict(run_b.config)
    capacity, capacities = recorded_capacity(run_b), recorded_capacities(run_b)
    costs = recorded_costs(run_a, topology.slots(config.get("topology") or {}))
    about: dict[str, Any] = {"cost": "replay", "recorded": run_a.path.name}
    if capacities:
        about["replicas"] = [{"blocks": each.blocks} for each in capacities]
    backend = SimBackend(
        recorded_cost(run_a) if not costs else costs[0],
        capacity,
        "replayed",
        about,
        recorded_outputs(run_b) if config.get("output_lengths") == "stop" else None,
        MechanismsConfig(api_ms=float(config.get("mechanisms", {}).get("api_ms", 0.0))),
        replicas=list(zip(costs, capacities, strict=True)),
        link=network(config),
        failures=failures(config),
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
