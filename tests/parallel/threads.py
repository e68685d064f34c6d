"""Ranks as threads of one process: the same cuts and the same order of exchanges, without sockets."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from real_engine.models.shard import Place, Shard

T = TypeVar("T")


class Meeting:
    """Where the ranks of a world exchange tensors."""

    def __init__(self, tensor: int, pipeline: int) -> None:
        self.barriers = [threading.Barrier(tensor, timeout=30) for _ in range(pipeline)]
        self.parts: list[list[Any]] = [[None] * tensor for _ in range(pipeline)]
        self.pipes = [queue.Queue[Tensor]() for _ in range(tensor * pipeline)]


class ThreadShard(Shard):
    def __init__(self, place: Place, meeting: Meeting) -> None:
        self.place, self._meeting = place, meeting
        self.sums = 0

    def _all(self, x: Tensor) -> list[Tensor]:
        stage, part = self.place.stage, self.place.part
        self._meeting.parts[stage][part] = x.clone()
        self._meeting.barriers[stage].wait()
        found = list(self._meeting.parts[stage])
        self._meeting.barriers[stage].wait()
        return found

    def sum_(self, x: Tensor) -> Tensor:
        self.sums += 1
        return x.copy_(torch.stack(self._all(x)).sum(0))

    def gather(self, logits: Tensor) -> Tensor:
        return torch.cat(self._all(logits), -1)

    def receive(self, tokens: int, width: int, like: Tensor) -> Tensor:
        x = self._meeting.pipes[self.place.rank].get(timeout=30)
        assert x.shape == (tokens, width)
        assert x.dtype == like.dtype
        return x

    def send(self, x: Tensor) -> None:
        self._meeting.pipes[self.place.rank + self.place.tensor].put(x.clone())


def on_ranks(tensor: int, pipeline: int, body: Callable[[ThreadShard], T]) -> list[T]:
    """What `body` gives on each rank, one thread each."""
    meeting = Meeting(tensor, pipeline)
    found: list[Any] = [None] * (tensor * pipeline)

    def run(rank: int) -> None:
        try:
            found[rank] = body(ThreadShard(Place(rank, tensor, pipeline), meeting))
        except BaseException as error:
            found[rank] = error
            for barrier in meeting.barriers:
                barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(len(found))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for result in found:
        if isinstance(result, BaseException) and not isinstance(result, threading.BrokenBarrierError):
            raise result
    return found
