"""How long a replica needs for what it has to compute: for admission and scaling."""

from __future__ import annotations

from lab.policy import ReplicaView


def backlog_time(replica: ReplicaView, more: int) -> float:
    """Nanoseconds until the tokens that wait there, and `more`, are computed; 0 before there is an estimate.

    Steps compute at most `token_budget` tokens, decodes first. An estimate holds for steps like those it was learnt
    from, so a long backlog is so many full steps, never one giant step.
    """
    tokens, decodes = replica.tokens_to_compute + more, replica.running
    a_step = max(replica.token_budget - decodes, 1)
    steps = max(tokens / a_step, 1.0)
    return steps * replica.estimate(min(tokens, a_step), decodes, replica.context_tokens)
