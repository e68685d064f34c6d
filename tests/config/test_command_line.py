"""What a user types, end to end: overrides, sweeps, plug-ins, mistakes, Ctrl-C."""

from __future__ import annotations

import importlib.metadata
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lab.cli import NEEDED

Command = Callable[..., Any]

POLICY = '''
from lab.policy import SchedulingPolicy


class Newest(SchedulingPolicy):
    """Latest arrival first."""

    def __init__(self, window: int = 16, share: float = 0.5) -> None:
        self.window = window
'''


def refused(done: Any, *parts: str) -> None:
    """One sentence on stderr, nothing on stdout, exit code 2, no traceback."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: ")
    for part in parts:
        assert part in done.stderr


def test_defaults_are_complete_and_nothing_is_written_beside_what_the_task_writes(
    command: Command, tmp_path: Path
) -> None:
    done = command(
        body="print(cfg.policy.name, cfg.eviction.name, cfg.trace.name, cfg.trace.limit, cfg.model.dtype)"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "fcfs lru chat 96 bfloat16\n"
    assert list((tmp_path / "cwd").iterdir()) == []


def test_compression_wants_the_prefix_cache_off(command: Command) -> None:
    refused(
        command("compression=tova"), "compression=tova overwrites blocks", "expected kv.prefix_cache=false"
    )
    done = command(
        "compression=tova",
        "compression.budget=64",
        "kv.prefix_cache=false",
        body="print(cfg.compression.budget)",
    )
    assert done.stdout == "64\n", done.stderr


def test_the_task_runs_where_the_user_stands(command: Command, tmp_path: Path) -> None:
    done = command(body="import os; print(os.getcwd())")
    assert Path(done.stdout.strip()) == (tmp_path / "cwd").resolve()


def test_exit_code_of_the_task_is_the_commands(command: Command) -> None:
    assert command(body="return 3").returncode == 3


def test_a_loose_file_is_a_policy_with_typed_parameters(command: Command, tmp_path: Path) -> None:
    (tmp_path / "cwd").mkdir()
    (tmp_path / "cwd" / "mine.py").write_text(POLICY)
    done = command("policy=./mine.py:Newest", "policy.window=64")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("./mine.py:Newest {'window': 64, 'share': 0.5}")
    refused(
        command("policy=./mine.py:Newest", "policy.windw=64"), "policy.windw", "did you mean 'policy.window'?"
    )
    refused(command("policy=./mine.py:Newest", "policy.window=wide"), "policy.window=wide", "Integer")
    refused(command("policy=./mine.py:Newst"), "Newst", "did you mean 'Newest'?")


def test_a_dotted_path_is_a_policy(command: Command) -> None:
    done = command("policy=policies.scheduling.sjf:ShortestJobFirst")
    assert done.stdout.startswith("policies.scheduling.sjf:ShortestJobFirst"), done.stderr


def test_a_sweep_runs_every_combination_each_in_a_directory_of_its_own(command: Command) -> None:
    done = command("-m", "policy=fcfs,sjf", "model=tiny,org/name", "run.dir=out")
    assert done.returncode == 0, done.stderr
    results = [line for line in done.stdout.splitlines() if not line.startswith("[")]
    assert results == [
        "fcfs {'backfill': False} tiny out/0",
        "fcfs {'backfill': False} org/name out/1",
        "sjf {} tiny out/2",
        "sjf {} org/name out/3",
    ]


def test_a_failing_combination_does_not_cost_the_others(command: Command) -> None:
    body = (
        "from lab.errors import RunError\nif cfg.seed == 1: raise RunError('no luck')\nprint('did', cfg.seed)"
    )
    done = command("-m", "seed=0,1,2", body=body)
    assert done.returncode == 1
    assert "did 0" in done.stdout
    assert "did 2" in done.stdout
    assert done.stderr == "error: no luck\n"


def test_a_wrong_combination_stops_a_sweep_before_its_first_run(command: Command) -> None:
    refused(command("-m", "kv.blocks=8,0", body="print('ran')"), "kv.blocks is 0")


def test_configuration_files_add_experiments(command: Command, tmp_path: Path) -> None:
    folder = tmp_path / "cwd" / "experiments" / "conf" / "experiment"
    folder.mkdir(parents=True)
    (folder / "tight.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /policy: sjf\nkv: {blocks: 64}\n"
    )
    (folder / "wrong.yaml").write_text("# @package _global_\nkv: {blocs: 64}\n")
    (folder / "torn.yaml").write_text("# @package _global_\nkv: {blocks: [\n")
    done = command(
        "+experiment=tight",
        "kv.block_size=8",
        body="print(cfg.policy.name, cfg.kv.blocks, cfg.kv.block_size)",
    )
    assert done.stdout == "sjf 64 8\n", done.stderr
    refused(command("+experiment=tigt"), "unknown experiment 'tigt'", "did you mean 'tight'?")
    refused(command("experiment=tight"), "+experiment=tight")
    refused(command("+experiment=wrong"), "experiment/wrong", "blocs")
    refused(command("+experiment=torn"), "torn.yaml")


def test_cfg_job_prints_the_configuration_and_does_not_run(command: Command) -> None:
    done = command("policy=sjf", "kv.blocks=7", "--cfg", "job", body="print('it ran')")
    assert done.returncode == 0
    assert "policy:\n  name: sjf\n" in done.stdout
    assert "blocks: 7" in done.stdout
    assert "it ran" not in done.stdout


def test_help_shows_every_choice_with_a_line_about_it_and_every_option(command: Command) -> None:
    done = command("--help", "trace=poisson", "policy=prefill_first")
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    for name in (
        "fcfs",
        "prefill_first",
        "sjf",
        "priority",
        "edf",
        "lru",
        "azure_2023_conv",
        "smollm2",
        "replay",
    ):
        found = [words for words in lines if name in words[:2]]
        assert found, name
        assert len(found[0]) > 2, f"{name} has no description"
    for option in ("kv.blocks=null", "trace.prompt.mean=256.0", "policy.watermark=", "slo.ttft_ms=2000.0"):
        assert f"  {option}" in done.stdout


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["polcy=fcfs"], ["polcy", "did you mean 'policy'?"]),
        (["policy=fcsf"], ["unknown policy 'fcsf'", "did you mean 'fcfs'?"]),
        (["policy.windw=3"], ["policy.windw", "fcfs"]),
        (["+policy.windw=3"], ["policy.windw", "fcfs"]),
        (["eviction=lruu"], ["unknown eviction 'lruu'", "did you mean 'lru'?"]),
        (["trace=azure_2023_con"], ["unknown trace", "did you mean 'azure_2023_conv'?"]),
        (["trace=azure_2023_conv"], ["needs a file", "trace.path=PATH"]),
        (["trace=poisson", "trace.rate=-1"], ["trace.rate is -1"]),
        (["trace=poisson", "trace.prompt.men=3"], ["did you mean 'trace.prompt.mean'?"]),
        (["model=smolm2"], ["unknown model", "did you mean 'smollm2'?"]),
        (["model.dtype=float"], ["did you mean 'float32'?"]),
        (["model.quantization=int9"], ["did you mean 'int8'?"]),
        (["model.quantization=int8", "model.dtype=float32"], ["expected model.dtype=bfloat16"]),
        (["backend=rel"], ["did you mean 'real'?"]),
        (["kv.blocks=0"], ["kv.blocks is 0; expected at least 1"]),
        (["kv.blocks=many"], ["kv.blocks=many", "Integer"]),
        (["kv=3"], ["kv is a section"]),
        (["engine.token_budget=0"], ["engine.token_budget is 0"]),
        (["engine.token_budget=1.5"], ["engine.token_budget=1.5"]),
        (["slo.ttft_ms=nan"], ["slo.ttft_ms is nan"]),
        (["sampling.top_p=2"], ["sampling.top_p is 2.0"]),
        (["seed=-1"], ["seed is -1"]),
        (["cost=replay"], ["cost.path=RUN"]),
        (["cost.path=x"], ["only read with cost=replay"]),
        (["cost=reference", "cost.recalibrate=true"], ["expected cost=fitted"]),
        (["fleet.failures=[{replica: 0, at_s: -1}]"], ["fleet.failures[0].at_s is -1"]),
        (["topology=dp2", "topology.groups.replica.count=0"], ["topology.groups.replica.count is 0"]),
        (["~policy"], ["~policy"]),
        (["policy=fcfs,sjf"], ["add -m"]),
        (["--polcy"], ["unknown flag"]),
        (["fcfs"], ["can't read 'fcfs'"]),
        (["hydra.run.dir=x"], ["no effect"]),
        (["policy=lab.policy:EvictionPolicy"], ["expected a subclass of lab.policy.SchedulingPolicy"]),
        (["policy=nowhere.at_all:X"], ["there is no module 'nowhere'"]),
        (["policy=./nowhere.py:X"], ["can't read ./nowhere.py"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_gets_one_sentence(
    words: list[str],
    parts: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    # The same entry as a process has, without starting thirty of them.
    from lab.cli import main

    monkeypatch.chdir(tmp_path)
    code = main(lambda cfg: print("ran"), argv=words)
    said = capsys.readouterr()
    refused(subprocess.CompletedProcess(words, code, said.out, said.err), *parts)


def test_a_broken_plug_in_is_named_with_file_and_line(command: Command, tmp_path: Path) -> None:
    (tmp_path / "cwd").mkdir()
    (tmp_path / "cwd" / "broken.py").write_text("x = 1\nimport no_such_module\n")
    (tmp_path / "cwd" / "torn.py").write_text("x = 1\n\ndef (\n")
    refused(command("policy=./broken.py:X"), "no_such_module", "broken.py:2")
    refused(command("policy=./torn.py:X"), "invalid syntax", "torn.py:3")


def test_a_plug_in_that_refuses_its_parameter_is_heard_before_the_run(
    command: Command, tmp_path: Path
) -> None:
    (tmp_path / "cwd").mkdir()
    source = POLICY + "        if window < 1:\n            raise ValueError('window must be positive')\n"
    (tmp_path / "cwd" / "mine.py").write_text(source)
    done = command("policy=./mine.py:Newest", "policy.window=0", body="print('ran')")
    assert (done.returncode, done.stdout) == (1, "")
    assert "window must be positive" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_bug_keeps_its_traceback(command: Command) -> None:
    done = command(body="raise KeyError('a bug')")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_a_python_without_the_packages_is_named(environment: dict[str, str]) -> None:
    words = [sys.executable, "-S", "-m", "lab.experiment", "backend=sim"]  # -S: no site-packages
    root = Path(__file__).parents[2]
    done = subprocess.run(words, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {sys.executable} has no package 'hydra'")
    assert len(done.stderr.splitlines()) == 1


def test_the_packages_that_are_needed_are_those_declared() -> None:
    declared = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"][
        "dependencies"
    ]
    installed = importlib.metadata.packages_distributions()
    provided = {name.lower() for package in NEEDED for name in installed[package]}
    assert {re.split("[<>=]", each)[0] for each in declared} <= provided


def test_a_full_disk_is_one_sentence(command: Command) -> None:
    done = command(body="with open('/dev/full', 'w') as file: file.write('x')")
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "no space left" in done.stderr


def test_ctrl_c_ends_a_command_and_a_sweep_with_130(
    script: Callable[[str], Path], environment: dict[str, str], tmp_path: Path
) -> None:
    path = script("print('ready', flush=True)\nsys.stdin.read()")
    for words in ([], ["-m", "seed=0,1"]):
        process = subprocess.Popen(
            [sys.executable, str(path), *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=tmp_path,
        )
        assert process.stdout is not None
        while process.stdout.readline().strip() != "ready":
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
        assert process.returncode == 130
        assert err == "interrupted\n"
        assert "ready" not in out, "the sweep went on"
