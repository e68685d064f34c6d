"""The shape of a decoder, read from a checkpoint's config.json. Data plane; state path.

Only what changes the arithmetic is kept, in our own words, so that the forward pass never meets the many
spellings of config files (transformers 4 writes `rope_theta` and `rope_scaling`, transformers 5
`rope_parameters`). What we can't compute exactly is refused by name instead of being approximated.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.errors import ModelError

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")
"""Families (`model_type` in config.json). SmolLM2 is a Llama."""


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding: base `theta`, and how its frequencies are stretched.

    `kind` is `default`, `linear` (positions divided by `factor`) or `llama3` (long wavelengths divided by
    `factor`, short ones kept, a ramp between; Llama 3.1, arXiv:2407.21783).
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """Everything the forward pass needs to know. Sizes are counts; `max_context` is in tokens."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_context: int
    """Longest sequence computed exactly: the positions trained for, or the sliding window if that is less
    (up to the window's length, sliding and full attention are the same)."""
    norm_eps: float
    rope: Rope
    tied_embeddings: bool
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMSNorm over each query and key head before the rotary embedding (Qwen3)."""
    eos_token_ids: tuple[int, ...] = ()

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.heads // self.kv_heads


def read_config(directory: Path) -> DecoderConfig:
    """The decoder described by `directory`/config.json. Raises `ModelError` in one sentence."""
    path = directory / "config.json"
    raw = _read_json(path)
    generation = directory / "generation_config.json"
    if generation.exists():
        raw = {**raw, "eos_token_id": _read_json(generation).get("eos_token_id", raw.get("eos_token_id"))}
    return parse_config(raw, str(path))


def parse_config(raw: Mapping[str, Any], where: str) -> DecoderConfig:
    """As `read_config`, from the parsed JSON; `where` names it in errors."""
    family = str(raw.get("model_type", "unnamed"))
    if family not in SUPPORTED:
        raise ModelError(
            f"'{where}' is of architecture '{family}'; supported are {', '.join(SUPPORTED)} (decoders for text)"
        )
    for named in raw.get("architectures") or ():
        if not str(named).endswith("ForCausalLM"):
            raise ModelError(f"'{where}' is of architecture '{named}'; expected one that ends in ForCausalLM")
    if raw.get("quantization_config"):
        raise ModelError(
            f"'{where}' describes quantized weights; expected plain float32, float16 or bfloat16"
        )
    if raw.get("hidden_act", "silu") != "silu":
        raise ModelError(f"'{where}' has activation '{raw['hidden_act']}'; expected 'silu'")

    def count(key: str, default: int | None = None) -> int:
        value = raw.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ModelError(f"'{where}' has {key} = {value!r}; expected a whole number >= 1")
        return value

    heads, hidden = count("num_attention_heads"), count("hidden_size")
    qwen3, qwen2 = family == "qwen3", family == "qwen2"
    head_dim = count("head_dim", 128 if qwen3 else hidden // heads)
    kv_heads = count("num_key_value_heads", heads)
    if heads % kv_heads or head_dim % 2:
        raise ModelError(
            f"'{where}' has {heads} query heads, {kv_heads} KV heads and head_dim {head_dim}; "
            "expected query heads to be a multiple of KV heads and head_dim to be even"
        )
    positions = count("max_position_embeddings")
    window = _window(raw, family)
    attention_bias = bool(raw.get("attention_bias", False))
    eos = raw.get("eos_token_id")
    return DecoderConfig(
        family=family,
        vocab_size=count("vocab_size"),
        hidden_size=hidden,
        intermediate_size=count("intermediate_size"),
        layers=count("num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        max_context=positions if window is None else min(positions, window),
        norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope=_rope(raw, where),
        tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=attention_bias or qwen2,
        output_bias=attention_bias and not qwen2,
        mlp_bias=bool(raw.get("mlp_bias", False)),
        qk_norm=qwen3,
        eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (int(eos),),
    )


def _window(raw: Mapping[str, Any], family: str) -> int | None:
    """The sliding window of any of the layers, if one has it."""
    window = raw.get("sliding_window")
    if family == "llama" or window is None:
        return None
    if family.startswith("qwen") and not raw.get("use_sliding_window", False):
        return None
    return int(window)


def _rope(raw: Mapping[str, Any], where: str) -> Rope:
    found = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = str(found.get("rope_type", found.get("type", "default")))
    if kind not in ("default", "linear", "llama3"):
        raise ModelError(f"'{where}' has rope_type '{kind}'; expected default, linear or llama3")
    partial = float(found.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0)))
    if partial != 1.0:
        raise ModelError(f"'{where}' rotates only {partial} of each head; expected partial_rotary_factor 1.0")
    theta = float(found.get("rope_theta", raw.get("rope_theta", 10_000.0)))
    try:
        if kind == "default":
            return Rope(theta)
        if kind == "linear":
            return Rope(theta, kind, float(found["factor"]))
        return Rope(
            theta,
            kind,
            float(found["factor"]),
            float(found["low_freq_factor"]),
            float(found["high_freq_factor"]),
            int(found["original_max_position_embeddings"]),
        )
    except KeyError as error:
        raise ModelError(f"'{where}' has rope_type '{kind}' without its parameter {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"'{path.parent}' has no readable config.json") from error
    except OSError as error:
        raise ModelError(f"'{path.parent}' has no readable {path.name}: {error}") from error
    except ValueError as error:
        raise ModelError(f"'{path}' is not the JSON of a model's configuration: {error}") from error
    if not isinstance(found, dict):
        raise ModelError(f"'{path}' holds a JSON {type(found).__name__}; expected an object")
    return found
