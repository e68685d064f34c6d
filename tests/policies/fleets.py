"""Several replicas in the simulator, with a cost model of two numbers; views made by hand."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lab.assembly import ControlPlane, EngineSpec, assemble
from lab.control.executor import Capacity
from lab.control.fleet import FleetSpec
from lab.control.plan import StepPlan, StepTiming
from lab.control.request import Prompt, Request, Segment
from lab.control.step import Limits
from lab.observe.recorder import Recorder
from lab.policy import ReplicaView
from sim.driver import Simulation
from sim.executor import SimExecutor

MS = 1_000_000
SECOND = 1000 * MS


@dataclass(frozen=True)
class Cost:
    """A step takes `step` nanoseconds and `token` for each token it computes."""

    step: int = 2 * MS
    token: int = 100_000

    def step_time(self, plan: StepPlan) -> StepTiming:
        return StepTiming(0, 0, self.step + self.token * plan.tokens, 0, 0)


@dataclass(frozen=True)
class Outcome:
    recorder: Recorder
    control: ControlPlane

    @property
    def digests(self) -> list[tuple[int, int, str]]:
        return [(step.replica, step.end, step.plan.digest) for step in self.recorder.steps]

    def mean(self, what: str = "e2e") -> float:
        """Seconds, over the requests that finished."""
        done = [record for record in self.recorder.requests if record.outcome == "finished"]
        ends = [record.end if what == "e2e" else record.token_times[0] for record in done]
        return (
            sum(end - record.request.arrival for end, record in zip(ends, done, strict=True))
            / len(done)
            / 1e9
        )

    @property
    def hit_ratio(self) -> float:
        records = self.recorder.requests
        return sum(r.cached_tokens for r in records) / sum(len(r.request.prompt) for r in records)


def simulate(
    requests: Sequence[Request],
    *,
    fleet: FleetSpec,
    capacity: Capacity | None = None,
    limits: Limits | None = None,
    cost: Any = None,
    seed: int = 0,
    **policies: str | Mapping[str, Any],
) -> Outcome:
    """Run requests; `routing="random"`, or `routing={"name": "power_of_two", "d": 3}`. Checks what must hold."""
    chosen = {seam: {"name": named} if isinstance(named, str) else named for seam, named in policies.items()}
    spec = EngineSpec({"policy": {"name": "fcfs"}, **chosen}, limits or Limits(256, 8), True, seed, fleet)
    capacity = capacity or Capacity(500, 16)
    recorder = Recorder()
    control = assemble(spec, capacity, recorder, requests)
    simulation = Simulation(control, SimExecutor(cost or Cost(), capacity), requests)
    simulation.run()
    control.fleet.close(simulation.now)
    for core in control.fleet.cores:
        core.check()
        assert not core.has_work
        assert core.pool.held == 0
    assert sorted(record.request.id for record in recorder.requests) == sorted(r.id for r in requests)
    return Outcome(recorder, control)


def poisson(
    count: int,
    rate: float,
    *,
    prompt: int = 64,
    output: int = 8,
    seed: int = 1,
    start: float = 0.0,
    **more: Any,
) -> list[Request]:
    """Requests of exponential lengths with these means, at `rate` a second from `start` seconds on."""
    rng = random.Random(seed)
    at, requests = start, []
    for i in range(count):
        at += rng.expovariate(rate)
        sizes = [1 + round(rng.expovariate(1 / mean)) for mean in (prompt, output)]
        content = Prompt((Segment(seed * 1_000_003 + i, 0, sizes[0]),))
        name = f"{seed}-{i:05}"
        requests.append(
            Request(id=name, prompt=content, arrival=round(at * 1e9), output_len=sizes[1], **more)
        )
    return requests


def turns(sessions: int, each: int, *, seed: int = 1, grow: int = 96, gap: float = 0.4) -> list[Request]:
    """Sessions of `each` turns, every prompt the last one and `grow` tokens more."""
    rng = random.Random(seed)
    requests = []
    for s in range(sessions):
        at = rng.uniform(0, 5)
        for turn in range(each):
            prompt = Prompt((Segment(7_000 + s, 0, 128 + grow * turn),))
            name = f"s{s:03}-{turn}"
            requests.append(
                Request(id=name, prompt=prompt, arrival=round(at * 1e9), output_len=4, session=f"s{s}")
            )
            at += gap + rng.expovariate(1 / gap)
    return sorted(requests, key=lambda request: (request.arrival, request.id))


def view(index: int, **fields: Any) -> ReplicaView:
    base: dict[str, Any] = {
        "as_of": 0, "running": 0, "waiting": 0, "blocks_free": 100, "blocks_total": 100, "max_seqs": 8,
    }  # fmt: skip
    return ReplicaView(index=index, **base | fields)


def request(
    name: str = "r", prompt: int = 64, output: int = 8, session: str = "", stream: int = 1, **more: Any
) -> Request:
    content = Prompt((Segment(stream, 0, prompt),))
    return Request(id=name, prompt=content, output_len=output, session=session, **more)
