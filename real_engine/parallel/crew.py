"""The other ranks as rank 0 sees them: how they come, what they say, and why one is gone. Data plane; state path.

Without torchrun they are processes that rank 0 starts, each on one end of a pair of sockets: nothing listens on any
port but gloo on the loopback device. With torchrun they are there already, on this host or others, and connect.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed import FileStore, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from lab.errors import ExecutorError
from lab.ranks import Launched
from real_engine.parallel.link import Link, LinkClosed

GRACE_S = 5.0
"""How long a worker that was told to end may take."""
PATIENCE_S = 3.0
"""How long to look for the reason when something went wrong."""
COMING_S = 120.0
"""How long a rank may take from its start to its first word: it imports torch."""

_opened = 0
"""Engines of several ranks that this process has opened: under torchrun all ranks count alike."""


class Worker:
    """One other rank."""

    def __init__(self, rank: int, link: Link, process: subprocess.Popen[bytes] | None) -> None:
        self.rank, self.link, self.process = rank, link, process
        self._ours = False
        self._failed = self._lost = ""
        self._gone = False

    def __str__(self) -> str:
        return f"rank {self.rank}" + (f" (process {self.process.pid})" if self.process is not None else "")

    def hear(self, timeout: float) -> dict[str, Any]:
        """Its next message. Raises `LinkClosed` when it is gone or says why it goes; `TimeoutError`."""
        message = self.link.hear(timeout)
        if "failed" in message or "lost" in message:
            self._failed, self._lost = str(message.get("failed", "")), str(message.get("lost", ""))
            raise LinkClosed
        return message

    def kill(self) -> None:
        """At once, if it is a process of ours."""
        if self.process is not None and self.process.poll() is None:
            self._ours = True
            self.process.kill()

    def fate(self) -> tuple[int, str] | None:
        """What has become of it and how well that explains a failure (0 best); None while nothing is known."""
        try:
            while not (self._gone or self._failed or self._lost):
                self.hear(0)
        except TimeoutError:
            pass
        except (LinkClosed, ExecutorError, ValueError):
            self._gone = True
        code = None if self.process is None or self._ours else self.process.poll()
        if self._failed:
            return 0, f"{self}: {self._failed}"
        if code is not None and code < 0:
            return 0, f"{self} was killed by {signal.Signals(-code).name}"
        if self._lost:
            return 2, f"{self}: {self._lost}"
        if code is not None:
            return 1, f"{self} ended with exit code {code}"
        if self._gone and not self._ours and self.process is None:
            return 1, f"{self} is gone"
        return None


class Crew:
    """All other ranks of one engine."""

    def __init__(self, world: int, launched: Launched | None, threads: int) -> None:
        """Start them, or wait until those that torchrun started have come. Raises `ExecutorError`."""
        self.workers: list[Worker] = []
        self._ended = threading.Event()
        self._directory: tempfile.TemporaryDirectory[str] | None = None
        try:
            if launched is None:
                self._directory = tempfile.TemporaryDirectory(prefix="diptych-ranks-")
                self.rendezvous = str(Path(self._directory.name) / "store")
                self.workers = [_start(rank, threads) for rank in range(1, world)]
            else:
                self.rendezvous = ""
                self.workers = _awaited(world)
            threading.Thread(target=self._watch, name="ranks", daemon=True).start()
        except BaseException:
            self.close(kill=True)
            raise

    def explain(self) -> str | None:
        """Which rank is to blame, and why; None if none of them says."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            fates = sorted(fate for worker in self.workers if (fate := worker.fate()) is not None)
            if (fates and fates[0][0] == 0) or time.monotonic() > deadline:
                return fates[0][1] if fates else None
            time.sleep(0.02)

    def close(self, *, kill: bool) -> None:
        """End them: by closing their lines, which each takes as the end, or at once. May be called twice."""
        self._ended.set()
        for worker in self.workers:
            if kill:
                worker.kill()
            worker.link.close()
        deadline = time.monotonic() + GRACE_S
        for worker in self.workers:
            if worker.process is None:
                continue
            try:
                worker.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.process.wait()
        if self._directory is not None:
            self._directory.cleanup()

    def _watch(self) -> None:
        """When one ends unasked, end all: whoever waits for it within an exchange then fails instead of waiting on."""
        processes = [worker.process for worker in self.workers if worker.process is not None]
        while not self._ended.wait(0.2):
            if any(process.poll() is not None for process in processes):
                if not self._ended.wait(1.0):  # rank 0 may have noticed by itself, and be asking why
                    for worker in self.workers:
                        worker.kill()
                return


def store(path: str, launched: Launched | None, world: int) -> Store:
    """Where ranks find each other: a file of this run's own, or torchrun's store."""
    global _opened
    if launched is None:
        return FileStore(path, world)
    _opened += 1
    return PrefixStore(f"diptych/{_opened}", _launched_store(launched.rank))


@contextmanager
def on_loopback(local: bool) -> Iterator[None]:
    """Within, gloo listens on the loopback device alone, if all ranks are on this host and nothing else was said."""
    name = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
    if not local or name is None or "GLOO_SOCKET_IFNAME" in os.environ:
        yield
        return
    os.environ["GLOO_SOCKET_IFNAME"] = name
    try:
        yield
    finally:
        del os.environ["GLOO_SOCKET_IFNAME"]


def is_local(environment: Mapping[str, str]) -> bool:
    """Whether all ranks are on this host, as far as the environment says."""
    return environment.get("MASTER_ADDR", "localhost") in ("localhost", "127.0.0.1", "::1")


def connect(launched: Launched) -> Link:
    """The line to rank 0, of a rank that torchrun started."""
    found = PrefixStore(f"diptych/link/{_opened + 1}", _launched_store(launched.rank))
    port, token = found.get("address").decode().split()
    stream = socket.create_connection((os.environ["MASTER_ADDR"], int(port)), timeout=COMING_S)
    stream.settimeout(None)
    link = Link(stream)
    link.say(token=token, rank=launched.rank)
    return link


def _launched_store(rank: int) -> Store:
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=rank == 0 and not agent,
        wait_for_workers=False,
    )


def _awaited(world: int) -> list[Worker]:
    """Every other rank that torchrun started, once it has connected and shown the token that the store holds."""
    found: dict[int, Worker] = {}
    token = secrets.token_hex(16)
    with socket.create_server(("127.0.0.1" if is_local(os.environ) else "", 0), backlog=world) as server:
        meeting = PrefixStore(f"diptych/link/{_opened + 1}", _launched_store(0))
        meeting.set("address", f"{server.getsockname()[1]} {token}")
        deadline = time.monotonic() + COMING_S
        while len(found) < world - 1:
            server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                stream, _ = server.accept()
                link = Link(stream)
                said = link.hear(10)
            except TimeoutError:
                if time.monotonic() < deadline:
                    continue
                missing = sorted(set(range(1, world)) - set(found))
                raise ExecutorError(f"of {world} ranks {missing} haven't come in {COMING_S:.0f} s") from None
            except (LinkClosed, ValueError, TypeError, ExecutorError):
                continue
            rank = int(said.get("rank", 0))
            if secrets.compare_digest(str(said.get("token")), token) and rank in range(1, world):
                found[rank] = Worker(rank, link, None)
            else:
                link.close()
    return [found[rank] for rank in sorted(found)]


def _start(rank: int, threads: int) -> Worker:
    ours, theirs = socket.socketpair()
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
    }
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "real_engine.parallel.worker", str(theirs.fileno()), str(rank)],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=environment,
            process_group=0,  # Ctrl-C is rank 0's to hear
        )
    return Worker(rank, Link(ours), process)
