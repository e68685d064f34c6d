"""Any other decoder of transformers, over our paged cache. Data plane; request path.

transformers' models look their attention up in a registry (`AttentionInterface`). Ours is entered there: it stores keys
and values in the paged cache and attends with whichever `AttentionBackend` the engine uses; all else is the model's
own code. The step's packed tokens are a batch of one, each with its position. Nothing is fused and no weight is
packed, so it is slower, with the same results.

Whether a model's attention is really what the registry was told, only the model knows. So each is tried when it is
loaded: two short sequences, cut and packed, must give what the model computes for each alone. State between
tokens, biases on scores or positions of its own making show there, and the model is refused.
"""

from __future__ import annotations

import inspect
import random
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lab.errors import ModelError
from real_engine.attention.backend import PackedBatch, PreparedAttention
from real_engine.attention.torch_cpu import TorchAttention
from real_engine.device import upload
from real_engine.kv_memory import KvMemory, KvShape
from real_engine.models.config import PLAIN, AttentionRule, ModelShape
from real_engine.models.quiet import quiet
from real_engine.models.weights import CheckpointWeights

NAME = "diptych_paged"
"""Of our attention in transformers' registry."""

_NO_INTERFACE = "its attention doesn't go through transformers' attention interface"
_BATCH_DEPENDENT = ("dynamic", "longrope")
_WITHIN = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""How far the trial's logits may lie from the model's own, as a share of the largest of them."""


@dataclass(slots=True)
class _Call:
    """What one layer told the registry."""

    rule: AttentionRule
    heads: int
    kv_heads: int
    dims: tuple[int, int, int]
    """Of queries, keys and values."""
    others: list[str]
    """Tensors that it passed besides."""


@dataclass(slots=True)
class _Step:
    """One forward pass: where its attention goes, layers counted in the order they call."""

    attention: PreparedAttention | None
    """None for a pass that only listens."""
    calls: int = 0
    heard: list[_Call] = field(default_factory=list)


_STEP: ContextVar[_Step] = ContextVar("_STEP")


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """As transformers calls it: `query` `[1, heads, tokens, dim]`, `key` and `value` likewise with KV heads; gives
    `[1, tokens, heads, dim]`, and no weights."""
    step = _STEP.get()
    rule = AttentionRule(
        kwargs.get("scaling"), kwargs.get("sliding_window") or None, kwargs.get("softcap") or None
    )
    layer, step.calls = step.calls, step.calls + 1
    if step.attention is None:
        others = [
            name for name, what in kwargs.items() if isinstance(what, Tensor) and name != "position_ids"
        ]
        dims = (query.shape[-1], key.shape[-1], value.shape[-1])
        if attention_mask is not None:
            others.append("attention_mask")
        step.heard.append(_Call(rule, query.shape[1], key.shape[1], dims, others))
        return query.new_zeros((1, query.shape[2], query.shape[1], value.shape[-1])), None
    qkv = torch.cat((query[0], key[0], value[0])).transpose(0, 1).contiguous()
    out = step.attention.forward(layer, qkv, None, rule)
    return out.view(1, query.shape[2], query.shape[1], -1), None


class ForeignDecoder:
    """A model of transformers with the interface of `Decoder`. Holds no state between steps."""

    def __init__(self, model: Any, shape: ModelShape, dtype: torch.dtype, device: torch.device) -> None:
        self.config, self.dtype, self.device = shape, dtype, device
        self._model = model
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

    def forward(self, batch: PackedBatch, attention: PreparedAttention) -> Tensor:
        """Float32 logits of the rows that sample, `[rows, vocab_size]`; keys and values go into the cache."""
        ids, positions, rows = upload(self.device, batch.token_ids, batch.positions, batch.sample_rows)
        kept = {"logits_to_keep": rows} if self._keeps else {}
        found = _run(self._model, _Step(attention), ids, positions, **kept)
        return found if self._keeps else found[rows]


def _run(model: Any, step: _Step, ids: Tensor, positions: Tensor, **kept: Tensor) -> Tensor:
    before = _STEP.set(step)
    try:
        out = model(input_ids=ids[None], position_ids=positions[None], use_cache=False, **kept)
    finally:
        _STEP.reset(before)
    logits: Tensor = out.logits[0].float()
    return logits


def load(
    directory: Path, raw: dict[str, Any], dtype: torch.dtype, device: torch.device, reason: str
) -> ForeignDecoder:
    """The decoder in `directory`, whose config.json is `raw`; `reason` says why it isn't one of ours.

    Raises `ModelError`: transformers doesn't know it either, the weights don't fit, or it can't run on paged KV.
    """
    weights = CheckpointWeights(directory)
    try:
        with quiet(), torch.inference_mode():
            model = _from_transformers(directory, dtype, weights).to(device).eval()
            return _tried(model, raw, dtype, device)
    except _Unfit as error:
        raise ModelError(f"{reason}; transformers' own code doesn't run here either: {error}") from error


class _Unfit(Exception):
    """Why a model can't be run this way."""


def _from_transformers(directory: Path, dtype: torch.dtype, weights: CheckpointWeights) -> Any:
    try:
        from transformers import AttentionInterface, AutoModelForCausalLM
    except ImportError as error:
        raise _Unfit("transformers isn't installed: pip install 'diptych[engine]'") from error
    AttentionInterface.register(NAME, _attend)
    automatic: Any = AutoModelForCausalLM
    try:
        model, info = automatic.from_pretrained(
            str(directory),
            dtype=dtype,
            attn_implementation=NAME,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as error:  # it raises a dozen kinds, some with a page of text
        if isinstance(error, KeyError) and NAME in str(error):
            raise _Unfit(_NO_INTERFACE) from error
        said = str(error).strip().splitlines() or [""]
        raise _Unfit(f"{type(error).__name__}: {said[0][:200]}") from error
    for name, found, expected in sorted(info["mismatched_keys"]):
        raise ModelError(
            f"tensor {name} of '{directory}' has shape {tuple(found)}; by config.json expected {tuple(expected)}"
        )
    for name in sorted(info["missing_keys"]):
        raise ModelError(f"'{directory}' has no tensor {name}")
    parameters = {name for name, _ in model.named_parameters()}
    weights.check_floats(lambda name: any(known.endswith(name) for known in parameters))
    return model


def _tried(model: Any, raw: dict[str, Any], dtype: torch.dtype, device: torch.device) -> ForeignDecoder:
    """The model with its shape, found by listening to a pass, and checked by a trial. Raises `_Unfit`."""
    config = model.config.get_text_config()
    _refuse_what_a_trial_cannot_show(config)
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise _Unfit("its forward pass takes no position ids, so sequences can't be packed")
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        raise _Unfit("its configuration doesn't say how many positions it has (max_position_embeddings)")
    listening = _Step(None)
    places = torch.arange(min(3, positions), device=device)
    try:
        logits = _run(model, listening, places, places)
    except Exception as error:
        raise _Unfit(f"its forward pass fails: {type(error).__name__}: {error}") from error
    calls = listening.heard
    if not calls:
        raise _Unfit(_NO_INTERFACE)
    first = calls[0]
    alike = all(
        (call.heads, call.kv_heads, call.dims) == (first.heads, first.kv_heads, first.dims) for call in calls
    )
    if not alike or len(set(first.dims)) != 1 or first.heads % first.kv_heads:
        raise _Unfit(
            "its layers don't all have the same number of KV heads, and one size of query, key and value heads"
        )
    rules = tuple(call.rule for call in calls)
    window = getattr(config, "sliding_window", None)
    if window and not any(rule.window for rule in rules):
        positions = min(positions, window)  # up to there, a window that isn't spoken of changes nothing
    eos = raw.get("eos_token_id")
    shape = ModelShape(
        family=str(raw.get("model_type")),
        vocab_size=logits.shape[-1],
        layers=len(calls),
        heads=first.heads,
        kv_heads=first.kv_heads,
        head_dim=first.dims[0],
        max_context=positions,
        eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (int(eos),),
        attention=rules if any(rule != PLAIN for rule in rules) else (),
    )
    decoder = ForeignDecoder(model, shape, dtype, device)
    if not _agrees(decoder, model):
        extra = sorted({name for call in calls for name in call.others})
        passed = f" (it passes {', '.join(extra)})" if extra else ""
        raise _Unfit(
            f"on paged KV it doesn't give what it gives by itself, so its attention is another kind{passed}"
        )
    return decoder


def _refuse_what_a_trial_cannot_show(config: Any) -> None:
    """What differs only in long sequences, or with another batch."""
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        raise _Unfit(f"it has layers of type '{min(kinds)}'; expected full_attention or sliding_attention")
    ropes = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in ropes.values() if isinstance(value, dict)]
    for rope in nested or [ropes]:
        kind = rope.get("rope_type", "default")
        if kind in _BATCH_DEPENDENT:
            raise _Unfit(f"its rope_type '{kind}' depends on the longest sequence of the batch")


def _agrees(decoder: ForeignDecoder, model: Any) -> bool:
    """Whether two sequences, cut into chunks and packed, get the logits that the model gives each by itself."""
    size, shape = 4, decoder.config
    lengths = [min(n, shape.max_context) for n in (13, 6)]
    rng = random.Random(0)
    texts = [[rng.randrange(shape.vocab_size) for _ in range(length)] for length in lengths]
    cuts = [[(0, 0, 5)], [(1, 0, lengths[1]), (0, 5, 6)], [(0, 6, lengths[0])]]
    blocks = [[5, 1, 4, 2], [3, 0]]
    memory = KvMemory(KvShape.of(shape, decoder.dtype, size), 6, decoder.device)
    got: list[list[Tensor]] = [[], []]
    for cut in cuts:
        parts = [(i, first, last) for i, first, last in cut if first < min(last, lengths[i])]
        if not parts:
            continue
        batch = PackedBatch.by_hand([(texts[i][a:b], a, blocks[i]) for i, a, b in parts], size)
        logits = decoder.forward(batch, TorchAttention().prepare(batch, memory))
        for (i, *_), first, last in zip(parts, batch.cu_seqlens_q, batch.cu_seqlens_q[1:], strict=False):
            got[i].append(logits[first:last])
    model.set_attn_implementation("eager")
    try:
        wanted = [
            model(input_ids=torch.tensor([text], device=decoder.device), use_cache=False) for text in texts
        ]
    finally:
        model.set_attn_implementation(NAME)
    for found, out in zip(got, wanted, strict=True):
        theirs, ours = out.logits[0].float(), torch.cat(found)
        if not (ours - theirs).abs().max() <= _WITHIN[decoder.dtype] * theirs.abs().max():
            return False
    return True
