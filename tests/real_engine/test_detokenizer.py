"""Text comes out whole, whatever the tokens are, and ends before a stop string wherever tokens end."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lab.control.core import EngineCore
from lab.control.executor import Capacity
from lab.control.request import Prompt, Request, SamplingParams
from policies.eviction.lru import Lru
from policies.scheduling.fcfs import Fcfs
from real_engine.detokenizer import TextStream
from real_engine.executor import TorchExecutor
from real_engine.models.loading import LoadedModel, load_model
from real_engine.models.spec import ModelSpec
from tests.real_engine.reference import serve


def byte_level() -> Tokenizer:
    """Every byte, and some tokens of several bytes that cut characters anywhere; the last one is special."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    rng = random.Random(1)
    sample = "größer 日本語 🙂👩‍👩‍👧 end. ab".encode()
    names = {byte: letter for letter in letters for byte in [_byte(letter)]}
    cut = {
        "".join(names[b] for b in sample[i : i + rng.randint(2, 5)])
        for i in (rng.randrange(len(sample) - 5) for _ in range(60))
    }
    vocab = {text: i for i, text in enumerate([*letters, *sorted(cut - set(letters))])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return tokenizer


def _byte(letter: str) -> int:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return ord(letter) if ord(letter) < 256 else others[ord(letter) - 256]


BYTES = byte_level()
SIZE = BYTES.get_vocab_size()
tokens = st.lists(st.integers(0, SIZE - 1), max_size=40)
words = st.text("größ日🙂 ab.", max_size=30).map(
    lambda text: [BYTES.token_to_id(letter) for letter in _letters(text)]
)


def _letters(text: str) -> list[str]:
    table = {_byte(letter): letter for letter in pre_tokenizers.ByteLevel.alphabet()}
    return [table[byte] for byte in text.encode()]


def parts(ids: list[int], *options: object) -> tuple[list[str], TextStream]:
    stream = TextStream(BYTES, *options)  # type: ignore[arg-type]
    out = [stream.push(token) for token in ids]
    return [*out, stream.finish()], stream


@settings(max_examples=300, deadline=None)
@given(tokens | words)
def test_increments_join_to_the_whole_text_and_hold_no_half_character(ids: list[int]) -> None:
    out, _ = parts(ids)
    whole = BYTES.decode(ids)
    assert "".join(out) == whole
    assert not any(part.endswith("\N{REPLACEMENT CHARACTER}") for part in out[:-1])


@settings(max_examples=100, deadline=None)
@given(words)
def test_whole_characters_are_not_held_back(ids: list[int]) -> None:
    stream = TextStream(BYTES)
    got = ""
    for i, token in enumerate(ids):
        got += stream.push(token)
        so_far = BYTES.decode(ids[: i + 1])
        assert got == so_far.rstrip("\N{REPLACEMENT CHARACTER}")


@settings(max_examples=300, deadline=None)
@given(words, st.lists(st.text("größ日🙂 ab.", min_size=1, max_size=4), min_size=1, max_size=3))
def test_text_ends_before_the_first_stop_string(ids: list[int], stop: list[str]) -> None:
    out, stream = parts(ids, stop)
    whole = BYTES.decode(ids)
    ends = [(i + len(s), i) for s in stop if (i := whole.find(s)) >= 0]
    assert stream.stopped == bool(ends)
    assert "".join(out) == (whole[: min(ends)[1]] if ends else whole)


def test_what_may_begin_a_stop_string_is_held_back() -> None:
    out, stream = parts([BYTES.token_to_id(c) for c in "abab."], ("abb", "ab."))
    assert out == ["", "", "ab", "", "", ""]
    assert stream.stopped
    out, stream = parts([BYTES.token_to_id(c) for c in "aba"], ("abb",))
    assert out == ["", "", "ab", "a"]
    assert not stream.stopped


def test_a_stop_string_that_is_complete_too_early_is_text() -> None:
    ids = [BYTES.token_to_id(c) for c in "ab.ab.ab."]
    assert "".join(parts(ids, ("b.",), 0)[0]) == "a"
    assert "".join(parts(ids, ("b.",), 3)[0]) == "ab.a"
    assert "".join(parts(ids, ("b.",), 6)[0]) == "ab.ab.a"
    assert not parts(ids, ("b.",), 9)[1].stopped
    # Held back as the beginning of one stop string, with another one in it that came too early.
    ids = [BYTES.token_to_id(c) for c in "xabq"]
    assert "".join(parts(ids, ("ab", "xaby"), 3)[0]) == "xabq"
    assert "".join(parts(ids, ("ab", "xaby"), 2)[0]) == "x"


def test_special_tokens_have_no_text() -> None:
    ids = [BYTES.token_to_id("a"), SIZE - 1, BYTES.token_to_id("b")]
    assert "".join(parts(ids)[0]) == "ab"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(ModelSpec("tiny", "float32"), cache_dir=tmp_path_factory.mktemp("cache"))


def generate(model: LoadedModel, blocks: int = 40, **ending: object) -> list[int]:
    executor = TorchExecutor(model, blocks=blocks, block_size=4, tokenizer=lambda: BYTES)
    core = EngineCore(Fcfs(), Lru(), capacity=Capacity(blocks, 4))
    only = tuple((token, 50.0) for token in range(SIZE - 1))  # tiny has more tokens than this tokenizer
    how = ending.pop("sampling", SamplingParams(logit_bias=only, temperature=1.0, seed=4))
    requests = [Request(id="a", prompt=Prompt.of(range(9)), sampling=how, **ending)]  # type: ignore[arg-type]
    return serve(core, executor, requests)["a"]


def test_the_engine_ends_a_request_where_its_text_says_so(tiny: LoadedModel) -> None:
    whole = generate(tiny, output_len=40)
    text, stop = "", ""
    for i in range(8, len(whole)):  # a stop string of two characters that tokens 8.. complete
        text = BYTES.decode(whole[: i + 1])
        if text[-1].isascii() and text[-2:] not in BYTES.decode(whole[:i]):
            stop = text[-2:]
            break
    assert stop
    got = generate(tiny, max_tokens=40, stop=("never", stop))
    assert got == whole[: i + 1]
    assert generate(tiny, output_len=40, stop=(stop,)) == whole  # a forced length ignores it


def test_min_tokens_keeps_the_engine_from_stopping(tiny: LoadedModel) -> None:
    whole = generate(tiny, sampling=SamplingParams(), output_len=12)
    stop = whole[4]
    early = whole.index(stop)
    assert len(generate(tiny, sampling=SamplingParams(), max_tokens=12, stop_ids=(stop,))) == early + 1
    held = generate(tiny, sampling=SamplingParams(min_tokens=8), max_tokens=12, stop_ids=(stop,))
    assert stop not in held[:8]
    assert len(held) > 8


def test_a_trained_tokenizers_text_streams_as_it_was() -> None:
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        ["größer als 日本 🙂 " * 9], BpeTrainer(vocab_size=300, initial_alphabet=letters)
    )
    ids = tokenizer.encode("Das ist größer als 日本, 🙂🙂 nicht?").ids
    stream = TextStream(tokenizer)
    assert "".join([stream.push(i) for i in ids]) == "Das ist größer als 日本, 🙂🙂 nicht?"


def test_a_prefix_space_is_neither_lost_nor_doubled() -> None:
    vocab = {"▁Hello": 0, "▁world": 1, "!": 2, "<0xF0>": 3, "<0x9F>": 4, "<0x99>": 5, "<0x82>": 6, "▁": 7}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    stream = TextStream(tokenizer)
    out = [stream.push(token) for token in [0, 1, 2, 7, 3, 4, 5, 6, 1]]
    assert out == ["Hello", " world", "!", " ", "", "", "", "🙂", " world"]
