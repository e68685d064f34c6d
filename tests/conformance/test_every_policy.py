"""Every shipped policy decides alike on both backends: driven by real durations, the simulator takes the same plans."""

from __future__ import annotations

import dataclasses

import pytest

from lab import plugins
from real_engine.models.loading import LoadedModel
from tests.conformance.sides import Setting, conversation, run_real, run_replayed

TIGHT = 40
"""KV blocks at which requests are evicted and preempted."""

COMPRESSIONS = [name for name in plugins.names("compression") if name != "none"]

CASES = [
    *(Setting(policy=name, blocks=TIGHT) for name in plugins.names("policy")),
    *(Setting(eviction=name, blocks=TIGHT) for name in plugins.names("eviction")),
    *(Setting(preemption=name, blocks=TIGHT) for name in plugins.names("preemption")),
    *(Setting(preemption=name, blocks=TIGHT, host_blocks=60) for name in plugins.names("preemption")),
    *(Setting(policy="srpt", predictor=name, blocks=TIGHT) for name in plugins.names("predictor")),
    *(Setting(compression=name, blocks=blocks) for name in COMPRESSIONS for blocks in (TIGHT, 400)),
    *(Setting(compression=name, blocks=26, host_blocks=60) for name in COMPRESSIONS),
    *(Setting(policy=name, compression="knorm", blocks=26) for name in plugins.names("policy")),
]


def label(setting: Setting) -> str:
    changed = (
        f"{field.name}={getattr(setting, field.name)}"
        for field in dataclasses.fields(setting)
        if field.name != "blocks" and getattr(setting, field.name) != field.default
    )
    return ",".join(changed) or "default"


@pytest.mark.parametrize("setting", CASES, ids=label)
def test_replaying_the_real_durations_gives_the_real_plans(setting: Setting, tiny: LoadedModel) -> None:
    requests = conversation()
    real = run_real(setting, tiny, requests)
    sim, cost = run_replayed(setting, tiny, requests, real)
    assert cost.parity(len(sim.steps)), f"decisions part at step {cost.diverged_at}"
    assert {r.request.id: r.token_times for r in sim.requests} == {
        r.request.id: r.token_times for r in real.requests
    }
    outcomes = {record.request.id: record.outcome for record in real.requests}
    assert outcomes.pop("giant") == "rejected"
    assert set(outcomes.values()) <= {"finished", "rejected"}
    if setting.compression != "none":
        assert any(step.plan.compactions for step in real.steps), (
            "nothing was dropped: the case tests nothing"
        )
        short = setting.blocks < TIGHT and setting.policy == "fcfs"
        assert any(step.plan.preempted for step in real.steps) >= short, "nobody was preempted"
    if setting.host_blocks:
        assert any(step.plan.swap_in for step in real.steps), "nothing was swapped: the case tests nothing"


def test_swapping_changes_no_token(tiny: LoadedModel) -> None:
    requests = conversation(12)  # before later turns, whose cached prefixes hold what was generated
    kept = run_real(Setting(blocks=30, host_blocks=60), tiny, requests)
    dropped = run_real(Setting(blocks=400), tiny, requests)
    assert any(step.plan.swap_in for step in kept.steps)
    outputs = [{r.request.id: r.output for r in run.requests} for run in (kept, dropped)]
    assert outputs[0] == outputs[1]
