"""Tokens to text as they come, and where a stop string ends it. Data plane; request path.

A token may be part of a character, and what it means may depend on the token before it (a leading space). So text
is the difference of two decodings that begin at the same earlier token, and it is held back while its end isn't a
whole character (the method that text-generation-inference and vLLM describe).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from lab.control.plan import StepPlan
from lab.control.request import RequestId

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What bytes that aren't a whole character are decoded to."""


class TextStream:
    """Text of one sequence, token by token.

    All that `push` and `finish` return, one after another, is the text of all tokens, or its part before the first
    of the strings `stop` that is complete after more than `min_tokens` tokens; then `stopped` is true. Text that may
    be the beginning of a stop string is held back until that is known. Special tokens have no text.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), min_tokens: int = 0) -> None:
        self._tokenizer, self._stop, self._min_tokens = tokenizer, tuple(stop), min_tokens
        self._window: list[int] = []
        """Tokens whose text is out but which the next ones are decoded behind, and those held back."""
        self._out = 0
        """How many of the window's tokens have their text out."""
        self._before = ""
        """Their text."""
        self._held = ""
        """Text that may begin a stop string."""
        self._count = 0
        self.stopped = False

    def push(self, token: int) -> str:
        """Text that is certain with this token; often some, sometimes none."""
        if self.stopped:
            return ""
        self._count += 1
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        if len(text) <= len(self._before) or text.endswith(_UNFINISHED):
            return ""
        return self._take(text)

    def finish(self) -> str:
        """What was held back: no more tokens will come."""
        if self.stopped:
            return ""
        text = self._take(self._tokenizer.decode(self._window))
        held, self._held = self._held, ""
        return text if self.stopped else text + held

    def _take(self, text: str) -> str:
        """The window's whole text is out, but for what may begin a stop string."""
        fresh = text[len(self._before) :]
        del self._window[: self._out]
        self._out = len(self._window)
        self._before = self._tokenizer.decode(self._window)
        return self._until_stop(fresh) if self._stop else fresh

    def _until_stop(self, fresh: str) -> str:
        old, text = len(self._held), self._held + fresh
        if self._count > self._min_tokens:
            # The first that is complete, as if characters came one by one: so tokens' borders don't matter.
            found = [
                (at + len(stop), at)
                for stop in self._stop
                if (at := text.find(stop, max(0, old - len(stop) + 1))) >= 0
            ]
            if found:
                self.stopped, self._held = True, ""
                return text[: min(found)[1]]
        longest = max(map(len, self._stop)) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                self._held = text[-length:]
                return text[:-length]
        self._held = ""
        return text


class TextStops:
    """The sequences that end where their text does. `tokenizer` is asked for when the first of them comes."""

    def __init__(self, tokenizer: Callable[[], Tokenizer]) -> None:
        self._tokenizer = tokenizer
        self._loaded: Tokenizer | None = None
        self._streams: dict[RequestId, TextStream] = {}

    def apply(self, plan: StepPlan) -> None:
        """Sequences that left and came. Raises `ModelError` when one needs a tokenizer and there is none."""
        if self._streams:
            for name in plan.released:
                self._streams.pop(name, None)
        for request in plan.new:
            if request.stop and request.output_len is None:
                self._loaded = self._loaded or self._tokenizer()
                least = request.sampling.min_tokens
                self._streams[request.id] = TextStream(self._loaded, request.stop, least)

    def reached(self, names: Sequence[RequestId], tokens: Sequence[int]) -> frozenset[RequestId]:
        """Those of `names` whose text is at a stop string with their new token."""
        if not self._streams:
            return frozenset()
        ended = set()
        for name, token in zip(names, tokens, strict=True):
            stream = self._streams.get(name)
            if stream is not None:
                stream.push(token)
                if stream.stopped:
                    ended.add(name)
        return frozenset(ended)
