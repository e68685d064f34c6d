"""From logits to tokens. Data plane; request path.

Greedy rows are answered by one argmax. Others are drawn on the host by inverting the cumulative distribution
at a number that depends on (seed, position) alone, so a request's tokens don't depend on what shares its
batch, and a run repeats. The filters apply in transformers' order: temperature, top-k, top-p, min-p. Rows with
penalties, a bias or a least length are changed before all that (`penalties.py`), one by one.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lab.control.plan import TokenLogprobs
from lab.control.request import RequestId, SamplingParams
from lab.errors import ExecutorError
from real_engine.penalties import Adjustment

_U64 = (1 << 64) - 1
_HEAD = 1024
"""How many of the most likely tokens top-p looks at before it sorts the whole vocabulary."""

Floats = NDArray[np.float64]
Ids = NDArray[np.int64]


def sample(
    logits: Tensor,
    requests: Sequence[RequestId],
    params: Sequence[SamplingParams],
    positions: Sequence[int],
    adjusted: Mapping[int, Adjustment] = MappingProxyType({}),
) -> tuple[list[int], dict[RequestId, TokenLogprobs]]:
    """A token for each row of `logits` (float32 `[rows, vocab]`), and log-probabilities where asked for.

    Row i belongs to `requests[i]`, and its token will stand at `positions[i]` of that sequence; `adjusted` has, for
    some rows, what changes them before a token is chosen. Log-probabilities are the model's own, before that. Raises
    `ExecutorError` naming the request when a row holds NaN or +infinity, or leaves nothing to choose.
    """
    best = _argmax(logits)
    # argmax ranks NaN highest, so the winner's value tells of any NaN or +inf in its row.
    finite = logits.gather(1, best.unsqueeze(1)).squeeze(1).isfinite()
    if not bool(finite.all()):
        bad = int((~finite).nonzero()[0])
        raise ExecutorError(
            f"request '{requests[bad]}': the logits at position {positions[bad]} aren't finite numbers"
        )
    tokens: list[int] = best.tolist()
    logprobs: dict[RequestId, TokenLogprobs] = {}
    for row, (name, how) in enumerate(zip(requests, params, strict=True)):
        change = adjusted.get(row)
        if change is not None:
            tokens[row] = _changed(logits[row], change, how, name, positions[row])
        elif how.temperature > 0:
            tokens[row] = _draw(logits[row], how, positions[row])
        if how.logprobs is not None:
            logprobs[name] = _logprobs(logits[row], tokens[row], how.logprobs)
    return tokens, logprobs


def _changed(row: Tensor, change: Adjustment, how: SamplingParams, name: RequestId, position: int) -> int:
    """A token of a row that is changed before it is chosen from."""
    values = change.apply(row.cpu().numpy())
    best = int(values.argmax())
    if not np.isfinite(values[best]):
        raise ExecutorError(
            f"request '{name}': its bias, penalties and stop tokens leave no token to draw at position {position}"
        )
    return _draw(torch.from_numpy(values), how, position) if how.temperature > 0 else best


def _argmax(logits: Tensor) -> Tensor:
    """Of each row. numpy's is several times faster than torch's on a CPU; both rank NaN highest."""
    if logits.device.type == "cpu" and not logits.requires_grad:
        return torch.from_numpy(logits.numpy().argmax(-1))
    return logits.argmax(-1)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on its arguments alone (blake2b, 53 bits)."""
    digest = hashlib.blake2b(struct.pack("<QQ", seed & _U64, position), digest_size=8, person=b"sampler")
    return (int.from_bytes(digest.digest(), "little") >> 11) * 2.0**-53


def distribution(logits: Tensor, params: SamplingParams) -> tuple[Floats, Ids]:
    """What a row `[vocab]` is drawn from, for a temperature above 0: (probabilities, their token ids, rising).

    top-k keeps the k likeliest tokens; top-p the smallest set of the likeliest of those whose share reaches
    `top_p`; min-p those at least `min_p` times as likely as the likeliest. Ties go to the lower id.
    """
    values = logits.cpu().numpy().astype(np.float64)
    weights = np.exp((values - values.max()) / params.temperature)  # the likeliest weighs 1
    ids: Ids = np.arange(len(values))
    if 0 < params.top_k < len(ids):
        ids = _likeliest(ids, values, params.top_k)
    if params.top_p < 1:
        enough = params.top_p * weights[ids].sum()
        if len(ids) > _HEAD:
            head = _likeliest(ids, values, _HEAD)
            if weights[head].sum() >= enough:
                ids = head
        order = ids[np.argsort(-values[ids], kind="stable")]
        kept = int(np.searchsorted(np.cumsum(weights[order]), enough, side="left")) + 1
        ids = np.sort(order[:kept])
    if params.min_p > 0:
        ids = ids[weights[ids] >= params.min_p]
    return weights[ids] / weights[ids].sum(), ids


def _draw(logits: Tensor, params: SamplingParams, position: int) -> int:
    probabilities, ids = distribution(logits, params)
    cumulative = np.cumsum(probabilities)
    target = uniform(params.seed, position) * cumulative[-1]
    # Rounding may take the target to the very end: then it is the last token that can be drawn at all.
    last = int(np.searchsorted(cumulative, cumulative[-1], side="left"))
    return int(ids[min(int(np.searchsorted(cumulative, target, side="right")), last)])


def _likeliest(ids: Ids, values: Floats, k: int) -> Ids:
    """The k of rising `ids` with the highest values, rising; among equals the lower ids."""
    mine = values[ids]
    threshold = np.partition(mine, len(mine) - k)[len(mine) - k]
    above = np.flatnonzero(mine > threshold)
    level = np.flatnonzero(mine == threshold)[: k - len(above)]
    return ids[np.sort(np.concatenate((above, level)))]


def _logprobs(row: Tensor, token: int, top: int) -> TokenLogprobs:
    """Of the model's own distribution, before temperature and filters."""
    values = torch.log_softmax(row, -1)
    best, ids = values.topk(min(top, len(values)))
    return TokenLogprobs(float(values[token]), tuple(zip(ids.tolist(), best.tolist(), strict=True)))
