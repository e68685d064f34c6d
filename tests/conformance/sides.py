"""One workload on both backends: the real engine with a tiny model, and the simulator on its durations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lab.assembly import ControlPlane, EngineSpec, assemble
from lab.control.request import Prompt, Request, Segment
from lab.control.step import Limits
from lab.observe.recorder import Recorder
from real_engine.driver import SteppedRun
from real_engine.executor import TorchExecutor
from real_engine.models.loading import LoadedModel
from sim.cost.replay import RecordedCost
from sim.driver import Simulation
from sim.executor import Output, SimExecutor

MS = 1_000_000


@dataclass(frozen=True)
class Setting:
    policy: str = "fcfs"
    eviction: str = "lru"
    blocks: int = 400
    prefix_cache: bool = True
    preemption: str = "last"
    predictor: str = "oracle"
    host_blocks: int = 0
    compression: str = "none"
    budget: int = 16

    @property
    def spec(self) -> EngineSpec:
        policies: dict[str, dict[str, object]] = {
            "policy": {"name": self.policy},
            "eviction": {"name": self.eviction},
            "predictor": {"name": self.predictor},
            "preemption": {"name": self.preemption, "mode": "swap" if self.host_blocks else "recompute"},
        }
        if self.compression != "none":
            policies["compression"] = {"name": self.compression, "budget": self.budget}
        cached = self.prefix_cache and self.compression == "none"
        return EngineSpec(policies, Limits(48, 6, 32), cached, 0)

    def executor(self, model: LoadedModel) -> TorchExecutor:
        return TorchExecutor(model, blocks=self.blocks, block_size=4, host_blocks=self.host_blocks)


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
    executor = setting.executor(model)
    recorder = Recorder()
    control = assemble(setting.spec, executor.capacity, recorder, requests)
    SteppedRun(control, executor, requests).run()
    finish(control)
    executor.close()
    return recorder


def finish(control: ControlPlane) -> None:
    control.core.check()
    assert control.core.pool.held == 0
    assert control.core.host.free == control.core.host.total
    control.fleet.close(0)


def run_replayed(
    setting: Setting,
    model: LoadedModel,
    requests: Sequence[Request],
    real: Recorder,
    outputs: Mapping[str, Output] | None = None,
) -> tuple[Recorder, RecordedCost]:
    capacity = setting.executor(model).capacity
    cost = RecordedCost(
        [step.plan.digest for step in real.steps],
        [step.timing for step in real.steps],
        [(step.prefill_tokens, step.decode_tokens, step.context_tokens) for step in real.steps],
    )
    recorder = Recorder()
    control = assemble(setting.spec, capacity, recorder, requests)
    Simulation(control, SimExecutor(cost, capacity, outputs or {}), requests).run()
    finish(control)
    return recorder, cost
