"""From a configuration to a control plane: the same gateway and engine core for every backend. Control plane."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from lab import plugins
from lab.control.core import EngineCore
from lab.control.executor import Capacity
from lab.control.gateway import Gateway
from lab.control.observer import Observer
from lab.control.request import stream_of
from lab.control.step import Limits
from lab.errors import RunError

P = TypeVar("P")


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What decides: policies by name with their parameters, limits, and the run's seed."""

    policies: Mapping[str, Mapping[str, Any]]
    """For each seam (`policy`, `eviction`, `admission`, `routing`) the chosen `name` and its parameters."""
    limits: Limits
    prefix_cache: bool
    seed: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> EngineSpec:
        """From a resolved configuration as plain data, such as a run directory's `config.yaml`."""
        try:
            engine = config["engine"]
            return cls(
                policies={seam: config[seam] for seam in ("policy", "eviction", "admission", "routing")},
                limits=Limits(engine["token_budget"], engine["max_seqs"], engine["chunk"]),
                prefix_cache=config["kv"]["prefix_cache"],
                seed=config["seed"],
            )
        except (KeyError, TypeError) as error:
            raise RunError(
                f"the run's config.yaml lacks {error}; was it written by another version?"
            ) from error

    def create(self, seam: str) -> Any:
        """A new policy object, with a random stream of its own derived from the seed."""
        chosen = dict(self.policies[seam])
        policy = plugins.create(seam, chosen.pop("name"), chosen)
        policy.rng = random.Random(stream_of("policy", seam, self.seed))
        return policy


def assemble(spec: EngineSpec, capacity: Capacity, observer: Observer) -> tuple[Gateway, EngineCore]:
    """A gateway before one replica with `capacity`; everything they do is told to `observer`."""
    core = EngineCore(
        spec.create("policy"),
        spec.create("eviction"),
        blocks=capacity.blocks,
        block_size=capacity.block_size,
        limits=spec.limits,
        max_context=capacity.max_context,
        prefix_cache=spec.prefix_cache,
        observer=observer,
        policy_name=str(spec.policies["policy"]["name"]),
    )
    return Gateway(spec.create("admission"), spec.create("routing"), [core], observer), core
