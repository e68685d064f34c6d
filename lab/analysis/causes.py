"""Why two runs parted, in clauses: what is configured otherwise, whose clock, which rule, which term of the step time.

Observation path. `lab/analysis/verdict.py` makes sentences of them.
"""

from __future__ import annotations

from typing import Any

from lab.analysis.around import rule
from lab.analysis.difference import Diff
from lab.analysis.residuals import EXPLAINED, FACTS
from lab.analysis.wording import names
from lab.config import SEAMS


def configured(diff: Diff) -> tuple[str, str]:
    """What was set otherwise that decisions follow from, `policies` or `limits`, and the options with both values."""
    told = diff.configuration.items()
    for kind, options in (
        ("policies", {key: cell for key, cell in told if key.partition(".")[0] in SEAMS}),
        ("limits", {key: cell for key, cell in told if key.startswith(("engine.", "kv.", "fleet."))}),
    ):
        if options:
            names_first = sorted(options, key=lambda key: (not key.endswith(".name"), key))
            shown = [
                f"{key} {' / '.join(_value(options[key][side]) for side in diff.keys)}"
                for key in names_first[:3]
            ]
            more = len(options) - len(shown)
            return kind, ", ".join(shown) + (f" and {more} more" if more > 0 else "")
    return "", ""


def _value(value: object) -> str:
    return "-" if value is None else str(value)


def divergence(diff: Diff) -> str:
    """Why the decisions parted where they did, as one clause; empty when they did not."""
    found = diff.decisions["first_divergence"]
    if found is None:
        return ""
    (left, right), (a, b) = diff.keys, diff.labels
    if found["cause"] == "ended":
        shorter = a if found[left] is None else b
        return f"{shorter} had ended by then"
    ahead = (found[right]["now_ns"] - found[left]["now_ns"]) / 1e6
    clock = f"{b}'s clock was {abs(ahead):.3f} ms {'ahead of' if ahead > 0 else 'behind'} {a}'s"
    if found["cause"] == "arrivals":
        who = [
            f"{names(found['arrived_only'][key])} had arrived for {label} alone"
            for key, label in ((left, a), (right, b))
            if found["arrived_only"][key]
        ]
        return f"{clock}, so {' and '.join(who)}" if ahead else " and ".join(who)
    if found["cause"] == "clock":
        return f"the same requests had arrived, but {clock}"
    if not diff.scope.same_workload:
        return "clock and arrivals were equal, but the workloads differ"
    return "clock and arrivals were equal, so policy, configuration or engine rules differ"


def changes(diff: Diff) -> list[str]:
    """What the two sides did differently at the first divergent step."""
    found = diff.decisions["first_divergence"]
    if found is None or found["difference"] is None:
        return []
    said, difference = [], found["difference"]
    verbs = {"work": "worked on", "admitted": "admitted", "preempted": "preempted", "rejected": "rejected"}
    for field, verb in verbs.items():
        for key, label in zip(diff.keys, diff.labels, strict=True):
            if difference[field][key]:
                said.append(f"only {label} {verb} {names(difference[field][key])}")
    for request, tokens in list(difference["changed"].items())[:4]:
        x, y = (tokens[key] for key in diff.keys)
        said.append(f"{request} got {x} tokens in {diff.labels[0]}, {y} in {diff.labels[1]}")
    if difference["blocks"] and not said:
        said.append(
            f"the same work on other KV blocks ({names(difference['blocks'])}): allocation or eviction order"
        )
    if difference["order"]:
        said.append("the batch is in another order")
    return said


def cause(diff: Diff) -> str:
    """The planted or real error that the numbers point at, if one does: a rule, or a term of the step time."""
    if not diff.scope.same_workload:
        return ""
    said = []
    for found, when in (
        (diff.decisions["first_divergence"], ""),
        (diff.replay_divergence, f" with {diff.labels[0]}'s durations"),
    ):
        clause = rule(found, diff.keys, diff.labels) if found is not None and found["difference"] else ""
        if clause and found is not None:
            kind, told = configured(diff)
            what = f"the {kind} differ as configured ({told}), first in" if told else "a rule differs:"
            said.append(f"{what} {clause} (step {found['step']}{when})")
            break
    if len(diff.terms):
        term: dict[Any, Any] = diff.terms.iloc[0].to_dict()
        if term["explained"] >= EXPLAINED and term["share"] >= 0.5:
            size = f"{term['delta_ns']:+,.1f} ns a unit"
            if term["factor"] == term["factor"]:
                size = f"x {term['factor']:.3g}, {size}"
            alike = [FACTS[name] for name in term["alike"]]
            also = f" (or {' or '.join(alike)}: these steps don't tell them apart)" if alike else ""
            said.append(
                f"{term['phase']} time for each {FACTS[term['fact']]}{also} is off ({size}), which explains "
                f"{100 * term['explained']:.0f} % of that phase's error over {len(diff.residuals)} equal steps"
            )
    return f"Cause: {'; and '.join(said)}." if said else ""
