"""A timeline parses with Perfetto's own classes, and holds the run that it was made of."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import Trace, TrackDescriptor, TrackEvent

from lab.observe.perfetto import write_timeline
from lab.observe.plain import PlainSpan, plain_spans
from lab.observe.recorder import Recorder
from sim.links import Link
from sim.moves import Failure
from tests.observe.made import info_for, play, rich, runs
from tests.policies.fleets import MS
from tests.sim.test_moves import SPLIT, serve, workload


@dataclass
class Slice:
    name: str
    category: str
    start: int
    end: int
    about: dict[str, Any]
    flows: list[int]
    inside: str | None


@dataclass
class Track:
    name: str
    parent: int
    path: str = ""
    slices: list[Slice] = field(default_factory=list)
    counts: list[tuple[int, int]] = field(default_factory=list)
    descriptor: Any = None


def _annotation(item: Any, texts: dict[int, str]) -> Any:
    kind = item.WhichOneof("value")
    if kind is None:
        return tuple(part.string_value for part in item.array_values)
    value = getattr(item, kind)
    return texts[value] if kind == "string_value_iid" else value


def opened(path: Path) -> dict[str, Track]:
    """The file as Perfetto's importer would see it: tracks by path, slices closed, texts looked up."""
    trace = Trace.FromString(path.read_bytes())
    names: dict[str, dict[int, str]] = {"event": {}, "category": {}, "key": {}, "text": {}}
    tracks: dict[int, Track] = {}
    events: list[tuple[int, int, Any]] = []
    for place, packet in enumerate(trace.packet):
        assert packet.trusted_packet_sequence_id == 1
        interned = packet.interned_data
        for kind, entries in (
            ("event", interned.event_names),
            ("category", interned.event_categories),
            ("key", interned.debug_annotation_names),
        ):
            for entry in entries:
                assert names[kind].setdefault(entry.iid, entry.name) == entry.name
        for entry in interned.debug_annotation_string_values:
            assert names["text"].setdefault(entry.iid, entry.str.decode()) == entry.str.decode()
        if packet.HasField("track_descriptor"):
            about = packet.track_descriptor
            assert about.uuid
            assert about.uuid not in tracks
            assert not about.parent_uuid or about.parent_uuid in tracks
            name = about.process.process_name or about.name
            above = tracks[about.parent_uuid].path + "/" if about.parent_uuid else ""
            tracks[about.uuid] = Track(name, about.parent_uuid, above + name, descriptor=about)
        if packet.HasField("track_event"):
            assert packet.sequence_flags == 2
            assert packet.track_event.track_uuid in tracks
            events.append((packet.timestamp, place, packet.track_event))
    assert trace.packet[0].sequence_flags == 1
    open_: dict[int, list[Slice]] = {}
    for at, _, event in sorted(events, key=lambda item: item[:2]):
        track = tracks[event.track_uuid]
        stack = open_.setdefault(event.track_uuid, [])
        if event.type == TrackEvent.TYPE_COUNTER:
            track.counts.append((at, event.counter_value))
        elif event.type == TrackEvent.TYPE_SLICE_END:
            stack.pop().end = at
        else:
            about = {names["key"][a.name_iid]: _annotation(a, names["text"]) for a in event.debug_annotations}
            [category] = event.category_iids
            inside = stack[-1].name if stack else None
            title = names["event"][event.name_iid]
            one = Slice(title, names["category"][category], at, at, about, list(event.flow_ids), inside)
            track.slices.append(one)
            if event.type == TrackEvent.TYPE_SLICE_BEGIN:
                stack.append(one)
    assert not any(open_.values())
    found = {track.path: track for track in tracks.values()}
    assert len(found) == len(tracks)
    return found


def timeline(recorder: Recorder, path: Path) -> tuple[dict[str, Track], list[PlainSpan]]:
    plain = list(plain_spans(recorder, info_for(recorder)))
    assert write_timeline(path, [("sim", plain)]) == len(plain)
    return opened(path), plain


@given(recorder=runs())
def test_every_span_is_a_slice_with_its_times_and_attributes(
    recorder: Recorder, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tracks, plain = timeline(recorder, tmp_path_factory.mktemp("perfetto") / "t")

    def key(name: str, plane: str, start: int, end: int, about: dict[str, Any]) -> str:
        return repr((name, plane, start, end, sorted(about.items())))

    expected = Counter(
        key(
            span.boundary.name,
            span.boundary.plane,
            span.start,
            span.end,
            {
                name: value
                for (name, _), value in zip(span.boundary.attributes, span.values, strict=True)
                if value not in (None, ())
            },
        )
        for span in plain
    )
    slices = [one for track in tracks.values() for one in track.slices]
    assert Counter(key(one.name, one.category, one.start, one.end, one.about) for one in slices) == expected


@given(recorder=runs())
def test_slices_lie_in_their_parents_on_the_track_of_their_trace(
    recorder: Recorder, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tracks, plain = timeline(recorder, tmp_path_factory.mktemp("perfetto") / "t")
    by_id = {(span.trace_id, span.span_id): span for span in plain}
    for record in recorder.requests:
        track = tracks[f"sim/requests/{record.request.id}"]
        assert track.slices[0].name == "request"
        assert {one.inside for one in track.slices[1:]} <= {
            "request" if record.end > record.request.arrival else None
        }
        stretches = [
            (one.name, one.start, one.end)
            for one in track.slices[1:]
            if one.name[8:] not in ("admit", "route")
        ]
        assert stretches == [(f"request.{part.phase}", part.start, part.end) for part in record.intervals]

    def around(span: PlainSpan) -> str | None:
        """The nearest span that lasts and is on the same track; what lies in an instant is beside it."""
        if span.parent_span_id is None or span.boundary.name == "step.rank":
            return None
        parent = by_id[span.trace_id, span.parent_span_id]
        if (span.boundary.name, parent.boundary.name) == ("kv.transfer", "request"):
            return None
        return parent.boundary.name if parent.end > parent.start else around(parent)

    expected = Counter((span.boundary.name, span.start, span.end, around(span)) for span in plain)
    slices = [one for track in tracks.values() for one in track.slices]
    assert Counter((one.name, one.start, one.end, one.inside) for one in slices) == expected


def test_ranks_counters_and_arrows(tmp_path: Path) -> None:
    recorder = rich()
    tracks, _ = timeline(recorder, tmp_path / "t")
    ranks = {part.rank for step in recorder.steps for part in step.ranks}
    assert ranks == {0, 1}
    shared = [step for step in recorder.steps if step.ranks]
    for rank in ranks:
        parts = [one for one in tracks[f"sim/replica 0/rank {rank}"].slices if one.name == "step.rank"]
        assert [one.about["lab.rank"] for one in parts] == [rank] * len(shared)
    assert {one.name for one in tracks["sim/replica 0/rank 1"].slices} > {"step.forward"}

    def at(name: str, when: int) -> int:
        values = [value for since, value in tracks[f"sim/replica 0/{name}"].counts if since <= when]
        return values[-1] if values else 0

    for step in recorder.steps:
        planned = step.start + step.timing.plan_ns
        if step.end == step.start:
            continue
        assert at("KV blocks held", planned) == step.blocks_held
        assert at("KV blocks cached", planned) == step.blocks_cached
        assert at("KV blocks free", planned) == step.blocks_free
        assert at("requests running", planned) == step.running
        assert at("requests waiting", planned) == step.waiting
        assert at("batch prefill tokens", planned) == step.prefill_tokens
        assert at("batch decode tokens", planned) == step.decode_tokens
    for step, after in zip(recorder.steps, [*recorder.steps[1:], None], strict=True):
        if after is None or after.start > step.end:  # nothing is computed in between
            assert at("batch requests", step.end) == 0
    counters = {name: track.descriptor.counter for name, track in tracks.items() if track.counts}
    assert {counter.unit_name for counter in counters.values()} == {"blocks", "requests", "tokens"}

    steps = {flow: one for one in tracks["sim/replica 0/steps"].slices for flow in one.flows}
    arrows = 0
    for record in recorder.requests:
        for one in tracks[f"sim/requests/{record.request.id}"].slices:
            for flow in one.flows:
                arrows += 1
                if one.about["lab.step.first"] >= 0:
                    assert steps[flow].about["lab.step.index"] == one.about["lab.step.first"]
    assert arrows == sum(part.phase != "queue" for record in recorder.requests for part in record.intervals)


def test_two_runs_lie_over_each_other_in_one_file(tmp_path: Path) -> None:
    import random

    a, b = rich(), play(random.Random(6), 20, 100, replica=3)
    sides = [("real", plain_spans(a, info_for(a))), ("sim", plain_spans(b, info_for(b)))]
    write_timeline(tmp_path / "t", sides)
    tracks = opened(tmp_path / "t")
    roots = [track.descriptor for track in tracks.values() if not track.parent]
    assert [root.process.process_name for root in roots] == ["real", "sim"]
    assert len({root.process.pid for root in roots}) == 2
    for name, recorder, replica in (("real", a, 0), ("sim", b, 3)):
        steps = [one for one in tracks[f"{name}/replica {replica}/steps"].slices if one.name == "step"]
        assert [one.start for one in steps] == [step.start for step in recorder.steps]
    assert tracks["sim/requests"].descriptor.child_ordering == TrackDescriptor.CHRONOLOGICAL
    flows = [flow for track in tracks.values() for one in track.slices for flow in one.flows]
    assert max(Counter(flows).values()) == 2


def test_names_and_values_that_come_again_are_written_once(tmp_path: Path) -> None:
    recorder = rich()
    timeline(recorder, tmp_path / "t")
    data = (tmp_path / "t").read_bytes()
    for word in (b"step.forward", b"lab.kv.blocks_held", b"request.decode", b"fcfs"):
        assert data.count(word) == 1, word
    spans = sum(1 for _ in plain_spans(recorder, info_for(recorder)))
    assert len(data) < 110 * spans


def test_arrows_follow_a_request_to_the_replica_that_took_it_and_none_leads_astray(tmp_path: Path) -> None:
    """Prefill and decode apart, a slow link, a decoding replica lost and replaced, one for prompts lost for good."""
    failures = [Failure(2, 400 * MS, 100 * MS), Failure(0, 600 * MS)]
    recorder, records = serve(
        workload(7), SPLIT, Link(1e7, 70_000), failures=failures, cold_start=50 * MS, aggregate=False
    )
    tracks, _ = timeline(recorder, tmp_path / "t")
    landed = {
        flow: (int(path.split("/")[1].removeprefix("replica ")), one)
        for path, track in tracks.items()
        if path.endswith("/steps")
        for one in track.slices
        for flow in one.flows
    }
    did = {(s.replica, s.plan.index): {work.request for work in s.plan.items} for s in recorder.steps}
    failed = {name for name, r in records.items() if any(part.cause == "failed" for part in r.intervals)}
    assert 0 < len(failed) < len(records)
    assert max(len(record.transfers) for record in records.values()) == 2
    arrows = 0
    for name, record in records.items():
        at = record.decision.replica
        for one in tracks[f"sim/requests/{name}"].slices:
            for flow in one.flows:
                if flow not in landed:
                    assert name in failed  # where it was computed again isn't told
                    continue
                arrows += 1
                replica, step = landed[flow]
                assert name in did[replica, step.about["lab.step.index"]]
                assert step.about["lab.step.index"] == one.about["lab.step.first"]
                assert one.start <= step.start < one.end
                if name not in failed:
                    assert replica == (
                        at if one.name == "request.prefill" else record.transfers[0].destination
                    )
    whole = [record for name, record in records.items() if name not in failed]
    assert arrows >= sum(part.phase != "queue" for record in whole for part in record.intervals) > len(whole)
    moves = [
        (name, one.start, one.end, one.about["lab.transfer.source"], one.about["lab.transfer.destination"])
        for name in records
        for one in getattr(tracks.get(f"sim/requests/{name}/moves"), "slices", [])
    ]
    assert moves == [
        (name, move.ready, move.end, move.source, move.destination)
        for name, record in records.items()
        for move in record.transfers
    ]
    gone = [
        (one.about["lab.replica"], one.start)
        for one in tracks["sim/gateway"].slices
        if one.about["lab.scale.reason"] == "failed"
    ]
    assert gone == [(2, 400 * MS), (0, 600 * MS)]
    for replica, moment in gone:
        assert all(step.end <= moment for step in tracks[f"sim/replica {replica}/steps"].slices)
    assert tracks["sim/replica 4/steps"].slices[0].start >= 550 * MS
