"""What is decided when the real engine opens on CUDA: attention, the size of the cache, graphs. Data plane."""

from __future__ import annotations

from lab.backend import kv_blocks
from lab.config import Config
from lab.console import Console
from lab.errors import ModelError
from real_engine.attention import flash
from real_engine.attention.agreement import agrees
from real_engine.attention.backend import AttentionBackend
from real_engine.attention.torch_cpu import TorchAttention
from real_engine.device import memory_for
from real_engine.executor import TorchExecutor
from real_engine.graphs import CudaGraphs
from real_engine.kv_memory import KvShape
from real_engine.models.config import PLAIN
from real_engine.models.loading import LoadedModel
from real_engine.profiling import blocks_within, largest_batch, measure


def attention(cfg: Config, model: LoadedModel, console: Console) -> AttentionBackend:
    """flash-attn where it is installed, suits the model and agrees with plain torch; else plain torch, and says why.

    Raises `ModelError` when `engine.attention` asks for what can't be had.
    """
    device, wanted = model.decoder.device, cfg.engine.attention
    if wanted == "native":
        raise ModelError(
            f"engine.attention=native computes on the CPU, and the device is {device.type}; expected auto, flash or "
            "torch, or engine.device=cpu"
        )
    shape = KvShape.of(model.config, model.dtype, cfg.kv.block_size)
    why = flash.unsuited(shape, device)
    if not why:
        functions, why = flash.installed()
        if functions is not None:
            store, missing = flash.triton_store()
            found = flash.FlashAttention(functions, store)
            rules = model.config.attention or (PLAIN,)
            if agrees(found, shape, model.config.heads, device, rules):
                if missing:
                    console.say(f"Keys and values are stored by plain torch: {missing}.")
                return found
            why = "on this device it doesn't agree with plain torch"
    if wanted == "flash":
        raise ModelError(f"engine.attention=flash can't run '{cfg.model.name}' here: {why}")
    console.say(f"flash-attn isn't used: {why}. Attention runs on plain torch, several times slower.")
    return TorchAttention()


def blocks(cfg: Config, model: LoadedModel, chosen: AttentionBackend) -> int:
    """Blocks of the KV cache: as configured; else on CUDA as many as fit, elsewhere enough for a default load."""
    device = model.decoder.device
    if cfg.kv.blocks is not None or device.type != "cuda":
        return kv_blocks(cfg)
    shape = KvShape.of(model.config, model.dtype, cfg.kv.block_size)
    step = largest_batch(
        cfg.engine.token_budget, cfg.engine.max_seqs, model.config.max_context, shape.block_size
    )
    what = f"a step of {cfg.engine.token_budget} tokens (engine.token_budget)"
    with memory_for(what, "fewer, or a smaller model"):
        use = measure(model.decoder, chosen, shape, step)
    return blocks_within(use, cfg.engine.memory_utilization, shape.block_bytes)


def record(cfg: Config, executor: TorchExecutor, model: LoadedModel) -> None:
    """Record decode steps as CUDA graphs, if they are wanted and there is a device for them."""
    device = model.decoder.device
    if cfg.engine.cuda_graphs and device.type == "cuda":
        with memory_for("recording decode steps", "engine.cuda_graphs=false, or fewer kv.blocks"):
            executor.record(CudaGraphs(device), most=cfg.engine.max_seqs)
