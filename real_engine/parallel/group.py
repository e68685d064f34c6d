"""A rank's part of the model, and its exchanges with the others through torch.distributed. Data plane; request path.

gloo carries CPU tensors, nccl CUDA ones. What is exchanged while a step is computed goes here; plans and reports have
their own line (`real_engine/parallel/link.py`).
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter_ns

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store  # type: ignore[attr-defined]

from lab.errors import ExecutorError
from real_engine.models.shard import Place, Shard


class RankLost(ExecutorError):
    """An exchange failed because another rank is gone, or hasn't answered in time."""


class RankShard(Shard):
    """Implements `Shard` among processes. One at a time in a process: torch's default group belongs to it."""

    def __init__(self, place: Place, store: Store, device: torch.device, timeout_s: float) -> None:
        """Returns when every rank of the world has come. Raises `RankLost`."""
        if dist.is_initialized():
            raise ExecutorError("another engine of several ranks is open in this process; close it first")
        self.place = place
        self.communication_ns = 0
        """Time within exchanges so far: passing data on, and waiting for it. Where a device computes by itself, only
        what the host saw of it."""
        self._device = device
        self.backend = "nccl" if device.type == "cuda" else "gloo"
        both = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        timeout = datetime.timedelta(seconds=timeout_s)
        self._tensor_group: dist.ProcessGroup | None = None
        with self._exchange():
            dist.init_process_group(
                both, store=store, rank=place.rank, world_size=place.world, timeout=timeout
            )
            for stage in range(place.pipeline):
                ranks = list(range(stage * place.tensor, (stage + 1) * place.tensor))
                group = dist.new_group(ranks, timeout=timeout)
                if stage == place.stage:
                    self._tensor_group = group

    @property
    def drawing(self) -> int:
        """The rank that has the logits and draws."""
        return (self.place.pipeline - 1) * self.place.tensor

    @property
    def draws(self) -> bool:
        return self.place.rank == self.drawing

    def sum_(self, x: Tensor) -> Tensor:
        if self.place.tensor > 1:
            with self._exchange():
                dist.all_reduce(x, group=self._tensor_group)
        return x

    def receive(self, tokens: int, width: int, like: Tensor) -> Tensor:
        x = torch.empty((tokens, width), dtype=like.dtype, device=like.device)
        with self._exchange():
            dist.recv(x, self.place.rank - self.place.tensor)
        return x

    def send(self, x: Tensor) -> None:
        with self._exchange():
            dist.send(x.contiguous(), self.place.rank + self.place.tensor)

    def gather(self, logits: Tensor) -> Tensor:
        if self.place.tensor == 1:
            return logits
        parts = [torch.empty_like(logits) for _ in range(self.place.tensor)] if self.draws else None
        with self._exchange():
            dist.gather(logits.contiguous(), parts, self.drawing, group=self._tensor_group)
        return logits if parts is None else torch.cat(parts, -1)

    def share(self, tokens: Sequence[int], count: int) -> list[int]:
        """The `count` tokens that the drawing rank drew, on every rank; `tokens` are read on that rank alone."""
        sent = torch.tensor(tokens if self.draws else [0] * count, dtype=torch.int64)
        with self._exchange():
            dist.broadcast(sent, self.drawing)
        shared: list[int] = sent.tolist()
        return shared

    def least(self, number: int) -> int:
        """The smallest of the ranks' numbers, on every rank."""
        found = torch.tensor([number], dtype=torch.int64)
        with self._exchange():
            dist.all_reduce(found, op=dist.ReduceOp.MIN)
        return int(found)

    def close(self) -> None:
        """Leave the group. May be called twice."""
        if dist.is_initialized():
            dist.destroy_process_group()

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        started = perf_counter_ns()
        try:
            yield
        except RuntimeError as error:  # also torch's DistError
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise RankLost(f"an exchange with another rank failed: {reason}") from error
        finally:
            self.communication_ns += perf_counter_ns() - started
