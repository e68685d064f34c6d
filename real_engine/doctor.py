"""What this machine has for the real engine, what is missing, and what would run. Observation path; data plane.

Facts are collected first and judged after, so that the judgement can be tested on machines that aren't here.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
from dataclasses import dataclass

from lab.config import Config
from lab.diagnosis import Finding
from real_engine.attention.flash_reference import PAGE_MULTIPLE, RELEASE

_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Gpu:
    """One CUDA device, as torch sees it."""

    name: str
    capability: tuple[int, int]
    free: int
    total: int
    """Bytes."""


@dataclass(frozen=True, slots=True)
class Machine:
    """The facts."""

    torch: str
    cuda: str | None
    """CUDA version that torch was built for; None for a build without."""
    gpus: tuple[Gpu, ...] = ()
    driver: str | None = None
    """NVIDIA's driver, where its own tool says one: it may be there without torch being able to use it."""
    flash: str | None = None
    flash_problem: str = ""
    """Why an installed flash-attn can't be used."""
    triton: str | None = None
    compiler: str | None = None
    memory: int | None = None
    """Bytes of the host that can still be taken."""


def diagnose(cfg: Config) -> list[Finding]:
    """Implements `lab.diagnosis.Diagnose`."""
    return judge(look(), cfg)


def look() -> Machine:
    """Collect the facts. Imports torch; builds and changes nothing."""
    import torch

    from real_engine.attention import flash
    from real_engine.kv_memory import available_memory
    from real_engine.native.library import COMPILERS

    gpus = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            capability = torch.cuda.get_device_capability(index)
            gpus.append(Gpu(torch.cuda.get_device_name(index), capability, free, total))
    flash_version = _version("flash-attn")
    return Machine(
        torch=torch.__version__,
        cuda=torch.version.cuda,
        gpus=tuple(gpus),
        driver=_driver(),
        flash=flash_version,
        flash_problem=flash.installed()[1] if flash_version else "",
        triton=_version("triton"),
        compiler=next((found for name in COMPILERS if (found := shutil.which(name))), None),
        memory=available_memory(),
    )


def judge(machine: Machine, cfg: Config) -> list[Finding]:
    """What the facts mean for the real engine under this configuration."""
    found = [
        _cuda(machine),
        *(
            Finding(
                True,
                f"gpu {index}",
                f"{gpu.name}, compute {gpu.capability[0]}.{gpu.capability[1]}, "
                f"{gpu.free / _GIB:.1f} of {gpu.total / _GIB:.1f} GiB free",
            )
            for index, gpu in enumerate(machine.gpus)
        ),
        _flash(machine),
        _triton(machine),
        Finding(
            True if machine.compiler else None,
            "compiler",
            f"{machine.compiler}; CPU kernels are built when they are first used"
            if machine.compiler
            else "missing: without one (Debian: apt install g++) the CPU runs plain torch, several times slower",
        ),
    ]
    if machine.memory is not None:
        found.append(Finding(None, "memory", f"{machine.memory / _GIB:.1f} GiB available"))
    return [*found, Finding(None, "would run", would_run(machine, cfg))]


def would_run(machine: Machine, cfg: Config) -> str:
    """Device, attention, KV storing and graphs that the configuration leads to here."""
    wanted, size = cfg.engine.attention, cfg.kv.block_size
    if cfg.engine.device == "cpu" or not machine.gpus:
        if cfg.engine.device == "cuda":
            return "nothing: engine.device=cuda, and torch sees no CUDA device"
        native = wanted in ("auto", "native") and machine.compiler is not None
        attention = (
            "our own kernels, if they agree with plain torch at start"
            if native
            else "plain torch (gather and SDPA)"
        )
        return f"on the CPU, attention by {attention}, blocks of {size} tokens (kv.block_size)"
    why = ""
    if wanted == "torch":
        why = "engine.attention=torch"
    elif machine.flash is None or machine.flash_problem:
        why = "no flash-attn"
    elif machine.gpus[0].capability < (8, 0):
        why = "flash-attn needs compute 8.0"
    elif cfg.model.dtype == "float32":
        why = "flash-attn needs model.dtype=bfloat16"
    elif size % PAGE_MULTIPLE:
        why = f"flash-attn needs kv.block_size={PAGE_MULTIPLE}"
    where = f"on {machine.gpus[0].name}, blocks of {size} tokens (kv.block_size)"
    if why:
        return f"{where}, attention by plain torch, several times slower ({why}); no graphs"
    store = "Triton" if machine.triton else "plain torch"
    graphs = (
        f"decode graphs up to {cfg.engine.max_seqs} sequences"
        if cfg.engine.cuda_graphs
        else "no graphs (engine.cuda_graphs=false)"
    )
    return f"{where}, attention by flash-attn, if it agrees with plain torch at start; KV stored by {store}; {graphs}"


def _cuda(machine: Machine) -> Finding:
    if machine.gpus:
        driver = f", driver {machine.driver}" if machine.driver else ""
        return Finding(True, "cuda", f"{machine.cuda}{driver}, {len(machine.gpus)} device(s)")
    if machine.driver is not None and machine.cuda is None:
        says = f"driver {machine.driver} is here, but torch {machine.torch} was built without CUDA: install one with"
        return Finding(None, "cuda", says)
    if machine.driver is not None:
        says = (
            f"driver {machine.driver} is here, but torch for CUDA {machine.cuda} can't use it: is it too old?"
        )
        return Finding(None, "cuda", says)
    return Finding(None, "cuda", "no NVIDIA driver; the real engine runs on the CPU")


def _flash(machine: Machine) -> Finding:
    if machine.flash is None:
        if not machine.gpus:
            return Finding(None, "flash-attn", "not installed; of use with a CUDA device only")
        command = "pip install flash-attn --no-build-isolation"
        return Finding(None, "flash-attn", f"missing: {command} (builds with nvcc where there is no wheel)")
    if machine.flash_problem:
        return Finding(None, "flash-attn", f"{machine.flash}, unusable: {machine.flash_problem}")
    says = machine.flash if machine.flash == RELEASE else f"{machine.flash} (written against {RELEASE})"
    return Finding(True, "flash-attn", says)


def _triton(machine: Machine) -> Finding:
    if machine.triton is None:
        says = (
            "missing: pip install triton" if machine.gpus else "not installed; of use with a CUDA device only"
        )
        return Finding(None, "triton", says)
    return Finding(True, "triton", machine.triton)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.partition("\n")[0].strip() or None
