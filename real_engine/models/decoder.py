"""The forward pass of a Llama-family decoder over packed tokens. Data plane; request path.

One function per layer and no modules: the three projections of attention are one product, gate and up
another, and nothing is padded. Each step gives logits only for the rows that sample, since the head over a
large vocabulary costs as much as several layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from real_engine.attention.backend import PackedBatch, PreparedAttention
from real_engine.device import upload
from real_engine.models.config import DecoderConfig
from real_engine.models.linear import Linear
from real_engine.models.ops import Ops, TorchOps
from real_engine.models.rope import RopeTable
from real_engine.models.weights import Weights

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class _Layer:
    attention_norm: Tensor
    qkv: Linear
    qk_norm: Tensor | None
    """`[heads + kv_heads, head_dim]`: the norm's weight for each query and key head."""
    output: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear


class Decoder:
    """Weights in memory, ready to compute. Made under `torch.inference_mode`; holds no state between steps."""

    def __init__(
        self, config: DecoderConfig, weights: Weights, dtype: torch.dtype, device: torch.device = CPU
    ) -> None:
        """Raises `ModelError` for a tensor that is missing or of another shape."""
        self.config, self.dtype, self.device = config, dtype, device
        self.ops: Ops = TorchOps()
        """What lies between the matrix products; may be replaced by a faster one."""
        self._weights = weights
        c = config
        self._embedding = self._take("model.embed_tokens.weight", c.vocab_size, c.hidden_size)
        self._layers = [self._layer(f"model.layers.{i}") for i in range(c.layers)]
        self._norm = self._take("model.norm.weight", c.hidden_size)
        head = (
            self._embedding
            if c.tied_embeddings
            else self._take("lm_head.weight", c.vocab_size, c.hidden_size)
        )
        self._head = Linear(head)
        self._rope = RopeTable(c.rope, c.head_dim, c.max_context, dtype, device)
        del self._weights

    def forward(self, batch: PackedBatch, attention: PreparedAttention) -> Tensor:
        """Float32 logits of the rows that sample, `[rows, vocab_size]`; keys and values go into the cache."""
        token_ids, rows = upload(self.device, batch.token_ids, batch.sample_rows)
        return self.logits(*self.hidden(token_ids, attention), rows)

    def hidden(self, token_ids: Tensor, attention: PreparedAttention) -> tuple[Tensor, Tensor | None]:
        """All layers over the tokens, int64 `[tokens]`: the residual stream and what the last layer adds to it,
        both `[tokens, hidden]`. Reads nothing on the host, so that a device can record it."""
        c, ops = self.config, self.ops
        rotated = c.heads + c.kv_heads
        x = self._embedding[token_ids]  # [tokens, hidden]
        added: Tensor | None = None
        for number, layer in enumerate(self._layers):
            qkv = layer.qkv(ops.add_norm(x, added, layer.attention_norm, c.norm_eps))
            qkv = qkv.view(len(x), -1, c.head_dim)  # [tokens, heads + 2 * kv_heads, head_dim]
            if layer.qk_norm is not None:
                qk = F.rms_norm(qkv[:, :rotated], (c.head_dim,), None, c.norm_eps) * layer.qk_norm
                qkv = torch.cat((qk, qkv[:, rotated:]), 1)
            added = layer.output(attention.forward(number, qkv, self._rope))
            gate_up = layer.gate_up(ops.add_norm(x, added, layer.mlp_norm, c.norm_eps))
            added = layer.down(ops.silu_mul(gate_up))
        return x, added

    def logits(self, x: Tensor, added: Tensor | None, rows: Tensor) -> Tensor:
        """What `hidden` gave, through the final norm and the head: float32 `[rows, vocab_size]`."""
        last, left = x[rows], None if added is None else added[rows]
        return self._head(self.ops.add_norm(last, left, self._norm, self.config.norm_eps)).float()

    def _take(self, name: str, *shape: int) -> Tensor:
        return self._weights.take(name, *shape).to(self.device, self.dtype)

    def _layer(self, prefix: str) -> _Layer:
        c = self.config
        q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        qkv = [(f"{attention}.q_proj", q), (f"{attention}.k_proj", kv), (f"{attention}.v_proj", kv)]
        gate_up = [(f"{mlp}.gate_proj", c.intermediate_size), (f"{mlp}.up_proj", c.intermediate_size)]
        qk_norm: Tensor | None = None
        if c.qk_norm:
            query, key = (
                self._take(f"{attention}.{name}.weight", c.head_dim) for name in ("q_norm", "k_norm")
            )
            qk_norm = torch.cat((query.expand(c.heads, -1), key.expand(c.kv_heads, -1)))
        return _Layer(
            attention_norm=self._take(f"{prefix}.input_layernorm.weight", c.hidden_size),
            qkv=self._linear(qkv, c.hidden_size, c.qkv_bias),
            qk_norm=qk_norm,
            output=self._linear([(f"{attention}.o_proj", c.hidden_size)], q, c.output_bias),
            mlp_norm=self._take(f"{prefix}.post_attention_layernorm.weight", c.hidden_size),
            gate_up=self._linear(gate_up, c.hidden_size, c.mlp_bias),
            down=self._linear([(f"{mlp}.down_proj", c.hidden_size)], c.intermediate_size, c.mlp_bias),
        )

    def _linear(self, parts: list[tuple[str, int]], inputs: int, bias: bool) -> Linear:
        """Several projections of the same input as one product, their rows one after another."""
        weight = torch.cat([self._take(f"{name}.weight", rows, inputs) for name, rows in parts])
        if not bias:
            return Linear(weight)
        return Linear(weight, torch.cat([self._take(f"{name}.bias", rows) for name, rows in parts]))
