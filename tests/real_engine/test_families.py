"""What sets the families apart: windows, soft caps, experts, norms; against transformers, logit by logit."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lab.control.core import EngineCore
from lab.control.executor import Capacity
from lab.control.request import Prompt, Request
from lab.control.step import Limits
from lab.errors import ExecutorError, ModelError
from policies.eviction.lru import Lru
from policies.scheduling.fcfs import Fcfs
from real_engine.attention import flash_reference
from real_engine.attention.backend import AttentionBackend, PackedBatch
from real_engine.attention.flash import FlashAttention, FlashFunctions
from real_engine.attention.native_cpu import NativeAttention
from real_engine.attention.torch_cpu import TorchAttention
from real_engine.executor import TorchExecutor
from real_engine.kv_memory import KvMemory, KvShape
from real_engine.models.decoder import Decoder
from real_engine.models.families import parse_config
from real_engine.models.loading import LoadedModel, load_model
from real_engine.models.spec import ModelSpec
from real_engine.native.library import Kernels
from tests.real_engine.reference import MARGIN, assert_greedy, both, families, saved, serve


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


def compare(ours: LoadedModel, theirs: Any, attention: AttentionBackend) -> None:
    """Two sequences in chunks, then decodes, packed together over scattered blocks: every logit of every token."""
    rng = random.Random(3)
    vocab, size = ours.config.vocab_size, max(4, attention.block_size_multiple)
    texts = [[rng.randrange(vocab) for _ in range(40)] for _ in range(2)]
    blocks = [range(10), range(19, 9, -1)]
    cuts = [(17, 1), (18, 0), (0, 30), (0, 4)] + 5 * [(1, 1)]
    done = [0, 0]
    memory = KvMemory(KvShape.of(ours.config, ours.dtype, size), 20)
    with torch.inference_mode():
        wanted = [theirs(torch.tensor([text])).logits[0] for text in texts]
        for cut in cuts:
            at = [(i, done[i], done[i] + count) for i, count in enumerate(cut) if count]
            batch = PackedBatch.by_hand(
                [(texts[i][first:last], first, blocks[i]) for i, first, last in at], size
            )
            got = ours.decoder.forward(batch, attention.prepare(batch, memory))
            expected = torch.cat([wanted[i][first:last] for i, first, last in at])
            torch.testing.assert_close(got, expected, atol=MARGIN, rtol=0)
            for i, _, last in at:
                done[i] = last
    assert done == [40, 40]


@pytest.mark.parametrize("family", list(families()))
def test_logits_are_those_of_transformers(family: str, root: Path) -> None:
    ours, theirs = both(family, root)
    compare(ours, theirs, TorchAttention())


@pytest.mark.parametrize("family", list(families()))
def test_logits_are_those_of_transformers_by_our_own_kernels(
    family: str, root: Path, kernels: Kernels
) -> None:
    ours, theirs = both(family, root)
    shape = KvShape.of(ours.config, ours.dtype, 4)
    attends = NativeAttention.suits(shape) and ours.config.needs <= NativeAttention.abilities
    assert attends or family not in ("mistral_window", "qwen3_window", "gemma3", "qwen3_moe")
    assert isinstance(ours.decoder, Decoder)
    with torch.inference_mode():
        ours.decoder.use(kernels)
    assert ours.decoder.ops is kernels
    compare(ours, theirs, NativeAttention(kernels) if attends else TorchAttention())


@pytest.mark.parametrize("family", list(families()))
def test_logits_are_those_of_transformers_by_flash_attention(family: str, root: Path) -> None:
    ours, theirs = both(family, root)
    functions = FlashFunctions(
        flash_reference.flash_attn_varlen_func, flash_reference.flash_attn_with_kvcache
    )
    compare(ours, theirs, FlashAttention(functions))


@pytest.mark.parametrize("family", list(families()))
def test_in_bfloat16_the_error_is_that_of_transformers(family: str, root: Path, kernels: Kernels) -> None:
    from transformers import AutoModelForCausalLM

    rng = random.Random(0)
    text = [rng.randrange(300) for _ in range(60)]

    @torch.inference_mode()
    def theirs(dtype: torch.dtype) -> Tensor:
        model: Any = AutoModelForCausalLM.from_pretrained(saved(family, root), dtype=dtype)
        return model.eval()(torch.tensor([text])).logits[0].float()

    @torch.inference_mode()
    def ours(*, native: bool) -> Tensor:
        model = load_model(ModelSpec(str(saved(family, root)), "bfloat16"), cache_dir=root)
        shape = KvShape.of(model.config, model.dtype, 4)
        attention: AttentionBackend = TorchAttention()
        if native and isinstance(model.decoder, Decoder):
            model.decoder.use(kernels)
            if NativeAttention.suits(shape) and model.config.needs <= NativeAttention.abilities:
                attention = NativeAttention(kernels)
            assert model.decoder.fused == (family == "mistral_window" and kernels.has_products)
        memory = KvMemory(shape, 15)
        found = []
        for first, last in ((0, 40), (40, 41), (41, 60)):
            batch = PackedBatch.by_hand([(text[first:last], first, range(15))], 4)
            found.append(model.decoder.forward(batch, attention.prepare(batch, memory)))
        return torch.cat(found)

    exact = theirs(torch.float32)
    error = (theirs(torch.bfloat16) - exact).abs().mean()
    for native in (False, True):
        assert (ours(native=native) - exact).abs().mean() < 1.6 * error


WINDOWED = ["mistral_window", "qwen2_window", "gemma2", "gemma3"]


@pytest.mark.parametrize("family", WINDOWED)
def test_a_shared_prefix_longer_than_the_window(family: str, root: Path) -> None:
    ours, theirs = both(family, root)
    rng = random.Random(5)
    head = [rng.randrange(300) for _ in range(24)]
    texts = [head + [rng.randrange(300) for _ in range(3 + 7 * i)] for i in range(4)]
    executor = TorchExecutor(ours, blocks=60, block_size=4)
    core = EngineCore(Fcfs(), Lru(), capacity=Capacity(60, 4), limits=Limits(32, 3))
    requests = [Request(id=str(i), prompt=Prompt.of(t), output_len=12) for i, t in enumerate(texts)]
    got = serve(core, executor, requests)
    for request, text in zip(requests, texts, strict=True):
        assert_greedy(theirs, text, got[request.id])


class WithoutWindows(TorchAttention):
    name = "far-sighted"
    abilities = frozenset()


def test_an_attention_backend_that_lacks_what_a_model_needs_is_refused(root: Path) -> None:
    ours, _ = both("gemma2", root)
    with pytest.raises(ExecutorError, match=r"'far-sighted' doesn't compute the softcap and the window of"):
        TorchExecutor(ours, blocks=4, attention=WithoutWindows())


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_experts_that_are_liked_equally(family: str, root: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    path = Path(shutil.copytree(saved(family, root), tmp_path / family))
    weights = load_file(path / "model.safetensors")
    for name, tensor in weights.items():
        if name.endswith(("mlp.gate.weight", "moe.gate.weight")):
            tensor.zero_()
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    ours = load_model(ModelSpec(str(path), "float32"), cache_dir=root)
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    compare(ours, theirs, TorchAttention())


def old_spelling(raw: dict[str, Any]) -> dict[str, Any]:
    """As transformers 4 wrote it: the layers' types are left to the family."""
    raw = {key: value for key, value in raw.items() if key != "layer_types"}
    ropes = raw.pop("rope_parameters")
    if "full_attention" in ropes:
        raw["rope_local_base_freq"] = ropes["sliding_attention"]["rope_theta"]
        ropes = ropes["full_attention"]
    raw["rope_theta"] = ropes["rope_theta"]
    if ropes["rope_type"] != "default":
        raw["rope_scaling"] = {key: value for key, value in ropes.items() if key != "rope_theta"}
    return raw


@pytest.mark.parametrize("family", list(families()))
def test_both_spellings_of_a_configuration_mean_the_same(family: str, root: Path) -> None:
    raw = json.loads((saved(family, root) / "config.json").read_text())
    if family in ("qwen3_window", "gemma3"):
        # Their pattern here is not the family's: what the family would choose is another test.
        raw.pop("layer_types")
    assert parse_config(old_spelling(raw), "here") == parse_config(raw, "here")


def test_layers_with_a_window_are_those_that_transformers_chooses() -> None:
    from transformers import Gemma2Config, Gemma3TextConfig, Qwen2Config, Qwen2MoeConfig, Qwen3Config

    some: dict[str, Any] = {"num_hidden_layers": 14, "sliding_window": 5, "max_position_embeddings": 64}
    qwen = some | {"use_sliding_window": True, "max_window_layers": 4}
    chosen = [
        Gemma2Config(**some),
        Gemma3TextConfig(**some),
        Gemma3TextConfig(**some, sliding_window_pattern=3),
    ]
    chosen += [Qwen2Config(**qwen), Qwen3Config(**qwen), Qwen2MoeConfig(**qwen)]
    for config in chosen:
        raw = config.to_dict()
        ours = parse_config({key: value for key, value in raw.items() if key != "layer_types"}, "here")
        assert [rule.window is not None for rule in ours.attention] == [
            kind == "sliding_attention" for kind in config.layer_types
        ], config.model_type


def test_a_window_that_is_not_used_is_none() -> None:
    from transformers import Qwen2Config, Qwen2MoeConfig, Qwen3Config

    for kind in (Qwen2Config, Qwen3Config, Qwen2MoeConfig):
        ours = parse_config(kind(sliding_window=4096, num_hidden_layers=2).to_dict(), "here")
        assert ours.needs == frozenset()
    llama = parse_config(families()["llama"].to_dict(), "here")
    assert llama.plain
    for field, value in (("activation", "gelu_tanh"), ("qkv_bias", True), ("post_norms", True)):
        assert not dataclasses.replace(llama, **{field: value}).plain


@pytest.mark.parametrize(
    ("family", "tensor"),
    [
        ("gemma2", "model.layers.1.pre_feedforward_layernorm.weight"),
        ("gemma3", "model.layers.0.self_attn.k_norm.weight"),
        ("mixtral", "model.layers.1.block_sparse_moe.experts.3.w2.weight"),
        ("qwen2_moe", "model.layers.1.mlp.shared_expert_gate.weight"),
        ("qwen3_moe", "model.layers.0.mlp.gate.weight"),
    ],
)
def test_weights_that_do_not_fit_are_named(family: str, tensor: str, root: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = Path(shutil.copytree(saved(family, root), tmp_path / family))
    weights = load_file(path / "model.safetensors")
    whole = weights[tensor]
    broken = {
        "has no tensor": None,
        r"has shape .* expected": whole[..., :-1].contiguous(),
        r"is of type torch\.int64": whole.long(),
    }
    for said, replacement in broken.items():
        changed = {name: value for name, value in weights.items() if name != tensor}
        if replacement is not None:
            changed[tensor] = replacement
        save_file(changed, path / "model.safetensors")
        with pytest.raises(ModelError, match=f"{said}|{tensor}.*{said}"):
            load_model(ModelSpec(str(path), "float32"), cache_dir=root)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layer_types": ["full_attention"]}, "1 layer_types for 2 layers"),
        ({"layer_types": ["full_attention", "mystery"]}, "layer of type 'mystery'"),
        ({"sliding_window": -3}, "sliding_window = -3"),
        ({"attn_logit_softcapping": 0}, "attn_logit_softcapping = 0"),
        ({"use_bidirectional_attention": True}, "expected causal attention"),
        (
            {"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 3},
            "to 3 experts and has 2",
        ),
    ],
)
def test_a_configuration_that_makes_no_sense(change: dict[str, Any], said: str) -> None:
    raw = families()["gemma2"].to_dict() | change
    with pytest.raises(ModelError, match=said):
        parse_config(raw, "here")
