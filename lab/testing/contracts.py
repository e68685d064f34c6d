"""What a policy promises: the contracts, and of each kind the class, its name in words and the hook that decides.

Observation path. Where a contract breaks, whoever sees it raises `Broken`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from lab import shipped


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of policy that can be checked."""

    name: str
    """Of its configuration group."""
    words: str
    hook: str
    """The one whose answers are compared between two plays."""
    fleet: bool = False
    """Whether it decides above the engine, so that it takes several to play it."""

    @property
    def base(self) -> type:
        """The class that every policy of this kind derives from."""
        base = shipped.KINDS[self.name].base
        assert base is not None
        return base


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        kind.name: kind
        for kind in (
            Kind("policy", "a scheduling policy", "schedule"),
            Kind("eviction", "an eviction policy", "victim"),
            Kind("compression", "a compression policy", "keep"),
            Kind("preemption", "a preemption policy", "victim"),
            Kind("predictor", "a length predictor", "predict"),
            Kind("admission", "an admission policy", "admit", fleet=True),
            Kind("routing", "a routing policy", "route", fleet=True),
            Kind("scaling", "a scaling policy", "target", fleet=True),
        )
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
