"""transformers as the oracle: the same weights in its own model, and the margin within which tokens may differ."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch

from lab.control.core import EngineCore
from lab.control.request import Request
from real_engine.executor import TorchExecutor
from real_engine.models.loading import LoadedModel, load_model
from real_engine.models.spec import ModelSpec

MARGIN = 1e-3
"""Where the two highest logits lie closer than this, either token is right: no GEMM is batch-invariant."""

SMALL = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def families() -> dict[str, Any]:
    """A small configuration of each family, with the features that set it apart."""
    from transformers import (
        Gemma2Config,
        Gemma3TextConfig,
        LlamaConfig,
        MistralConfig,
        MixtralConfig,
        Qwen2Config,
        Qwen2MoeConfig,
        Qwen3Config,
        Qwen3MoeConfig,
    )

    llama3 = {
        "rope_type": "llama3",
        "rope_theta": 10_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    return {
        "llama": LlamaConfig(**SMALL, tie_word_embeddings=True),
        "llama3_rope": LlamaConfig(**SMALL, tie_word_embeddings=False, rope_parameters=llama3),
        "llama_biased": LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
        "qwen2": Qwen2Config(**SMALL),
        "qwen3": Qwen3Config(**SMALL, head_dim=20),
        "mistral": MistralConfig(**SMALL, sliding_window=None),
        # Wide enough for all of its layers to be one call of our own kernels, in bfloat16.
        "mistral_window": MistralConfig(**(SMALL | {"hidden_size": 64}), head_dim=32, sliding_window=13),
        "qwen2_window": Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=9, max_window_layers=1),
        "qwen3_window": Qwen3Config(
            **SMALL,
            head_dim=16,
            use_sliding_window=True,
            sliding_window=16,
            layer_types=["sliding_attention", "full_attention"],
        ),
        # Caps low enough to bend every score, and a query scale that is not the usual one.
        "gemma2": Gemma2Config(
            **SMALL,
            head_dim=16,
            sliding_window=11,
            query_pre_attn_scalar=9,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=5.0,
        ),
        "gemma3": Gemma3TextConfig(
            **(SMALL | {"num_hidden_layers": 3}),
            head_dim=16,
            sliding_window=7,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            query_pre_attn_scalar=24,
            rope_parameters={
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 50_000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1_000.0},
            },
        ),
        "mixtral": MixtralConfig(**SMALL, num_local_experts=5, num_experts_per_tok=2),
        "qwen2_moe": Qwen2MoeConfig(
            **(SMALL | {"num_hidden_layers": 3}),
            num_experts=6,
            num_experts_per_tok=3,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=48,
            mlp_only_layers=[0],
            use_sliding_window=True,
            sliding_window=10,
            max_window_layers=2,
        ),
        "qwen3_moe": Qwen3MoeConfig(
            **SMALL,
            head_dim=16,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            norm_topk_prob=True,
        ),
    }


@cache
def saved(family: str, root: Path) -> Path:
    """A random model of a family, saved as transformers saves models. Peaked enough to have clear winners."""
    from transformers import AutoModelForCausalLM

    path = root / family
    config = families()[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=1.5 / parameter.shape[-1] ** 0.5)
        else:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(path)
    return path


def both(family: str, root: Path) -> tuple[LoadedModel, Any]:
    """(ours, transformers') of one set of weights, float32."""
    from transformers import AutoModelForCausalLM

    path = saved(family, root)
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return load_model(ModelSpec(str(path), "float32"), cache_dir=root), theirs


def assert_greedy(theirs: Any, prompt: list[int], generated: list[int]) -> None:
    """Each generated token is the reference's best one given all before it, or within `MARGIN` of it."""
    with torch.inference_mode():
        logits = theirs(torch.tensor([prompt + generated])).logits[0].float()
    for i, token in enumerate(generated):
        row = logits[len(prompt) - 1 + i]
        gap = float(row.max() - row[token])
        assert gap <= MARGIN, (
            f"token {i} of {len(generated)} is {token}; {int(row.argmax())} is better by {gap:.5f}"
        )


def serve(core: EngineCore, executor: TorchExecutor, requests: list[Request]) -> dict[str, list[int]]:
    """Tokens of every request."""
    out: dict[str, list[int]] = {request.id: [] for request in requests}
    for request in requests:
        core.add(request, 0)
    while core.has_work:
        plan = core.plan(0)
        for emission in core.commit(plan, executor.execute(plan), 0):
            out[emission.request].append(emission.token)
        core.check()
    return out
