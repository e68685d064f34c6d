"""A difference in sentences: did the decisions part, is it duration or decision, and which stage. Observation path."""

from __future__ import annotations

from typing import Any

from lab.analysis.causes import cause, configured, divergence
from lab.analysis.clocks import say
from lab.analysis.difference import Diff
from lab.analysis.frames import PARTS, STAGE_WORDS
from lab.analysis.wording import names, percent

CHANCE = 2.0
"""A distance of this many times its noise floor is still chance."""


def verdict(diff: Diff) -> list[str]:
    """What a reader should know first, most important first; each item is one or two whole sentences."""
    said = [
        _warnings(diff),
        _clocks(diff),
        cause(diff),
        _noise(diff) if diff.noise else "",
        _decisions(diff),
        _error(diff),
        _stages(diff),
        _parity(diff),
        _noise(diff) if not diff.noise else "",
        _alignment(diff),
        _unaligned(diff),
    ]
    return [sentence for sentence in said if sentence]


def _warnings(diff: Diff) -> str:
    """What limits the comparison: this first, or everything after it is misread."""
    said = []
    if not diff.scope.same_workload:
        said.append(_workloads(diff))
    partial = [label for label, cut in zip(diff.labels, diff.partial, strict=True) if cut]
    if partial:
        steps = diff.decisions["steps"][diff.keys[0]]
        said.append(
            f"Partial run: {' and '.join(partial)} ended early; compared are the {steps} steps that both took and "
            f"the {len(diff.scope.ids or ())} requests that had ended in both, and nothing is re-simulated."
            if diff.scope.ids
            else f"Partial run: {' and '.join(partial)} ended early, before any request had ended in both; the "
            "table sets two unlike runs side by side, and nothing is re-simulated."
        )
    return " ".join(said)


def _clocks(diff: Diff) -> str:
    """Whose spans lie where they weren't."""
    said = [
        f"{say(skew)} in {label}"
        for label, side in zip(diff.labels, diff.clocks, strict=True)
        for skew in side
        if skew.wrong
    ]
    if not said:
        return ""
    return (
        f"Clock skew: {'; and '.join(said)}. Durations within a rank stand; times across ranks don't compare."
    )


def _workloads(diff: Diff) -> str:
    scope = diff.scope
    ways = [
        f"{len(ids)} requests are in {label}'s alone ({names(ids, 2)})"
        for label, ids in zip(diff.labels, scope.only, strict=True)
        if ids
    ]
    if scope.unlike:
        ways.append(f"{len(scope.unlike)} arrive or measure otherwise ({names(scope.unlike, 2)})")
    if scope.contents:
        ways.append("the prompts have the same lengths and other contents")
    text = f"The workloads differ: {', '.join(ways)}."
    if any(diff.partial):
        return text
    if scope.ids is None:
        return f"{text} Nothing is re-simulated."
    if not scope.ids:
        return (
            f"{text} No request is alike, so the table sets the whole runs side by side, the differences are no "
            "errors, and nothing is re-simulated."
        )
    return f"{text} Compared are the {len(scope.ids)} that are alike, and nothing is re-simulated."


def _noise(diff: Diff) -> str:
    """What chance alone would have done."""
    if diff.noise is None:
        if not diff.measured or diff.decisions["first_divergent_step"] is None:
            return ""
        return (
            "Without repeats of the measured run (--noise RUN RUN) there is no noise floor: a first divergence means "
            "little, since two measured runs part as well."
        )
    found = diff.noise
    e2e = found["distances"].get("e2e.w1_over_mean")
    text = f"Noise floor of {found['runs']} repeats: "
    if e2e is not None:
        times = f", {e2e['ratio']:.1f} times the noise" if e2e["ratio"] is not None else ""
        text += f"E2E distributions lie {100 * e2e['floor']:.2f} % apart (here {100 * e2e['distance']:.2f} %{times}); "
    if e2e is not None and e2e["ratio"] is not None and e2e["ratio"] <= CHANCE:
        text = f"No finding in E2E: chance alone does as much. {text}"
    if found["first_divergent_step"] is None:
        return text + "the repeats took the same decisions throughout."
    return (
        f"{text}{found['parted']} of {found['pairs']} pairs part by themselves, at step "
        f"{found['first_divergent_step']:.0f} in the median."
    )


def _unaligned(diff: Diff) -> str:
    """Which steps have no partner, and what a run didn't keep."""
    if not diff.aligned.by_work and diff.decisions["first_divergent_step"] is not None:
        return "A run kept no plans, so steps are aligned while their digests are equal and no further."
    if not any(diff.decisions["steps"].values()):
        return "The runs kept no steps (run.record), so only requests are compared."
    if not any(diff.aligned.alone):
        return ""
    counts = [
        f"{count} of {label}" for count, label in zip(diff.aligned.alone, diff.labels, strict=True) if count
    ]
    return f"Steps without a counterpart: {' and '.join(counts)}."


def _decisions(diff: Diff) -> str:
    step, counts = diff.decisions["first_divergent_step"], diff.decisions["steps"]
    if step is None:
        text = f"Decisions never diverged: all {counts[diff.keys[0]]} steps took the same plan."
        modes = diff.configuration.get("engine.mode", {})
        again = [diff.labels[diff.keys.index(key)] for key in diff.keys if modes.get(key) == "replay"]
        if again:
            text += f" {again[0]} executed recorded plans, so every difference is one of durations."
        return text
    sizes = " / ".join(f"{counts[key]} ({label})" for key, label in zip(diff.keys, diff.labels, strict=True))
    replica = diff.decisions["first_divergence"]["replica"]
    where = f" of replica {replica}" if diff.decisions["replicas"] > 1 else ""
    text = f"Decisions first diverged at step {step}{where} of {sizes}: {divergence(diff)}."
    options = [] if configured(diff)[1] in cause(diff) else list(diff.configuration)
    return text + (f" Options that differ: {names(options)}." if options else "")


def _error(diff: Diff) -> str:
    mean = diff.metrics.get("e2e_ms.mean")
    if not mean or None in mean.values() or not diff.alignment["matched"]:
        return ""
    values: dict[str, Any] = mean
    delta = values[diff.keys[1]] - values[diff.keys[0]]
    if delta == 0 and diff.attribution["e2e"]["total_ms"] == 0 and diff.distances["interval_iou"] == 1.0:
        return "Every request took exactly the same time on both sides."
    against = set(diff.keys) == {"real", "sim"}
    noun = "error" if against else "difference"
    a, b = diff.labels
    size = f"{abs(delta):,.3f} ms {'longer' if delta > 0 else 'shorter'} than {a}'s"
    text = f"Mean E2E of {b} is {size} ({percent(values['error_pct'])})"
    split = (diff.counterfactual or {}).get("e2e_ms.mean")
    laid_out = any(option.startswith(("topology.", "fleet.")) for option in diff.configuration)
    decided = (
        "decisions and the topology" if laid_out else "decisions"
    )  # links and losses come with the rules
    if split and not split["duration"] and split["decision"]:
        return f"{text}, all of it from {decided}: steps that did the same work took the same time."
    if split and not split["decision"] and split["duration"]:
        return f"{text}, all of it from step durations: with {a}'s durations nothing is left of it."
    if split:
        moved = abs(split["duration"]) + abs(split["decision"])
        shares = [100 * abs(split[part]) / moved if moved else 0.0 for part in ("duration", "decision")]
        return (
            f"{text}: {split['duration']:+,.3f} ms from step durations, {split['decision']:+,.3f} ms from {decided} "
            f"({shares[0]:.0f} % / {shares[1]:.0f} % of the {noun})."
        )
    if diff.decisions["first_divergent_step"] is None:
        return f"{text}, all of it from durations, since the decisions are equal."
    if diff.replay_divergence is None and diff.parity:
        return f"{text}; duration and decision can't be separated: {b}'s rules can't be had again."
    return f"{text}; what of it is duration and what decision was not separated: nothing was re-simulated."


def _stages(diff: Diff) -> str:
    found = diff.attribution["e2e"]
    parts = sorted(PARTS, key=lambda stage: -found["stages"][stage]["share"])
    told = [
        f"{STAGE_WORDS[stage]} {100 * found['stages'][stage]['share']:.0f} % "
        f"({found['stages'][stage]['mean_ms']:+.3f} ms a request)"
        for stage in parts
        if found["stages"][stage]["share"] >= 0.005
    ]
    if not told:
        return ""
    residual = f" {found['residual_ns']} ns are unexplained." if found["residual_ns"] else ""
    return f"The difference by stage: {', '.join(told)}.{residual}"


def _parity(diff: Diff) -> str:
    if diff.parity is None:
        return ""
    parted = diff.decisions["first_divergence"]
    if diff.parity and parted is not None and parted["cause"] == "rule":
        return (
            f"Run again by this code with {diff.labels[0]}'s durations, {diff.labels[1]}'s configuration takes "
            f"{diff.labels[0]}'s decisions: {diff.labels[1]} was made by other code, or its configuration doesn't "
            "tell all."
        )
    if diff.parity:
        return (
            f"Parity holds: driven with {diff.labels[0]}'s durations, every plan digest comes out the same."
        )
    kind, told = configured(diff)
    if told:
        return f"Parity fails, as expected: the {kind} differ ({told})."
    return (
        f"Parity fails: even with {diff.labels[0]}'s durations the decisions differ, "
        "so something other than time differs between the two sides."
    )


def _alignment(diff: Diff) -> str:
    found, said = diff.alignment, []
    for key, label in zip(diff.keys, diff.labels, strict=True):
        if found["only"][key]:
            said.append(f"{len(found['only'][key])} only in {label} ({names(found['only'][key], 2)})")
    if found["unlike_outcome"]:
        said.append(
            f"{len(found['unlike_outcome'])} with different outcomes ({names(found['unlike_outcome'], 2)})"
        )
    if found["unlike_work"]:
        said.append(
            f"{len(found['unlike_work'])} with different arrival, prompt or output ({names(found['unlike_work'], 2)})"
        )
    if not said:
        return ""
    return (
        f"{found['matched']} requests finished on both sides and are compared; not alike: {'; '.join(said)}."
    )
