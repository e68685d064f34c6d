"""What enters: a request, its prompt, and how its tokens are sampled. Request path, control plane.

A prompt is a sequence of *pieces*. A piece is either literal token ids, or a `Segment`: a stretch of an
endless synthetic text named by a 64-bit number. Segments let a trace of a million long prompts stay small,
let both backends see exactly the same shared prefixes, and give the engine real token ids when it asks.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import KW_ONLY, field, replace
from typing import TypeAlias

from lab.frozen import frozen

RequestId: TypeAlias = str
BlockId: TypeAlias = int

_MASK = (1 << 64) - 1


@frozen
class Segment:
    """Tokens `start .. start + length` of the synthetic text called `stream`."""

    stream: int
    start: int
    length: int

    def __len__(self) -> int:
        return self.length


Piece: TypeAlias = Segment | tuple[int, ...]


def stream_of(*names: object) -> int:
    """A stable 64-bit name for a synthetic text (blake2b, never `hash()`)."""
    text = "\x1f".join(map(str, names)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


_OUTPUT = hashlib.blake2b(b"output\x1f", digest_size=8)


def synthetic_token(stream: int, position: int, vocab_size: int) -> int:
    """Token id at one position of a synthetic text (splitmix64 of stream and position)."""
    z = (stream + (position + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return (z ^ (z >> 31)) % vocab_size


def _synthesised(segment: Segment, vocab_size: int) -> list[int]:
    """`synthetic_token` over a whole segment, in numpy: a prompt's ids are made while its step waits."""
    import numpy as np

    positions = np.arange(segment.start + 1, segment.start + segment.length + 1, dtype=np.uint64)
    z = np.uint64(segment.stream) + positions * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    ids: list[int] = ((z ^ (z >> np.uint64(31))) % np.uint64(vocab_size)).tolist()
    return ids


@frozen
class Prompt:
    """An immutable prompt; `len(prompt)` is its number of tokens."""

    pieces: tuple[Piece, ...]
    _length: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_length", sum(len(piece) for piece in self.pieces))

    @classmethod
    def of(cls, tokens: Iterable[int]) -> Prompt:
        """A prompt of literal token ids."""
        return cls((tuple(tokens),))

    def __len__(self) -> int:
        return self._length

    def token_ids(self, vocab_size: int) -> list[int]:
        """Concrete ids: literal pieces as they are, segments synthesised, these all below `vocab_size`."""
        ids: list[int] = []
        for piece in self.pieces:
            ids += _synthesised(piece, vocab_size) if isinstance(piece, Segment) else piece
        return ids


@frozen
class SamplingParams:
    """How the next token is drawn. `temperature == 0` is greedy and ignores the filters.

    The draw depends on (seed, position) alone, so it is the same in any batch.
    `logprobs` asks for that many alternatives beside the chosen token's own log-probability.

    Logits are changed in this order: `logit_bias` (token id, number) is added; what stands in prompt or output is
    divided by `repetition_penalty` where positive and multiplied by it where negative; what stands in the output
    loses `frequency_penalty` for each time and `presence_penalty` once; until there are `min_tokens` tokens no
    stop token can be drawn, and no stop string ends the request.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    logprobs: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0

    def __post_init__(self) -> None:
        repetition = self.repetition_penalty
        checks = (
            ("temperature", self.temperature, self.temperature >= 0, ">= 0"),
            ("top_k", self.top_k, self.top_k >= 0, ">= 0 (0 keeps all)"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "in [0, 1]"),
            ("logprobs", self.logprobs, self.logprobs is None or self.logprobs >= 0, ">= 0"),
            (
                "repetition_penalty",
                repetition,
                0 < repetition < math.inf,
                "a finite number above 0 (1: none)",
            ),
            (
                "presence_penalty",
                self.presence_penalty,
                math.isfinite(self.presence_penalty),
                "a finite number",
            ),
            (
                "frequency_penalty",
                self.frequency_penalty,
                math.isfinite(self.frequency_penalty),
                "a finite number",
            ),
            ("min_tokens", self.min_tokens, self.min_tokens >= 0, ">= 0"),
        )
        for token, bias in self.logit_bias:
            if token < 0 or not math.isfinite(bias):
                raise ValueError(
                    f"sampling parameter logit_bias has {bias} for token {token}; expected token ids >= 0 and "
                    "finite numbers"
                )
        for name, value, good, expected in checks:
            if not good:
                raise ValueError(f"sampling parameter {name} is {value}; expected {expected}")

    @property
    def penalised(self) -> bool:
        """Whether logits depend on the tokens before, or on a bias."""
        return bool(
            self.logit_bias or self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty
        )


GREEDY = SamplingParams()


@frozen
class Request:
    """One request as the control plane receives it. Times are integer nanoseconds since the run began.

    `output_len` forces the number of generated tokens and ignores EOS: the experiments' mode, where a
    generated token enters the prefix cache as an identity (request, position). With `output_len=None`
    generation ends at `max_tokens`, at a token of `stop_ids`, or with a text of `stop` (which only a data plane
    with a tokenizer can see), and real tokens are the content.
    """

    _: KW_ONLY
    id: RequestId
    prompt: Prompt
    arrival: int = 0
    max_tokens: int = 16
    output_len: int | None = None
    stop_ids: tuple[int, ...] = ()
    sampling: SamplingParams = GREEDY
    tenant: str = ""
    session: str = ""
    priority: int = 0
    ttft_slo: int | None = None
    tpot_slo: int | None = None
    cache_salt: str = ""
    stop: tuple[str, ...] = ()
    n: int = 1
    """Outputs wanted: more than one become as many sequences where the request enters an engine (`sequences`)."""
    parent: RequestId = ""
    sample: int = 0
    """Of one such sequence: the request that it belongs to, and its number there, from 1."""

    def __post_init__(self) -> None:
        if len(self.prompt) < 1:
            raise ValueError(f"request '{self.id}' has an empty prompt; expected at least 1 token")
        if self.arrival < 0:
            raise ValueError(f"request '{self.id}' arrives at {self.arrival} ns; expected >= 0")
        if self.output_limit < 1:
            raise ValueError(f"request '{self.id}' may generate {self.output_limit} tokens; expected >= 1")
        if self.n < 1:
            raise ValueError(f"request '{self.id}' asks for {self.n} outputs (n); expected >= 1")
        if self.sampling.min_tokens > self.output_limit:
            raise ValueError(
                f"request '{self.id}' is to generate {self.sampling.min_tokens} tokens or more (min_tokens) and at "
                f"most {self.output_limit}; expected the first to be no more than the second"
            )
        if not all(self.stop):
            raise ValueError(f"request '{self.id}' has an empty stop string; expected at least 1 character")

    @property
    def output_limit(self) -> int:
        """The most tokens this request can generate."""
        return self.max_tokens if self.output_len is None else self.output_len

    @property
    def output_stream(self) -> int:
        """The synthetic text that stands for this request's forced output, for a later turn to quote.

        Of several outputs a later turn quotes the first.
        """
        state = _OUTPUT.copy()  # `stream_of` of both words, for half the time
        state.update((self.parent if self.sample == 1 else self.id).encode())
        return int.from_bytes(state.digest(), "little")

    def sequences(self) -> tuple[Request, ...]:
        """Itself; or of `n` outputs one request each, called `ID#1` to `ID#n`, with seeds of their own."""
        if self.n == 1:
            return (self,)
        seed = self.sampling.seed
        return tuple(
            replace(
                self,
                id=f"{self.id}#{i}",
                n=1,
                parent=self.id,
                sample=i,
                sampling=replace(self.sampling, seed=stream_of("sample", seed, i) >> 1),
            )
            for i in range(1, self.n + 1)
        )
