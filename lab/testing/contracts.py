"""What a policy promises: the contracts, and of each kind the class, its name in words and the hook that decides.

Observation path. Where a contract breaks, whoever sees it raises `Broken`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from lab.policy import (
    AdmissionPolicy,
    CompressionPolicy,
    EvictionPolicy,
    LengthPredictor,
    PreemptionPolicy,
    RoutingPolicy,
    ScalingPolicy,
    SchedulingPolicy,
)


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of policy that can be checked."""

    base: type
    words: str
    hook: str
    """The one whose answers are compared between two plays."""
    fleet: bool = False
    """Whether it decides above the engine, so that it takes several to play it."""


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "policy": Kind(SchedulingPolicy, "a scheduling policy", "schedule"),
        "eviction": Kind(EvictionPolicy, "an eviction policy", "victim"),
        "compression": Kind(CompressionPolicy, "a compression policy", "keep"),
        "preemption": Kind(PreemptionPolicy, "a preemption policy", "victim"),
        "predictor": Kind(LengthPredictor, "a length predictor", "predict"),
        "admission": Kind(AdmissionPolicy, "an admission policy", "admit", fleet=True),
        "routing": Kind(RoutingPolicy, "a routing policy", "route", fleet=True),
        "scaling": Kind(ScalingPolicy, "a scaling policy", "target", fleet=True),
    }
)
"""By the name of its configuration group."""

CONTRACTS: Mapping[str, str] = MappingProxyType(
    {
        "made": "a policy can be made without arguments: every parameter of __init__ has a default",
        "raises": "no hook raises",
        "hangs": "every hook returns",
        "misuse": "the step is asked only for what is possible",
        "candidates": "a victim is one of the candidates",
        "progress": "every request ends: nothing waits for ever while it could be served",
        "determinism": "the same workload gives the same decisions, in any process",
        "views": "views are for reading only",
        "budgets": "no step holds more than the limits allow",
        "conservation": "every KV block is free, cached or held, and whoever ended holds none",
        "answer": "a hook answers with the type and the range that lab/policy.py states",
    }
)


class Broken(Exception):
    """A contract broke: which, how, and where in the policy's source."""

    def __init__(self, contract: str, says: str, where: str = "") -> None:
        self.contract, self.says, self.where = contract, says, where
        super().__init__(f"{contract}: {says}{f' ({where})' if where else ''}")
