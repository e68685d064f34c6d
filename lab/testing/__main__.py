"""`python -m lab.testing ./mine.py:Mine`: does a policy keep its contracts? Observation path.

python -m lab.testing ./mine.py:Mine examples=100 seed=1
python -m lab.testing policy=./mine.py:Mine policy.width=4
python -m lab.testing eviction=lru
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence

from lab import plugins
from lab.cli import guarded
from lab.errors import ConfigError, UnknownNameError

USAGE = """usage: python -m lab.testing [KIND=]POLICY [KIND.OPTION=VALUE ...] [examples=25] [seed=0]

Does a policy keep its contracts? POLICY is ./file.py:Class, module:Class, or a name as in `lab.experiment`.
KIND is policy, eviction, preemption, predictor, admission, routing or scaling, and can mostly be left out.
Exits with 1 when a contract broke."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return guarded(lambda: _command(list(sys.argv[1:] if argv is None else argv)))


def _command(words: list[str]) -> int:
    from lab.testing.check import check_policy
    from lab.testing.contracts import KINDS

    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if words else 2
    numbers = {"examples": 25, "seed": 0}
    options: dict[str, object] = {}
    policy = kind = ""
    for word in words:
        key, equals, value = word.partition("=")
        group, _, option = key.partition(".")
        if key in numbers:
            if not value.isdecimal():
                raise ConfigError(f"{key} is '{value}'; expected a whole number.")
            numbers[key] = int(value)
        elif equals and key in KINDS:
            kind, policy = key, value
        elif equals and group in KINDS and option:
            options[option] = _value(value)
        elif equals or word.startswith("-") or policy:
            raise UnknownNameError("option", key, [*KINDS, *numbers], USAGE.partition("\n")[0])
        else:
            policy = word
    if not policy:
        raise ConfigError("no policy is named; write ./file.py:Class, module:Class, or a name.")
    if not options:
        report = check_policy(policy, kind=kind, seed=numbers["seed"], examples=numbers["examples"])
    else:
        if not kind:
            raise ConfigError(f"options need the kind said: policy={policy} policy.option=value.")
        plugins.create(kind, policy, options)
        make = functools.partial(plugins.create, kind, policy, options)
        report = check_policy(make, kind=kind, seed=numbers["seed"], examples=numbers["examples"])
    print(report)
    return 0 if report.ok else 1


def _value(text: str) -> object:
    import yaml

    return yaml.safe_load(text)


if __name__ == "__main__":
    sys.exit(main())
