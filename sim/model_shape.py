"""The shape of a model that needn't be there: what its weights, its KV and its arithmetic amount to. Data plane.

Read from a config.json as checkpoints on the hub have it (`parse`), from a few that ship with the simulator
(`sim/data/models`), or from any path. Only sizes matter here, so families that the real engine can't compute have
a shape too: grouped heads, explicit head sizes, tied embeddings, windows in some layers, mixtures of experts with
shared ones, and KV compressed to a latent vector (MLA, arXiv:2405.04434).
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.errors import ConfigError, UnknownNameError

MODELS = Path(__file__).parent / "data" / "models"
ALIASES = {"smollm2": "smollm2-135m"}
_VARIANT = re.compile(r"^meta-|-(instruct|chat|it|base)(?=-|$)")
BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "fp8": 1.0, "int8": 1.0, "int4": 4.25 / 8}
"""Of one value. `int4` has a scale and a zero point of 16 bits for each 128."""


@dataclass(frozen=True, slots=True)
class Mla:
    """KV as one latent vector and one rotary key a token, for all heads."""

    kv_rank: int
    q_rank: int | None
    rope: int
    nope: int
    value: int


@dataclass(frozen=True, slots=True)
class Mixture:
    """Of `count` experts, each of `size`, a token goes to `per_token`; and to the `shared` width always."""

    count: int
    per_token: int
    size: int
    shared: int = 0
    shared_gate: bool = False

    def touched(self, tokens: float) -> float:
        """Experts that so many tokens are expected to need, if they choose evenly and on their own."""
        return float(self.count * (1 - (1 - self.per_token / self.count) ** tokens))


@dataclass(frozen=True, slots=True)
class LayerKind:
    """Layers that are alike: how many, their window if they have one, and whether they hold experts."""

    count: int
    window: int | None
    sparse: bool


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a decoder. Bytes follow `dtype`, unless its linear layers (`weights`) or KV (`kv`) are quantised."""

    name: str
    hidden: int
    intermediate: int
    vocab: int
    heads: int
    kv_heads: int
    head_dim: int
    kinds: tuple[LayerKind, ...]
    max_context: int
    tied: bool = False
    matrices: int = 3
    """Of a feed-forward block: up, gate and down; 2 without a gate."""
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    norms: int = 2
    """A layer's norms over its hidden size."""
    mixture: Mixture | None = None
    mla: Mla | None = None
    dtype: str = "bfloat16"
    weights: str = ""
    kv: str = ""

    @property
    def layers(self) -> int:
        return sum(kind.count for kind in self.kinds)

    # -- parameters ------------------------------------------------------------------------------------

    @property
    def attention_linear(self) -> int:
        """Parameters of one layer's projections around attention, biases aside."""
        h, mla = self.hidden, self.mla
        if mla is None:
            q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
            return h * q + 2 * h * kv + q * h
        query = self.heads * (mla.nope + mla.rope)
        down = h * query if mla.q_rank is None else h * mla.q_rank + mla.q_rank * query
        up = mla.kv_rank * self.heads * (mla.nope + mla.value)
        return down + h * (mla.kv_rank + mla.rope) + up + self.heads * mla.value * h

    @property
    def dense_linear(self) -> int:
        """Parameters of one dense feed-forward block, biases aside."""
        return self.matrices * self.hidden * self.intermediate

    @property
    def expert_linear(self) -> int:
        """Parameters of one expert."""
        return self.matrices * self.hidden * self.mixture.size if self.mixture else 0

    @property
    def always_linear(self) -> int:
        """Of a layer with experts: the router and the shared expert, which every token meets."""
        if self.mixture is None:
            return 0
        gate = self.hidden if self.mixture.shared_gate else 0
        return self.hidden * self.mixture.count + self.matrices * self.hidden * self.mixture.shared + gate

    @property
    def head_linear(self) -> int:
        return self.vocab * self.hidden

    def linear(self, sparse: bool) -> int:
        """All linear parameters of one layer."""
        if not sparse or self.mixture is None:
            return self.attention_linear + self.dense_linear
        return self.attention_linear + self.always_linear + self.mixture.count * self.expert_linear

    def _small(self, sparse: bool) -> int:
        """One layer's norms and biases."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        found = self.norms * self.hidden
        if self.mla is not None:
            found += self.mla.kv_rank + (self.mla.q_rank or 0)
        if self.qkv_bias:
            found += q + 2 * kv
        found += self.hidden if self.output_bias else 0
        found += 2 * self.head_dim if self.qk_norm else 0
        if self.mlp_bias and not sparse:
            found += (self.matrices - 1) * self.intermediate + self.hidden
        return found

    @property
    def parameters(self) -> int:
        """All of them, as the checkpoint counts them."""
        layers = sum(
            kind.count * (self.linear(kind.sparse) + self._small(kind.sparse)) for kind in self.kinds
        )
        return layers + self.hidden + self.head_linear * (1 if self.tied else 2)

    @property
    def active_parameters(self) -> int:
        """Those that one token meets."""
        if self.mixture is None:
            return self.parameters
        idle = (self.mixture.count - self.mixture.per_token) * self.expert_linear
        return self.parameters - idle * sum(kind.count for kind in self.kinds if kind.sparse)

    # -- bytes -----------------------------------------------------------------------------------------

    @property
    def weight_width(self) -> float:
        """Bytes of one weight of a linear layer."""
        return BYTES[self.weights or self.dtype]

    @property
    def width(self) -> float:
        """Bytes of everything else: embeddings, head, norms, activations."""
        return BYTES[self.dtype]

    @property
    def weight_bytes(self) -> float:
        """Of the whole model. Embeddings and head keep the dtype where the layers are quantised."""
        linear = sum(kind.count * self.linear(kind.sparse) for kind in self.kinds)
        return linear * self.weight_width + (self.parameters - linear) * self.width

    @property
    def expert_bytes(self) -> float:
        """Of that, experts which only some tokens meet."""
        if self.mixture is None:
            return 0.0
        sparse = sum(kind.count for kind in self.kinds if kind.sparse)
        return sparse * self.mixture.count * self.expert_linear * self.weight_width

    @property
    def kv_layer_bytes(self) -> float:
        """KV of one token in one layer."""
        values = 2 * self.kv_heads * self.head_dim if self.mla is None else self.mla.kv_rank + self.mla.rope
        return values * BYTES[self.kv or self.dtype]

    @property
    def kv_bytes_per_token(self) -> float:
        """KV of one token in all layers; windows don't shorten the cache."""
        return self.layers * self.kv_layer_bytes

    @property
    def pair_flops(self) -> float:
        """Operations for one query that attends to one key, in one layer: scores and the weighted sum."""
        if self.mla is None:
            return 4.0 * self.heads * self.head_dim
        return 2.0 * self.heads * (self.mla.nope + self.mla.rope + self.mla.value)

    def quantised(self, weights: str = "", kv: str = "") -> ModelShape:
        """The same with other widths."""
        return dataclasses.replace(self, weights=weights or self.weights, kv=kv or self.kv)


def names() -> list[str]:
    """Shapes that ship with the simulator."""
    return sorted(path.stem for path in MODELS.glob("*.json"))


def load(name: str) -> ModelShape:
    """A shape by name, or from a config.json, its directory, or a file like ours. Raises `ConfigError`.

    A hub id is found by its last part, without `-Instruct` and the like: they don't change a shape.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        path = path / "config.json"
    elif not name.endswith(".json"):
        known = ALIASES.get(name, _VARIANT.sub("", name.rpartition("/")[2].lower()))
        path = MODELS / f"{known}.json"
        if not path.is_file():
            raise UnknownNameError("model shape", name, [*ALIASES, *names()])
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"model shape '{path}' can't be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"model shape '{path}' is malformed: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"model shape '{path}' is a {type(raw).__name__}; expected an object")
    config = raw["config"] if isinstance(raw.get("config"), dict) else raw
    return parse(config, path.stem if path.stem != "config" else path.parent.name, str(path))


def parse(raw: Mapping[str, Any], name: str, where: str) -> ModelShape:
    """From the keys of a config.json. Raises `ConfigError` for what is missing or makes no sense."""
    family = str(raw.get("model_type", ""))
    if isinstance(raw.get("text_config"), Mapping):
        return parse(
            {**raw["text_config"], "model_type": raw["text_config"].get("model_type", family)}, name, where
        )

    def count(*keys: str, default: int | None = None) -> int:
        value = next((raw[key] for key in keys if raw.get(key) is not None), default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"'{where}' has {keys[0]} = {value!r}; expected a whole number, at least 1")
        return value

    gemma, qwen = family.startswith("gemma"), family.startswith("qwen")
    hidden, heads = count("hidden_size", "n_embd"), count("num_attention_heads", "n_head")
    layers = count("num_hidden_layers", "n_layer")
    mixture = _mixture(raw, count)
    windows = _windows(raw, family, layers)
    sparse = _sparse(raw, layers) if mixture is not None else [False] * layers
    kinds = Counter(zip(windows, sparse, strict=True))
    activation = str(
        raw.get("hidden_act") or raw.get("hidden_activation") or raw.get("activation_function") or "silu"
    )
    plain = family in ("gpt2", "opt", "phi", "gpt_neox", "falcon", "starcoder2") or activation == "gelu_new"
    quantised, kv = _quantised(raw)
    dtype = str(raw.get("torch_dtype") or raw.get("dtype") or "bfloat16").removeprefix("torch.")
    return ModelShape(
        name=name,
        hidden=hidden,
        intermediate=count("intermediate_size", "n_inner", "ffn_dim", default=4 * hidden),
        vocab=count("vocab_size"),
        heads=heads,
        kv_heads=count("num_key_value_heads", "num_kv_heads", default=heads),
        head_dim=count(
            "head_dim", default=256 if gemma else 128 if family.startswith("qwen3") else hidden // heads
        ),
        kinds=tuple(LayerKind(number, window, has) for (window, has), number in kinds.items()),
        max_context=count("max_position_embeddings", "n_positions", default=8192),
        tied=bool(raw.get("tie_word_embeddings", gemma)),
        matrices=2 if plain else 3,
        qkv_bias=bool(raw.get("attention_bias", family in ("qwen2", "qwen2_moe"))),
        output_bias=bool(raw.get("attention_bias", False)) and not qwen,
        mlp_bias=bool(raw.get("mlp_bias", False)),
        qk_norm=family.startswith("qwen3") or family == "gemma3_text",
        norms=4 if gemma else 2,
        mixture=mixture,
        mla=_mla(raw, count) if raw.get("kv_lora_rank") else None,
        dtype=dtype if dtype in BYTES else "bfloat16",
        weights=quantised,
        kv=kv,
    )


def _mla(raw: Mapping[str, Any], count: Any) -> Mla:
    rank = count("q_lora_rank") if raw.get("q_lora_rank") else None
    return Mla(
        count("kv_lora_rank"), rank, count("qk_rope_head_dim"), count("qk_nope_head_dim"), count("v_head_dim")
    )


def _mixture(raw: Mapping[str, Any], count: Any) -> Mixture | None:
    keys = ("num_local_experts", "num_experts", "n_routed_experts")
    if not any(raw.get(key) for key in keys):
        return None
    size = count("moe_intermediate_size", "intermediate_size")
    shared = raw.get("shared_expert_intermediate_size") or size * (raw.get("n_shared_experts") or 0)
    gated = bool(raw.get("shared_expert_intermediate_size"))
    return Mixture(count(*keys), count("num_experts_per_tok", "top_k"), size, int(shared), gated)


def _sparse(raw: Mapping[str, Any], layers: int) -> list[bool]:
    """Which layers hold experts."""
    every = raw.get("decoder_sparse_step") or raw.get("moe_layer_freq") or 1
    first, without = raw.get("first_k_dense_replace") or 0, raw.get("mlp_only_layers") or ()
    every = every if isinstance(every, int) else 1
    shift = 1 if raw.get("decoder_sparse_step") else 0
    return [i >= first and i not in without and (i + shift) % every == 0 for i in range(layers)]


def _windows(raw: Mapping[str, Any], family: str, layers: int) -> list[int | None]:
    """Each layer's window, as the layers' types say it, or else the family."""
    window = raw.get("sliding_window")
    if not window or (family.startswith("qwen") and not raw.get("use_sliding_window", False)):
        return [None] * layers
    types = raw.get("layer_types")
    if isinstance(types, list) and len(types) == layers:
        return [window if kind == "sliding_attention" else None for kind in types]
    if family.startswith("qwen"):
        return [window if i >= raw.get("max_window_layers", layers) else None for i in range(layers)]
    pattern = raw.get("sliding_window_pattern") or {"gemma2": 2, "gemma3_text": 6}.get(family)
    return [window if not pattern or (i + 1) % pattern else None for i in range(layers)]


def _quantised(raw: Mapping[str, Any]) -> tuple[str, str]:
    """(weights, KV) as the checkpoint's quantization_config says, empty where it says nothing."""
    found = raw.get("quantization_config")
    if not isinstance(found, Mapping):
        return "", ""
    method, bits = str(found.get("quant_method", "")), found.get("bits") or found.get("w_bit")
    weights = "int4" if bits == 4 else "int8" if bits == 8 else "fp8" if "fp8" in method else ""
    return weights, "fp8" if found.get("kv_cache_scheme") else ""
