"""What KV compression costs and saves: `python experiments/benchmarks/kv_compression.py [tiny] [quality] [speed]`.

Quality is the perplexity of a fixed text (`texts/harbour.txt`, written for this; text=FILE takes another) under
SmolLM2, read by the engine itself in chunks of one block. That gives what one token at a time would: a request gives
up KV only when a block is full. Tokens count from the position on at which every budget is in force. Beside it stand
the rate of decoding a few long prompts, and the most KV that one of them holds. budgets=128,256 tries those; out=DIR
takes the table (JSON) and the picture. Without `quality` or `speed` both are measured; one of them alone adds to
what the other left in out=DIR.

The weights of `tiny` are random: its perplexity says nothing, and only shows that the benchmark runs.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lab import plugins
from lab.config import Config, cache_dir
from lab.control.core import EngineCore
from lab.control.request import Prompt, Request
from lab.control.step import Limits
from lab.policy import CompressionPolicy
from real_engine.attention.backend import AttentionBackend, PackedBatch, PreparedAttention
from real_engine.attention.native_cpu import NativeAttention
from real_engine.attention.torch_cpu import TorchAttention
from real_engine.executor import TorchExecutor
from real_engine.models.loading import LoadedModel, load_model
from real_engine.models.spec import ModelSpec
from real_engine.native import library

TEXT = Path(__file__).parent / "texts" / "harbour.txt"
RULES = ("streaming_llm", "knorm", "tova")
BUDGETS = {"smollm2": (128, 256, 512), "tiny": (64, 256)}
PROMPTS, PROMPT, OUTPUT = 4, 1024, 64
SIZE = 16
CHUNK = 256

Row = dict[str, Any]


class Reading:
    """Stands before a decoder and has the logits of every row; passes on those that were asked for."""

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder
        self.logits: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)

    def forward(self, batch: PackedBatch, attention: PreparedAttention) -> Tensor:
        everything = dataclasses.replace(batch, sample_rows=np.arange(len(batch.token_ids)))
        logits: Tensor = self._decoder.forward(everything, attention)
        self.logits.append(logits)
        return logits[torch.from_numpy(batch.sample_rows)]


def core(executor: TorchExecutor, rule: str, budget: int, chunk: int) -> EngineCore:
    compression: CompressionPolicy = plugins.create("compression", rule, {"budget": budget} if budget else {})
    return EngineCore(
        plugins.create("policy", "fcfs"),
        plugins.create("eviction", "lru"),
        capacity=executor.capacity,
        limits=Limits(1024, 64, chunk),
        prefix_cache=False,
        compression=compression,
        compression_name=rule,
    )


def perplexity(
    model: LoadedModel, attention: AttentionBackend, ids: list[int], rule: str, budget: int, first: int
) -> float:
    """Of the tokens from position `first` on, each given what the rule kept of those before it."""
    reading = Reading(model.decoder)
    reader = dataclasses.replace(model, decoder=reading)  # type: ignore[arg-type]
    executor = TorchExecutor(reader, blocks=-(-len(ids) // SIZE) + 1, block_size=SIZE, attention=attention)
    engine = core(executor, rule, budget, SIZE)
    engine.add(Request(id="text", prompt=Prompt.of(ids), output_len=1), 0)
    total = 0.0
    while engine.has_work:
        plan = engine.plan(0)
        engine.commit(plan, executor.execute(plan), 0)
        start = plan.work[0].start
        known = reading.logits.pop().log_softmax(-1)
        for row in range(len(known)):
            if first <= start + row + 1 < len(ids):
                total -= float(known[row, ids[start + row + 1]])
    executor.close()
    return math.exp(total / (len(ids) - first))


def speed(model: LoadedModel, attention: AttentionBackend, ids: list[int], rule: str, budget: int) -> Row:
    """Output tokens a second while all prompts decode, by the median step and what compaction adds on average; the
    most KV of one request; compaction's share of the time."""
    length = min(PROMPT, len(ids) // 2, model.config.max_context - OUTPUT)
    blocks = PROMPTS * (-(-(length + OUTPUT) // SIZE))
    executor = TorchExecutor(model, blocks=blocks, block_size=SIZE, attention=attention)
    engine = core(executor, rule, budget, CHUNK)
    step = max(1, (len(ids) - length) // PROMPTS)
    for i in range(PROMPTS):
        prompt = Prompt.of(ids[i * step : i * step + length])
        engine.add(Request(id=f"r{i}", prompt=prompt, output_len=OUTPUT), 0)
    steps: list[float] = []
    compacting, held = 0.0, 0
    while engine.has_work:
        began = perf_counter()
        plan = engine.plan(0)
        result = executor.execute(plan)
        if plan.work and all(work.tokens == 1 for work in plan.work):
            held = max(held, max(-(-work.context // SIZE) for work in plan.work))
        engine.commit(plan, result, 0)
        took = perf_counter() - began
        if plan.tokens == len(plan.work) == PROMPTS:
            steps.append(took - result.compact_ns / 1e9)
            compacting += result.compact_ns / 1e9
    kv = held * executor.capacity.block_bytes
    executor.close()
    return {
        "tokens_per_s": PROMPTS / (median(steps) + compacting / len(steps)),
        "kv_mib": kv / (1 << 20),
        "compaction_pct": 100 / (1 + median(steps) * len(steps) / compacting) if compacting else 0.0,
    }


def load(name: str) -> tuple[LoadedModel, AttentionBackend]:
    cache = cache_dir(Config(), os.environ)
    dtype = "bfloat16" if name == "smollm2" else "float32"
    model = load_model(ModelSpec(name, dtype), cache_dir=cache, notify=print)
    kernels = library.load(cache, print)
    if kernels is None:
        return model, TorchAttention()
    if hasattr(model.decoder, "use"):
        model.decoder.use(kernels)
    return model, NativeAttention(kernels)


def encode(model: LoadedModel, path: Path) -> list[int]:
    text = path.read_text(encoding="utf-8")
    if model.path is None:
        ids = list(text.encode())
    else:
        ids = list(model.tokenizer().encode(" ".join(text.split())).ids)
    return ids[: model.config.max_context - 1]


def draw(rows: list[Row], path: Path, model: str) -> None:
    """Perplexity and rate over the budget, a line a rule; what no compression gives as a line across."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import pandas as pd
    import seaborn as sns

    frame = pd.DataFrame(rows)
    panels = [
        (column, label)
        for column, label in (
            ("perplexity", "perplexity (lower is better)"),
            ("tokens_per_s", f"output tokens/s, {PROMPTS} long prompts decoding"),
            ("kv_mib", "most KV of one request, MiB (the same for every rule)"),
        )
        if column in frame and frame[column].notna().all()
    ]
    sns.set_theme(style="whitegrid", palette="colorblind")
    figure, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 4), squeeze=False)
    plain, rest = frame[frame["rule"] == "none"], frame[frame["rule"] != "none"]
    for ax, (column, label) in zip(axes[0], panels, strict=True):
        sns.lineplot(rest, x="budget", y=column, hue="rule", style="rule", markers=True, dashes=False, ax=ax)
        ax.axhline(float(plain[column].iloc[0]), color="black", linestyle="--", linewidth=1, label="none")
        budgets = sorted(rest["budget"].unique())
        ax.set_xscale("log", base=2)
        ax.set_xticks(budgets, [str(budget) for budget in budgets])
        ax.minorticks_off()
        ax.set(xlabel="budget, tokens of KV", ylabel="", title=label)
        if column != "perplexity":
            ax.set_ylim(bottom=0)
        if ax is axes[0][0]:
            ax.legend(title="", loc="best")
        elif ax.get_legend() is not None:
            ax.get_legend().remove()
    figure.suptitle(f"KV compression at block granularity ({SIZE} tokens), {model}")
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def table(rows: list[Row]) -> str:
    columns = ("perplexity", "tokens_per_s", "kv_mib", "compaction_pct")
    lines = [
        f"{'rule':14} {'budget':>7} {'perplexity':>11} {'tokens/s':>9} {'KV MiB':>7} {'compaction %':>13}"
    ]
    for row in rows:
        cells = [f"{row[column]:.2f}" if row.get(column) is not None else "-" for column in columns]
        lines.append(
            f"{row['rule']:14} {row['budget'] or 'all':>7} {cells[0]:>11} {cells[1]:>9} {cells[2]:>7} {cells[3]:>13}"
        )
    return "\n".join(lines)


def main(words: Sequence[str]) -> None:
    given = dict(word.split("=", 1) for word in words if "=" in word)
    name = next((word for word in words if word in BUDGETS), "smollm2")
    parts = [word for word in words if word in ("quality", "speed")] or ["quality", "speed"]
    strange = [w for w in words if "=" not in w and w not in (*BUDGETS, "quality", "speed")]
    strange += [key for key in given if key not in ("budgets", "out", "text")]
    if strange:
        sys.exit(
            f"error: '{strange[0]}' isn't a word here; expected smollm2, tiny, quality, speed, budgets=, text=, out="
        )
    budgets = [int(n) for n in given["budgets"].split(",")] if "budgets" in given else list(BUDGETS[name])
    out = Path(given.get("out", "runs/kv_compression"))
    out.mkdir(parents=True, exist_ok=True)
    model, attention = load(name)
    ids = encode(model, Path(given.get("text", TEXT)))
    first = min(max(budgets) + SIZE, len(ids) // 2)
    rows: list[Row] = [{"rule": "none", "budget": 0}]
    rows += [{"rule": rule, "budget": budget} for budget in budgets for rule in RULES]
    kept = out / "kv_compression.json"
    if kept.exists():
        before = {(row["rule"], row["budget"]): row for row in json.loads(kept.read_text())}
        rows = [{**before.get((row["rule"], row["budget"]), {}), **row} for row in rows]
        if any(row.get("of") != [name, first] for row in rows):  # another model, or other tokens
            rows = [{"rule": row["rule"], "budget": row["budget"]} for row in rows]
    rows = [row | {"of": [name, first]} for row in rows]
    print(f"{name}: {len(ids)} tokens of text, perplexity from token {first} on; blocks of {SIZE} tokens")
    for row in rows:
        if "quality" in parts:
            row["perplexity"] = perplexity(model, attention, ids, row["rule"], row["budget"], first)
        if "speed" in parts:
            row |= speed(model, attention, ids, row["rule"], row["budget"])
    print(table(rows))
    kept.write_text(json.dumps(rows, indent=1) + "\n")
    draw(rows, out / "kv_compression.png", name)
    print(f"Table and picture: {kept} and {out / 'kv_compression.png'}")


if __name__ == "__main__":
    main(sys.argv[1:])
