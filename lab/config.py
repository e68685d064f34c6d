"""What a run can be told: every option, its default, the line that `--help` shows, the values it takes. Control plane.

`Config` is what `lab.cli.main` hands to a command. Its plain sections are the dataclasses below; `trace`, `policy` and
the other seams are `Choice`s (`lab/choices.py`), made from the parameters of the class that was named. `lab/compose.py`
puts Hydra behind it, `lab/validation.py` says what makes sense together. Nothing here imports Hydra or a plug-in.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lab.errors import ConfigError
from lab.options import NOT_NEGATIVE, POSITIVE, REQUIRED, SHARE, at_least, option
from lab.topology import TopologyConfig

MOST_BLOCKS = (1 << 31) - 1
"""In a pool: a block's number has 32 bits."""
WIDTHS = ("bfloat16", "float16", "float32", "fp8", "int8", "int4")
"""Of weights and, but for the last, of KV."""


@dataclass
class ModelConfig:
    """`name` is `smollm2`, `tiny`, a local directory or a hub id."""

    name: str = "smollm2"
    dtype: str = option("bfloat16", "bfloat16 or float32", ("bfloat16", "float32"))
    quantization: str = option(
        "none", "real engine on CPU: int8 multiplies in 8 bits, rows scaled as they come", ("none", "int8")
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
    weights: str | None = option(
        None, "width of linear layers: fp8, int8, int4; null: as the model's dtype", (None, *WIDTHS)
    )
    kv: str | None = option(None, "width of KV: fp8, int8; null: as the model's dtype", (None, *WIDTHS[:-1]))
    tensor_parallel: int | None = option(
        None, "devices that share each layer; null: engine.tensor_parallel", at_least(1)
    )
    pipeline_parallel: int | None = option(
        None, "runs of layers, one after the other; null: engine.pipeline_parallel", at_least(1)
    )
    microbatches: int = option(
        1, "parts that a batch is cut into, for runs of layers to work at once", at_least(1)
    )
    reserved_gib: float | None = option(
        None,
        "device memory an engine keeps beside weights, KV and activations; null: as measured on one",
        NOT_NEGATIVE,
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
    warmup: float = option(
        0.0, "how much longer the very first step takes, as a share; fades away", NOT_NEGATIVE
    )
    warmup_steps: float = option(10.0, "steps within which that falls to 1/e", POSITIVE)
    api_ms: float = option(
        0.0, "from the arrival until the engine knows of a request (8.2: vLLM on an H100)", NOT_NEGATIVE
    )
    control: str = option(
        "modelled",
        "time of planning: modelled (by the cost model), measured (then no two runs are equal)",
        ("modelled", "measured"),
    )


@dataclass
class EngineConfig:
    """Limits of one step."""

    token_budget: int = option(512, "most tokens one step computes", at_least(1))
    max_seqs: int = option(32, "most requests running at once", at_least(1))
    chunk: int | None = option(
        None, "most prefill tokens of one request in one step; null: the budget alone", at_least(1)
    )
    threads: int | None = option(
        None,
        "CPU threads of the real engine, of each rank; null: torch's own choice, divided among ranks",
        at_least(1),
    )
    attention: str = option(
        "auto",
        "real engine's attention: native (own CPU kernels), flash (CUDA), torch; auto: what there is",
        ("auto", "native", "flash", "torch"),
    )
    device: str = option(
        "auto",
        "where the real engine computes: cpu, cuda; auto: cuda where there is some",
        ("auto", "cpu", "cuda"),
    )
    memory_utilization: float = option(
        0.9, "share of a CUDA device's memory that is used when kv.blocks is null", SHARE
    )
    cuda_graphs: bool = option(True, "record decode steps as CUDA graphs, where attention allows it")
    mode: str = option(
        "stepped",
        "real engine's time: stepped (measured durations, idle time skipped), online (wall clock), replay",
        ("stepped", "online", "replay"),
    )
    replay: str | None = option(None, "engine.mode=replay: the recorded run whose plans are executed")
    tensor_parallel: int = option(1, "ranks that share each layer of the real engine", at_least(1))
    pipeline_parallel: int = option(1, "runs of layers that ranks hold one after the other", at_least(1))
    rank_timeout_s: float = option(300.0, "longest that one rank waits for another within a step", POSITIVE)


@dataclass
class KvConfig:
    """The KV cache."""

    blocks: int | None = option(
        None,
        "blocks in the pool; null: for 32,768 tokens, or what memory allows on CUDA and on cost.hardware",
        at_least(1),
    )
    block_size: int = option(16, "tokens a block", at_least(1))
    prefix_cache: bool = option(True, "reuse blocks of equal prefixes")
    host_blocks: int = option(
        0, "blocks of host memory that preempted requests can be swapped to", at_least(0)
    )
    transfer_gb_s: float = option(16.0, "nominal bandwidth between device and host, each way", POSITIVE)
    salt_per_tenant: bool = option(False, "tenants never share blocks")


@dataclass
class FailureConfig:
    """A replica that is lost; its requests go back to the router and are computed again."""

    replica: int = option(REQUIRED, "its index: those of the beginning count from 0")  # type: ignore[assignment]
    at_s: float = option(REQUIRED, "when, in seconds", NOT_NEGATIVE)  # type: ignore[assignment]
    back_s: float | None = option(
        None, "seconds until another starts in its place, which takes fleet.cold_start_s", NOT_NEGATIVE
    )


@dataclass
class FleetConfig:
    """Replicas behind the gateway (simulator only above one), and how well the gateway sees them."""

    replicas: int = option(1, "replicas at the start, and the least there will be", at_least(1))
    most: int | None = option(
        None, "replicas that the scaling policy may reach; null: as many as at the start"
    )
    cold_start_s: float = option(10.0, "from the decision to scale up until a replica is ready", NOT_NEGATIVE)
    refresh_ms: float = option(
        0.0, "replica views are taken anew when older than this; 0: always current", NOT_NEGATIVE
    )
    noise: float = option(0.0, "log-standard deviation of the counts in replica views", NOT_NEGATIVE)
    failures: list[FailureConfig] = field(
        default_factory=list,
        metadata={"help": "replicas that are lost, as in fleet.failures=[{replica: 0, at_s: 5, back_s: 2}]"},
    )


@dataclass
class SloConfig:
    """Targets that goodput counts by, for requests that bring none of their own."""

    ttft_ms: float | None = option(2000.0, "time to first token", POSITIVE)
    tpot_ms: float | None = option(200.0, "time per output token after the first", POSITIVE)


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
    n: int = option(1, "outputs of each request, which share its prompt's KV blocks", at_least(1))
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
        ("everything", "steps", "requests"),
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
    workers: int | None = option(
        None, "runs at once; null: one a core, and one alone where time is measured", at_least(1)
    )


@dataclass(frozen=True)
class Origin:
    """The words that a configuration was composed of, and where configuration files were looked for."""

    words: tuple[str, ...] = ()
    config_dir: Path | None = None


@dataclass
class Config:
    """One experiment, or (`studies`) many."""

    backend: str = option("both", "both, real, sim, or cache (block accesses only)")
    seed: int = option(0, "seed of everything random", at_least(0))
    output_lengths: str = option(
        "forced", "forced: as the trace says; stop: at EOS (not comparable by token)", ("forced", "stop")
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


def cache_dir(cfg: Config, environment: Mapping[str, str]) -> Path:
    """Where converted weights and fitted costs are kept: `cache_dir`, else the XDG cache directory."""
    if cfg.cache_dir is not None:
        return Path(cfg.cache_dir).expanduser()
    base = environment.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "diptych"


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
