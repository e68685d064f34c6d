"""Compiles the Triton kernel for GPUs that aren't here, down to machine code; `test_triton_store.py` starts it.

The interpreter takes Python that the compiler doesn't.
"""

from __future__ import annotations

import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from real_engine.attention.triton_store import _rotate_and_store

ARCHITECTURES = (80, 90)


def main() -> None:
    sizes: dict[str, Any] = {"heads": 9, "kv_heads": 3, "dim": 64}
    sizes |= {f"{name}_padded": triton.next_power_of_2(value) for name, value in sizes.items()}
    types = {"positions": "*i64", "slots": "*i64", "qkv_stride": "i32"}
    signature = {
        name: "constexpr" if name in sizes else types.get(name, "*bf16")
        for name in _rotate_and_store.arg_names
    }
    for architecture in ARCHITECTURES:
        source = ASTSource(fn=_rotate_and_store, signature=signature, constexprs=sizes)
        made = triton.compile(source, target=GPUTarget("cuda", architecture, 32))
        assert "cubin" in made.asm
    print(f"compiled for {ARCHITECTURES}")


if __name__ == "__main__":
    sys.exit(main())
