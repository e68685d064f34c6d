"""Who this process is among several, where `torchrun` started it. Control plane."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from lab.config import Config
from lab.errors import ConfigError

WORKER = "real_engine.parallel.worker:join"
"""What a rank other than the first runs instead of an experiment; reached by name, as every data plane is."""


class Launched(NamedTuple):
    """As torchrun says it in the environment."""

    rank: int
    world: int
    local_rank: int


def world(cfg: Config) -> int:
    """Ranks that the real engine is to have."""
    return cfg.engine.tensor_parallel * cfg.engine.pipeline_parallel


def launched(environment: Mapping[str, str]) -> Launched | None:
    """None where this process was started by a person."""
    if "TORCHELASTIC_RUN_ID" not in environment:
        return None
    return Launched(*(int(environment[key]) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))


def follows(cfg: Config, environment: Mapping[str, str]) -> bool:
    """Whether this process is to follow the plans of another. Raises `ConfigError` for ranks that don't fit."""
    found = launched(environment)
    if found is None:
        return False
    if cfg.studies:
        raise ConfigError(
            "a study starts processes of its own, and torchrun started this one; run it without."
        )
    if found.world != world(cfg) or cfg.backend not in ("real", "both"):
        raise ConfigError(
            f"torchrun started {found.world} processes for backend={cfg.backend}, engine.tensor_parallel="
            f"{cfg.engine.tensor_parallel}, engine.pipeline_parallel={cfg.engine.pipeline_parallel}; expected backend "
            f"real or both, and as many processes as the product of the two, {world(cfg)}."
        )
    return found.rank > 0
