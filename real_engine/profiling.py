"""How many KV blocks a device has room for: what is left when the largest step has run once. Data plane; state path.

The rule of vLLM and nano-vllm: the cache takes a share of the device's memory, less what is in use and less what a step
takes on top of that at its peak.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from lab.errors import ExecutorError
from real_engine.attention.backend import AttentionBackend, PackedBatch
from real_engine.device import synchronize
from real_engine.kv_memory import KvMemory, KvShape
from real_engine.models.loading import AnyDecoder

_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class DeviceUse:
    """A device's memory around the largest step, in bytes."""

    total: int
    used: int
    """By anybody, between steps: weights, the driver's context, other processes."""
    step: int
    """What the step takes at its peak, on top of that."""


def blocks_within(use: DeviceUse, utilization: float, block_bytes: int) -> int:
    """Blocks of KV that fit: (`total` * `utilization` - `used` - `step`) / `block_bytes`, rounded down.

    Raises `ExecutorError` where not even one does.
    """
    room = int(use.total * utilization) - use.used - use.step
    if room < block_bytes:
        raise ExecutorError(
            f"no room for a KV cache: {utilization:g} of {use.total / _GIB:.2f} GiB (engine.memory_utilization), less "
            f"{use.used / _GIB:.2f} GiB in use and {use.step / _GIB:.2f} GiB for the largest step, leaves "
            f"{max(room, 0) / _GIB:.2f} GiB, and a block takes {block_bytes / _GIB:.4f} GiB; expected a smaller model, "
            "engine.token_budget or engine.max_seqs"
        )
    return room // block_bytes


def largest_batch(token_budget: int, max_seqs: int, max_context: int, block_size: int) -> PackedBatch:
    """`token_budget` new tokens in as many sequences as may run at once, all of which sample.

    All of them write to and read from the same few blocks: what they say doesn't matter, what they take does.
    """
    sequences = max(min(max_seqs, token_budget), -(-token_budget // max_context))
    counts = np.full(sequences, token_budget // sequences)
    counts[: token_budget % sequences] += 1
    ends = np.cumsum(counts)
    positions = np.concatenate([np.arange(count) for count in counts])
    blocks = -(-int(counts.max()) // block_size)
    return PackedBatch(
        token_ids=np.zeros(token_budget, np.int64),
        positions=positions,
        cu_seqlens_q=np.concatenate(([0], ends)).astype(np.int32),
        seqlens_k=counts.astype(np.int32),
        block_table=np.tile(np.arange(blocks, dtype=np.int32), (sequences, 1)),
        slot_mapping=positions,
        sample_rows=ends - 1,
    )


def run_largest(decoder: AnyDecoder, attention: AttentionBackend, shape: KvShape, batch: PackedBatch) -> None:
    """One step of `largest_batch`, on a cache of just its blocks."""
    memory = KvMemory(shape, batch.block_table.shape[1], decoder.device)
    with torch.inference_mode():
        decoder.forward(batch, attention.prepare(batch, memory))
    memory.free()


def measure(
    decoder: AnyDecoder, attention: AttentionBackend, shape: KvShape, batch: PackedBatch
) -> DeviceUse:
    """Run the largest step on a CUDA device, twice, and see what it takes."""
    device = decoder.device
    run_largest(decoder, attention, shape, batch)  # libraries take their workspaces, for good
    synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run_largest(decoder, attention, shape, batch)
    synchronize(device)
    step = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return DeviceUse(total, total - free, step)
