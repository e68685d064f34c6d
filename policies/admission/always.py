"""always: every request enters. The baseline; loses under overload, when early rejection saves the rest."""

from __future__ import annotations

from collections.abc import Sequence

from lab.policy import AdmissionPolicy, ReplicaView, Request, Verdict


class Always(AdmissionPolicy):
    """O(1)."""

    def admit(self, request: Request, replicas: Sequence[ReplicaView], now: int) -> Verdict:
        return Verdict(True, "always")
