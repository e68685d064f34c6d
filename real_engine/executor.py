"""The real data plane: executes a plan with torch. Data plane; request path (its tables: state path).

`execute` is the whole of it: transfer (swapped KV), prepare (what the plan says, as arrays), forward (logits),
sample (tokens), compact (KV that compression gives up). They are timed back to back, so they add up to what the
call takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from time import perf_counter_ns
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lab.control.executor import Capacity
from lab.control.plan import StepPlan, StepResult, TokenLogprobs
from lab.control.request import RequestId, SamplingParams
from lab.errors import ExecutorError
from real_engine import device
from real_engine.attention.backend import AttentionBackend, GraphableAttention
from real_engine.attention.torch_cpu import TorchAttention
from real_engine.compression import Compressor, Queries
from real_engine.detokenizer import TextStops
from real_engine.graphs import DecodeGraphs, GraphDevice
from real_engine.kv_memory import KvMemory, KvShape
from real_engine.models.decoder import Decoder
from real_engine.models.loading import LoadedModel
from real_engine.sampler import sample
from real_engine.sequences import Sequences

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_ROOM = "a smaller engine.token_budget, kv.blocks or engine.memory_utilization"
"""What gives a step more memory."""


class TorchExecutor:
    """Implements `lab.control.executor.Executor`.

    `attention` defaults to plain torch. With `keep_logits`, `logits` holds the float32 logits `[vocab]` that
    each request of the last step sampled from (before penalties): for tests and analyses that look behind the
    tokens. `tokenizer` gives the one that stop strings are looked for with; by default the model's own.
    """

    def __init__(
        self,
        model: LoadedModel,
        *,
        blocks: int,
        block_size: int = 16,
        host_blocks: int = 0,
        transfer_gb_s: float = 16.0,
        attention: AttentionBackend | None = None,
        keep_logits: bool = False,
        tokenizer: Callable[[], Tokenizer] | None = None,
    ) -> None:
        """Allocates the KV cache. Raises `ExecutorError` when it doesn't fit, or its block size doesn't suit."""
        self._attention = attention or TorchAttention()
        if block_size % self._attention.block_size_multiple:
            raise ExecutorError(
                f"attention '{self._attention.name}' needs a block size that is a multiple of "
                f"{self._attention.block_size_multiple}; kv.block_size is {block_size}"
            )
        config = model.config
        lacking = config.needs - self._attention.abilities
        if lacking:
            raise ExecutorError(
                f"attention '{self._attention.name}' doesn't compute the {' and the '.join(sorted(lacking))} "
                f"of model '{model.spec.name}'; engine.attention=torch does"
            )
        shape = KvShape.of(config, model.dtype, block_size)
        self.capacity = Capacity(
            blocks,
            block_size,
            config.max_context,
            config.vocab_size,
            host_blocks,
            shape.block_bytes,
            transfer_gb_s,
        )
        self.logits: dict[RequestId, Tensor] = {}
        self._keep_logits = keep_logits
        self._model = model
        self._device = model.decoder.device
        self._memory = KvMemory(shape, blocks, self._device)
        self._host = KvMemory(shape, host_blocks, pinned=self._device.type == "cuda") if host_blocks else None
        self._sequences = Sequences(
            blocks=blocks,
            block_size=block_size,
            max_context=config.max_context,
            vocab_size=config.vocab_size,
        )
        self._texts = TextStops(tokenizer or model.tokenizer)
        self._graphs: DecodeGraphs | None = None
        self._compressor = Compressor(self._memory, config)
        self._closed = False

    def record(self, graphs: GraphDevice, *, most: int) -> None:
        """Before any step: record decode steps of up to `most` sequences as graphs, where attention and model allow."""
        decoder = self._model.decoder
        if not isinstance(decoder, Decoder) or not decoder.recordable:
            return
        if isinstance(self._attention, GraphableAttention):
            self._graphs = DecodeGraphs(
                decoder,
                self._attention,
                self._memory,
                graphs,
                most=most,
                max_context=self.capacity.max_context,
            )

    @property
    def model(self) -> LoadedModel:
        return self._model

    @property
    def about(self) -> Mapping[str, object]:
        """What a run's manifest should say of this data plane: results compare only where these are equal."""
        decoder = self._model.decoder
        own = isinstance(decoder, Decoder)
        return {
            "model": self._model.spec.name,
            "dtype": self._model.spec.dtype,
            "device": device.describe(self._device),
            "attention": self._attention.name,
            "graphs": 0 if self._graphs is None else len(self._graphs.sizes),
            "forward": "own" if own else "transformers",
            "linear": decoder.products if isinstance(decoder, Decoder) else "torch",
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "kv_bytes": self._memory.nbytes,
        }

    def execute(self, plan: StepPlan) -> StepResult:
        """Compute the plan's tokens. Raises `ExecutorError` for a plan that can't be executed."""
        started = perf_counter_ns()
        if self._closed:
            raise ExecutorError(f"step {plan.index}: the executor is closed")
        transfer_ns = self._transfer(plan, started) if plan.moved_blocks or plan.copies else 0
        started += transfer_ns
        self._sequences.apply(plan)
        self._texts.apply(plan)
        self.logits.clear()
        if not plan.work:
            return StepResult((), prepare_ns=perf_counter_ns() - started, transfer_ns=transfer_ns)
        what = f"step {plan.index} with {plan.tokens} tokens"
        with torch.inference_mode(), device.memory_for(what, _ROOM):
            batch, names, params, positions = self._sequences.pack(plan)
            decoder = self._model.decoder
            queries: Queries | None = None
            asking = self._compressor.asking(plan) if plan.compactions else frozenset()
            replay = None if self._graphs is None or asking else self._graphs.load(batch)
            if replay is None or not isinstance(decoder, Decoder):
                attention = self._attention.prepare(batch, self._memory)
                if asking:
                    attention = queries = self._compressor.watch(asking, plan, batch, attention)
                prepared = perf_counter_ns()
                logits = decoder.forward(batch, attention)
            else:
                (rows,) = device.upload(self._device, batch.sample_rows)
                prepared = perf_counter_ns()
                logits = decoder.logits(*replay(), rows)
            device.synchronize(self._device)
            forwarded = perf_counter_ns()
            tokens, logprobs = self._draw(logits, names, params, positions)
        for row, (name, token) in enumerate(zip(names, tokens, strict=True)):
            self._sequences.append(name, token)
            if self._keep_logits:
                self.logits[name] = logits[row]
        stopped = self._texts.reached(names, tokens)
        sampled = perf_counter_ns()
        for item in plan.compactions:
            with torch.inference_mode():
                self._compressor.choose(item, *self._sequences.table(item.request), queries)
            self._sequences.compact(item, plan)
        if plan.compactions:
            device.synchronize(self._device)
        return StepResult(
            tuple(tokens),
            prepare_ns=prepared - started,
            forward_ns=forwarded - prepared,
            sample_ns=sampled - forwarded,
            logprobs=logprobs,
            transfer_ns=transfer_ns,
            compact_ns=perf_counter_ns() - sampled if plan.compactions else 0,
            stopped=stopped,
        )

    def _draw(
        self,
        logits: Tensor,
        requests: Sequence[RequestId],
        params: Sequence[SamplingParams],
        positions: Sequence[int],
    ) -> tuple[list[int], Mapping[RequestId, TokenLogprobs]]:
        adjusted = self._sequences.adjustments(requests)
        return sample(logits, requests, params, positions, adjusted)

    def _transfer(self, plan: StepPlan, started: int) -> int:
        """Swap out, copy, swap in; returns the nanoseconds since `started`."""
        copies = [pair for move in plan.copies for pair in move.pairs]
        if not plan.moved_blocks:
            self._memory.copy(self._memory, copies)
            device.synchronize(self._device)
            return perf_counter_ns() - started
        if self._host is None:
            raise ExecutorError(f"step {plan.index} moves KV to the host, but there is no host tier")
        out = [pair for move in plan.swap_out for pair in move.pairs]
        back = [(host, device) for move in plan.swap_in for device, host in move.pairs]
        self._host.copy(self._memory, out)
        self._memory.copy(self._memory, copies)
        self._memory.copy(self._host, back)
        device.synchronize(self._device)
        return perf_counter_ns() - started

    def close(self) -> None:
        """Give back the KV cache. May be called twice."""
        self._closed = True
        self._graphs = None
        self._memory.free()
        if self._host is not None:
            self._host.free()
