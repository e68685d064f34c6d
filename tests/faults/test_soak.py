"""The soak finds what leaks, and finds nothing in thousands of requests to the engine as it is."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lab.control.core import EngineCore
from lab.control.live import LiveRequest
from lab.state.tiers import HostTier
from real_engine.sequences import Sequences
from tests.experiment.command import ROOT, environment

SOAK = ROOT / "experiments" / "benchmarks" / "soak.py"


@pytest.fixture(scope="module")
def soak() -> Any:
    spec = importlib.util.spec_from_file_location("soak", SOAK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def short(soak: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A soak of one set of policies that lasts a burst or two."""
    monkeypatch.setattr(soak, "EPOCHS", soak.EPOCHS[:1])
    monkeypatch.setattr(soak, "WORDS", (*soak.WORDS, "engine.attention=torch"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return soak.Soak(0.001, 0)


def test_nothing_leaks_in_a_burst_and_the_load_is_what_it_says(short: Any) -> None:
    short.run()
    books = short.books
    assert sum(books.outcomes.values()) % 150 == 0
    assert min(books.outcomes[what] for what in ("finished", "aborted", "rejected")) > 0
    assert min(books.preemptions, books.moved, books.evicted) > 0


def losing(owner: type, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From its twentieth call on the method does nothing."""
    method, calls = getattr(owner, name), []

    def lossy(self: Any, *args: Any, **options: Any) -> Any:
        calls.append(1)
        return method(self, *args, **options) if len(calls) < 20 else None

    monkeypatch.setattr(owner, name, lossy)


def test_a_host_block_that_is_lost_is_found(short: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    losing(HostTier, "release", monkeypatch)
    with pytest.raises(AssertionError):
        short.run()


def test_a_data_plane_that_never_forgets_is_found(short: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    apply = Sequences.apply

    def remembering(self: Sequences, plan: Any) -> None:
        known = dict(self._known)
        apply(self, plan)
        self._known |= {name: known[name] for name in plan.released if name in known}

    monkeypatch.setattr(Sequences, "apply", remembering)
    with pytest.raises(AssertionError, match="the data plane remembers"):
        short.run()


def test_a_control_plane_that_keeps_the_dead_is_found(short: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    end, kept = EngineCore._end, []

    def keeping(self: EngineCore, live: LiveRequest, *args: Any) -> None:
        kept.append(live)
        end(self, live, *args)

    monkeypatch.setattr(EngineCore, "_end", keeping)
    with pytest.raises(AssertionError, match="requests live on after their end"):
        short.run()


@pytest.mark.parametrize(("each", "leaks"), [(0, False), (100, False), (600, True)])
def test_memory_that_grows_with_every_request_is_found(soak: Any, short: Any, each: int, leaks: bool) -> None:
    # A jump when some cache grows once, noise of a page or two, and so many bytes a request.
    short.memory = [
        (float(n), 150 * n, (10**8 if n < 50 else 11 * 10**7) + 8192 * (n % 3) + 150 * n * each)
        for n in range(400)
    ]
    short._backend.close()
    if leaks:
        with pytest.raises(AssertionError, match="that is a leak"):
            short.verdict()
    else:
        assert "bytes a request" in short.verdict()


@pytest.mark.slow
def test_thousands_of_random_requests_leak_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, SOAK, "minutes=0", "requests=8000", "seed=1"],
        cwd=tmp_path,
        env=environment(tmp_path) | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("OK\n")
