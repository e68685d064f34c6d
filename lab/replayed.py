"""A recorded run as a job for the real engine: everything that was decided comes from it. Control plane.

What may be chosen anew is what durations depend on: number format, threads, kernels, and where results go. A word
that would decide something is refused rather than ignored.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from lab.assembly import EngineSpec
from lab.config import Config
from lab.control.request import Request
from lab.errors import ConfigError, ReplayError, RunError

FREE = ("backend", "cache_dir", "model", "engine", "export", "run")
"""Options that are the new run's own ..."""
DECIDED = ("engine.token_budget", "engine.max_seqs", "engine.chunk")
"""... but for these."""


class Job(NamedTuple):
    """What an experiment runs."""

    cfg: Config
    requests: list[Request]
    source: dict[str, Any]
    """Where the workload comes from."""
    spec: EngineSpec
    config_text: str
    slug: str
    """For the name of a new run directory."""


def replayed(cfg: Config) -> Job:
    """The job of executing `engine.replay` again. Raises `ConfigError`, `RunError`, `ReplayError`."""
    import yaml

    from lab.analysis.runs import load

    run = load(cfg.engine.replay or "")
    for word in cfg.origin.words:
        key = word.partition("=")[0].lstrip("+~")
        if key.partition(".")[0] not in FREE or key in DECIDED:
            raise ConfigError(
                f"{word} has no say in a replay: that was decided by the recorded run '{run.path}'. Expected only "
                "what durations depend on: model, engine.threads, engine.attention and the like."
            )
    config = dict(run.config)
    model = str(config.get("model", {}).get("name", ""))
    if model != cfg.model.name:
        raise ReplayError(
            f"run '{run.path}' served the model '{model}', and this one has model={cfg.model.name}; expected "
            f"model={model}"
        )
    plans = run.steps  # read once before anything is opened
    replicas = int(plans["replica"].nunique())
    if replicas != 1 or plans["replica"].iloc[0] != 0:
        raise ReplayError(
            f"run '{run.path}' has {'no steps' if not replicas else f'steps of {replicas} replicas'}; expected "
            "those of one, the first"
        )
    try:
        capacity = run.environment["capacity"]
        sizes = {key: capacity[key] for key in ("blocks", "block_size", "host_blocks", "transfer_gb_s")}
    except (KeyError, TypeError) as error:
        raise RunError(f"run '{run.path}' doesn't say its capacity in environment.json") from error
    mine = dataclasses.asdict(cfg)
    config |= {key: mine[key] for key in ("backend", "cache_dir", "model", "export")}
    own = {key: value for key, value in mine["engine"].items() if f"engine.{key}" not in DECIDED}
    config["engine"] = {**config["engine"], **own}
    same = dataclasses.replace(
        cfg, seed=config["seed"], output_lengths="forced", kv=dataclasses.replace(cfg.kv, **sizes)
    )
    return Job(
        cfg=same,
        requests=run.workload(),
        source=dict(run.environment.get("workload", {})),
        spec=EngineSpec.of(config),
        config_text=yaml.safe_dump(config, sort_keys=False),
        slug=f"replay-{run.path.name}",
    )
