"""A rank other than the first: builds its part of the model, then executes plan after plan until the line closes.

Data plane; request path. Rank 0 starts it as `python -m real_engine.parallel.worker`; torchrun starts
`python -m lab.experiment`, which comes here when it finds that it isn't the first. What goes wrong is told to rank 0,
who says it; the process then ends without ceremony, so that nobody waits for it within an exchange.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import sys
import time
import traceback
from typing import Any, NoReturn

import torch

from lab import __version__, ranks
from lab.config import Config, EngineConfig, KvConfig, ModelConfig
from lab.console import Console
from lab.control import wire
from lab.errors import ConfigError, DiptychError, ExecutorError
from real_engine.backend import build
from real_engine.device import choose
from real_engine.models.shard import Place
from real_engine.parallel.crew import connect, is_local, on_loopback, store
from real_engine.parallel.group import RankLost, RankShard
from real_engine.parallel.link import Link, LinkClosed
from real_engine.parallel.rank import RankExecutor

HELLO = {"diptych": __version__, "plans": wire.SCHEMA, "torch": str(torch.__version__)}
"""What all ranks must have in common."""


class _Quiet(Console):
    """Rank 0 says it."""

    def say(self, text: str) -> None:
        pass


def device_of(cfg: Config, local_rank: int) -> torch.device:
    """The device of the `local_rank`-th rank on this host. Raises `ConfigError` if there are fewer."""
    device = choose(cfg.engine.device)
    if device.type != "cuda":
        return device
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ConfigError(
            f"{ranks.world(cfg)} ranks need a CUDA device each, and rank {local_rank} of this host finds {count}; "
            "expected engine.tensor_parallel * engine.pipeline_parallel to be at most that, or engine.device=cpu."
        )
    torch.cuda.set_device(local_rank)
    return choose(cfg.engine.device)


def join(cfg: Config) -> int:
    """For a rank that torchrun started: follow rank 0 to the end; returns the exit code."""
    found = ranks.launched(os.environ)
    assert found is not None
    signal.signal(
        signal.SIGTERM, signal.SIG_IGN
    )  # torchrun sends it to all: rank 0 ends us when it has saved
    follow(connect(found), found.rank, found)
    return 0


def follow(link: Link, rank: int, launched: ranks.Launched | None) -> None:
    """Until rank 0 closes the line. Whatever fails is told to it, and ends the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        _follow(link, rank, launched)
    except LinkClosed:
        os._exit(0)
    except RankLost as error:
        _end(link, lost=str(error))
    except DiptychError as error:
        _end(link, failed=str(error))
    except Exception as error:  # a bug of ours: rank 0 says what, and here is where
        traceback.print_exc()
        _end(link, failed=f"{type(error).__name__}: {error}")


def _follow(link: Link, rank: int, launched: ranks.Launched | None) -> None:
    link.say(hello=HELLO)
    job = link.hear()
    cfg = _config(job)
    place = Place(rank, job["tensor"], job["pipeline"])
    device = device_of(cfg, rank if launched is None else launched.local_rank)
    with on_loopback(launched is None or is_local(os.environ)):
        meeting = store(job["rendezvous"], launched, place.world)
        shard = RankShard(place, meeting, device, cfg.engine.rank_timeout_s)
    executor = build(cfg, _Quiet(), shard)
    assert isinstance(executor, RankExecutor)
    link.say(ready={"kv_bytes": executor.about["kv_bytes"], "device": executor.about["device"]})
    try:
        while True:
            _step(link, executor)
    except LinkClosed:
        executor.close()


def _step(link: Link, executor: RankExecutor) -> None:
    letter, data = link.receive()
    came = time.time_ns()
    if letter != b"P":
        raise ExecutorError(f"expected a plan, and a frame '{letter.decode('latin-1')}' came")
    result, timing = executor.follow(wire.decode(data))
    said = bool(result.logprobs)
    clock = {"came": came, "gave": time.time_ns()}
    link.say(digest=executor.digest, timing=dataclasses.asdict(timing), clock=clock, logprobs=said)
    if said:
        link.send(b"B", wire.encode_logprobs(result.logprobs))


def _config(job: dict[str, Any]) -> Config:
    """As much of rank 0's configuration as building an executor takes."""
    sections = job["config"]
    return Config(
        seed=job["seed"],
        cache_dir=job["cache_dir"],
        model=ModelConfig(**sections["model"]),
        engine=EngineConfig(**sections["engine"]),
        kv=KvConfig(**sections["kv"]),
    )


def _end(link: Link, **message: str) -> NoReturn:
    with contextlib.suppress(LinkClosed):
        link.say(**message)
    sys.stderr.flush()
    os._exit(1)


if __name__ == "__main__":
    follow(Link(socket.socket(fileno=int(sys.argv[1]))), int(sys.argv[2]), None)
