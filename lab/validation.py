"""Whether a configuration makes sense: what its options mean together. Control plane; runs before a run begins.

`validate` is the whole interface: it raises one `ConfigError`, a sentence, for the first value or combination that
makes no sense. The range of a single option stands beside the option (`lab/config.py`).
"""

from __future__ import annotations

import dataclasses

from lab import options, plugins, topology
from lab.choices import COSTS, SHAPED, backends, params, trace_options, traces
from lab.config import (
    MOST_BLOCKS,
    SEAMS,
    Config,
    CostConfig,
    ExportConfig,
    FleetConfig,
    MechanismsConfig,
    StudyConfig,
    sampling,
)
from lab.errors import ConfigError
from lab.options import POSITIVE, at_least, one_of

MOST_REPLICAS = 10_000


def validate(cfg: Config) -> None:
    """Raise `ConfigError` for the first value, or combination, that makes no sense.

    Also makes each plug-in once, so that a parameter it refuses is known before anything is measured.
    """
    one_of("backend", cfg.backend, backends())
    options.check("", cfg)
    _run(cfg)
    _model(cfg)
    one_of("cost", cfg.cost.name, list(COSTS))
    _mode(cfg)
    _kv(cfg)
    _fleet(cfg)
    _sampling(cfg)
    _cost(cfg)
    _mechanisms(cfg)
    _endpoint(cfg.export.otlp_endpoint)
    for group in SEAMS:
        choice = getattr(cfg, group)
        plugins.create(group, choice.name, params(choice))
    _ranks(cfg)
    _trace(cfg)
    for name, study in cfg.studies.items():
        _study(f"studies.{name}", study)


def _run(cfg: Config) -> None:
    if cfg.run.record != "everything" and (
        cfg.backend != "sim" or cfg.run.report or cfg.export != ExportConfig()
    ):
        raise ConfigError(
            f"run.record={cfg.run.record} leaves out what a comparison, a report or an export needs; expected "
            "backend=sim, and neither run.report nor export."
        )


def _model(cfg: Config) -> None:
    if cfg.model.quantization != "none" and (
        cfg.model.dtype != "bfloat16" or cfg.engine.attention == "torch"
    ):
        raise ConfigError(
            f"model.quantization={cfg.model.quantization} is part of the CPU kernels; expected model.dtype=bfloat16 "
            "and engine.attention=auto or native."
        )


def _mode(cfg: Config) -> None:
    mode, run = cfg.engine.mode, cfg.engine.replay
    if mode == "replay" and run is None:
        raise ConfigError("engine.mode=replay needs the recorded run: engine.replay=RUN.")
    if mode != "replay" and run is not None:
        raise ConfigError(
            f"engine.replay={run} is only read with engine.mode=replay, not engine.mode={mode}."
        )
    if mode == "replay" and cfg.backend != "real":
        raise ConfigError(
            f"engine.mode=replay executes plans on the real engine alone; backend is {cfg.backend}, expected "
            "backend=real."
        )
    if mode == "online" and cfg.backend not in ("real", "both"):
        raise ConfigError(
            f"engine.mode=online is a clock of the real engine; backend is {cfg.backend}, expected real or both."
        )


def _kv(cfg: Config) -> None:
    for key, count in (("kv.blocks", cfg.kv.blocks), ("kv.host_blocks", cfg.kv.host_blocks)):
        if count is not None and count > MOST_BLOCKS:
            raise ConfigError(
                f"{key} is {count}; expected at most {MOST_BLOCKS}, since a block's number has 32 bits."
            )
    if cfg.compression.name != SEAMS["compression"] and cfg.kv.prefix_cache:
        raise ConfigError(
            f"compression={cfg.compression.name} overwrites blocks that the prefix cache would share; expected "
            "kv.prefix_cache=false beside it."
        )


def _fleet(cfg: Config) -> None:
    fleet = cfg.fleet
    if cfg.topology.groups:
        fleet = _grouped(cfg)
    if fleet.most is not None and fleet.most < fleet.replicas:
        raise ConfigError(f"fleet.most is {fleet.most}; expected at least fleet.replicas, {fleet.replicas}.")
    if max(fleet.most or 0, fleet.replicas) > MOST_REPLICAS:
        raise ConfigError(
            f"fleet asks for {max(fleet.most or 0, fleet.replicas)} replicas; expected at most {MOST_REPLICAS}."
        )
    if (fleet.most or fleet.replicas) > 1 and cfg.backend != "sim":
        raise ConfigError(
            f"backend={cfg.backend} runs one replica, and fleet asks for {fleet.most or fleet.replicas}; "
            "expected backend=sim."
        )
    if cfg.scaling.name != SEAMS["scaling"] and (fleet.most or fleet.replicas) == fleet.replicas:
        raise ConfigError(
            f"scaling={cfg.scaling.name} has nothing to scale: fleet.most is {fleet.most}; expected more than "
            f"fleet.replicas, {fleet.replicas}."
        )
    for n, failure in enumerate(fleet.failures):
        if not 0 <= failure.replica < fleet.replicas:
            raise ConfigError(
                f"fleet.failures[{n}].replica is {failure.replica}; expected 0 to {fleet.replicas - 1}."
            )
    if fleet.failures and (cfg.backend != "sim" or cfg.cost.name == "replay"):
        raise ConfigError("fleet.failures are made; expected backend=sim, and another cost than replay.")
    to_choose = fleet.most or fleet.replicas
    if topology.disaggregated(cfg.topology):
        to_choose = max(
            sum(group.most or group.count for group in cfg.topology.groups.values() if group.role == role)
            for role in ("prefill", "decode")
        )
    if cfg.routing.name == SEAMS["routing"] and to_choose > 1:
        raise ConfigError(
            f"routing={cfg.routing.name} would leave all replicas but one idle; expected another, such as "
            "routing=round_robin."
        )


def _grouped(cfg: Config) -> FleetConfig:
    """The fleet that a topology's groups make, where they and the rest fit together."""
    fleet, name = cfg.fleet, cfg.topology.name
    topology.validate(cfg.topology, cfg.cost.name in SHAPED)
    if cfg.backend != "sim":
        raise ConfigError(
            f"backend={cfg.backend} runs what is there, and topology={name} is a made one; expected backend=sim."
        )
    if fleet.replicas != 1:
        raise ConfigError(
            f"fleet.replicas is {fleet.replicas}, and topology={name} says how many there are; expected "
            "topology.groups.GROUP.count."
        )
    if cfg.cost.name == "replay":
        raise ConfigError(f"cost=replay is one recorded replica, and topology={name} asks for another fleet.")
    count = sum(group.count for group in cfg.topology.groups.values())
    mosts = {key: group.most for key, group in cfg.topology.groups.items() if group.most is not None}
    if fleet.most is not None and (mosts or len(cfg.topology.groups) > 1):
        raise ConfigError(
            f"fleet.most is {fleet.most}, and topology={name} has groups: {', '.join(cfg.topology.groups)}; expected "
            "topology.groups.GROUP.most of those that are to grow."
        )
    if mosts:
        fleet = dataclasses.replace(
            fleet, most=sum(group.most or group.count for group in cfg.topology.groups.values())
        )
    if topology.disaggregated(cfg.topology):
        if cfg.sampling.n > 1:
            raise ConfigError(
                f"sampling.n is {cfg.sampling.n}, and topology={name} moves requests of one output alone."
            )
        if cfg.compression.name != SEAMS["compression"]:
            raise ConfigError(
                f"compression={cfg.compression.name} changes KV that topology={name} has to move; expected none."
            )
    return dataclasses.replace(fleet, replicas=count)


def _sampling(cfg: Config) -> None:
    sampling(cfg)
    for key, given in (("stop", cfg.sampling.stop), ("min_tokens", cfg.sampling.min_tokens)):
        if given and cfg.output_lengths != "stop":
            raise ConfigError(
                f"sampling.{key} is {given}, and output lengths are forced; expected output_lengths=stop with it."
            )
    if cfg.sampling.n > 1 and cfg.backend == "cache":
        raise ConfigError(
            f"sampling.n is {cfg.sampling.n}, and backend=cache replays prompts alone; expected sampling.n=1."
        )
    if not all(cfg.sampling.stop):
        raise ConfigError("sampling.stop has an empty text; expected at least one character.")


def _cost(cfg: Config) -> None:
    """Options of `cost` that only some cost models read. The model itself checks its bounds."""
    cost = cfg.cost
    if cost.name == "replay" and cost.path is None:
        raise ConfigError("cost=replay needs the recorded run: cost.path=RUN.")
    if cost.name != "replay" and cost.path is not None:
        raise ConfigError(f"cost.path={cost.path} is only read with cost=replay, not cost={cost.name}.")
    if cost.recalibrate and cost.name != "fitted":
        raise ConfigError(
            f"cost.recalibrate=true makes no sense with cost={cost.name}; expected cost=fitted."
        )
    reached = {"weight_read", "kv_read", "mfu", "link", "layer_us", "sequence_us", "step_us", "collective_us"}
    own = {"name", "path", "recalibrate"}  # said above
    if cost.name in SHAPED:
        own = {item.name for item in dataclasses.fields(cost)}
    if cost.name != "tables":
        own -= {"tables"}
    elif cost.tables is None:
        raise ConfigError(
            "cost=tables needs the directory of one device's measured kernels: cost.tables=DIR."
        )
    if cost.name == "roofline":
        own -= reached
    plain = CostConfig()
    for item in dataclasses.fields(cost):
        if item.name not in own and getattr(cost, item.name) != getattr(plain, item.name):
            raise ConfigError(
                f"cost.{item.name}={getattr(cost, item.name)} isn't read with cost={cost.name}; expected cost="
                + (
                    "tables."
                    if item.name == "tables"
                    else "physical or tables."
                    if item.name in reached
                    else f"{', '.join(SHAPED[:-1])} or {SHAPED[-1]}."
                )
            )


def _mechanisms(cfg: Config) -> None:
    told = cfg.mechanisms
    if cfg.backend != "sim" and told != MechanismsConfig():
        raise ConfigError(
            f"mechanisms are switches of the simulator, and backend is {cfg.backend}; expected backend=sim."
        )
    if told.graph_padding and cfg.cost.name not in ("physical", "tables"):
        raise ConfigError(
            f"mechanisms.graph_padding isn't read with cost={cfg.cost.name}; expected cost=physical or tables."
        )
    if cfg.cost.name == "replay" and (told.warmup or told.control != "modelled"):
        raise ConfigError("mechanisms.warmup and control are in a recorded run's durations already.")


def _endpoint(endpoint: str | None) -> None:
    """Raise `ConfigError` for an address that spans can't be sent to, before anything is run for them."""
    if endpoint is None:
        return
    from lab.observe.send import check_endpoint, check_packages

    wrong = check_endpoint(endpoint)
    if wrong:
        raise ConfigError(
            f"export.otlp_endpoint is '{endpoint}': {wrong}; expected an address such as http://localhost:4318 or "
            "grpc://localhost:4317."
        )
    check_packages(endpoint)


def _ranks(cfg: Config) -> None:
    from lab.policy import CompressionPolicy

    tensor, name = cfg.engine.tensor_parallel, cfg.compression.name
    if tensor > 1 and plugins.load("compression", name).score is not CompressionPolicy.score:  # type: ignore[attr-defined]
        raise ConfigError(
            f"compression={name} scores the keys of all heads together, and engine.tensor_parallel={tensor} holds them "
            "apart; expected engine.tensor_parallel=1."
        )


def _trace(cfg: Config) -> None:
    for key, value in params(cfg.trace).items():
        if key == "limit":
            at_least(1).check("trace.limit", value)
        elif key == "rate" or key.startswith("rate_") or key.endswith("_rate"):
            POSITIVE.check(f"trace.{key}", value)
    entry = traces()[cfg.trace.name]
    if getattr(entry, "needs_path", False) and not getattr(cfg.trace, "path", None):
        raise ConfigError(f"trace '{cfg.trace.name}' needs a file: {entry.get}, then set trace.path=PATH.")
    trace_options(cfg)


def _study(key: str, study: StudyConfig) -> None:
    vary = study.vary
    one_of(f"{key}.vary.seam", vary.seam, list(SEAMS))
    listed = vary.names if isinstance(vary.names, list) else []
    if vary.names != "all" and not (listed and all(isinstance(name, str) for name in listed)):
        raise ConfigError(f"{key}.vary.names is {vary.names!r}; expected all, or a list of names.")
    for name in (*listed, *vary.without):
        if not plugins.is_path(name):
            one_of(f"a name in {key}.vary", name, plugins.names(vary.seam))
    if not study.workloads:
        raise ConfigError(f"{key}.workloads is empty; expected for each workload its words.")
    for axis, values in study.axes.items():
        if not values:
            raise ConfigError(f"{key}.axes: {axis} is an empty list; expected its values.")
    for seed in study.seeds:
        at_least(0).check(f"{key}.seeds", seed)
