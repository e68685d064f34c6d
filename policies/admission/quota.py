"""quota: each tenant may send so much in each window of time.

Rule: windows follow one another from the beginning of the run. A tenant's request enters while the tenant has used
less than `tokens` in this window and sent fewer than `requests`. Prompt tokens count on entry, output tokens in the
window in which their request ends, so the last one in may overshoot `tokens`.
Origin: requests and tokens a minute (RPM, TPM) of hosted APIs; a baseline of VTC (OSDI'24).
Wins: simple, and a noisy tenant can't take all. Loses: turns away while replicas idle; twice the quota can come
around a window's edge. Cost: O(1).
"""

from __future__ import annotations

from collections.abc import Sequence

from lab.policy import AdmissionPolicy, Ended, ReplicaView, Request, Verdict


class Quota(AdmissionPolicy):
    """`requests` and `tokens` a tenant and window; `tokens` 0 is no limit."""

    def __init__(self, requests: int = 60, tokens: int = 0, window_s: float = 60.0) -> None:
        if requests < 1:
            raise ValueError(f"requests is {requests}; expected at least 1")
        if tokens < 0:
            raise ValueError(f"tokens is {tokens}; expected at least 0, which is no limit")
        if not 1e-9 <= window_s < float("inf"):
            raise ValueError(f"window_s is {window_s}; expected a time in seconds above 0")
        self._requests, self._tokens, self._length = requests, tokens, round(window_s * 1e9)
        self._window = -1
        self._used: dict[str, tuple[int, int]] = {}

    def admit(self, request: Request, replicas: Sequence[ReplicaView], now: int) -> Verdict:
        sent, used = self._so_far(request.tenant, now)
        if sent >= self._requests:
            return Verdict(False, f"{sent} requests in this window, the quota")
        if self._tokens and used >= self._tokens:
            return Verdict(False, f"{used} tokens in this window, the quota is {self._tokens}")
        self._used[request.tenant] = (sent + 1, used + len(request.prompt))
        return Verdict(True, f"request {sent + 1} of {self._requests} in this window")

    def on_finish(self, request: Request, ended: Ended, now: int) -> None:
        sent, used = self._so_far(request.tenant, now)
        self._used[request.tenant] = (sent, used + ended.tokens)

    def _so_far(self, tenant: str, now: int) -> tuple[int, int]:
        if now // self._length != self._window:
            self._window = now // self._length
            self._used = {}
        return self._used.get(tenant, (0, 0))
