"""What products of 8 bits cost in accuracy: `python experiments/benchmarks/quantization.py [text=FILE]`.

SmolLM2 reads a fixed text (`texts/harbour.txt`, written for this project) through the engine, in float32, in bfloat16
and with `model.quantization=int8`. Of each: the perplexity; how often its likeliest next token is that of float32 and
of bfloat16; the mean KL divergence from float32, in nats. Then each continues passages of the text greedily: the share
of tokens, and of whole continuations, that bfloat16 gives too. What int8 gains in speed, engine.py says.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from kv_compression import TEXT, Reading  # beside this file
from torch import Tensor

from lab import plugins
from lab.cli import guarded
from lab.config import Config, cache_dir
from lab.control.core import EngineCore
from lab.control.request import Prompt, Request
from lab.control.step import Limits
from lab.errors import ModelError
from real_engine.attention.backend import AttentionBackend
from real_engine.attention.native_cpu import NativeAttention
from real_engine.attention.torch_cpu import TorchAttention
from real_engine.executor import TorchExecutor
from real_engine.models.decoder import Decoder
from real_engine.models.loading import LoadedModel, load_model
from real_engine.models.spec import ModelSpec
from real_engine.native import library

PASSAGES, PROMPT, OUTPUT = 32, 48, 32
FORMS = ("float32", "bfloat16", "int8")


def load(form: str) -> tuple[LoadedModel, AttentionBackend]:
    """SmolLM2 in one of the forms, with the attention that belongs to it."""
    cache = cache_dir(Config(), os.environ)
    model = load_model(ModelSpec("smollm2", "float32" if form == "float32" else "bfloat16"), cache_dir=cache)
    kernels = library.load(cache, print)
    if kernels is None or not kernels.has_products:
        if form == "int8":
            raise ModelError("products of 8 bits need a compiler and a processor that multiplies them")
        return model, TorchAttention()
    assert isinstance(model.decoder, Decoder)
    with torch.inference_mode():
        model.decoder.use(kernels, int8=form == "int8")
    return model, NativeAttention(kernels)


def serve(
    model: LoadedModel, attention: AttentionBackend, requests: Sequence[Request]
) -> dict[str, list[int]]:
    """All of them at once; the tokens of each."""
    executor = TorchExecutor(model, blocks=1024, attention=attention)
    policy, eviction = plugins.create("policy", "fcfs"), plugins.create("eviction", "lru")
    core = EngineCore(
        policy, eviction, capacity=executor.capacity, limits=Limits(512, 64), prefix_cache=False
    )
    for request in requests:
        core.add(request, 0)
    tokens: dict[str, list[int]] = {request.id: [] for request in requests}
    while core.has_work:
        plan = core.plan(0)
        for emission in core.commit(plan, executor.execute(plan), 0):
            tokens[emission.request].append(emission.token)
    executor.close()
    return tokens


def read(model: LoadedModel, attention: AttentionBackend, ids: list[int]) -> Tensor:
    """Log-probabilities of the next token after each one: float32 `[tokens, vocab]`."""
    reading = Reading(model.decoder)
    reader = dataclasses.replace(model, decoder=reading)  # type: ignore[arg-type]
    serve(reader, attention, [Request(id="text", prompt=Prompt.of(ids), output_len=1)])
    return torch.cat(reading.logits)[: len(ids)].log_softmax(-1)


def main(words: Sequence[str]) -> None:
    """Print the table."""
    path = next((Path(word.removeprefix("text=")) for word in words if word.startswith("text=")), TEXT)
    known: dict[str, Tensor] = {}
    continued: dict[str, dict[str, list[int]]] = {}
    for form in FORMS:
        model, attention = load(form)
        ids = model.tokenizer().encode(path.read_text(encoding="utf-8")).ids[:2048]
        known[form] = read(model, attention, ids)
        starts = np.linspace(0, len(ids) - PROMPT, PASSAGES).astype(int)
        passages = [
            Request(id=str(start), prompt=Prompt.of(ids[start : start + PROMPT]), output_len=OUTPUT)
            for start in starts.tolist()
        ]
        continued[form] = serve(model, attention, passages)
    print(f"{len(ids)} tokens of {path.name}; {PASSAGES} greedy continuations of {OUTPUT} tokens")
    print("form      perplexity  top-1 as float32  as bfloat16  KL from float32  tokens as bfloat16  whole")
    following = torch.tensor(ids[1:]).unsqueeze(1)
    best = {form: values.argmax(-1) for form, values in known.items()}
    for form, values in known.items():
        perplexity = float(values[:-1].gather(1, following).mean().neg().exp())
        as_exact, as_half = (float((best[form] == best[to]).float().mean()) for to in ("float32", "bfloat16"))
        exact = known["float32"]
        divergence = float((exact.exp() * (exact - values)).sum(-1).mean())
        pairs = [(tokens, continued["bfloat16"][name]) for name, tokens in continued[form].items()]
        same = np.mean([a == b for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True)])
        whole = np.mean([ours == theirs for ours, theirs in pairs])
        print(
            f"{form:<9} {perplexity:>10.3f} {100 * as_exact:>15.1f} % {100 * as_half:>10.1f} % {divergence:>16.5f}"
            f" {100 * same:>17.1f} % {100 * whole:>4.0f} %"
        )


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(sys.argv[1:])))
