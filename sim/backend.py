"""The simulator as a backend: which cost model, what capacity, and re-simulation of recorded runs. Data plane."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lab import plugins, ranks, topology
from lab.assembly import ControlPlane, EngineSpec
from lab.backend import Backend, Progress, kv_blocks
from lab.choices import SHAPED
from lab.config import MOST_BLOCKS, Config, MechanismsConfig, cache_dir
from lab.console import Console
from lab.control.executor import Capacity
from lab.control.request import Request, RequestId
from lab.control.step import Limits
from lab.errors import ConfigError, ModelError, ReplayError
from lab.observe.bill import Power
from lab.topology import GroupConfig
from sim import hardware, model_shape
from sim.capacity import RESERVED_GIB, blocks_that_fit
from sim.cost.linear import FORMAT, LinearCost
from sim.cost.model import CostModel
from sim.cost.physical import GRAPH_SIZES, MEASURED, PERFECT, Coefficients, Parallel, PhysicalCost
from sim.cost.replay import RecordedCost
from sim.cost.tables import TablesCost
from sim.cost.transfer import WithTransfers
from sim.cost.warmup import WithWarmup
from sim.driver import Simulation
from sim.executor import Output, SimExecutor
from sim.moves import Failure, Link
from sim.probes import Watch, speed_of

if TYPE_CHECKING:
    from lab.analysis.frames import RunLike
    from lab.analysis.runs import Run

REFERENCE = Path(__file__).parent / "cost" / "reference.json"
"""Coefficients measured on a reference machine, for when this one hasn't been measured."""

NOISY_PCT = 50.0
"""A calibration whose repeats lie further apart than this (median over shapes) deserves a warning."""


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
        link: Link | None = None,
        failures: Sequence[Failure] = (),
        watch: Watch | None = None,
    ) -> None:
        """`replicas`: the topology's, in the order of their places, where it has groups. `watch`: of the machine that
        a real run beside this one has."""
        self.evidence, self.about, self.capacity = evidence, about, capacity
        self.cost = cost
        self._link, self._failures, self._watch = link, failures, watch
        models = [model for model, _ in replicas] or [cost]
        self.power = [_power(model) for model in models if isinstance(model, PhysicalCost)]
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
        if self._watch is not None:
            self._watch.ended()
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
        )

    def account(self) -> dict[str, Any]:
        """How often the cost model was asked for what nobody has measured, and how fast the machine was meanwhile;
        empty where there is nothing to say."""
        asked = getattr(self.cost, "account", None)
        machine = {} if self._watch is None else {"machine_ns": self._watch.account()}
        return ({} if asked is None else dict(asked())) | machine

    def close(self) -> None:
        self.executor.close()
        warnings = getattr(self.cost, "warnings", None)
        if self._console is not None and warnings is not None:
            for sentence in warnings():
                self._console.say(sentence)


def open_backend(cfg: Config, console: Console, beside: Backend | None) -> SimBackend:
    """A simulator for this configuration: replayed durations, or the fit that belongs to the real engine."""
    if cfg.model.name.startswith(("/", "~", ".")) and not Path(cfg.model.name).expanduser().is_dir():
        raise ModelError(
            f"model '{cfg.model.name}' is no directory; expected one that is there, smollm2, tiny, or a hub id"
        )
    if cfg.cost.name == "replay":
        from lab.analysis.runs import load

        assert cfg.cost.path is not None  # validated
        recorded = load(cfg.cost.path)
        capacity = beside.capacity if beside is not None else recorded_capacity(recorded)
        if cfg.kv.blocks not in (None, capacity.blocks):
            raise ConfigError(
                f"kv.blocks is {cfg.kv.blocks}, but the run replayed by cost.path had {capacity.blocks}; "
                "leave it out or give the same"
            )
        about: dict[str, Any] = {"cost": "replay", "recorded": recorded.path.name, "model": cfg.model.name}
        return SimBackend(recorded_cost(recorded), capacity, "replayed", about, mechanisms=cfg.mechanisms)
    if cfg.cost.name in SHAPED:
        return _shaped(cfg, console, beside)
    cost = LinearCost.load(REFERENCE) if cfg.cost.name == "reference" else fitted(cfg, console, beside)
    capacity = beside.capacity if beside is not None else _capacity(cfg, cost)
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
        link=_link(cfg),
        failures=_failures(cfg),
        watch=Watch(beside.executor, speed) if beside is not None and speed else None,
    )


def _shaped(cfg: Config, console: Console, beside: Backend | None) -> SimBackend:
    """A device that needn't be there, described; and KV blocks as many as fit on it."""
    replicas: list[tuple[PhysicalCost, Capacity]] = []
    for group in cfg.topology.groups.values():
        own = group_config(cfg, group)
        model = shaped_cost(own, group)
        replicas += [(model, _described_capacity(own, model))] * group.count
    cost = replicas[0][0] if replicas else shaped_cost(cfg)
    capacity = beside.capacity if beside is not None else _described_capacity(cfg, cost)
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
        link=_link(cfg, replicas),
        failures=_failures(cfg),
    )


def _power(cost: PhysicalCost) -> Power:
    device = cost.hardware
    return Power(cost.parallel.devices, device.idle_w, device.tdp_w, device.price_per_hour)


def _failures(cfg: Config) -> list[Failure]:
    return [
        Failure(
            each.replica, round(each.at_s * 1e9), None if each.back_s is None else round(each.back_s * 1e9)
        )
        for each in cfg.fleet.failures
    ]


def _link(cfg: Config, replicas: Sequence[tuple[PhysicalCost, Capacity]] = ()) -> Link | None:
    """What KV moves over: as configured, else the slowest network port at either end."""
    if not topology.disaggregated(cfg.topology):
        return None
    wanted, ports = cfg.topology.link, [cost.hardware.network for cost, _ in replicas]
    rate = min(port.bytes_s for port in ports) if wanted.gb_s is None else wanted.gb_s * 1e9
    late = max(port.latency_s for port in ports) if wanted.latency_us is None else wanted.latency_us * 1e-6
    return Link(rate, round(late * 1e9))


def group_config(cfg: Config, group: GroupConfig) -> Config:
    """The configuration of one group's replicas: what it says of itself, else what `cost` says of all."""
    own: dict[str, Any] = {
        "hardware": group.hardware,
        "tensor_parallel": group.tp,
        "pipeline_parallel": group.pp,
        "microbatches": group.microbatches,
    }
    if group.hardware is not None and cfg.cost.name == "tables":
        raise ConfigError(
            f"hardware={group.hardware} of a replica group has no measured kernels: cost.tables are one device's; "
            "expected cost=physical or roofline."
        )
    cost = replace(cfg.cost, **{key: value for key, value in own.items() if value is not None})
    return replace(cfg, cost=cost)


def shaped_cost(cfg: Config, group: GroupConfig | None = None) -> PhysicalCost:
    """The cost model that `cost=roofline` and its like ask for; of a replica group."""
    wanted = cfg.cost
    shape = model_shape.load(wanted.model or cfg.model.name)
    shape = shape.quantised(wanted.weights or "", wanted.kv or "")
    parallel = Parallel(
        wanted.tensor_parallel or cfg.engine.tensor_parallel,
        wanted.pipeline_parallel or cfg.engine.pipeline_parallel,
        wanted.microbatches,
        *((group.ep or 1, group.imbalance) if group is not None else ()),
    )
    given = {field.name: getattr(wanted, field.name) for field in fields(Coefficients)}
    base = PERFECT if wanted.name == "roofline" else MEASURED
    coefficients = replace(base, **{key: value for key, value in given.items() if value is not None})
    device = hardware.load(wanted.hardware or "h100_sxm")
    graphs = GRAPH_SIZES if cfg.mechanisms.graph_padding else ()
    if wanted.tables is not None and parallel.expert > 1:
        raise ConfigError(
            "no kernels were measured with experts shared out (ep); expected cost=physical or roofline."
        )
    if wanted.tables is None:
        return PhysicalCost(shape, device, coefficients, parallel, graphs)
    from sim.cost import table_files

    parallel.check(shape)
    kernels = table_files.load(Path(wanted.tables).expanduser(), shape, device, parallel)
    return TablesCost(shape, device, kernels, coefficients, parallel, graphs)


def _described_capacity(cfg: Config, cost: PhysicalCost) -> Capacity:
    shape, size = cost.shape, cfg.kv.block_size
    blocks = cfg.kv.blocks or blocks_that_fit(
        shape,
        cost.hardware,
        utilization=cfg.engine.memory_utilization,
        block_size=size,
        token_budget=cfg.engine.token_budget,
        max_seqs=cfg.engine.max_seqs,
        parallel=cost.parallel,
        reserved_gib=RESERVED_GIB if cfg.cost.reserved_gib is None else cfg.cost.reserved_gib,
    )
    return Capacity(
        min(blocks, MOST_BLOCKS),
        size,
        shape.max_context,
        shape.vocab,
        cfg.kv.host_blocks,
        round(shape.kv_bytes_per_token * size),
        cfg.kv.transfer_gb_s,
    )


def recorded_cost(run: Run) -> RecordedCost:
    """The durations of a recorded run as a cost model."""
    digests, *shapes = run.step_columns("digest", "prefill_tokens", "decode_tokens", "context_tokens")
    return RecordedCost(digests, run.timings(), list(zip(*shapes, strict=True)))


def recorded_capacity(run: Run) -> Capacity:
    """The data plane's capacity as the run wrote it down."""
    try:
        return Capacity(**run.environment["capacity"])
    except (KeyError, TypeError) as error:
        raise ReplayError(f"run '{run.path}' doesn't say its capacity in environment.json") from error


def recorded_outputs(run: Run) -> dict[RequestId, Output]:
    """What each request of a recorded run generated, and whether it ended by that."""
    return {record.request.id: (record.output, record.reason == "stop") for record in run.request_records()}


def resimulate(run_b: Run, run_a: Run, out: Path | None) -> RunLike:
    """Run b's workload, configuration and policies with a's step durations; into run directory `out` if there is one.

    With b = a (or equal in all but durations) this is the parity test: the plan digests must be a's. Where outputs
    weren't forced, b's own tokens and ends are used again: they are what its decisions followed.
    """
    import yaml

    from lab.analysis.kept import Kept
    from lab.analysis.runs import load
    from lab.session import Side, keep_side, run_side

    config = dict(run_b.config)
    if (config.get("topology") or {}).get("groups") or (config.get("fleet") or {}).get("failures"):
        raise ReplayError(
            f"run '{run_b.path}' has replica groups or failures, and only a fleet of equal replicas can be simulated "
            "again with another's durations"
        )
    capacity = recorded_capacity(run_b)
    backend = SimBackend(
        recorded_cost(run_a),
        capacity,
        "replayed",
        {"cost": "replay", "recorded": run_a.path.name},
        recorded_outputs(run_b) if config.get("output_lengths") == "stop" else None,
        MechanismsConfig(api_ms=float(config.get("mechanisms", {}).get("api_ms", 0.0))),
    )
    side = Side(
        backend=backend,
        spec=EngineSpec.of(config),
        requests=run_b.workload(),
        config_text=yaml.safe_dump({**config, "backend": "sim"}, sort_keys=False),
        model=str(config.get("model", {}).get("name", "")),
    )
    if out is None:
        return Kept(keep_side(side), config, capacity.block_size)
    run_side(side, out, None)
    return load(out)


def calibration_file(cfg: Config, environment: Mapping[str, str]) -> Path:
    """Where the fit for this machine, model, dtype, threads, ranks and step limits is kept."""
    key = {
        "format": FORMAT,
        "machine": [platform.node(), platform.machine(), _cpu()],
        "model": cfg.model.name,
        "dtype": cfg.model.dtype,
        "threads": cfg.engine.threads,
        "attention": cfg.engine.attention,
        **({"quantization": cfg.model.quantization} if cfg.model.quantization != "none" else {}),
        "engine": [cfg.engine.token_budget, cfg.engine.max_seqs],
        "kv": [cfg.kv.block_size],
    }
    if cfg.engine.device != "auto":
        key["device"] = cfg.engine.device
    if ranks.world(cfg) > 1:
        key["ranks"] = [cfg.engine.tensor_parallel, cfg.engine.pipeline_parallel]
    digest = hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=8).hexdigest()
    name = "".join(c if c.isalnum() else "-" for c in Path(cfg.model.name).name)
    return cache_dir(cfg, environment) / "calibration" / f"{name}-{cfg.model.dtype}-{digest}.json"


def fitted(cfg: Config, console: Console, beside: Backend | None) -> LinearCost:
    """The fit that is kept for this machine and model, or a new one, or the reference machine's."""
    import os

    path = calibration_file(cfg, os.environ)
    if path.exists() and not (cfg.cost.recalibrate and beside is not None):
        if cfg.cost.recalibrate:
            console.say("cost.recalibrate=true measures the real engine, so it needs backend=both.")
        cost = LinearCost.load(path)
        _warn_if_noisy(cost, console)
        measured = cost.measured_on.get("threads")
        if beside is not None and beside.about.get("threads") != measured:
            console.say(
                f"The calibration was made with {measured} threads and the engine runs with "
                f"{beside.about.get('threads')}: simulated durations will be off. cost.recalibrate=true measures again."
            )
        return cost
    if beside is None:
        console.say(
            "This machine has no calibration for this model: step times come from the reference machine "
            "(backend=both measures this one)."
        )
        return LinearCost.load(REFERENCE)
    cost = _calibrate(cfg, console, beside)
    _warn_if_noisy(cost, console)
    temporary = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(cost.to_json(), encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        console.say(f"The calibration is used but can't be kept at '{path}': {error.strerror}.")
    return cost


def _warn_if_noisy(cost: LinearCost, console: Console) -> None:
    spread = cost.measured_on["quality"]["repeat_spread_pct"]
    if spread > NOISY_PCT:
        console.say(
            f"The calibration was made on a busy machine (equal batches took up to {spread:.0f} % longer from one "
            "time to the next): simulated durations will be off. cost.recalibrate=true measures again."
        )


def _calibrate(cfg: Config, console: Console, beside: Backend) -> LinearCost:
    from sim.calibrate import calibrate

    about = {**beside.about, "cpu": _cpu(), "capacity": asdict(beside.capacity)}
    with console.progress("Calibrating", 100) as update:
        cost = calibrate(
            beside.executor,
            plugins.create("policy", "fcfs"),
            plugins.create("eviction", "lru"),
            Limits(cfg.engine.token_budget, cfg.engine.max_seqs),
            about=about,
            notify=lambda done, total, what: update(round(100 * done / total), what),
        )
    quality = cost.measured_on["quality"]
    console.say(
        f"Calibrated on {quality['grid_shapes']} batch shapes: mean error {quality['grid_error_pct']['mean_abs']} % "
        f"on them, {quality['holdout_error_pct']['mean_abs']} % on {quality['holdout_steps']} steps it never saw."
    )
    kinds = quality["holdout_by_shape_pct"].items()
    console.say("On batches left out: " + ", ".join(f"{kind} {e['mean_abs']} %" for kind, e in kinds) + ".")
    return cost


def _capacity(cfg: Config, cost: LinearCost) -> Capacity:
    known = cost.measured_on.get("capacity", {})
    return Capacity(
        kv_blocks(cfg),
        cfg.kv.block_size,
        int(known.get("max_context", 8192)),
        int(known.get("vocab_size", 49152)),
        cfg.kv.host_blocks,
        int(known["block_bytes"]) * cfg.kv.block_size // int(known["block_size"]),
        cfg.kv.transfer_gb_s,
    )


def _cpu() -> str:
    from lab.observe.environment import cpu_model

    return cpu_model()
