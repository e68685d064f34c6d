"""Rank 0: hands every plan to all ranks, computes its own part, and answers for the whole. Data plane; request path.

The control plane lives in this process and knows nothing of ranks. A step goes: the plan down each line, the exchanges
of the forward pass and the tokens through torch.distributed, and up each line what the rank did and the digest of all
plans it has executed, which must be rank 0's own. Stages of a pipeline work one after another: a step is one batch, so
the bubble is there, and what a pipeline gains is memory.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from time import perf_counter_ns, time_ns
from typing import Any

import torch
from torch import Tensor

from lab.config import Config, cache_dir
from lab.console import Console
from lab.control import wire
from lab.control.executor import Capacity
from lab.control.plan import RankTiming, StepPlan, StepResult
from lab.control.request import RequestId
from lab.errors import ExecutorError, ModelError
from lab.ranks import launched, world
from real_engine.backend import build, model_spec
from real_engine.models.families import OtherArchitecture, parse_config, read_config
from real_engine.models.loading import LoadedModel, find_model
from real_engine.models.shard import Place, Shard
from real_engine.models.tiny import CONFIG
from real_engine.parallel.crew import COMING_S, Crew, Worker, is_local, on_loopback, store
from real_engine.parallel.group import RankLost, RankShard
from real_engine.parallel.link import LinkClosed
from real_engine.parallel.rank import RankExecutor
from real_engine.parallel.worker import HELLO, device_of

SECTIONS = ("model", "engine", "kv")
"""Of the configuration, what a worker is told."""


class ParallelExecutor:
    """Implements `lab.control.executor.Executor` over several ranks, this process being the first.

    A failure of any rank ends it: `execute` raises `ExecutorError`, and from then on only `close` may be called.
    """

    def __init__(self, own: RankExecutor, crew: Crew, about: Mapping[str, object], timeout_s: float) -> None:
        self._own, self._crew, self._timeout_s = own, crew, timeout_s
        self.capacity: Capacity = own.capacity
        self.about = about
        self._busy = self._closed = False

    @property
    def model(self) -> LoadedModel:
        """Rank 0's part."""
        return self._own.model

    @property
    def digest(self) -> str:
        """Of all plans executed so far; every rank's."""
        return self._own.digest

    @property
    def logits(self) -> dict[RequestId, Tensor]:
        """As `TorchExecutor.logits`; empty where another rank draws."""
        return self._own.logits

    @property
    def workers(self) -> list[Worker]:
        return self._crew.workers

    def execute(self, plan: StepPlan) -> StepResult:
        """Compute the plan's tokens on all ranks. Raises `ExecutorError`, naming the rank that failed."""
        if self._closed or self._busy:
            raise ExecutorError(f"step {plan.index}: the executor is closed")
        self._busy = True
        try:
            result = self._execute(plan)
        except (RankLost, LinkClosed, TimeoutError) as error:
            raise ExecutorError(f"step {plan.index}: {_why(self._crew, error)}") from error
        self._busy = False
        return result

    def _execute(self, plan: StepPlan) -> StepResult:
        started = perf_counter_ns()
        data = wire.encode(plan)
        sent: list[int] = []
        for worker in self._crew.workers:
            sent.append(time_ns())
            worker.link.send(b"P", data)
        sent_ns = perf_counter_ns() - started
        result, timing = self._own.follow(plan)
        timings, logprobs = [timing], result.logprobs
        for worker, at in zip(self._crew.workers, sent, strict=True):
            report = worker.hear(self._timeout_s)
            heard, clock = time_ns(), report["clock"]
            if report.get("digest") != self._own.digest:
                raise ExecutorError(
                    f"step {plan.index}: {worker} has executed other plans; its digest is {report.get('digest')}, "
                    f"and rank 0's {self._own.digest}"
                )
            across = {"down_ns": clock["came"] - at, "up_ns": heard - clock["gave"]}
            timings.append(RankTiming(**report["timing"] | across))
            if report.get("logprobs"):
                logprobs = wire.decode_logprobs(worker.link.receive(self._timeout_s)[1])
        rest_ns = perf_counter_ns() - started - sent_ns - result.duration_ns
        return dataclasses.replace(
            result,
            prepare_ns=result.prepare_ns + sent_ns + (0 if plan.work else rest_ns),
            sample_ns=result.sample_ns + (rest_ns if plan.work else 0),
            logprobs=logprobs,
            ranks=tuple(timings),
        )

    def close(self) -> None:
        """End all ranks and give back what this one holds. May be called twice."""
        if self._closed:
            return
        self._closed = True
        # In the middle of a step the others wait for what will never come.
        self._crew.close(kill=self._busy)
        self._own.close()


def open_ranks(cfg: Config, console: Console) -> ParallelExecutor:
    """Start, or meet, the other ranks and build this one's part. Raises `DiptychError`."""
    place = Place(0, cfg.engine.tensor_parallel, cfg.engine.pipeline_parallel)
    by_torchrun = launched(os.environ)
    device = device_of(cfg, 0 if by_torchrun is None else by_torchrun.local_rank)
    _check(cfg, console, place)
    threads = cfg.engine.threads or max(1, torch.get_num_threads() // (1 if by_torchrun else place.world))
    cfg = dataclasses.replace(cfg, engine=dataclasses.replace(cfg.engine, threads=threads))
    console.say(
        f"Starting {place.world} ranks ..." if by_torchrun is None else f"Meeting {place.world} ranks ..."
    )
    crew = Crew(world(cfg), by_torchrun, threads)
    own: RankExecutor | None = None
    try:
        for worker in crew.workers:
            _greet(worker, cfg, crew.rendezvous, place)
        with on_loopback(by_torchrun is None or is_local(os.environ)):
            meeting = store(crew.rendezvous, by_torchrun, place.world)
            shard = RankShard(place, meeting, device, cfg.engine.rank_timeout_s)
        try:
            built = build(cfg, console, shard)
        except BaseException:
            shard.close()
            raise
        assert isinstance(built, RankExecutor)
        own = built
        ready = [worker.hear(cfg.engine.rank_timeout_s)["ready"] for worker in crew.workers]
    except BaseException as error:
        why = _why(crew, error) if isinstance(error, (RankLost, LinkClosed, TimeoutError)) else ""
        crew.close(kill=True)
        if own is not None:
            own.close()
        if why:
            raise ExecutorError(why) from error
        raise
    about = {
        **own.about,
        "tensor_parallel": place.tensor,
        "pipeline_parallel": place.pipeline,
        "collectives": shard.backend,
        "kv_bytes": sum(int(said["kv_bytes"]) for said in (own.about, *ready)),
    }
    return ParallelExecutor(own, crew, about, cfg.engine.rank_timeout_s)


def _why(crew: Crew, error: BaseException) -> str:
    said = crew.explain()
    if said is not None:
        return f"{said}; the other ranks can't go on without it"
    if isinstance(error, TimeoutError):
        return "a rank hasn't answered within engine.rank_timeout_s"
    return str(error) or "a rank is gone, and none says why"


def _check(cfg: Config, console: Console, place: Place) -> None:
    """Whether the model can be cut so, before anybody is started for it; its checkpoint is there for all then."""
    whole = Shard()
    whole.place = place
    directory = find_model(model_spec(cfg), cache_dir=cache_dir(cfg, os.environ), notify=console.say)
    try:
        whole.config(
            parse_config(CONFIG, "the model 'tiny'") if directory is None else read_config(directory)
        )
    except OtherArchitecture as reason:
        raise ModelError(
            f"{reason}. What runs through transformers' own code can't be cut into ranks"
        ) from reason


def _greet(worker: Worker, cfg: Config, rendezvous: str, place: Place) -> None:
    """Hear who it is, and tell it what to build. Raises `ExecutorError` for one of another version."""
    hello: Any = worker.hear(COMING_S).get("hello")
    if hello != HELLO:
        raise ExecutorError(f"{worker} is of another version of Diptych or torch: {hello}; rank 0 is {HELLO}")
    worker.link.say(
        tensor=place.tensor,
        pipeline=place.pipeline,
        seed=cfg.seed,
        cache_dir=cfg.cache_dir,
        rendezvous=rendezvous,
        config={name: dataclasses.asdict(getattr(cfg, name)) for name in SECTIONS},
    )
