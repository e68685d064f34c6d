"""How fast the real engine is: `python experiments/benchmarks/engine.py [W1 ...] [lists=FILE] [torch] [int8]
[openvino=VENV] [vllm=VENV]`.

Four workloads, all submitted at once, greedy, EOS ignored: W1 64 requests of 32-256 prompt and 32-128 output tokens;
W2 32 of 32 and 256; W3 32 of 512 and 16; W4 64 sharing a prefix of 256, with 32 of their own, and 32. Prompts are
random ids (seed 0), or the token lists of a JSON file (plain or gzip), {"W1": [{"prompt": [...], "max_tokens": n}]}.

Marks stand beside the measured rate, all taken in the same session. The *floor*: what the matrix products alone of the
very same steps would take with torch's best (oneDNN, packed weights, bfloat16), at the pace measured for each number of
rows. With `torch`, the same engine on plain torch (gather and SDPA, oneDNN) instead of its own kernels; with `int8`, on
products of 8 bits. And other engines on the same weights and token lists, each from a virtual environment of its own
(experiments/benchmarks/peers.py says what it needs). With `device=cuda` none: the engine as it opens there.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import peers  # beside this file
import torch
from torch import Tensor

from lab.assembly import EngineSpec, assemble
from lab.cli import guarded
from lab.config import Config, EngineConfig, KvConfig, ModelConfig, cache_dir
from lab.console import Console
from lab.control.request import Prompt, Request
from lab.control.step import Limits
from lab.errors import ModelError
from lab.observe.recorder import Recorder
from real_engine.attention.native_cpu import NativeAttention
from real_engine.attention.torch_cpu import TorchAttention
from real_engine.backend import open_backend
from real_engine.driver import SteppedRun
from real_engine.executor import TorchExecutor
from real_engine.models.config import DecoderConfig
from real_engine.models.decoder import Decoder
from real_engine.models.linear import Linear
from real_engine.models.loading import LoadedModel, load_model
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


@dataclass(frozen=True)
class Variant:
    """Our engine, loaded and ready in one of its forms."""

    name: str
    model: LoadedModel
    attention: NativeAttention | TorchAttention

    @classmethod
    def load(cls, name: str, notify: Callable[[str], None]) -> Variant:
        cache = cache_dir(Config(), os.environ)
        model = load_model(ModelSpec("smollm2", "bfloat16"), cache_dir=cache, notify=notify)
        if name == "torch":
            return cls(name, model, TorchAttention())
        kernels = library.load(cache, notify)
        if kernels is None or (name == "int8" and not kernels.has_products):
            raise ModelError(
                f"the variant '{name}' needs a compiler, and for int8 a processor that multiplies it"
            )
        assert isinstance(model.decoder, Decoder)
        with torch.inference_mode():
            model.decoder.use(kernels, int8=name == "int8")
        return cls(name, model, NativeAttention(kernels))

    def run(self, requests: Sequence[Request]) -> Result:
        """Serve a workload from a cold cache, by the wall clock, control plane and recording included."""
        executor = TorchExecutor(self.model, blocks=BLOCKS, attention=self.attention)
        result = serve(executor, requests)
        executor.close()
        return result


def serve(executor: TorchExecutor, requests: Sequence[Request]) -> Result:
    """As `Variant.run`, on an executor that is kept."""
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
    """Seconds of a step's matrix products alone with torch's best, measured once for each number of rows."""

    def __init__(self, config: DecoderConfig) -> None:
        """Random weights of the model's shapes: what they hold makes no difference."""
        c = config
        heads, inner = c.heads * c.head_dim, c.intermediate_size
        qkv = (heads + 2 * c.kv_heads * c.head_dim, c.hidden_size)
        layer = [qkv, (c.hidden_size, heads), (2 * inner, c.hidden_size), (c.hidden_size, inner)]
        self._products = [(Linear(_drawn(*shape)), shape[1]) for _ in range(c.layers) for shape in layer]
        self._head_product = [(Linear(_drawn(c.vocab_size, c.hidden_size)), c.hidden_size)]
        self.layers = cache(lambda rows: _time(self._products, rows))
        self.head = cache(lambda rows: _time(self._head_product, rows) if rows else 0.0)

    def of(self, rows: list[tuple[int, int]]) -> float:
        return sum(
            self.layers(_near(a)) * a / _near(a) + self.head(_near(b)) * b / _near(b) for a, b in rows if a
        )


def _drawn(*shape: int) -> Tensor:
    return torch.randn(shape).to(torch.bfloat16)


def _near(rows: int) -> int:
    """Row counts are measured in steps of an eighth."""
    step = max(1, 1 << max(rows.bit_length() - 4, 0))
    return max(1, -(-rows // step) * step)


def _time(linears: list[tuple[Linear, int]], rows: int) -> float:
    inputs = {width: _drawn(rows, width) for _, width in linears}
    best = float("inf")
    with torch.inference_mode():
        for _ in range(6):
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
    path = next((Path(word.removeprefix("lists=")) for word in words if word.startswith("lists=")), None)
    given = dict(word.split("=", 1) for word in words if "=" in word)
    if "device" in given:
        chosen = [word for word in words if word.startswith("W")]
        on_device(given["device"], given.get("model", "smollm2"), path, chosen)
        return
    wanted = {
        name: requests
        for name, requests in workloads(path).items()
        if name in words or not any(word.startswith("W") for word in words)
    }
    variants = [Variant.load("native", print)]
    variants[0].run([Request(id="first", prompt=Prompt.of(range(100, 132)), output_len=1)])
    print(
        f"{torch.get_num_threads()} threads, torch {torch.__version__}; first token {_age():.1f} s after the start"
    )
    results = {("native", name): variants[0].run(requests) for name, requests in wanted.items()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)
    print(f"peak memory {peak:.2f} GiB")
    for variant in ("int8", "torch"):
        if variant in words:
            other = Variant.load(variant, print)
            results |= {(variant, name): other.run(requests) for name, requests in wanted.items()}
    config = variants[0].model.config
    assert isinstance(config, DecoderConfig)
    floor = Floor(config)
    print("workload  engine    output tok/s  seconds  native / it  share of the floor's rate")
    for (variant, name), result in results.items():
        ours = results["native", name]
        share = floor.of(result.rows) / result.seconds
        _line(name, variant, result.output_tokens, result.seconds, ours, f"{100 * share:.0f} %")
    for peer in peers.PEERS:
        if peer in given:
            for name, tokens, seconds in peers.measure(
                peer, Path(given[peer]), variants[0].model.path, wanted
            ):
                _line(name, peer, tokens, seconds, results["native", name])


def _line(name: str, engine: str, tokens: int, seconds: float, ours: Result, share: str = "") -> None:
    rate = tokens / seconds
    ratio = ours.output_tokens / ours.seconds / rate
    print(f"{name:<9} {engine:<9} {rate:>12.1f} {seconds:>8.2f} {ratio:>12.2f}  {share}", flush=True)


def _age() -> float:
    """Seconds since this process was started, imports included."""
    started = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(sys.argv[1:])))
