"""A policy that raises is named, with its own line, whichever seam it sits in."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from lab.control.gateway import Gateway
from lab.errors import PolicyError
from lab.policy import AdmissionPolicy, ReplicaView, Request, RequestView, RoutingPolicy, Verdict
from policies.admission.always import Always
from policies.eviction.lru import Lru
from policies.routing.single import Single
from policies.scheduling.fcfs import Fcfs
from tests.control.harness import drain, engine, fleet_of, request


class NoVictim(Lru):
    def victim(self, now: int) -> int:
        raise LookupError("nothing to give")


class BadHook(Fcfs):
    def on_finish(self, request: RequestView, reason: str, now: int) -> None:
        raise RuntimeError("too late")


class BadDoor(AdmissionPolicy):
    def admit(self, request: Request, replicas: Sequence[ReplicaView], now: int) -> Verdict:
        raise ValueError


class BadRoute(RoutingPolicy):
    def route(self, request: Request, replicas: Sequence[ReplicaView], now: int) -> tuple[int, str]:
        return 7, "lost"


def test_an_eviction_policy_is_blamed_by_its_own_name() -> None:
    core, _ = engine(eviction=NoVictim(), blocks=4)
    core.add(request("a", 64, output=1), 0)
    drain(core)
    core.add(request("b", 20, output=1), 100)
    with pytest.raises(
        PolicyError, match=r"eviction policy 'NoVictim' raised LookupError: nothing to give .*test_blame"
    ):
        core.plan(100)


def test_a_hook_is_blamed_with_its_request_and_the_record_is_kept() -> None:
    core, notes = engine(BadHook())
    core.add(request("a", 8, output=1), 0)
    with pytest.raises(
        PolicyError, match=r"'BadHook' raised RuntimeError: too late \(in on_finish, step 1, .*'a'"
    ):
        drain(core)
    assert notes.requests["a"].outcome == "finished"


def test_admission_and_routing_are_blamed_at_the_gateway() -> None:
    core, _ = engine()
    with pytest.raises(PolicyError, match=r"admission policy 'BadDoor' raised ValueError \(request 'a'\)"):
        Gateway(BadDoor(), Single(), fleet_of(core)).submit(request("a", 8), 0)
    with pytest.raises(PolicyError, match=r"'BadRoute' sent request 'a' to replica 7; expected one of: 0"):
        Gateway(Always(), BadRoute(), fleet_of(core)).submit(request("a", 8), 0)
