"""From a `ModelSpec` to a decoder in memory. Data plane; state path."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lab.errors import ModelError, UnknownNameError
from real_engine import device
from real_engine.models import foreign, smollm2, tiny
from real_engine.models.config import ModelShape
from real_engine.models.decoder import Decoder
from real_engine.models.families import OtherArchitecture, parse_config, read_config, read_raw
from real_engine.models.foreign import ForeignDecoder
from real_engine.models.shard import ALONE, Shard
from real_engine.models.spec import ModelSpec
from real_engine.models.weights import CheckpointWeights, TensorWeights, Weights

if TYPE_CHECKING:
    from tokenizers import Tokenizer

AnyDecoder = Decoder | ForeignDecoder

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A decoder ready to compute, and where it came from."""

    spec: ModelSpec
    decoder: AnyDecoder
    path: Path | None
    """Its checkpoint; None for `tiny`."""

    @property
    def config(self) -> ModelShape:
        return self.decoder.config

    @property
    def quantized(self) -> bool:
        """Whether products are computed in 8 bits."""
        return isinstance(self.decoder, Decoder) and self.decoder.quantized

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.dtype

    def tokenizer(self) -> Tokenizer:
        """The `tokenizers` library's own, without transformers' seconds of import. Raises `ModelError` if none.

        Read now: keep what you get.
        """
        from tokenizers import Tokenizer

        file = None if self.path is None else self.path / "tokenizer.json"
        if file is None or not file.exists():
            raise ModelError(f"model '{self.spec.name}' has no tokenizer (tokenizer.json)")
        try:
            return Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise ModelError(f"'{file}' isn't a readable tokenizer: {error}") from error


def load_model(
    spec: ModelSpec,
    *,
    cache_dir: Path,
    notify: Callable[[str], None] = lambda message: None,
    shard: Shard = ALONE,
) -> LoadedModel:
    """Find, convert or download, check and load. `notify` hears of what takes long; `shard` is the part to hold.

    What isn't one of our own families runs through transformers' code (`foreign`), which `notify` is told too.
    `cache_dir` keeps what was converted. Raises `ModelError`, or `UnknownNameError` for a name that is neither
    built in, nor a directory, nor of the form of a hub id.
    """
    if spec.dtype not in _DTYPES:
        raise ModelError(f"model dtype is '{spec.dtype}'; expected one of {', '.join(_DTYPES)}")
    if spec.threads is not None:
        torch.set_num_threads(spec.threads)
    weights: Weights
    dtype, where = _DTYPES[spec.dtype], device.choose(spec.device)
    decoder: AnyDecoder
    directory = find_model(spec, cache_dir=cache_dir, notify=notify)
    if directory is None:
        config = parse_config(tiny.CONFIG, "the model 'tiny'")
        weights = TensorWeights(tiny.tiny_weights(spec.seed), "the model 'tiny'")
    else:
        try:
            config, weights = read_config(directory), CheckpointWeights(directory)
        except OtherArchitecture as reason:
            if not shard.alone:
                raise ModelError(
                    f"{reason}. What runs through transformers' own code can't be cut into ranks"
                ) from reason
            decoder = foreign.load(directory, read_raw(directory), dtype, where, str(reason))
            notify(f"{reason}. It runs through transformers' own code: the same results, slower.")
            return LoadedModel(spec, decoder, directory)
    what = f"the weights of '{spec.name}' in {spec.dtype}"
    with torch.inference_mode(), device.memory_for(what, "a smaller model, or engine.device=cpu"):
        decoder = Decoder(config, weights, dtype, where, shard)
    return LoadedModel(spec, decoder, directory)


def find_model(
    spec: ModelSpec, *, cache_dir: Path, notify: Callable[[str], None] = lambda message: None
) -> Path | None:
    """Its checkpoint, found, converted or downloaded; None for `tiny`. Raises as `load_model` does."""
    if spec.path is None and spec.name == "tiny":
        return None
    return _directory(spec, cache_dir, notify)


def _directory(spec: ModelSpec, cache_dir: Path, notify: Callable[[str], None]) -> Path:
    """The checkpoint directory that `spec` means."""
    if spec.path is None and spec.name == "smollm2":
        return smollm2.checkpoint(cache_dir, notify)
    place = spec.path if spec.path is not None else Path(spec.name).expanduser()
    if place.is_dir():
        return place
    if spec.path is not None or spec.name.startswith(("/", "~", ".")):
        raise ModelError(f"model '{place}' is no directory; expected one with config.json and safetensors")
    if _HUB_ID.fullmatch(spec.name):
        return _from_hub(spec.name, notify)
    raise UnknownNameError("model", spec.name, ("smollm2", "tiny"), "Or a local directory, or a hub id.")


def _from_hub(name: str, notify: Callable[[str], None]) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ModelError(
            f"model '{name}' is no directory here, and downloading needs huggingface_hub; "
            "get it with: pip install 'diptych[engine]'"
        ) from error
    wanted = ["*.json", "*.safetensors", "*.jinja"]
    try:
        # What is here already is used as it is: no network in an experiment that needs none.
        found = Path(snapshot_download(name, allow_patterns=wanted, local_files_only=True))
        read_raw(found)
        CheckpointWeights(found)
        return found
    except (ModelError, OSError, ValueError):
        pass  # absent or incomplete: fetch it
    notify(f"downloading '{name}' ...")
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # the hub client raises a dozen kinds: offline, unknown, gated, disk full
        reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise ModelError(
            f"model '{name}' is neither a directory nor downloaded, and the hub couldn't give it "
            f"({type(error).__name__}: {reason}); get it with: hf download {name}"
        ) from error
