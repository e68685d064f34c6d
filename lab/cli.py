"""How every command begins and ends: words in, one clear sentence and an exit code out. Control plane.

    from lab.cli import main

    def run(cfg: Config) -> int | None: ...

    if __name__ == "__main__":
        sys.exit(main(run, about="Run one workload on both data planes."))

A command without a Hydra configuration wraps its body in `guarded` instead.
Everything heavy is imported inside, so that `--help` and Ctrl-C answer at once.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import lab
from lab import interrupts
from lab.collector import collector_at_rest
from lab.errors import ConfigError, DiptychError, UnknownNameError

if TYPE_CHECKING:
    from lab.config import Config

if not hasattr(lab, "shadowed"):
    # As in `lab/plugins.py`, for the commands that come here first.
    raise SystemExit(
        f"error: package 'lab' is shadowed: Python finds {lab.__file__}, expected {Path(__file__).parent}. "
        "Take its directory off PYTHONPATH, or uninstall it."
    )

INTERRUPTED = 130
NEEDED = (
    "bokeh", "hydra", "jinja2", "matplotlib", "numpy", "omegaconf", "opentelemetry", "pandas", "pyarrow", "rich",
    "scipy", "seaborn", "simpy", "yaml",
)  # fmt: skip
"""Packages that any installation of Diptych has: a Python without one of them isn't one that it was installed in."""
FLAGS = ("--help", "--multirun", "--cfg", "--config-dir", "-h", "-m", "-c", "-cd")


@dataclass
class Arguments:
    """The command line, split. `words` are Hydra overrides (`key=value`)."""

    words: list[str] = field(default_factory=list)
    help: bool = False
    sweep: bool = False
    show: bool = False
    config_dir: Path | None = None


def main(
    task: Callable[[Config], int | None],
    *,
    about: str = "",
    argv: Sequence[str] | None = None,
    prog: str = "",
) -> int:
    """Compose a configuration from the command line, check it, and run `task` with it; return the exit code.

    `-m key=a,b` runs every combination, one after the other, with `run.dir` (if given) numbered below it.
    All combinations are composed and checked before the first runs. A `DiptychError` is printed as one
    sentence and exits with its `exit_code`, Ctrl-C with 130. Anything else is a bug: it keeps its traceback.
    """
    return guarded(lambda: _main(task, about, list(sys.argv[1:] if argv is None else argv), prog or _prog()))


def guarded(body: Callable[[], int | None]) -> int:
    """Run a command's body; expected failures become one sentence on stderr and an exit code.

    SIGTERM ends it as Ctrl-C does.
    """
    try:
        with interrupts.terminable():
            return body() or 0
    except KeyboardInterrupt:
        spec = getattr(sys.modules.get("__main__"), "__spec__", None)
        if spec is not None and spec.name.startswith("lab."):  # nothing comes after us
            interrupts.deaf()
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except DiptychError as error:
        _say(f"error: {error}")
        return error.exit_code
    except BrokenPipeError:  # the reader of our output went away, as in `... --help | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in NEEDED:
            raise
        _say(
            f"error: {sys.executable} has no package '{error.name}', which Diptych needs; activate the environment "
            "that it is installed in (`make run` makes .venv), or install it into this one: pip install -e ."
        )
        return 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _say(f"error: no space left on the disk{f' for {error.filename}' if error.filename else ''}.")
        return 1


def split(argv: Sequence[str]) -> Arguments:
    """Flags from overrides. Raises `ConfigError` for a flag that doesn't exist or lacks its value."""
    found, rest = Arguments(), list(argv)
    while rest:
        word = rest.pop(0)
        flag, equals, value = word.partition("=")
        if not word.startswith("-"):
            found.words.append(word)
        elif word in ("-h", "--help"):
            found.help = True
        elif word in ("-m", "--multirun"):
            found.sweep = True
        elif flag in ("-c", "--cfg", "-cd", "--config-dir"):
            if not equals:
                if not rest:
                    raise ConfigError(
                        f"{flag} needs a value: {'job' if flag in ('-c', '--cfg') else 'a directory'}."
                    )
                value = rest.pop(0)
            if flag in ("-c", "--cfg"):
                if value != "job":
                    raise ConfigError(f"{flag} is '{value}'; expected job.")
                found.show = True
            else:
                found.config_dir = Path(value).expanduser().resolve()
                if not found.config_dir.is_dir():
                    raise ConfigError(f"{flag} is {value}; expected a directory.")
        else:
            raise UnknownNameError("flag", word, FLAGS, "Options are written key=value.")
    return found


def default_config_dir() -> Path | None:
    """`experiments/conf` of the working directory, else of this checkout; for `+experiment=NAME`."""
    for root in (Path.cwd(), Path(__file__).resolve().parent.parent):
        if (root / "experiments" / "conf").is_dir():
            return root / "experiments" / "conf"
    return None


def _main(task: Callable[[Config], int | None], about: str, argv: list[str], prog: str) -> int:
    wrong = lab.shadowed()
    if wrong:
        raise ConfigError(" ".join(wrong))
    arguments = split(argv)
    if arguments.help:
        from lab.usage import usage

        print(usage(prog, about, arguments.words, arguments.config_dir or default_config_dir()))
        return 0
    with collector_at_rest():  # Hydra's imports and what it makes: a third of the time until a run begins
        from lab import compose
        from lab.validation import validate

        with compose.composer(arguments.config_dir or default_config_dir()) as composer:
            jobs = composer.jobs(arguments.words, sweep=arguments.sweep)
            configs = [composer.config(words) for words in jobs]
    if arguments.show:
        print("---\n".join(compose.to_yaml(cfg) for cfg in configs), end="")
        return 0
    for number, cfg in enumerate(configs):
        if arguments.sweep and cfg.run.dir is not None:
            cfg.run.dir = str(Path(cfg.run.dir) / str(number))
        validate(cfg)
    if not arguments.sweep:
        return task(configs[0]) or 0
    worst = 0
    for number, (words, cfg) in enumerate(zip(jobs, configs, strict=True)):
        print(f"[{number + 1}/{len(jobs)}] {' '.join(words)}", flush=True)
        # One failing combination doesn't cost the others; Ctrl-C ends them all.
        code = guarded(lambda cfg=cfg: task(cfg))  # type: ignore[misc]
        if code == INTERRUPTED:
            return code
        worst = worst or code
    return worst


def _prog() -> str:
    """What was typed to get here, as far as Python remembers."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return f"python -m {spec.name}" if spec is not None else f"python {Path(sys.argv[0]).name}"


def _say(text: str) -> None:
    """One line, whatever an underlying message had in it."""
    print(" ".join(text.split()), file=sys.stderr)
