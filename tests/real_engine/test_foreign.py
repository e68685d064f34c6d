"""Decoders that aren't ours, through transformers' attention registry: the same logits, or a sentence."""

from __future__ import annotations

import random
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from lab.control.core import EngineCore
from lab.control.executor import Capacity
from lab.control.request import Prompt, Request
from lab.control.step import Limits
from lab.errors import ModelError
from policies.eviction.lru import Lru
from policies.scheduling.fcfs import Fcfs
from real_engine.attention import flash_reference
from real_engine.attention.flash import FlashAttention, FlashFunctions
from real_engine.attention.native_cpu import NativeAttention
from real_engine.attention.torch_cpu import TorchAttention
from real_engine.executor import TorchExecutor
from real_engine.kv_memory import KvShape
from real_engine.models import foreign
from real_engine.models.foreign import ForeignDecoder
from real_engine.models.loading import LoadedModel, load_model
from real_engine.models.spec import ModelSpec
from real_engine.native.library import Kernels
from tests.real_engine.reference import SMALL, assert_greedy, serve
from tests.real_engine.test_families import compare


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("foreign")


def others() -> dict[str, Any]:
    """Decoders of other shapes: partial rotation, parallel blocks, learned positions, multi-query, scaled logits."""
    import transformers as t

    small = SMALL | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    wide = small | {"hidden_size": 64}
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
    return {
        "gpt_neox": t.GPTNeoXConfig(**small, rotary_pct=0.5),
        "phi": t.PhiConfig(**small),
        "olmo2": t.Olmo2Config(**wide),
        "granite": t.GraniteConfig(
            **small, attention_multiplier=0.3, logits_scaling=3.0, residual_multiplier=0.5
        ),
        "starcoder2": t.Starcoder2Config(**wide, sliding_window=9),
        "cohere2": t.Cohere2Config(**small, sliding_window=8, sliding_window_pattern=2),
        "gpt2": t.GPT2Config(vocab_size=300, n_positions=128, n_embd=48, n_layer=2, n_head=4),
        "opt": t.OPTConfig(**small, ffn_dim=96, word_embed_proj_dim=48),
        "gpt_bigcode": t.GPTBigCodeConfig(vocab_size=300, n_positions=128, n_embd=48, n_layer=2, n_head=4),
        "llama_yarn": t.LlamaConfig(**small, rope_parameters=yarn),
    }


def refused() -> dict[str, tuple[Any, str]]:
    """Configurations, and what is said of them."""
    import transformers as t

    small = SMALL | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    return {
        "mamba": (
            t.MambaConfig(vocab_size=300, hidden_size=48, num_hidden_layers=2, state_size=4),
            "layers of type 'linear_attention'",
        ),
        "gptj": (
            t.GPTJConfig(vocab_size=300, n_positions=64, n_embd=48, n_layer=2, n_head=4, rotary_dim=8),
            "attention interface",
        ),
        "bloom": (
            t.BloomConfig(vocab_size=300, hidden_size=48, n_layer=2, n_head=4),
            "takes no position ids",
        ),
        "gpt_oss": (
            t.GptOssConfig(**small, head_dim=12, num_local_experts=4, sliding_window=8),
            r"another kind \(it passes s_aux\)",
        ),
        "llama_dynamic": (t.LlamaConfig(**small, rope_parameters=dynamic), "longest sequence of the batch"),
    }


@cache
def saved(name: str, root: Path) -> Path:
    from transformers import AutoModelForCausalLM

    path = root / name
    config = others()[name] if name in others() else refused()[name][0]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=1.5 / parameter.shape[-1] ** 0.5)
        else:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(path)
    return path


@cache
def both(name: str, root: Path) -> tuple[LoadedModel, Any]:
    from transformers import AutoModelForCausalLM

    path = saved(name, root)
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return load_model(ModelSpec(str(path), "float32"), cache_dir=root), theirs


@pytest.mark.parametrize("name", list(others()))
def test_logits_are_the_models_own(name: str, root: Path) -> None:
    ours, theirs = both(name, root)
    assert isinstance(ours.decoder, ForeignDecoder)
    compare(ours, theirs, TorchAttention())


@pytest.mark.parametrize("name", ["olmo2", "starcoder2"])
def test_other_attention_backends_need_no_rotation_either(name: str, root: Path, kernels: Kernels) -> None:
    ours, theirs = both(name, root)
    functions = FlashFunctions(
        flash_reference.flash_attn_varlen_func, flash_reference.flash_attn_with_kvcache
    )
    compare(ours, theirs, FlashAttention(functions))
    assert NativeAttention.suits(KvShape.of(ours.config, ours.dtype, 4))
    compare(ours, theirs, NativeAttention(kernels))


@pytest.mark.parametrize("name", ["gpt_neox", "starcoder2", "gpt2"])
def test_tokens_are_the_models_own_with_prefix_hits_and_preemption(name: str, root: Path) -> None:
    ours, theirs = both(name, root)
    rng = random.Random(5)
    head = [rng.randrange(300) for _ in range(12)]
    texts = [head + [rng.randrange(300) for _ in range(3 + 5 * i)] for i in range(5)]
    executor = TorchExecutor(ours, blocks=24, block_size=4)
    assert executor.about["forward"] == "transformers"
    core = EngineCore(Fcfs(), Lru(), capacity=Capacity(24, 4), limits=Limits(24, 4))
    requests = [Request(id=str(i), prompt=Prompt.of(t), output_len=9) for i, t in enumerate(texts)]
    got = serve(core, executor, requests)
    for request, text in zip(requests, texts, strict=True):
        assert_greedy(theirs, text, got[request.id])


@pytest.mark.parametrize("name", list(refused()))
def test_a_model_that_cannot_run_so_is_refused_in_a_sentence(name: str, root: Path) -> None:
    with pytest.raises(ModelError, match=refused()[name][1]) as caught:
        load_model(ModelSpec(str(saved(name, root)), "float32"), cache_dir=root)
    assert "\n" not in str(caught.value)


def test_loading_says_that_the_slow_path_runs(root: Path) -> None:
    said: list[str] = []
    load_model(ModelSpec(str(saved("phi", root)), "bfloat16"), cache_dir=root, notify=said.append)
    assert len(said) == 1
    assert "'phi'" in said[0]
    assert "through transformers' own code: the same results, slower" in said[0]


def test_a_trial_that_fails_refuses_the_model(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = foreign._run
    monkeypatch.setattr(foreign, "_run", lambda m, step, ids, at, **kept: right(m, step, ids, at * 0, **kept))
    with pytest.raises(ModelError, match="its attention is another kind"):
        load_model(ModelSpec(str(saved("phi", root)), "float32"), cache_dir=root)


def test_weights_that_do_not_fit_are_named(root: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = Path(shutil.copytree(saved("olmo2", root), tmp_path / "model"))
    whole, tensor = load_file(path / "model.safetensors"), "model.layers.1.mlp.up_proj.weight"
    for said, replacement in {
        f"has no tensor {tensor}": None,
        rf"tensor {tensor} of .* has shape \(96, 63\); by config.json expected \(96, 64\)": whole[tensor][
            :, :-1
        ],
        rf"tensor {tensor} of .* is of type I64; expected float32": whole[tensor].long(),
    }.items():
        changed = {name: value for name, value in whole.items() if name != tensor}
        if replacement is not None:
            changed[tensor] = replacement.contiguous()
        save_file(changed, path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError, match=said):
            load_model(ModelSpec(str(path), "float32"), cache_dir=root)
    (path / "model.safetensors").write_bytes(b"\x10")
    with pytest.raises(ModelError, match="truncated or not safetensors"):
        load_model(ModelSpec(str(path), "float32"), cache_dir=root)
