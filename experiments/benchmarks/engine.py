"""How fast the real engine is: `python experiments/benchmarks/engine.py [W1 ...] [lists=FILE] [torch]`.

Four workloads, all submitted at once, greedy, EOS ignored: W1 64 requests of 32-256 prompt and 32-128 output tokens;
W2 32 of 32 and 256; W3 32 of 512 and 16; W4 64 sharing a prefix of 256, with 32 of their own, and 32. Prompts are
random ids (seed 0), or the token lists of a JSON file (plain or gzip), {"W1": [{"prompt": [...], "max_tokens": n}]}.

Two marks stand beside the measured rate, both taken in the same process: the *floor*, what the matrix products alone
of the very same steps would take at the pace measured for each number of rows; and, with `torch`, the same engine on
plain torch (gather and SDPA) instead of its own kernels. With `device=cuda` neither: the engine as it opens there.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from lab.assembly import EngineSpec, assemble
from lab.cli import guarded
from lab.config import Config, EngineConfig, KvConfig, ModelConfig, cache_dir
from lab.console import Console
from lab.control.request import Prompt, Request
from lab.control.step import Limits
from lab.observe.recorder import Recorder
from real_engine.attention.native_cpu import NativeAttention
from real_engine.attention.torch_cpu import TorchAttention
from real_engine.backend import open_backend
from real_engine.driver import SteppedRun
from real_engine.executor import TorchExecutor
from real_engine.models.decoder import Decoder
from real_engine.models.linear import Linear
from real_engine.models.loading import LoadedModel, load_model
from real_engine.models.ops import TorchOps
from real_engine.models.spec import ModelSpec
from real_engine.native import library

LIMITS = Limits(token_budget=512, max_seqs=64)
BLOCKS = 2048


@dataclass(frozen=True)
class Result:
    """One workload on one variant."""

    seconds: float
    output_tokens: int
    rows: list[tuple[int, int]]
    """Of each step: rows through the layers, rows through the head."""


def workloads(path: Path | None) -> dict[str, list[Request]]:
    """The four, from a file or made up."""
    if path is not None:
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt") as file:
            lists = json.load(file)
    else:
        rng = random.Random(0)

        def ids(count: int) -> list[int]:
            return [rng.randrange(1000, 40_000) for _ in range(count)]

        shared = ids(256)
        lists = {
            "W1": [
                {"prompt": ids(rng.randint(32, 256)), "max_tokens": rng.randint(32, 128)} for _ in range(64)
            ],
            "W2": [{"prompt": ids(32), "max_tokens": 256} for _ in range(32)],
            "W3": [{"prompt": ids(512), "max_tokens": 16} for _ in range(32)],
            "W4": [{"prompt": [*shared, *ids(32)], "max_tokens": 32} for _ in range(64)],
        }
    return {
        name: [
            Request(id=f"{name}-{n:03}", prompt=Prompt.of(item["prompt"]), output_len=item["max_tokens"])
            for n, item in enumerate(items)
        ]
        for name, items in lists.items()
    }


def run(
    model: LoadedModel, attention: NativeAttention | TorchAttention, requests: Sequence[Request]
) -> Result:
    """Serve a workload from a cold cache, by the wall clock, control plane and recording included."""
    executor = TorchExecutor(model, blocks=BLOCKS, attention=attention)
    result = serve(executor, requests)
    executor.close()
    return result


def serve(executor: TorchExecutor, requests: Sequence[Request]) -> Result:
    """As `run`, on an executor that is kept."""
    recorder = Recorder()
    spec = EngineSpec({"policy": {"name": "fcfs"}}, LIMITS, True, 0)
    control = assemble(spec, executor.capacity, recorder, requests)
    began = time.perf_counter()
    SteppedRun(control, executor, requests).run()
    seconds = time.perf_counter() - began
    assert all(record.outcome == "finished" for record in recorder.requests)
    plans = [step.plan for step in recorder.steps]
    rows = [(plan.tokens, sum(work.samples for work in plan.work)) for plan in plans]
    return Result(seconds, sum(len(record.output) for record in recorder.requests), rows)


class Floor:
    """Seconds of a step's matrix products alone, measured once for each number of rows."""

    def __init__(self, decoder: Decoder) -> None:
        layers = decoder._layers
        self._linears = [x for layer in layers for x in (layer.qkv, layer.output, layer.gate_up, layer.down)]
        self._head, self._dtype, self._hidden = decoder._head, decoder.dtype, decoder.config.hidden_size
        config = decoder.config
        wide = (
            config.hidden_size,
            config.heads * config.head_dim,
            config.hidden_size,
            config.intermediate_size,
        )
        self._inputs = [wide[i % 4] for i in range(len(self._linears))]
        self.layers, self.head = cache(self._layers_at), cache(self._head_at)

    def of(self, rows: list[tuple[int, int]]) -> float:
        return sum(
            self.layers(_near(a)) * a / _near(a) + self.head(_near(b)) * b / _near(b) for a, b in rows if a
        )

    def _layers_at(self, rows: int) -> float:
        return _time(list(zip(self._linears, self._inputs, strict=True)), rows, self._dtype)

    def _head_at(self, rows: int) -> float:
        return _time([(self._head, self._hidden)], rows, self._dtype) if rows else 0.0


def _near(rows: int) -> int:
    """Row counts are measured in steps of an eighth."""
    step = max(1, 1 << max(rows.bit_length() - 4, 0))
    return max(1, -(-rows // step) * step)


def _time(linears: list[tuple[Linear, int]], rows: int, dtype: torch.dtype) -> float:
    inputs = {width: torch.randn(rows, width).to(dtype) for _, width in linears}
    best = float("inf")
    with torch.inference_mode():
        for _ in range(4):
            began = time.perf_counter()
            for linear, width in linears:
                linear(inputs[width])
            best = min(best, time.perf_counter() - began)
    return best


def on_device(device: str, name: str, path: Path | None, chosen: Sequence[str]) -> None:
    """The workloads on the engine as `engine.device` opens it: its attention, its graphs, the size of its cache. The
    floor of matrix products is the CPU's mark and isn't shown."""
    cfg = Config(
        model=ModelConfig(name),
        engine=EngineConfig(device=device, token_budget=LIMITS.token_budget, max_seqs=LIMITS.max_seqs),
        kv=KvConfig(block_size=256),
    )
    backend = open_backend(cfg, Console(), None)
    print(", ".join(f"{key} {value}" for key, value in backend.about.items()))
    print("workload  output tok/s  seconds  (the second time: a first pass warms up)")
    for workload, requests in workloads(path).items():
        if not chosen or workload in chosen:
            for _ in range(2):
                result = serve(backend.executor, requests)
            print(
                f"{workload:<9} {result.output_tokens / result.seconds:>12.1f} {result.seconds:>8.2f}",
                flush=True,
            )
    backend.close()


def main(words: Sequence[str]) -> None:
    """Print the table."""
    began = time.perf_counter()
    path = next((Path(word.removeprefix("lists=")) for word in words if word.startswith("lists=")), None)
    given = dict(word.split("=", 1) for word in words if "=" in word)
    if "device" in given:
        chosen = [word for word in words if word.startswith("W")]
        on_device(given["device"], given.get("model", "smollm2"), path, chosen)
        return
    model = load_model(
        ModelSpec("smollm2", "bfloat16"), cache_dir=cache_dir(Config(), os.environ), notify=print
    )
    kernels = library.load(cache_dir(Config(), os.environ), print)
    plain = (
        load_model(ModelSpec("smollm2", "bfloat16"), cache_dir=cache_dir(Config(), os.environ))
        if kernels
        else model
    )
    with torch.inference_mode():
        if kernels:
            model.decoder.use(kernels)
    ready = time.perf_counter() - began
    variants = {"torch": (TorchAttention(), TorchOps())} if "torch" in words or kernels is None else {}
    if kernels is not None:
        variants = {"native": (NativeAttention(kernels), kernels), **variants}  # type: ignore[dict-item]
    floor = Floor(plain.decoder)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}; model ready after {ready:.1f} s")
    print("workload  variant  output tok/s  seconds  share of the floor's rate")
    for name, requests in workloads(path).items():
        if any(word.startswith("W") for word in words) and name not in words:
            continue
        for variant, (attention, _ops) in variants.items():
            result = run(model if variant == "native" else plain, attention, requests)
            rate, share = result.output_tokens / result.seconds, floor.of(result.rows) / result.seconds
            print(
                f"{name:<9} {variant:<8} {rate:>12.1f} {result.seconds:>8.2f} {100 * share:>6.0f} %",
                flush=True,
            )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)
    print(f"peak memory {peak:.2f} GB")


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(sys.argv[1:])))
