"""From a configuration to a control plane: the same gateway and engine cores for every backend. Control plane."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lab import plugins, topology
from lab.config import SEAMS
from lab.control.core import EngineCore
from lab.control.executor import Capacity
from lab.control.fleet import Fleet, FleetSpec
from lab.control.gateway import Gateway
from lab.control.observer import Observer
from lab.control.request import Request, stream_of
from lab.control.step import Limits
from lab.errors import ConfigError, RunError
from lab.state.future import KnownFuture


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What decides: policies by name with their parameters, limits, and the run's seed."""

    policies: Mapping[str, Mapping[str, Any]]
    """For each seam (`lab.config.SEAMS`) the chosen `name` and its parameters; the default where it is missing."""
    limits: Limits
    prefix_cache: bool
    seed: int
    fleet: FleetSpec = field(default_factory=FleetSpec)
    joins_late: bool = False
    """See `EngineCore`."""
    last_block: bool = True
    """See `BlockPool`."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> EngineSpec:
        """From a resolved configuration as plain data, such as a run directory's `config.yaml`."""
        try:
            engine, fleet = config["engine"], config["fleet"]
            slots = topology.slots(config.get("topology", {}))
            replicas = len(slots) or fleet["replicas"]
            groups = topology.scaled(config.get("topology", {}))
            more = sum(group.most - group.least for group in groups)
            return cls(
                policies={seam: config[seam] for seam in SEAMS},
                limits=Limits(engine["token_budget"], engine["max_seqs"], engine["chunk"]),
                prefix_cache=config["kv"]["prefix_cache"],
                seed=config["seed"],
                fleet=FleetSpec(
                    replicas=replicas,
                    most=replicas + more if more else fleet["most"] or replicas,
                    cold_start=round(fleet["cold_start_s"] * 1e9),
                    refresh=round(fleet["refresh_ms"] * 1e6),
                    noise=fleet["noise"],
                    roles=tuple(slot.role for slot in slots),
                    groups=groups,
                ),
                joins_late=bool(config.get("mechanisms", {}).get("async_scheduling", False)),
                last_block=bool(config.get("mechanisms", {}).get("last_block", True)),
            )
        except (KeyError, TypeError) as error:
            raise RunError(
                f"the run's config.yaml lacks {error}; was it written by another version?"
            ) from error

    def provenance(self) -> dict[str, str]:
        """Where each seam's policy comes from: distribution and version, or file."""
        named = {seam: str((self.policies.get(seam) or {"name": SEAMS[seam]})["name"]) for seam in SEAMS}
        return {seam: plugins.provenance(plugins.load(seam, name)) for seam, name in named.items()}

    def create(self, seam: str, replica: int = 0) -> Any:
        """A new policy object, with a random stream of its own derived from the seed."""
        chosen = dict(self.policies.get(seam) or {"name": SEAMS[seam]})
        policy = plugins.create(seam, chosen.pop("name"), chosen)
        stream = ("policy", seam, self.seed, *([replica] if replica else []))
        policy.rng = random.Random(stream_of(*stream))
        return policy


@dataclass(frozen=True, slots=True)
class ControlPlane:
    """Everything that decides in one run."""

    gateway: Gateway
    fleet: Fleet
    observer: Observer = field(default_factory=Observer)
    """Told of everything."""

    @property
    def core(self) -> EngineCore:
        """The engine core, where there is just one."""
        return self.fleet.core


def assemble(
    spec: EngineSpec,
    alike: Capacity,
    observer: Observer,
    requests: Sequence[Request] = (),
    *,
    aggregate: bool = False,
    capacities: Sequence[Capacity] = (),
) -> ControlPlane:
    """A gateway before replicas of capacity `alike`; everything they do is told to `observer`.

    `requests` are what is to come: only a bound such as Belady's may look at them. `aggregate`: see `EngineCore`.
    `capacities`: of each replica of the topology, where they aren't alike.
    """
    gateways: list[Gateway] = []

    def make(replica: int, slot: int) -> EngineCore:
        capacity = capacities[slot] if capacities else alike
        eviction = spec.create("eviction", replica)
        future = None
        if eviction.needs_future:
            if spec.fleet.most > 1:
                name = type(eviction).__name__
                raise ConfigError(
                    f"eviction '{name}' knows the future of one replica; fleet.most is {spec.fleet.most}."
                )
            eviction.future = future = KnownFuture(
                (sequence for request in requests for sequence in request.sequences()), capacity.block_size
            )
        core = EngineCore(
            spec.create("policy", replica),
            eviction,
            capacity=capacity,
            limits=spec.limits,
            prefix_cache=spec.prefix_cache,
            preemption=spec.create("preemption", replica),
            predictor=spec.create("predictor", replica),
            compression=spec.create("compression", replica),
            compression_name=str((spec.policies.get("compression") or {"name": "none"})["name"]),
            observer=observer,
            replica=replica,
            policy_name=str(spec.policies["policy"]["name"]),
            on_admitted=future.passed if future is not None else None,
            aggregate=aggregate,
            joins_late=spec.joins_late,
            last_block=spec.last_block,
        )
        core.on_ended = lambda record, now: gateways[0].ended(record, now)
        return core

    rng = random.Random(stream_of("fleet views", spec.seed))
    scalings = [spec.create("scaling", n) for n in range(len(spec.fleet.groups) or 1)]
    fleet = Fleet(make, scalings[0], spec.fleet, rng=rng, observer=observer, scalings=scalings)
    # The policy of the second choice is one of its own: a policy that takes turns would else skip replicas.
    placing = spec.create("routing", 1) if "decode" in spec.fleet.roles else None
    gateways.append(Gateway(spec.create("admission"), spec.create("routing"), fleet, observer, placing))
    return ControlPlane(gateways[0], fleet, observer)
