"""The forward pass of a decoder over packed tokens. Data plane; request path.

One function per layer and no modules: the three projections of attention are one product, gate and up
another, and nothing is padded. Each step gives logits only for the rows that sample, since the head over a
large vocabulary costs as much as several layers. What families have and Llama hasn't is an optional part of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from real_engine.attention.backend import PackedBatch, PreparedAttention
from real_engine.attention.native_cpu import NativePrepared
from real_engine.device import upload
from real_engine.models.config import AttentionRule, DecoderConfig
from real_engine.models.feed_forward import Gated, Mixture
from real_engine.models.linear import Linear, packed_available
from real_engine.models.ops import Ops, TorchOps
from real_engine.models.rope import RopeTable
from real_engine.models.shard import ALONE, Shard
from real_engine.models.weights import Weights
from real_engine.native.library import LANES, PANEL, Kernels
from real_engine.native.stack import Stack, StackLayer

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class _Layer:
    attention_norm: Tensor
    qkv: Linear
    qk_norm: Tensor | None
    """`[heads + kv_heads, head_dim]`: the norm's weight for each query and key head."""
    rope: RopeTable
    rule: AttentionRule
    output: Linear
    attention_post_norm: Tensor | None
    mlp_norm: Tensor
    mlp: Gated | Mixture
    mlp_post_norm: Tensor | None


class Decoder:
    """Weights in memory, ready to compute. Made under `torch.inference_mode`; holds no state between steps."""

    def __init__(
        self,
        config: DecoderConfig,
        weights: Weights,
        dtype: torch.dtype,
        device: torch.device = CPU,
        shard: Shard = ALONE,
    ) -> None:
        """`config` and `weights` are the whole model's; `shard` says what part of it is held here.

        Raises `ModelError` for a tensor that is missing or of another shape.
        """
        place, layers = shard.place, shard.place.layers(config.layers)
        config, weights = shard.config(config), shard.weights(weights)
        self.config, self.dtype, self.device, self.shard = config, dtype, device, shard
        self.ops: Ops = TorchOps()
        """What lies between the matrix products."""
        self._stack: Stack | None = None
        self._weights = weights
        c = config
        embeds = place.first or (place.last and c.tied_embeddings)
        self._embedding = (
            self._take("model.embed_tokens.weight", c.vocab_size, c.hidden_size)
            if embeds
            else torch.empty((0, c.hidden_size), dtype=dtype, device=device)
        )
        self._rope = RopeTable(c.rope, c.head_dim, c.max_context, dtype, device)
        self._local_rope = self._rope
        if c.local_rope is not None:
            self._local_rope = RopeTable(c.local_rope, c.head_dim, c.max_context, dtype, device)
        self._layers = [self._layer(i) for i in layers]
        if place.last:
            self._norm = self._norm_weight("model.norm")
            head = (
                self._embedding
                if c.tied_embeddings
                else self._take("lm_head.weight", c.vocab_size, c.hidden_size)
            )
            self._head = Linear(shard.head(head))
        del self._weights

    def use(self, kernels: Kernels, *, int8: bool = False) -> None:
        """Compute with our own CPU kernels, as far as they go: single operations, products, or all layers in one call.

        `int8` multiplies in 8 bits wherever a weight suits, but for the head. Made under `torch.inference_mode`.
        """
        c = self.config
        if any(width % LANES for width in c.widths):
            return
        self.ops = kernels
        if self.shard.place.last:
            self._head.use(kernels)
        stack: list[StackLayer] = []
        for layer in self._layers:
            mlp = layer.mlp
            for linear in (layer.qkv, layer.output, *mlp.products):
                linear.use(kernels, int8=int8)
            if isinstance(mlp, Gated):
                norms, products = (
                    (layer.attention_norm, layer.mlp_norm),
                    (layer.qkv, layer.output, *mlp.products),
                )
                stack.append(StackLayer(norms, products, layer.rule))
        panels = c.head_dim % PANEL == 0 == c.intermediate_size % PANEL
        whole = self.shard.place.tensor == 1  # else each layer waits for sums over the ranks
        if (
            whole
            and panels
            and c.plain_layers
            and len(stack) == c.layers
            and all(layer.suits for layer in stack)
        ):
            self._stack = Stack(kernels, c, stack, self._rope)

    @property
    def quantized(self) -> bool:
        """Whether products are computed in 8 bits."""
        return any(layer.qkv.quantized for layer in self._layers)

    @property
    def products(self) -> str:
        """How matrix products are computed, as a run's manifest should name it."""
        if self.quantized:
            return "native-int8"
        if self._layers[0].qkv.native is not None:
            return "native"
        return "onednn-packed" if packed_available() and self.device.type == "cpu" else "torch"

    @property
    def fused(self) -> bool:
        """Whether all layers are computed in one call of our own kernels."""
        return self._stack is not None

    def forward(self, batch: PackedBatch, attention: PreparedAttention) -> Tensor:
        """Float32 logits of the rows that sample, `[rows, vocab_size]`; keys and values go into the cache."""
        token_ids, rows = upload(self.device, batch.token_ids, batch.sample_rows)
        return self.logits(*self.hidden(token_ids, attention), rows)

    @property
    def recordable(self) -> bool:
        """Whether `hidden` does the same operations whatever the numbers, and all of them here: a mixture looks up
        who was chosen, and a part of a model waits for other ranks."""
        return not self.config.sparse_layers and self.shard.alone

    def hidden(self, token_ids: Tensor, attention: PreparedAttention) -> tuple[Tensor, Tensor | None]:
        """All layers over the tokens, int64 `[tokens]`: the residual stream and what the last layer adds to it,
        both `[tokens, hidden]`. Reads nothing on the host, so that a device can record it."""
        c, ops, shard = self.config, self.ops, self.shard
        rotated = c.heads + c.kv_heads
        x = self._entering(token_ids)
        if self._stack is not None and isinstance(attention, NativePrepared):
            return self._stack.forward(x, attention), None
        added: Tensor | None = None
        for number, layer in enumerate(self._layers):
            qkv = layer.qkv(ops.add_norm(x, added, layer.attention_norm, c.norm_eps))
            qkv = qkv.view(len(x), -1, c.head_dim)  # [tokens, heads + 2 * kv_heads, head_dim]
            if layer.qk_norm is not None:
                qk = F.rms_norm(qkv[:, :rotated], (c.head_dim,), None, c.norm_eps) * layer.qk_norm
                qkv = torch.cat((qk, qkv[:, rotated:]), 1)
            added = shard.sum_(layer.output(attention.forward(number, qkv, layer.rope, layer.rule)))
            if layer.attention_post_norm is not None:
                added = ops.add_norm(added, None, layer.attention_post_norm, c.norm_eps)
            added = shard.sum_(layer.mlp.forward(ops.add_norm(x, added, layer.mlp_norm, c.norm_eps), ops))
            if layer.mlp_post_norm is not None:
                added = ops.add_norm(added, None, layer.mlp_post_norm, c.norm_eps)
        return x, added

    def logits(self, x: Tensor, added: Tensor | None, rows: Tensor) -> Tensor:
        """What `hidden` gave, through the final norm and the head: float32 `[rows, vocab_size]`.

        Of a part of a model, only the rank that draws gets logits.
        """
        if not self.shard.place.last:
            self.shard.send(x if added is None else x.add_(added))
            return x[:0]
        last, left = x[rows], None if added is None else added[rows]
        found = self._head(self.ops.add_norm(last, left, self._norm, self.config.norm_eps), torch.float32)
        found = self.shard.gather(found)
        cap = self.config.final_softcap
        return found if cap is None else found.div_(cap).tanh_().mul_(cap)

    def _entering(self, token_ids: Tensor) -> Tensor:
        """The residual stream `[tokens, hidden]` before the first layer here."""
        c = self.config
        if not self.shard.place.first:
            return self.shard.receive(len(token_ids), c.hidden_size, self._embedding)
        x = self._embedding[token_ids]
        if c.embedding_scale != 1:
            x *= torch.tensor(c.embedding_scale, dtype=self.dtype)  # rounded to it, as the model was trained
        return x

    def _take(self, name: str, *shape: int) -> Tensor:
        return self._weights.take(name, *shape).to(self.device, self.dtype)

    def _norm_weight(self, name: str, width: int | None = None) -> Tensor:
        weight = self._weights.take(f"{name}.weight", width or self.config.hidden_size)
        if self.config.norm_offset:
            weight = weight.float() + self.config.norm_offset
        return weight.to(self.device, self.dtype)

    def _layer(self, number: int) -> _Layer:
        c, prefix = self.config, f"model.layers.{number}"
        q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
        attention = f"{prefix}.self_attn"
        qkv = [(f"{attention}.q_proj", q), (f"{attention}.k_proj", kv), (f"{attention}.v_proj", kv)]
        qk_norm: Tensor | None = None
        if c.qk_norm:
            query, key = (
                self._norm_weight(f"{attention}.{name}", c.head_dim) for name in ("q_norm", "k_norm")
            )
            qk_norm = torch.cat((query.expand(c.heads, -1), key.expand(c.kv_heads, -1)))
        # With post-norms, the norm that other families call `post_attention` is one, and theirs is `pre_feedforward`.
        after, before = "post_attention_layernorm", "pre_feedforward_layernorm"
        rule = c.rule(number)
        return _Layer(
            attention_norm=self._norm_weight(f"{prefix}.input_layernorm"),
            qkv=self._linear(qkv, c.hidden_size, c.qkv_bias),
            qk_norm=qk_norm,
            rope=self._rope if rule.window is None else self._local_rope,
            rule=rule,
            output=self._linear([(f"{attention}.o_proj", c.hidden_size)], q, c.output_bias),
            attention_post_norm=self._norm_weight(f"{prefix}.{after}") if c.post_norms else None,
            mlp_norm=self._norm_weight(f"{prefix}.{before if c.post_norms else after}"),
            mlp=self._mixture(prefix)
            if number in c.sparse_layers
            else self._gated(f"{prefix}.mlp", c.intermediate_size),
            mlp_post_norm=self._norm_weight(f"{prefix}.post_feedforward_layernorm") if c.post_norms else None,
        )

    def _gated(
        self, prefix: str, width: int, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    ) -> Gated:
        c = self.config
        gate, up, down = (f"{prefix}.{name}" for name in names)
        return Gated(
            gate_up=self._linear([(gate, width), (up, width)], c.hidden_size, c.mlp_bias),
            down=self._linear([(down, c.hidden_size)], width, c.mlp_bias),
            activation=c.activation,
        )

    def _mixture(self, layer: str) -> Mixture:
        found = self.config.experts
        assert found is not None
        block, *names = found.names
        prefix, hidden = f"{layer}.{block}", self.config.hidden_size
        gate, up, down = names
        shared: tuple[Linear, Gated] | None = None
        if found.shared_size is not None:
            shared = (
                self._linear([(f"{prefix}.shared_expert_gate", 1)], hidden, False),
                self._gated(f"{prefix}.shared_expert", found.shared_size),
            )
        return Mixture(
            router=self._linear([(f"{prefix}.gate", found.count)], hidden, False),
            experts=[
                self._gated(f"{prefix}.experts.{i}", found.intermediate_size, (gate, up, down))
                for i in range(found.count)
            ],
            per_token=found.per_token,
            renormalized=found.renormalized,
            shared=shared,
        )

    def _linear(self, parts: list[tuple[str, int]], inputs: int, bias: bool) -> Linear:
        """Several projections of the same input as one product, their rows one after another."""
        weight = torch.cat([self._take(f"{name}.weight", rows, inputs) for name, rows in parts])
        if not bias:
            return Linear(weight)
        return Linear(weight, torch.cat([self._take(f"{name}.bias", rows) for name, rows in parts]))
