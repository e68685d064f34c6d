"""What the doctor makes of machines that aren't here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lab.config import Config, EngineConfig, KvConfig
from lab.diagnosis import Finding
from real_engine.doctor import Gpu, Machine, diagnose, judge, would_run

LAPTOP = Machine(torch="2.13.0+cpu", cuda=None, compiler="g++", memory=21 << 30)
SERVER = Machine(
    torch="2.13.0+cu130",
    cuda="13.0",
    gpus=(Gpu("NVIDIA H100", (9, 0), 79 << 30, 80 << 30),),
    driver="590.1",
    flash="2.8.3.post2",
    triton="3.7.1",
    compiler="g++",
    memory=100 << 30,
)


def said(machine: Machine, cfg: Config | None = None) -> dict[str, Finding]:
    return {finding.what: finding for finding in judge(machine, cfg or Config())}


def test_a_machine_without_a_gpu_misses_nothing_that_it_could_use() -> None:
    found = said(LAPTOP)
    assert "no NVIDIA driver" in found["cuda"].says
    assert "of use with a CUDA device only" in found["flash-attn"].says
    assert found["compiler"].good
    assert found["memory"].says == "21.0 GiB available"
    assert found["would run"].says.startswith("on the CPU, attention by our own kernels")
    assert all(finding.good is not False for finding in found.values())


def test_without_a_compiler_it_says_what_to_install() -> None:
    found = said(replace(LAPTOP, compiler=None))
    assert "apt install g++" in found["compiler"].says
    assert "plain torch" in found["would run"].says


def test_a_driver_that_torch_cannot_use_is_noticed() -> None:
    assert "built without CUDA" in said(replace(LAPTOP, driver="590.1"))["cuda"].says
    assert "too old" in said(replace(LAPTOP, driver="390.1", cuda="13.0"))["cuda"].says


def test_a_server_is_told_its_device_and_what_is_missing() -> None:
    found = said(SERVER)
    assert found["gpu 0"] == Finding(True, "gpu 0", "NVIDIA H100, compute 9.0, 79.0 of 80.0 GiB free")
    assert found["cuda"].says == "13.0, driver 590.1, 1 device(s)"
    assert found["flash-attn"].good
    bare = said(replace(SERVER, flash=None, triton=None))
    assert "pip install flash-attn" in bare["flash-attn"].says
    assert "pip install triton" in bare["triton"].says
    assert (
        "has no block_table"
        in said(replace(SERVER, flash_problem="it has no block_table"))["flash-attn"].says
    )


@pytest.mark.parametrize(
    ("machine", "options", "words"),
    [
        (SERVER, {"block_size": 256}, ("H100", "flash-attn, if", "stored by Triton", "graphs up to 32")),
        (SERVER, {}, ("blocks of 16", "plain torch", "needs kv.block_size=256")),
        (SERVER, {"block_size": 256, "cuda_graphs": False}, ("flash-attn", "no graphs (engine.cuda_graphs")),
        (SERVER, {"block_size": 256, "attention": "torch"}, ("plain torch", "engine.attention=torch")),
        (SERVER, {"block_size": 256, "dtype": "float32"}, ("plain torch", "model.dtype=bfloat16")),
        (SERVER, {"device": "cpu"}, ("on the CPU", "our own kernels")),
        (LAPTOP, {"device": "cuda"}, ("nothing: engine.device=cuda",)),
        (replace(SERVER, triton=None), {"block_size": 256}, ("stored by plain torch",)),
        (replace(SERVER, flash=None), {"block_size": 256}, ("no flash-attn",)),
        (
            replace(SERVER, gpus=(Gpu("NVIDIA T4", (7, 5), 1, 2),)),
            {"block_size": 256},
            ("T4", "needs compute 8.0"),
        ),
    ],
)
def test_what_would_run_follows_from_machine_and_configuration(
    machine: Machine, options: dict[str, Any], words: tuple[str, ...]
) -> None:
    cfg = Config(kv=KvConfig(block_size=options.pop("block_size", 16)))
    cfg.model.dtype = options.pop("dtype", "bfloat16")
    cfg.engine = EngineConfig(**options)
    sentence = would_run(machine, cfg)
    for part in words:
        assert part in sentence


def test_this_machine_can_be_looked_at() -> None:
    found = diagnose(Config())
    assert [finding.what for finding in found if finding.what in ("cuda", "would run")] == [
        "cuda",
        "would run",
    ]
