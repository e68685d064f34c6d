"""KV compression on the real engine, against a model in a few lines that keeps its keys and values as lists."""

from __future__ import annotations

import dataclasses
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from lab.control.core import EngineCore
from lab.control.plan import Compaction, StepPlan
from lab.control.request import Prompt, Request
from lab.control.step import Limits
from lab.errors import ExecutorError
from lab.policy import CompressionPolicy
from policies.compression.knorm import KeyNorm
from policies.compression.streaming_llm import StreamingLlm
from policies.compression.tova import Tova
from policies.eviction.lru import Lru
from policies.preemption.last import Last
from policies.scheduling.fcfs import Fcfs
from real_engine.attention.backend import AttentionBackend
from real_engine.attention.native_cpu import NativeAttention
from real_engine.attention.torch_cpu import TorchAttention
from real_engine.compression import Compressor
from real_engine.executor import TorchExecutor
from real_engine.kv_memory import KvMemory, KvShape
from real_engine.models.config import AttentionRule
from real_engine.models.loading import LoadedModel, load_model
from real_engine.models.spec import ModelSpec
from real_engine.models.tiny import CONFIG, tiny_weights
from real_engine.native.library import load

SIZE = 4
RULES = {"streaming_llm": StreamingLlm, "knorm": KeyNorm, "tova": Tova}


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    return load_model(ModelSpec("tiny", "float32"), cache_dir=Path("unused"))


class Lists:
    """The model `tiny`, one token at a time. Per layer: blocks, each a list of (key, value) of one token."""

    def __init__(self) -> None:
        self.w = tiny_weights(0)
        self.layers = CONFIG["num_hidden_layers"]
        self.begin()

    def begin(self) -> None:
        self.blocks: list[list[list[tuple[Tensor, Tensor]]]] = [[] for _ in range(self.layers)]
        self.query: list[Tensor] = []

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean() + 1e-5).sqrt() * self.w[name]

    def turn(self, x: Tensor, position: int) -> Tensor:
        angles = position / 10_000 ** (torch.arange(0, 16, 2) / 16)
        cos, sin = angles.cos(), angles.sin()
        a, b = x[:, :8], x[:, 8:]
        return torch.cat((a * cos - b * sin, b * cos + a * sin), 1)

    def token(self, token: int, position: int) -> Tensor:
        """Logits after one token, which sees what is kept and itself."""
        x = self.w["model.embed_tokens.weight"][token]
        self.query = []
        for i in range(self.layers):
            p, blocks = f"model.layers.{i}", self.blocks[i]
            h = self.norm(x, f"{p}.input_layernorm.weight")
            q, k, v = ((self.w[f"{p}.self_attn.{n}_proj.weight"] @ h).view(-1, 16) for n in ("q", "k", "v"))
            q, k = self.turn(q, position), self.turn(k, position)
            if not blocks or len(blocks[-1]) == SIZE:
                blocks.append([])
            blocks[-1].append((k, v))
            self.query.append(q)
            weights = self.weights(i)  # [heads, tokens]
            values = torch.stack([v for block in blocks for _, v in block]).repeat_interleave(2, 1)
            attended = torch.einsum("ht,thd->hd", weights, values).flatten()
            x = x + self.w[f"{p}.self_attn.o_proj.weight"] @ attended
            h = self.norm(x, f"{p}.post_attention_layernorm.weight")
            gate, up = (self.w[f"{p}.mlp.{n}_proj.weight"] @ h for n in ("gate", "up"))
            x = x + self.w[f"{p}.mlp.down_proj.weight"] @ (F.silu(gate) * up)
        return self.w["lm_head.weight"] @ self.norm(x, "model.norm.weight")

    def weights(self, layer: int) -> Tensor:
        keys = torch.stack([k for block in self.blocks[layer] for k, _ in block]).repeat_interleave(2, 1)
        return (torch.einsum("hd,thd->ht", self.query[layer], keys) / math.sqrt(16)).softmax(-1)

    def drop(self, rule: str, count: int, sinks: int, recent: int) -> None:
        """One block after another, the worst first."""
        for layer in range(self.layers):
            blocks = self.blocks[layer]
            weights, worth = self.weights(layer).mean(0).tolist(), {}
            at = 0
            for block in blocks:
                norms = [float(k.norm(dim=1).mean()) for k, _ in block]
                worth[id(block)] = -sum(norms) if rule == "knorm" else sum(weights[at : at + len(block)])
                at += len(block)
            full = [block for block in blocks if len(block) == SIZE]
            candidates = full[sinks : len(full) - recent]
            if rule != "streaming_llm":
                candidates.sort(key=lambda block: worth[id(block)])
            gone = {id(block) for block in candidates[:count]}
            self.blocks[layer] = [block for block in blocks if id(block) not in gone]


def requests(count: int = 5, seed: int = 0, longest: int = 60) -> list[Request]:
    rng = random.Random(seed)
    return [
        Request(
            id=f"r{i}",
            prompt=Prompt.of(rng.randrange(512) for _ in range(rng.randint(3, longest))),
            output_len=rng.randint(5, 30),
        )
        for i in range(count)
    ]


def attention(name: str, cache: Path) -> AttentionBackend:
    if name == "torch":
        return TorchAttention()
    kernels = load(cache)
    if kernels is None:
        pytest.skip("no C++ compiler here")
    return NativeAttention(kernels)


def serve(
    model: LoadedModel,
    asked: list[Request],
    compression: CompressionPolicy | None,
    name: str = "",
    *,
    blocks: int = 400,
    how: str = "recompute",
    backend: AttentionBackend | None = None,
) -> tuple[list[StepPlan], list[dict[str, Tensor]], dict[str, list[int]]]:
    """Plans, the logits of each step, and the tokens of each request."""
    executor = TorchExecutor(
        model, blocks=blocks, block_size=SIZE, host_blocks=40, attention=backend, keep_logits=True
    )
    core = EngineCore(
        Fcfs(),
        Lru(),
        capacity=executor.capacity,
        limits=Limits(32, 4, 24),
        prefix_cache=False,
        preemption=Last(how),  # type: ignore[arg-type]
        compression=compression,
        compression_name=name,
    )
    for request in asked:
        core.add(request, 0)
    plans, logits = [], []
    tokens: dict[str, list[int]] = {request.id: [] for request in asked}
    while core.has_work:
        plan = core.plan(0)
        for emission in core.commit(plan, executor.execute(plan), 0):
            tokens[emission.request].append(emission.token)
        core.check()
        plans.append(plan)
        logits.append(dict(executor.logits))
    assert core.pool.held == 0
    return plans, logits, tokens


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("how", ["ample", "recompute", "swap"])
@pytest.mark.parametrize("rule", list(RULES))
def test_logits_are_those_of_dense_attention_over_what_each_layer_kept(
    rule: str, how: str, backend: str, tiny: LoadedModel, tmp_path_factory: pytest.TempPathFactory
) -> None:
    options: dict[str, int] = {"sinks": 4} if rule == "streaming_llm" else {"sinks": 4, "recent": 5}
    if how == "recompute":
        options = {"sinks": 0}
    asked = requests()
    plans, logits, tokens = serve(
        tiny,
        asked,
        RULES[rule](16, **options),  # type: ignore[arg-type]
        rule,
        blocks=400 if how == "ample" else 17,
        how=how if how != "ample" else "recompute",
        backend=attention(backend, tmp_path_factory.getbasetemp() / "kernels"),
    )
    assert sum(len(plan.compactions) for plan in plans) > 10
    assert any(len(c.blocks) > 2 for plan in plans for c in plan.compactions)
    texts = {r.id: [*r.prompt.token_ids(512), *tokens[r.id]] for r in asked}
    models = {r.id: Lists() for r in asked}
    kept_less: dict[str, int] = dict.fromkeys(models, 0)
    interrupted = 0
    for plan, found in zip(plans, logits, strict=True):
        for name, word in plan.preempted:
            interrupted += kept_less[name] > 0 and word == how
            if word == "recompute":
                models[name].begin()
                kept_less[name] = 0
        for work in plan.work:
            model, last = models[work.request], torch.zeros(0)
            for position in range(work.start, work.start + work.tokens):
                last = model.token(texts[work.request][position], position)
            if work.samples:
                torch.testing.assert_close(found[work.request], last, atol=2e-4, rtol=1e-3)
        for item in plan.compactions:
            models[item.request].drop(rule, len(item.blocks), item.sinks, item.recent)
            kept_less[item.request] += item.tokens
    assert (interrupted > 0) == (how != "ample"), "no compressed request was preempted: the case tests less"


@pytest.mark.parametrize("rule", list(RULES))
def test_a_budget_beyond_the_context_changes_nothing_at_all(rule: str, tiny: LoadedModel) -> None:
    asked = requests(seed=1)
    plain = serve(tiny, asked, None)
    within = serve(tiny, asked, RULES[rule](100), rule)
    assert [p.digest for p in plain[0]] == [p.digest for p in within[0]]
    for ours, theirs in zip(plain[1], within[1], strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_rules_differ_and_so_do_the_layers(tiny: LoadedModel) -> None:
    asked = requests(seed=2)
    told = [serve(tiny, asked, kind(16), name)[2] for name, kind in RULES.items()]
    assert told[0] != told[1]
    assert told[1] != told[2]


def test_a_model_with_windows_is_refused(tiny: LoadedModel) -> None:
    windows = dataclasses.replace(tiny.config, attention=(AttentionRule(window=8),) * 2)
    compressor = Compressor(KvMemory(KvShape.of(windows, torch.float32, SIZE), 2), windows)
    plan = StepPlan(7, 0, (), "", compactions=(Compaction("a", (0,), 4),))
    with pytest.raises(ExecutorError, match=r"step 7 gives up KV, and the model attends within a window"):
        compressor.asking(plan)


class Silent(KeyNorm):
    @staticmethod
    def score(keys: Any, query: Any) -> Any:
        return keys.sum()


def test_scores_of_another_shape_are_refused_with_the_shape_that_was_expected(tiny: LoadedModel) -> None:
    rule = f"{__name__}:Silent"
    with pytest.raises(ExecutorError, match=r"Silent' gave scores \(\); expected a tensor \(2, \d+\)"):
        serve(tiny, requests(1, longest=30, seed=4), Silent(8), rule)


def test_a_plan_at_odds_with_the_tables_is_refused(tiny: LoadedModel) -> None:
    executor = TorchExecutor(tiny, blocks=30, block_size=SIZE)
    core = EngineCore(
        Fcfs(), Lru(), capacity=executor.capacity, prefix_cache=False, compression=StreamingLlm(8, 4)
    )
    core.add(Request(id="a", prompt=Prompt.of(range(30)), output_len=9), 0)
    plan = core.plan(0)
    wrong = (Compaction("a", (9, 1), 8, 1),)
    with pytest.raises(
        ExecutorError, match=r"gives up blocks \(9, 1\), which aren't those of its table from 1"
    ):
        executor.execute(StepPlan(0, 0, plan.work, "", plan.new, plan.admitted, compactions=wrong))
