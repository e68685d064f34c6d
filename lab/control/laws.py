"""Conservation laws of the control plane, as code: what must hold between any two steps. State path."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lab.control.core import EngineCore


def check(core: EngineCore) -> None:
    """Blocks, tables, statuses and sums. Raises AssertionError with the facts."""
    core.pool.check([*(live.table for live in core._requests.values()), *core.relocation.leaving.values()])
    core.host.check([live.host for live in core._requests.values()])
    held = sum(live.status == "held" for live in core._requests.values())
    assert held == core._held, f"{held} sequences are held, {core._held} are counted"
    everybody = [live.now() for live in core._requests.values()]
    core._decodes.check(core._running)
    load = core._load
    kept = (load.to_compute, load.expected, load.context)
    there = (
        sum(live.known - live.computed for live in everybody),
        sum(max(live.predicted - len(live.output), 0) for live in everybody),
        sum(live.computed - live.dropped for live in core._running.values()),
    )
    assert kept == there, f"tokens to compute, expected, of context: {kept} are kept, {there} are there"
    for name, live in core._requests.items():
        assert (name in core._running) == (live.status == "running"), f"{live.view!r} is in the wrong table"
        assert (name in core._waiting) == (live.status == "waiting"), f"{live.view!r} is in the wrong table"
        assert live.computed < live.known, f"{live.view!r} has nothing left to compute"
        capacity = len(live.blocks or live.host) * core.pool.block_size
        assert not (live.blocks and live.host), f"{live.view!r} is on the device and the host at once"
        assert live.computed - live.dropped + live.granted_now <= capacity, (
            f"{live.view!r} holds {capacity} tokens of blocks"
        )
        core._compression.check(live)
    assert len(core._running) <= core.limits.max_seqs
