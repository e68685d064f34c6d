"""The real engine as a backend: model, threads, KV memory, clock. Data plane."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from lab import ranks
from lab.assembly import ControlPlane
from lab.backend import Backend, Drive, Progress
from lab.config import SEAMS, Config, cache_dir
from lab.console import Console
from lab.control.executor import Capacity
from lab.control.request import Request
from lab.errors import ModelError, ReplayError
from lab.observe.recorder import Recorded
from real_engine.driver import SteppedRun
from real_engine.online import OnlineRun
from real_engine.replay import ReplayRun

if TYPE_CHECKING:
    from real_engine.attention.backend import AttentionBackend
    from real_engine.executor import TorchExecutor
    from real_engine.models.loading import LoadedModel
    from real_engine.models.spec import ModelSpec
    from real_engine.parallel.group import RankShard


class RealBackend:
    """Implements `lab.backend.Backend`."""

    name: Literal["real"] = "real"
    evidence: Literal["measured"] = "measured"

    def __init__(
        self,
        executor: Any,
        about: Mapping[str, Any],
        stop_ids: tuple[int, ...],
        *,
        online: bool = False,
        recorded: Recorded | None = None,
    ) -> None:
        self.executor, self.stop_ids = executor, stop_ids
        self.capacity: Capacity = executor.capacity
        self.about = about
        self._recorded = recorded
        self.clock: Literal["stepped", "wall"] = "wall" if online else "stepped"

    def drive(self, control: ControlPlane, requests: Sequence[Request], progress: Progress) -> Drive:
        if self._recorded is not None:
            steps, records = self._recorded.steps, self._recorded.requests
            return ReplayRun(steps, records, self.executor, control.observer, control.core, progress)
        run = OnlineRun if self.clock == "wall" else SteppedRun
        return run(control, self.executor, requests, progress)

    def close(self) -> None:
        self.executor.close()


def open_backend(cfg: Config, console: Console, beside: Backend | None) -> RealBackend:
    """Load the model and make room for its KV cache. Raises `ModelError`, `ExecutorError`."""
    if find_spec("torch") is None:
        raise ModelError(
            "the real engine needs torch, which isn't installed: pip install 'diptych[engine]' (or backend=sim)"
        )
    from real_engine.parallel.executor import open_ranks

    executor = open_ranks(cfg, console) if ranks.world(cfg) > 1 else build(cfg, console)
    model = executor.model
    if cfg.sampling.stop:
        model.tokenizer()  # now rather than when the first request comes
    if cfg.compression.name != SEAMS["compression"] and any(rule.window for rule in model.config.attention):
        raise ModelError(
            f"compression={cfg.compression.name} can't shorten the KV of '{cfg.model.name}', which attends within a "
            "window of so many tokens: they can't be counted where some are gone; expected compression=none"
        )
    online, recorded, about = cfg.engine.mode == "online", None, dict(executor.about)
    if cfg.engine.mode == "replay":
        recorded, name = _recorded(cfg, model)
        about["recorded"] = name
    return RealBackend(executor, about, model.config.eos_token_ids, online=online, recorded=recorded)


def build(cfg: Config, console: Console, shard: RankShard | None = None) -> TorchExecutor:
    """The executor of this process: of a whole model, or of the part that `shard` says."""
    from real_engine import cuda
    from real_engine.executor import TorchExecutor
    from real_engine.models.loading import load_model
    from real_engine.models.shard import ALONE
    from real_engine.parallel.rank import RankExecutor

    model = load_model(
        model_spec(cfg), cache_dir=cache_dir(cfg, os.environ), notify=console.say, shard=shard or ALONE
    )
    attention = _attention(cfg, model, console)
    blocks = cuda.blocks(cfg, model, attention)
    executor = (TorchExecutor if shard is None else RankExecutor)(
        model,
        attention=attention,
        blocks=blocks if shard is None else shard.least(blocks),
        block_size=cfg.kv.block_size,
        host_blocks=cfg.kv.host_blocks,
        transfer_gb_s=cfg.kv.transfer_gb_s,
    )
    if shard is None:  # exchanges between ranks aren't recorded
        cuda.record(cfg, executor, model)
    return executor


def model_spec(cfg: Config) -> ModelSpec:
    """What the configuration says of the model. Raises `ExecutorError` for a device that isn't there."""
    from real_engine.device import choose
    from real_engine.models.spec import ModelSpec

    where = choose(cfg.engine.device).type
    return ModelSpec(cfg.model.name, cfg.model.dtype, seed=cfg.seed, threads=cfg.engine.threads, device=where)


def _recorded(cfg: Config, model: LoadedModel) -> tuple[Recorded, str]:
    """The run to execute again and its name, if this model can. Raises `ReplayError`."""
    from lab.analysis.runs import load

    run = load(cfg.engine.replay or "")
    found = run.recorded()
    longest = max((len(r.prompt) + r.output_limit for s in found.steps for r in s.plan.new), default=0)
    if longest > model.config.max_context:
        raise ReplayError(
            f"run '{run.path}' has a request of {longest} tokens, prompt and output; the longest context of "
            f"'{cfg.model.name}' is {model.config.max_context}"
        )
    return found, run.path.name


def _attention(cfg: Config, model: LoadedModel, console: Console) -> AttentionBackend:
    """Our own kernels where they can be built, suit the model and agree with plain torch; else plain torch."""
    import torch

    from real_engine import cuda
    from real_engine.attention.native_cpu import NativeAttention, agrees
    from real_engine.attention.torch_cpu import TorchAttention
    from real_engine.kv_memory import KvShape
    from real_engine.models.config import PLAIN
    from real_engine.models.decoder import Decoder
    from real_engine.native import library

    int8 = cfg.model.quantization == "int8"
    if cfg.engine.attention == "torch":
        return TorchAttention()
    if int8 and model.decoder.device.type != "cpu":
        raise ModelError(f"model.quantization=int8 needs engine.device=cpu; this is '{model.decoder.device}'")
    if model.decoder.device.type != "cpu" or cfg.engine.attention == "flash":
        return cuda.attention(cfg, model, console)
    shape = KvShape.of(model.config, model.dtype, cfg.kv.block_size)
    lacking, why = model.config.needs - NativeAttention.abilities, ""
    if lacking:
        why = f"our own kernels don't compute its {' and its '.join(sorted(lacking))}"
    elif not NativeAttention.suits(shape):
        why = f"its head size is {shape.head_dim}; expected a multiple of {library.LANES}"
    rules = () if why else model.config.attention or (PLAIN,)
    kernels = library.load(cache_dir(cfg, os.environ), console.say)
    agreed = kernels is not None and agrees(kernels, shape, model.config.heads, rules)
    if kernels is not None and agreed:
        if isinstance(model.decoder, Decoder):
            with torch.inference_mode():
                model.decoder.use(kernels, int8=int8)
    elif kernels is not None:
        why = "on this processor they don't agree with plain torch"
        console.say(f"The CPU kernels aren't used: {why}.")
    if int8 and not model.quantized:
        lacks = "this processor, or this model's shape, has no products of 8 bits"
        raise ModelError(f"model.quantization=int8 can't run '{cfg.model.name}' here: {lacks}")
    if kernels is not None and agreed:
        if not why:
            return NativeAttention(kernels)
        console.say(f"Attention of '{cfg.model.name}' runs on plain torch: {why}.")
    why = why or "see above"
    if cfg.engine.attention == "native":
        raise ModelError(f"engine.attention=native can't run '{cfg.model.name}' here: {why}")
    return TorchAttention()
