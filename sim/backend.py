"""The simulator as a backend: which cost model, with what capacity, under which mechanisms. Data plane."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from lab.assembly import ControlPlane
from lab.backend import Backend, Progress
from lab.choices import SHAPED
from lab.config import Config, MechanismsConfig
from lab.console import Console
from lab.control.executor import Capacity
from lab.control.request import Request, RequestId
from lab.errors import ConfigError, ModelError
from sim.cost.linear import LinearCost
from sim.cost.model import CostModel
from sim.cost.physical import PhysicalCost
from sim.cost.transfer import WithTransfers
from sim.cost.warmup import WithWarmup
from sim.described import described_capacity, group_config, power, shaped_cost
from sim.driver import LostStep, Simulation
from sim.executor import Output, SimExecutor
from sim.fitted import REFERENCE, fitted, fitted_capacity
from sim.links import Link, Network
from sim.moves import Failure
from sim.network import failures, network
from sim.probes import Watch, speed_of
from sim.recorded import recorded_capacity, recorded_cost


class SimBackend:
    """Implements `lab.backend.Backend`."""

    name: Literal["sim"] = "sim"
    clock: Literal["virtual"] = "virtual"
    stop_ids: tuple[int, ...] = ()

    def __init__(
        self,
        cost: CostModel,
        capacity: Capacity,
        evidence: Literal["modelled", "replayed"],
        about: Mapping[str, Any],
        outputs: Mapping[RequestId, Output] | None = None,
        mechanisms: MechanismsConfig | None = None,
        console: Console | None = None,
        replicas: Sequence[tuple[CostModel, Capacity]] = (),
        link: Link | Network | None = None,
        failures: Sequence[Failure] = (),
        watch: Watch | None = None,
    ) -> None:
        """`replicas`: the topology's, in the order of their places, where it has groups. `watch`: of the machine that
        a real run beside this one has."""
        self.evidence, self.about, self.capacity = evidence, about, capacity
        self.cost = cost
        self._link, self._failures, self._watch = link, failures, watch
        self._lost_steps: list[LostStep] = []
        models = [model for model, _ in replicas] or [cost]
        self.power = [power(model) for model in models if isinstance(model, PhysicalCost)]
        self._mechanisms, self._console = mechanisms or MechanismsConfig(), console
        self.executor = SimExecutor(self._timed(cost, capacity), capacity, outputs or {})
        self.replicas = tuple(replicas)
        self.capacities = tuple(capacity for _, capacity in replicas)
        self._executors = tuple(
            SimExecutor(self._timed(cost, capacity), capacity, outputs or {}) for cost, capacity in replicas
        )

    def _timed(self, cost: CostModel, capacity: Capacity) -> CostModel:
        timed: CostModel = cost if self.evidence == "replayed" else WithTransfers(cost, capacity)
        if self._mechanisms.warmup:
            timed = WithWarmup(timed, self._mechanisms.warmup, self._mechanisms.warmup_steps)
        return timed

    def drive(self, control: ControlPlane, requests: Sequence[Request], progress: Progress) -> Simulation:
        told = self._mechanisms
        expects = getattr(self.cost, "expects", None)  # one that prices where KV lies
        if expects is not None:
            expects(requests, self.capacity, max(1, len(self.replicas)))
        if self._watch is not None:
            self._watch.ended()
        self._lost_steps = []
        return Simulation(
            control,
            self.executor,
            requests,
            progress,
            api_ns=round(told.api_ms * 1e6),
            measured_control=told.control == "measured",
            executors=self._executors,
            link=self._link,
            failures=self._failures,
            lost_steps=self._lost_steps,
        )

    def account(self) -> dict[str, Any]:
        """How often the cost model was asked for what nobody has measured, how fast the machine was meanwhile, and the
        steps that failures cut off, which no other table has; empty where there is nothing to say."""
        asked = getattr(self.cost, "account", None)
        machine = {} if self._watch is None else {"machine_ns": self._watch.account()}
        lost = {"lost_steps": self._lost_steps} if self._failures else {}
        return ({} if asked is None else dict(asked())) | machine | lost

    def close(self) -> None:
        self.executor.close()
        warnings = getattr(self.cost, "warnings", None)
        if self._console is not None and warnings is not None:
            for sentence in warnings():
                self._console.say(sentence)


def open_backend(cfg: Config, console: Console, beside: Backend | None) -> SimBackend:
    """A simulator for this configuration, with the cost model that it names."""
    if cfg.model.name.startswith(("/", "~", ".")) and not Path(cfg.model.name).expanduser().is_dir():
        raise ModelError(
            f"model '{cfg.model.name}' is no directory; expected one that is there, smollm2, tiny, or a hub id"
        )
    if cfg.cost.name == "replay":
        return _replayed(cfg, beside)
    if cfg.cost.name in SHAPED:
        return _shaped(cfg, console, beside)
    return _measured(cfg, console, beside)


def _replayed(cfg: Config, beside: Backend | None) -> SimBackend:
    """The durations of a recorded run."""
    from lab.analysis.runs import load

    assert cfg.cost.path is not None  # validated
    recorded = load(cfg.cost.path)
    capacity = beside.capacity if beside is not None else recorded_capacity(recorded)
    if cfg.kv.blocks not in (None, capacity.blocks):
        raise ConfigError(
            f"kv.blocks is {cfg.kv.blocks}, but the run replayed by cost.path had {capacity.blocks}; "
            "leave it out or give the same"
        )
    about = {"cost": "replay", "recorded": recorded.path.name, "model": cfg.model.name}
    return SimBackend(recorded_cost(recorded), capacity, "replayed", about, mechanisms=cfg.mechanisms)


def _measured(cfg: Config, console: Console, beside: Backend | None) -> SimBackend:
    """The fit of this machine's real engine, or the reference machine's."""
    cost = LinearCost.load(REFERENCE) if cfg.cost.name == "reference" else fitted(cfg, console, beside)
    capacity = beside.capacity if beside is not None else fitted_capacity(cfg, cost)
    about = {
        "cost": cfg.cost.name,
        "calibration": dict(cost.measured_on),
        "model": cfg.model.name,
        "dtype": cfg.model.dtype,
    }
    count = sum(group.count for group in cfg.topology.groups.values())
    speed = speed_of(cost)
    return SimBackend(
        cost,
        capacity,
        "modelled",
        about,
        mechanisms=cfg.mechanisms,
        console=console,
        replicas=[(cost, capacity)] * count,
        link=network(asdict(cfg)),
        failures=failures(asdict(cfg)),
        watch=Watch(beside.executor, speed) if beside is not None and speed else None,
    )


def _shaped(cfg: Config, console: Console, beside: Backend | None) -> SimBackend:
    """A device that needn't be there, described; and KV blocks as many as fit on it."""
    replicas: list[tuple[PhysicalCost, Capacity]] = []
    for group in cfg.topology.groups.values():
        own = group_config(cfg, group)
        model = shaped_cost(own, group)
        replicas += [(model, described_capacity(own, model))] * group.count
    cost = replicas[0][0] if replicas else shaped_cost(cfg)
    capacity = beside.capacity if beside is not None else described_capacity(cfg, cost)
    about: dict[str, Any] = {
        "cost": cfg.cost.name,
        "hardware": asdict(cost.hardware),
        "shape": asdict(cost.shape),
        "coefficients": asdict(cost.coefficients),
        "parallel": asdict(cost.parallel),
        "model": cfg.model.name,
        "dtype": cost.shape.dtype,
    }
    if replicas:
        about["replicas"] = [
            {"hardware": each.hardware.name, "parallel": asdict(each.parallel), "blocks": room.blocks}
            for each, room in replicas
        ]
    return SimBackend(
        cost,
        capacity,
        "modelled",
        about,
        mechanisms=cfg.mechanisms,
        console=console,
        replicas=replicas,
        link=network(asdict(cfg)),
        failures=failures(asdict(cfg)),
    )
