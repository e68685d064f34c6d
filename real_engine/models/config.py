"""The shape of a decoder, in our own words. Data plane; state path.

Only what changes the arithmetic is kept, so that the forward pass never meets the names of families or the many
spellings of config files: those end in `real_engine/models/families.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


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


@dataclass(frozen=True, slots=True)
class AttentionRule:
    """How one layer attends, beyond causality."""

    scale: float | None = None
    """Factor of the scores; None for 1 / sqrt(head_dim)."""
    window: int | None = None
    """A token attends to this many, itself included; None for all before it (Mistral, arXiv:2310.06825)."""
    softcap: float | None = None
    """Scores s become softcap * tanh(s / softcap) (Gemma 2, arXiv:2408.00118)."""

    @property
    def needs(self) -> frozenset[str]:
        """What a backend must be able to do for it, of `window` and `softcap`."""
        return frozenset(name for name in ("window", "softcap") if getattr(self, name) is not None)


PLAIN = AttentionRule()


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """A layer's mixture of experts: each token goes to the `per_token` of `count` that its router likes best."""

    count: int
    per_token: int
    intermediate_size: int
    renormalized: bool
    """Whether the chosen experts' shares of the softmax over all are scaled to sum to 1."""
    shared_size: int | None = None
    """Width of the expert that every token goes to as well, through a gate of its own (Qwen2-MoE)."""
    names: tuple[str, str, str, str] = ("mlp", "gate_proj", "up_proj", "down_proj")
    """How the checkpoint calls the block and an expert's three products."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What the engine around a model needs to know. Sizes are counts; `max_context` is in tokens."""

    family: str
    vocab_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_context: int
    """Longest sequence: the positions that the model was trained for."""
    eos_token_ids: tuple[int, ...] = ()
    attention: tuple[AttentionRule, ...] = ()
    """One for each layer; empty where all are plain."""

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.heads // self.kv_heads

    @property
    def needs(self) -> frozenset[str]:
        """What an attention backend must be able to do for some layer, of `window` and `softcap`."""
        return frozenset().union(*(rule.needs for rule in self.attention))

    def rule(self, layer: int) -> AttentionRule:
        return self.attention[layer] if self.attention else PLAIN


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig(ModelShape):
    """Everything our own forward pass needs to know. What has a default is absent from a plain Llama."""

    hidden_size: int
    intermediate_size: int
    norm_eps: float
    rope: Rope
    tied_embeddings: bool
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMSNorm over each query and key head before the rotary embedding (Qwen3, Gemma 3)."""
    local_rope: Rope | None = None
    """Rotary embedding of the layers with a window, where it is another (Gemma 3)."""
    activation: Literal["silu", "gelu_tanh"] = "silu"
    norm_offset: float = 0.0
    """Added to the weights of all norms (1 for Gemma, whose checkpoints hold the distance from 1)."""
    post_norms: bool = False
    """A norm after attention and after the feed-forward block as well, before the residual (Gemma)."""
    embedding_scale: float = 1.0
    final_softcap: float | None = None
    """As `AttentionRule.softcap`, for the logits."""
    experts: Experts | None = None
    sparse_layers: frozenset[int] = frozenset()
    """The layers that have experts."""

    @property
    def widths(self) -> tuple[int, ...]:
        """Of everything that is normed or gated: what a vector kernel asks about."""
        found = [self.hidden_size, self.intermediate_size]
        if self.experts is not None:
            found += [
                self.experts.intermediate_size,
                self.experts.shared_size or self.experts.intermediate_size,
            ]
        return tuple(found)

    @property
    def plain(self) -> bool:
        """Whether this is a Llama of any size: no biases, and none of what sets the other families apart."""
        biased = self.qkv_bias or self.output_bias or self.mlp_bias
        return not biased and not self.attention and not self.sparse_layers and self.plain_layers

    @property
    def plain_layers(self) -> bool:
        """Whether each layer is: two norms, attention, and a feed-forward block gated by silu. Biases, windows and
        experts aside."""
        return (
            self.activation == "silu" and not self.qk_norm and not self.post_norms and self.local_rope is None
        )
