"""KV blocks that fit on a device that isn't there: what vLLM finds out by running its largest step. State path.

(memory * utilisation - weights - the largest step - what else an engine keeps) / bytes of a block, rounded down.
"""

from __future__ import annotations

from lab.errors import ConfigError
from sim.cost.physical import ALONE, Parallel
from sim.hardware import Hardware
from sim.model_shape import ModelShape

GIB = 1 << 30
RESERVED_GIB = 0.57
"""Kernels, their workspaces, and memory lost between pieces. One measured point: vLLM 0.19 on an RTX 4090 has 2,588
blocks of 16 beside Llama-3.1-8B at 0.9, so 1.152 GiB are neither weights nor KV; `largest_step` accounts for 0.58."""
LOGIT_COPIES = 4
"""Arrays of float32 as large as the logits that sampling holds at once: logits, probabilities, sorted, summed."""


def largest_step(shape: ModelShape, token_budget: int, max_seqs: int, tensor: int = 1) -> float:
    """Bytes of activations at their peak: in a feed-forward block, or when every request samples."""
    width = shape.width
    residual = 2 * token_budget * shape.hidden * width
    inner = token_budget * 3 * shape.intermediate * width / tensor
    logits = min(max_seqs, token_budget) * shape.vocab * (width + 4.0 * LOGIT_COPIES)
    return residual + max(inner, logits)


def blocks_that_fit(
    shape: ModelShape,
    hardware: Hardware,
    *,
    utilization: float,
    block_size: int,
    token_budget: int,
    max_seqs: int,
    parallel: Parallel = ALONE,
    reserved_gib: float = RESERVED_GIB,
) -> int:
    """Blocks of `block_size` tokens that every device of a replica holds its share of. Raises `ConfigError`."""
    weights = parallel.weight_bytes(shape)
    step = largest_step(shape, token_budget, max_seqs, parallel.tensor)
    room = hardware.memory_bytes * utilization - weights - step - reserved_gib * GIB
    stage = -(-shape.layers // parallel.pipeline)
    block = block_size * stage * shape.kv_layer_bytes * parallel.kv_share(shape)
    if room < block:
        raise ConfigError(
            f"{shape.name} doesn't fit on {parallel.devices} x {hardware.name}: {utilization:g} of "
            f"{hardware.memory_bytes / GIB:.1f} GiB a device, less {weights / GIB:.1f} of weights and "
            f"{step / GIB + reserved_gib:.1f} for the largest step and the engine, leaves "
            f"{max(room, 0) / GIB:.2f} GiB; expected more devices (cost.tensor_parallel), smaller weights "
            "(cost.weights) or another cost.hardware."
        )
    return int(room // block)
