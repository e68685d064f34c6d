"""Builds `kernels.cpp` and its headers once a machine, and calls them. Data plane.

The library has a plain C interface and knows nothing of torch: it is made by one compiler call, kept in the cache
directory under a name that says from what (source, compiler, processor), and opened with ctypes. Where there
is no compiler, or anything else goes wrong, `load` says so in a sentence and the engine runs without it.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from real_engine import pages

SOURCE = Path(__file__).parent / "kernels.cpp"
HEADERS = tuple(sorted(SOURCE.parent.glob("*.h")))
COMPILERS = ("g++", "c++", "clang++")
FLAGS = (
    "-O3",
    "-march=native",
    "-std=c++17",
    "-ffp-contract=fast",
    "-shared",
    "-fPIC",
    "-fopenmp",
    "-fvisibility=hidden",
)
TIMEOUT_S = 180

SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
LANES = 16
"""Numbers handled at once: head sizes, and all other widths, must be a multiple of it."""
PANEL = 32
"""Outputs of a packed weight come in such panels."""

_INT, _LONG, _FLOAT, _POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
_SIGNATURES = {
    "attend": [*[_POINTER] * 7, _LONG, _LONG, *[_INT] * 5, _FLOAT, _INT, _INT],
    "rotate_and_store": [_POINTER, _LONG, *[_INT] * 3, *[_POINTER] * 6, _INT],
    "add_norm": [*[_POINTER] * 4, _LONG, _INT, _FLOAT, _INT],
    "silu_mul": [_POINTER, _POINTER, _LONG, _INT, _INT],
}


class Kernels:
    """The opened library. Tensors are on the CPU, of a type in `SUFFIX`, and contiguous but for `q`'s rows. It is an
    `Ops` too, for widths that are a multiple of `LANES`."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        self._functions = {}
        for name, arguments in _SIGNATURES.items():
            for dtype, suffix in SUFFIX.items():
                function = getattr(library, f"{name}_{suffix}")
                function.argtypes, function.restype = arguments, None
                self._functions[name, dtype] = function
        self.has_products = bool(library.has_products())
        """Whether this processor has dot products of bfloat16 and of 8 bits, which `product` and `stack` need."""
        if self.has_products:
            self._products = {torch.bfloat16: library.product_to_bf16, torch.float32: library.product_to_f32}
            for function in self._products.values():
                function.argtypes = [_POINTER, _INT, _INT, _POINTER, _INT, *[_POINTER] * 4, _INT]
                function.restype = None
            self.stack = library.stack_bf16
            self.stack.argtypes, self.stack.restype = [_POINTER, _POINTER, _INT], None

    def attend(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        starts: Tensor,
        lengths: Tensor,
        table: Tensor,
        scale: float,
        window: int = 0,
    ) -> Tensor:
        """Causal attention of packed rows over paged keys and values, at most `window` tokens back unless it is 0.

        `q` `[tokens, heads, dim]`; `keys`, `values` `[blocks, block_size, kv_heads, dim]`; int32 `starts`
        `[sequences + 1]`, `lengths` `[sequences]`, `table` `[sequences, most blocks]`, as in `PackedBatch`.
        Gives `[tokens, heads * dim]`.
        """
        tokens, heads, dim = q.shape
        _, block_size, kv_heads, _ = keys.shape
        assert q.stride(1) == dim
        assert q.stride(2) == 1
        out = torch.empty((tokens, heads * dim), dtype=q.dtype)
        pointers = (x.data_ptr() for x in (q, keys, values, out, starts, lengths, table))
        strides = (q.stride(0), table.stride(0))
        sizes = (len(lengths), heads, kv_heads, dim, block_size)
        self._functions["attend", q.dtype](
            *pointers, *strides, *sizes, scale, window, torch.get_num_threads()
        )
        return out

    def rotate_and_store(
        self,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor,
        slots: Tensor,
        keys: Tensor,
        values: Tensor,
    ) -> None:
        """Rotate query and key heads of `qkv` `[tokens, heads + 2 * kv_heads, dim]` in place; write keys and values
        to their slots (int64 `[tokens]`) of one layer's cache."""
        assert qkv.is_contiguous()
        kv_heads, dim = keys.shape[2:]
        sizes = (qkv.shape[1] - 2 * kv_heads, kv_heads, dim)
        pointers = (x.data_ptr() for x in (cos, sin, positions, slots, keys, values))
        function = self._functions["rotate_and_store", qkv.dtype]
        function(qkv.data_ptr(), len(qkv), *sizes, *pointers, torch.get_num_threads())

    def add_norm(self, x: Tensor, added: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        """As `real_engine.models.ops.Ops` says."""
        out = torch.empty_like(x)
        pointers = (x.data_ptr(), added.data_ptr() if added is not None else None, weight.data_ptr())
        function = self._functions["add_norm", x.dtype]
        function(*pointers, out.data_ptr(), *x.shape, eps, torch.get_num_threads())
        return out

    def product(self, x: Tensor, weight: Packed, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """bfloat16 `x` `[rows, inputs]` times a packed weight, plus `bias`, as bfloat16 or float32 rows. With a weight
        of 8 bits, so is `x` for the product, with a scale for each row (dynamic quantisation)."""
        assert x.is_contiguous()
        rows, inputs = x.shape
        outputs = weight.panels.numel() // inputs
        out = torch.empty((rows, outputs), dtype=dtype)
        room: tuple[Tensor | None, ...] = (None, None)
        if weight.scale is not None:
            room = (torch.empty((rows, inputs), dtype=torch.uint8), torch.empty(rows))
        more = [None if tensor is None else tensor.data_ptr() for tensor in (bias, *room, out)]
        struct = ctypes.byref(weight.struct)
        self._products[dtype](x.data_ptr(), rows, inputs, struct, outputs, *more, torch.get_num_threads())
        return out

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """As `real_engine.models.ops.Ops` says."""
        rows, width = len(gate_up), gate_up.shape[1] // 2
        out = gate_up.new_empty((rows, width))
        function = self._functions["silu_mul", gate_up.dtype]
        function(gate_up.data_ptr(), out.data_ptr(), rows, width, torch.get_num_threads())
        return out


class WeightStruct(ctypes.Structure):
    """`Weight` of product.h."""

    _fields_ = (("panels", _POINTER), ("scale", _POINTER), ("shift", _POINTER))


@dataclass(frozen=True, slots=True)
class Packed:
    """A weight `[outputs, inputs]` in the order that product.h reads: bfloat16; or 8 bits, symmetric, with for each
    output a float32 `scale` and an int32 `shift`: 128 times its sum, since rows of 8 bits are stored plus 128."""

    panels: Tensor
    scale: Tensor | None = None
    shift: Tensor | None = None

    @property
    def struct(self) -> WeightStruct:
        parts = (self.panels, self.scale, self.shift)
        return WeightStruct(*(None if part is None else part.data_ptr() for part in parts))


def pack(weight: Tensor, *, int8: bool = False) -> Packed | None:
    """A bfloat16 weight `[outputs, inputs]`, packed; None if its shape or type doesn't suit."""
    outputs, inputs = weight.shape
    group = 4 if int8 else 2
    if weight.dtype != torch.bfloat16 or outputs % PANEL or inputs % group or (int8 and inputs % LANES):
        return None
    scale = shift = None
    if int8:
        exact = weight.float()
        scale = exact.abs().amax(1).clamp_min_(1e-30) / 127
        weight = (exact / scale[:, None]).round_().to(torch.int8)
        shift = 128 * weight.sum(1, dtype=torch.int32)
    panels = weight.view(outputs // PANEL, PANEL, inputs // group, group).transpose(1, 2)
    return Packed(pages.moved(panels), scale, shift)


def load(cache: Path, notify: Callable[[str], None] = lambda text: None) -> Kernels | None:
    """The kernels, built into `cache` if they aren't there yet; None, with a sentence to `notify`, without them."""
    compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        notify("No C++ compiler here: attention runs on plain torch, several times slower at large batches.")
        return None
    try:
        return Kernels(_built(compiler, cache, notify))
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        said = getattr(error, "stderr", None) or str(error)
        line = next((text for text in str(said).splitlines() if "error" in text.lower()), str(error))
        notify(f"The CPU kernels can't be used ({line.strip()}): attention runs on plain torch.")
        return None


def _built(compiler: str, cache: Path, notify: Callable[[str], None]) -> Path:
    """Path of the library for this source, compiler and processor. One process builds, others wait."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=30)
    key = hashlib.blake2b(digest_size=8)
    for part in (
        *(file.read_bytes() for file in (SOURCE, *HEADERS)),
        version.stdout.encode(),
        " ".join(FLAGS).encode(),
        _processor().encode(),
    ):
        key.update(part)
    folder = cache / "native"
    path = folder / f"kernels-{key.hexdigest()}.so"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return path
        notify("Building the CPU kernels (a few seconds, once a machine) ...")
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            fresh = Path(scratch) / "kernels.so"
            command = [compiler, *FLAGS, str(SOURCE), "-o", str(fresh)]
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=TIMEOUT_S)
            os.replace(fresh, path)
    return path


def _processor() -> str:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return platform.machine() + next((line for line in lines if line.startswith("flags")), "")
    except OSError:
        return platform.machine() + platform.processor()
