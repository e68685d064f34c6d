"""Model shapes against what transformers counts, device descriptions, and the KV that fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lab.errors import ConfigError, UnknownNameError
from sim import hardware, model_shape
from sim.capacity import blocks_that_fit
from sim.cost.physical import Parallel

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 100,
}


@pytest.mark.parametrize("name", model_shape.names())
def test_parameters_and_kv_are_those_that_were_counted(name: str) -> None:
    counted = json.loads((model_shape.MODELS / f"{name}.json").read_text())["counted"]
    shape = model_shape.load(name)
    assert shape.parameters == counted["parameters"]
    assert shape.kv_bytes_per_token == counted["kv_bytes_per_token"]


@pytest.mark.parametrize("name", model_shape.names())
def test_transformers_counts_as_many_parameters(name: str) -> None:
    """Another implementation, without weights: its modules are made where nothing is stored."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    shapes = json.loads((model_shape.MODELS / f"{name}.json").read_text())["config"]
    family = shapes.pop("model_type")
    with torch.device("meta"):
        config = transformers.AutoConfig.for_model(family, **shapes)
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert model_shape.load(name).parameters == sum(weight.numel() for weight in model.parameters())


def test_active_parameters_of_mixtures() -> None:
    """Mixtral: 12.9 billion of 46.7; Qwen3-30B-A3B: 3.3; DeepSeek-V2-Lite: 2.4 without the embeddings."""
    assert model_shape.load("mixtral-8x7b").active_parameters == pytest.approx(12.88e9, rel=0.001)
    assert model_shape.load("qwen3-30b-a3b").active_parameters == pytest.approx(3.35e9, rel=0.001)
    lite = model_shape.load("deepseek-v2-lite")
    assert lite.active_parameters - lite.head_linear == pytest.approx(2.45e9, rel=0.01)


def test_a_latent_kv_is_a_ninth_of_what_its_heads_would_take() -> None:
    lite = model_shape.load("deepseek-v2-lite")
    assert lite.kv_layer_bytes == (512 + 64) * 2
    assert 2 * 16 * (128 + 64 + 128) / 2 * 2 / lite.kv_layer_bytes == pytest.approx(80 / 9)


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b"),
        ("meta-llama/Meta-Llama-3.1-8B", "llama-3.1-8b"),
        ("Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b"),
        ("smollm2", "smollm2-135m"),
    ],
)
def test_a_hub_id_has_a_shape(said: str, found: str) -> None:
    assert model_shape.load(said).name == found


def test_any_config_json_is_a_shape(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "head_dim": 32, "tie_word_embeddings": True}))
    shape = model_shape.load(str(tmp_path))
    layer = 64 * 128 * 4 + 3 * 64 * 128 + 2 * 64
    assert shape.parameters == 4 * layer + 64 + 6400
    assert shape.kv_bytes_per_token == 4 * 2 * 128 * 2
    assert model_shape.load(str(tmp_path / "config.json")).parameters == shape.parameters


def test_windows_by_layer() -> None:
    def windows(**more: Any) -> dict[int | None, int]:
        shape = model_shape.parse({**LLAMA, **more}, "toy", "toy")
        return {kind.window: kind.count for kind in shape.kinds}

    assert windows() == {None: 4}
    assert windows(model_type="mistral", sliding_window=8) == {8: 4}
    assert windows(model_type="gemma2", sliding_window=8) == {8: 2, None: 2}
    assert windows(model_type="qwen2", sliding_window=8) == {None: 4}
    assert windows(model_type="qwen2", sliding_window=8, use_sliding_window=True, max_window_layers=3) == {
        None: 3,
        8: 1,
    }
    types = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    assert windows(sliding_window=8, layer_types=types) == {8: 2, None: 2}


def test_quantised_weights_and_kv_take_their_width() -> None:
    shape = model_shape.load("llama-3.1-8b")
    linear = 32 * shape.linear(False)
    assert shape.quantised("int4").weight_bytes == pytest.approx(
        2 * shape.parameters - linear * (2 - 4.25 / 8)
    )
    assert shape.quantised(kv="fp8").kv_bytes_per_token == 65_536
    awq = model_shape.parse(
        {**LLAMA, "quantization_config": {"quant_method": "awq", "bits": 4}}, "toy", "toy"
    )
    assert awq.weights == "int4"


def test_an_rtx_4090_holds_2588_blocks_beside_llama_8b() -> None:
    """As vLLM 0.19 says of itself: 16 tokens a block, 2,048 tokens and 256 requests a step."""

    def blocks(device: str, **more: Any) -> int:
        shape = model_shape.load("llama-3.1-8b").quantised(more.pop("weights", ""), more.pop("kv", ""))
        limits: dict[str, Any] = {"block_size": 16, "token_budget": 2048, "max_seqs": 256}
        return blocks_that_fit(shape, hardware.load(device), utilization=0.9, **{**limits, **more})

    assert blocks("rtx_4090") == 2588
    assert blocks("rtx_4090", kv="fp8") in (5176, 5177)
    assert blocks("rtx_4090", weights="int4") > 2588 + 32 * 218_103_808 * 1.4 // (2 << 20)
    assert blocks("rtx_4090", block_size=32) == 1294
    two = blocks("rtx_4090", parallel=Parallel(tensor=2))
    assert two > 2 * 2588  # half the weights, half the KV on each
    with pytest.raises(ConfigError, match=r"llama-3\.1-8b doesn't fit on 1 x rtx_4090"):
        blocks("rtx_4090", reserved_gib=9.0)


@pytest.mark.parametrize("name", hardware.names())
def test_devices_are_what_they_could_be(name: str) -> None:
    device = hardware.load(name)
    assert set(device.sources) >= {"flops", "memory_bytes", "memory_gb_s", "link", "tdp_w", "price_per_hour"}
    assert device.idle_w < device.tdp_w
    assert device.peak("bfloat16") >= device.peak("float32")
    assert device.energy_j(2.0, 5.0) == 2 * device.tdp_w + 3 * device.idle_w


def test_bad_descriptions_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'h100_sxm'"):
        hardware.load("h100_sxn")
    with pytest.raises(UnknownNameError, match="model shape"):
        model_shape.load("llama-9b")
    good = json.loads((hardware.HARDWARE / "l40s.json").read_text())
    for change, words in (
        ({"tdp_w": -1}, "tdp_w is -1"),
        ({"memory_gb_s": "fast"}, "memory_gb_s is 'fast'"),
        ({"colour": 1}, "unknown keys"),
    ):
        (tmp_path / "mine.json").write_text(json.dumps({**good, **change}))
        with pytest.raises(ConfigError, match=words):
            hardware.load(str(tmp_path / "mine.json"))
    (tmp_path / "mine.json").write_text(json.dumps({k: v for k, v in good.items() if k != "link"}))
    with pytest.raises(ConfigError, match=r"missing keys \['link'\]"):
        hardware.load(str(tmp_path / "mine.json"))
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "hidden_size": 0}))
    with pytest.raises(ConfigError, match="hidden_size = 0"):
        model_shape.load(str(tmp_path))
    with pytest.raises(ConfigError, match="can't be read"):
        model_shape.load(str(tmp_path / "nothing.json"))
