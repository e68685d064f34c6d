"""From a checkpoint's config.json to a `DecoderConfig`: what sets the families apart. Data plane; state path.

The only file that knows families by name. What we can't compute exactly is refused by name instead of being
approximated: `OtherArchitecture` where transformers might (`real_engine/models/foreign.py`), `ModelError` where
the file is at fault. Both spellings are read: transformers 4 writes `rope_theta` and `rope_scaling`, transformers 5
`rope_parameters`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from lab.errors import ModelError
from real_engine.models.config import AttentionRule, DecoderConfig, Experts, Rope

SUPPORTED = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
)
"""Families (`model_type` in config.json). SmolLM2 is a Llama."""

_ACTIVATIONS: dict[str, Literal["silu", "gelu_tanh"]] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


class OtherArchitecture(ModelError):
    """A model that isn't one of ours, or has a part that we don't compute."""


def read_config(directory: Path) -> DecoderConfig:
    """The decoder described by `directory`/config.json. Raises `ModelError` in one sentence."""
    return parse_config(read_raw(directory), str(directory / "config.json"))


def read_raw(directory: Path) -> dict[str, Any]:
    """config.json as it is, with the end-of-text ids of generation_config.json. Raises `ModelError`."""
    raw = _read_json(directory / "config.json")
    generation = directory / "generation_config.json"
    if generation.exists():
        raw = {**raw, "eos_token_id": _read_json(generation).get("eos_token_id", raw.get("eos_token_id"))}
    return raw


def parse_config(raw: Mapping[str, Any], where: str) -> DecoderConfig:
    """As `read_config`, from the parsed JSON; `where` names it in errors."""
    family = str(raw.get("model_type", "unnamed"))
    for named in raw.get("architectures") or ():
        if not str(named).endswith(("ForCausalLM", "LMHeadModel")):
            raise ModelError(f"'{where}' is of architecture '{named}'; expected one that ends in ForCausalLM")
    if raw.get("quantization_config"):
        raise ModelError(
            f"'{where}' describes quantized weights; expected plain float32, float16 or bfloat16"
        )
    if family not in SUPPORTED:
        raise OtherArchitecture(
            f"'{where}' is of architecture '{family}'; supported are {', '.join(SUPPORTED)} (decoders for text)"
        )
    gemma, qwen2, qwen3 = (family.startswith(name) for name in ("gemma", "qwen2", "qwen3"))
    named = raw.get("hidden_activation") or raw.get("hidden_act") or ("silu", "gelu_pytorch_tanh")[gemma]
    if named not in _ACTIVATIONS:
        raise OtherArchitecture(
            f"'{where}' has activation '{named}'; expected one of {', '.join(_ACTIVATIONS)}"
        )
    if raw.get("use_bidirectional_attention"):
        raise ModelError(f"'{where}' attends to later tokens too; expected causal attention")

    def count(key: str, default: int | None = None) -> int:
        return _count(raw, where, key, default)

    heads, hidden, layers = (
        count(key) for key in ("num_attention_heads", "hidden_size", "num_hidden_layers")
    )
    head_dim = count("head_dim", 256 if gemma else 128 if family == "qwen3" else hidden // heads)
    kv_heads = count("num_key_value_heads", heads)
    if heads % kv_heads or head_dim % 2:
        raise ModelError(
            f"'{where}' has {heads} query heads, {kv_heads} KV heads and head_dim {head_dim}; "
            "expected query heads to be a multiple of KV heads and head_dim to be even"
        )
    experts = _experts(raw, where, family)
    scale = count("query_pre_attn_scalar", 256) ** -0.5 if gemma else None
    softcap = _cap(raw, where, "attn_logit_softcapping", 50.0 if family == "gemma2" else None)
    rules = tuple(AttentionRule(scale, window, softcap) for window in _windows(raw, where, family, layers))
    biased = bool(raw.get("attention_bias", False))
    rope, local = _ropes(raw, where, family)
    eos = raw.get("eos_token_id")
    return DecoderConfig(
        family=family,
        vocab_size=count("vocab_size"),
        hidden_size=hidden,
        intermediate_size=count("intermediate_size"),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        max_context=count("max_position_embeddings"),
        eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (int(eos),),
        attention=rules if any(rule != AttentionRule() for rule in rules) else (),
        norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope=rope,
        local_rope=local,
        tied_embeddings=bool(raw.get("tie_word_embeddings", gemma)),
        qkv_bias=bool(raw.get("qkv_bias", True)) if qwen2 else biased,
        output_bias=biased and not qwen2,
        mlp_bias=bool(raw.get("mlp_bias", False)),
        qk_norm=qwen3 or family == "gemma3_text",
        activation=_ACTIVATIONS[named],
        norm_offset=1.0 if gemma else 0.0,
        post_norms=gemma,
        embedding_scale=hidden**0.5 if gemma else 1.0,
        final_softcap=_cap(raw, where, "final_logit_softcapping", 30.0 if family == "gemma2" else None),
        experts=experts,
        sparse_layers=frozenset() if experts is None else _sparse_layers(raw, where, layers),
    )


def _count(raw: Mapping[str, Any], where: str, key: str, default: int | None = None) -> int:
    value = raw.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"'{where}' has {key} = {value!r}; expected a whole number >= 1")
    return value


def _cap(raw: Mapping[str, Any], where: str, key: str, default: float | None) -> float | None:
    value = raw.get(key, default)
    if value is not None and not (isinstance(value, int | float) and value > 0):
        raise ModelError(f"'{where}' has {key} = {value!r}; expected a number above 0, or null")
    return value


def _windows(raw: Mapping[str, Any], where: str, family: str, layers: int) -> list[int | None]:
    """Each layer's sliding window. Where `layer_types` doesn't say which layers have it, the family does."""
    window = raw.get("sliding_window", 4096 if family.startswith("gemma") else None)
    unused = family.startswith("qwen") and not raw.get("use_sliding_window", False)
    if family == "llama" or unused or not window:
        return [None] * layers
    window = _count({"sliding_window": window}, where, "sliding_window")
    first = _count({"n": raw.get("max_window_layers", 28) + 1}, where, "n") - 1
    pattern = 2 if family == "gemma2" else _pattern(raw, where)
    sliding = [
        {
            "gemma2": (i + 1) % pattern != 0,
            "gemma3_text": (i + 1) % pattern != 0,
            "qwen2": i >= first,
            "qwen3": i >= first,
            "qwen2_moe": i % 2 == 0 and i < first,  # as transformers computes it
        }.get(family, True)
        for i in range(layers)
    ]
    types = raw.get("layer_types")
    if types is not None and family in ("gemma2", "gemma3_text", "qwen2", "qwen3", "qwen2_moe"):
        for kind in types:
            if kind not in ("full_attention", "sliding_attention"):
                raise OtherArchitecture(
                    f"'{where}' has a layer of type '{kind}'; expected full_attention or sliding_attention"
                )
        if len(types) != layers:
            raise ModelError(
                f"'{where}' has {len(types)} layer_types for {layers} layers; expected one for each"
            )
        sliding = [kind == "sliding_attention" for kind in types]
    return [window if slides else None for slides in sliding]


def _pattern(raw: Mapping[str, Any], where: str) -> int:
    """Every how many layers one of Gemma 3 attends to everything."""
    key = "sliding_window_pattern" if "sliding_window_pattern" in raw else "_sliding_window_pattern"
    return _count(raw, where, key, 6)


def _experts(raw: Mapping[str, Any], where: str, family: str) -> Experts | None:
    if family not in ("mixtral", "qwen2_moe", "qwen3_moe"):
        return None

    def count(key: str) -> int:
        return _count(raw, where, key)

    total = count("num_local_experts" if "num_local_experts" in raw else "num_experts")
    chosen = count("num_experts_per_tok")
    if chosen > total:
        raise ModelError(
            f"'{where}' sends each token to {chosen} experts and has {total}; expected at most as many"
        )
    if family == "mixtral":
        names = ("block_sparse_moe", "w1", "w3", "w2")
        return Experts(
            count=total,
            per_token=chosen,
            intermediate_size=count("intermediate_size"),
            renormalized=True,
            names=names,
        )
    return Experts(
        count=total,
        per_token=chosen,
        intermediate_size=count("moe_intermediate_size"),
        renormalized=bool(raw.get("norm_topk_prob", False)),
        shared_size=count("shared_expert_intermediate_size") if family == "qwen2_moe" else None,
    )


def _sparse_layers(raw: Mapping[str, Any], where: str, layers: int) -> frozenset[int]:
    every = _count(raw, where, "decoder_sparse_step", 1)
    dense = raw.get("mlp_only_layers") or ()
    return frozenset(i for i in range(layers) if i not in dense and (i + 1) % every == 0)


def _ropes(raw: Mapping[str, Any], where: str, family: str) -> tuple[Rope, Rope | None]:
    """The rotary embedding, and that of the layers with a window where it is another."""
    found = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = float(raw.get("rope_theta", 1e6 if family in ("mixtral", "gemma3_text") else 10_000.0))
    if family != "gemma3_text":
        return _rope(found, raw, where, theta), None
    nested = "full_attention" in found or "sliding_attention" in found
    full, sliding = (
        (found.get(key) or {} for key in ("full_attention", "sliding_attention")) if nested else (found, {})
    )
    local = _rope(sliding, {}, where, float(raw.get("rope_local_base_freq", 10_000.0)))
    return _rope(full, raw, where, theta), local


def _rope(found: Mapping[str, Any], raw: Mapping[str, Any], where: str, theta: float) -> Rope:
    kind = str(found.get("rope_type", found.get("type", "default")))
    if kind not in ("default", "linear", "llama3"):
        raise OtherArchitecture(f"'{where}' has rope_type '{kind}'; expected default, linear or llama3")
    partial = float(found.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0)))
    if partial != 1.0:
        raise OtherArchitecture(
            f"'{where}' rotates only {partial} of each head; expected partial_rotary_factor 1.0"
        )
    theta = float(found.get("rope_theta", theta))
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
