"""One workload on both backends: the real engine with a tiny model, and the simulator on its durations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lab.assembly import EngineSpec, assemble
from lab.control.request import Prompt, Request, Segment
from lab.control.step import Limits
from lab.observe.recorder import Recorder
from real_engine.driver import SteppedRun
from real_engine.executor import TorchExecutor
from real_engine.models.loading import LoadedModel
from sim.cost.replay import RecordedCost
from sim.driver import Simulation
from sim.executor import SimExecutor

MS = 1_000_000


@dataclass(frozen=True)
class Setting:
    policy: str = "fcfs"
    eviction: str = "lru"
    blocks: int = 400
    prefix_cache: bool = True

    @property
    def spec(self) -> EngineSpec:
        names = {"policy": self.policy, "eviction": self.eviction, "admission": "always", "routing": "single"}
        policies = {seam: {"name": name} for seam, name in names.items()}
        return EngineSpec(policies, Limits(48, 6, 32), self.prefix_cache, 0)


def conversation(count: int = 24) -> list[Request]:
    """Shared heads, later turns that quote earlier outputs, bursts, priorities; one request that never fits."""
    requests: list[Request] = []
    for i in range(count):
        head = Segment(1 + i % 2, 0, 19)
        own = Segment(1000 + i, 0, 3 + 7 * i % 31)
        pieces: tuple[Segment, ...] = (head, own)
        if i >= 12:
            before = requests[i - 12]
            assert all(isinstance(piece, Segment) for piece in before.prompt.pieces)
            pieces = (*before.prompt.pieces, Segment(before.output_stream, 0, before.output_limit), own)  # type: ignore[assignment]
        requests.append(
            Request(
                id=f"r{i:02}",
                prompt=Prompt(pieces),
                arrival=(i // 6) * 4 * MS + (i % 6) * 100_000,
                output_len=2 + 5 * i % 17,
                priority=i % 3,
                ttft_slo=20 * MS,
                tpot_slo=5 * MS,
            )
        )
    requests.append(Request(id="giant", prompt=Prompt((Segment(9, 0, 5000),)), arrival=30 * MS, output_len=1))
    return requests


def run_real(setting: Setting, model: LoadedModel, requests: Sequence[Request]) -> Recorder:
    executor = TorchExecutor(model, blocks=setting.blocks, block_size=4)
    recorder = Recorder()
    gateway, core = assemble(setting.spec, executor.capacity, recorder)
    SteppedRun(gateway, core, executor, requests).run()
    core.check()
    assert core.pool.held == 0
    executor.close()
    return recorder


def run_replayed(
    setting: Setting, model: LoadedModel, requests: Sequence[Request], real: Recorder
) -> tuple[Recorder, RecordedCost]:
    capacity = TorchExecutor(model, blocks=setting.blocks, block_size=4).capacity
    cost = RecordedCost(
        [step.plan.digest for step in real.steps],
        [step.timing for step in real.steps],
        [(step.prefill_tokens, step.decode_tokens, step.context_tokens) for step in real.steps],
    )
    recorder = Recorder()
    gateway, core = assemble(setting.spec, capacity, recorder)
    Simulation(gateway, core, SimExecutor(cost, capacity), requests).run()
    core.check()
    return recorder, cost
