"""Files: what loads, and what a damaged one says."""

from __future__ import annotations

import gzip
import json
import re
import tempfile
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from lab.errors import ConfigError, TraceError, UnknownNameError
from traces import azure
from traces.azure import timestamp_ns
from traces.files import Place
from traces.registry import TRACES, build

AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    "2023-11-16 18:15:46.6805900,374,44\r\n"
    "2023-11-16 18:15:50.9951690,396,109\r\n"
    "2023-11-16 18:15:51.2225670,879,55"
)
AZURE_2024 = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2024-05-10 00:00:00.009930+00:00,2162,5\n"
    "2024-05-10 02:00:00+02:00,2399,6\n"
)
MOONCAKE = "".join(
    json.dumps({"timestamp": t, "input_length": n, "output_length": 7, "hash_ids": ids}) + "\n"
    for t, n, ids in [(0, 700, [0, 1]), (0, 1100, [0, 2, 3]), (3000, 512, [0])]
)
TENANTS = "arrival_s,client,prompt_tokens,output_tokens\n0.000000,13,13,199\n0.207938,2,36,137\n0.3,13,5,6\n"
CHAT = (
    '{"arrival_ms": 0, "session": "a", "turn": 0, "tenant": "x", "system": "s", "system_tokens": 9, '
    '"user_tokens": 3, "output_tokens": 4}\n'
    '{"arrival_ms": 10.5, "user_tokens": 5, "output_tokens": 6, "priority": 2, "ttft_slo_ms": 100}\n'
    '{"arrival_ms": 900, "session": "a", "turn": 1, "tenant": "x", "user_tokens": 3, "output_tokens": 4}\n'
)
VALID = {"azure_2023_conv": AZURE, "mooncake": MOONCAKE, "tenants": TENANTS, "jsonl": CHAT}


@pytest.fixture
def write(tmp_path):
    def write(data, name="trace.txt"):
        path = tmp_path / name
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        return str(path)

    return write


@pytest.mark.parametrize("name", VALID)
def test_gzip_and_plain_load_alike_whatever_the_suffix(name, write):
    packed, plain = write(gzip.compress(VALID[name].encode()), "a.txt"), write(VALID[name], "b.gz")
    assert build(name, {"path": packed}).requests == build(name, {"path": plain}).requests
    assert len(build(name, {"path": plain})) == 3


@pytest.mark.parametrize("name", VALID)
@given(offset=st.integers(0, 2), limit=st.integers(1, 4))
@settings(max_examples=12, deadline=None)
def test_a_slice_keeps_ids_content_and_gaps(name, offset, limit, tmp_path_factory):
    path = tmp_path_factory.mktemp("slice") / "t"
    path.write_text(VALID[name])
    whole = build(name, {"path": str(path)}).requests[offset : offset + limit]
    part = build(name, {"path": str(path), "offset": offset, "limit": limit}).requests
    assert [(r.id, r.prompt, r.arrival) for r in part] == [
        (r.id, r.prompt, r.arrival - whole[0].arrival) for r in whole
    ]


@pytest.mark.parametrize("name", VALID)
def test_nothing_after_the_limit_is_parsed(name, write):
    damaged = VALID[name].rstrip() + "\nwhat is this\n"
    assert len(build(name, {"path": write(damaged), "limit": 3})) == 3
    with pytest.raises(TraceError, match=rf"line {4 if name in ('mooncake', 'jsonl') else 5}"):
        build(name, {"path": write(damaged)})


def test_rows_out_of_order_are_sorted_stably_and_counted(write):
    rows = [(5, 1), (1, 2), (5, 3), (1, 4), (0, 5)]
    text = "arrival_s,client,prompt_tokens,output_tokens\n" + "".join(f"{t},c,{n},1\n" for t, n in rows)
    workload = build("tenants", {"path": write(text)})
    assert [len(request.prompt) for request in workload.requests] == [5, 2, 4, 1, 3]
    assert workload.source["out_of_order"] == 3


def test_azure_2024_times_honour_their_zone(write):
    workload = build("azure_2023_conv", {"path": write(AZURE_2024)})
    assert [(request.arrival, len(request.prompt)) for request in workload.requests] == [
        (0, 2399),
        (9_930_000, 2162),
    ]


@given(
    st.datetimes(
        min_value=datetime(2000, 1, 1),
        max_value=datetime(2099, 1, 1),
    ),
    st.integers(0, 9),
)
def test_timestamps_differ_by_exactly_their_ticks(moment, digit):
    text = moment.strftime("%Y-%m-%d %H:%M:%S.") + f"{moment.microsecond:06d}"
    place = Place("p", 1)
    assert timestamp_ns(place, f"{text}{digit}") - timestamp_ns(place, text) == digit * 100
    assert timestamp_ns(place, f"{text}+01:30") == timestamp_ns(place, text) - 5400 * 10**9


PLAIN = [
    "2023-11-16 18:17:03.9799600,4,10",
    "2024-05-10 23:59:59+05:30,700,1",
    "2023-11-16T18:17:04Z,12,999999999",
]
ODD = [
    '"2023-11-16 18:17:05",1,2', " 2023-11-16 18:17:05 ,1,2", "2023-11-16 18:17:05,+1, 2", "2023-11-16 18:17:05,007,2",
    "", "2023-11-16 18:17:60,1,2", "2023-02-30 18:17:05,1,2", "2023-11-16 18:17:05+24:00,1,2",
    "2023-11-16 24:00:00,1,2",
    "2023-11-16 18:17:05,0,2", "2023-11-16 18:17:05,1000000000,2", "2023-11-16 18:17:05,1",
    "2023-11-16 18:17:05,\u0661,2", "\udcff", "2023-11-16\r,1,2", "2023-11-16 18:17:05,1,2\x85",
]  # fmt: skip


@pytest.mark.parametrize("header", ["TIMESTAMP,ContextTokens,GeneratedTokens", "GeneratedTokens,b,TIMESTAMP"])
@given(
    st.lists(st.sampled_from(PLAIN + ODD), max_size=6), st.sampled_from(["\n", "\r\n"]), st.integers(0, 40)
)
@example([PLAIN[0], ODD[0], PLAIN[1], ODD[5]], "\n", 0)
def test_rows_read_at_sight_are_those_that_csv_reads(header, lines, ending, cut):
    data = ending.join(["\ufeff" * (cut % 2) + header, *lines]).encode(errors="surrogateescape")
    if cut > 30:
        data = gzip.compress(data)[:-cut]
    with tempfile.TemporaryDirectory() as folder:
        (file := Path(folder, "a")).write_bytes(data)
        assert told(lambda: azure._rows("x", str(file))) == told(lambda: azure._csv_rows("x", str(file), 0))


def told(rows):
    """What a reader gives, and what it says in the end."""
    found = []
    try:
        found.extend(rows())
    except TraceError as error:
        found.append(str(error))
    return found


def test_shared_hash_ids_are_a_shared_prefix_token_by_token(write):
    first, second, third = build("mooncake", {"path": write(MOONCAKE)}).requests
    a, b, c = (request.prompt.token_ids(32_000) for request in (first, second, third))
    assert a[:512] == b[:512] == c
    assert a[512:700] != b[512:700]
    assert [len(piece) for piece in second.prompt.pieces] == [512, 512, 76]


def test_the_file_options_of_a_line_reach_the_request(write):
    _, single, _ = build("jsonl", {"path": write(CHAT)}).requests
    assert (single.priority, single.ttft_slo, single.tpot_slo) == (2, 100_000_000, None)


@pytest.mark.parametrize(
    ("name", "old", "new", "says"),
    [
        (
            "azure_2023_conv",
            "ContextTokens",
            "Context",
            r"line 1, column 'ContextTokens': missing from the header",
        ),
        (
            "azure_2023_conv",
            ",396,",
            ",-3,",
            r"line 3, column 'ContextTokens': '-3'; expected an integer from 1",
        ),
        ("azure_2023_conv", ",396,", ",1e3,", r"line 3, column 'ContextTokens': '1e3'; expected an integer"),
        (
            "azure_2023_conv",
            ",396,",
            ",0,",
            r"line 3, column 'ContextTokens': '0'; expected an integer from 1",
        ),
        ("azure_2023_conv", ",396,", ",396,4,", r"line 3: 4 fields; expected 3"),
        (
            "azure_2023_conv",
            "2023-11-16 18:15:50",
            "2023-02-30 18:15:50",
            r"line 3, column 'TIMESTAMP': '2023-02-30",
        ),
        ("azure_2023_conv", "18:15:50", "18:15:60", r"line 3, column 'TIMESTAMP': '2023-11-16 18:15:60"),
        ("azure_2023_conv", "18:15:50", "18:60:50", r"line 3, column 'TIMESTAMP': '2023-11-16 18:60:50"),
        ("azure_2023_conv", "18:15:50", "24:15:50", r"line 3, column 'TIMESTAMP': '2023-11-16 24:15:50"),
        ("mooncake", "[0, 2, 3]", "[0, 2]", r"line 2, column 'hash_ids': 2 ids for an input_length of 1100"),
        ("mooncake", "[0, 2, 3]", '[0, 2, "x"]', r"line 2, column 'hash_ids': 'x'; expected an integer"),
        (
            "mooncake",
            '"timestamp": 3000',
            '"timestamp": -1',
            r"line 3, column 'timestamp': -1; expected a number",
        ),
        ("mooncake", '"timestamp": 3000, ', "", r"line 3, column 'timestamp': missing"),
        ("mooncake", '"input_length": 512', '"input_length": true', r"line 3, column 'input_length': True;"),
        ("mooncake", '{"timestamp": 3000', '["timestamp": 3000', r"line 3: not JSON at character 13"),
        ("tenants", "0.207938", "soon", r"line 3, column 'arrival_s': 'soon'; expected a number"),
        ("tenants", "0.207938", "nan", r"line 3, column 'arrival_s': 'nan'; expected a number"),
        ("tenants", ",2,36", ",,36", r"line 3, column 'client': ''; expected 1 to 200 printable"),
        (
            "jsonl",
            '"turn": 1',
            '"turn": 2',
            r"line 3, column 'turn': 2; expected 1, the next turn of session 'a'",
        ),
        ("jsonl", "900", "-900", r"line 3, column 'arrival_ms': -900; expected a number"),
        ("jsonl", '"priority"', '"prioritty"', r"line 2: unknown key 'prioritty'; did you mean 'priority'"),
        ("jsonl", '"system": "s", ', "", r"line 1, column 'system': missing; a system prompt has"),
    ],
)
def test_a_malformed_file_says_where_what_and_what_was_expected(name, old, new, says, write):
    assert old in VALID[name]
    path = write(VALID[name].replace(old, new))
    with pytest.raises(TraceError, match=f"{re.escape(path)}.*{says}"):
        build(name, {"path": path})


@pytest.mark.parametrize("name", VALID)
def test_damaged_containers_are_told_apart(name, write, tmp_path):
    packed = gzip.compress(VALID[name].encode() * 50)
    for data, says in [
        (b"", r"empty|no requests"),
        (packed[: len(packed) // 2], r"line \d+: the gzip data ends or is damaged"),
        (packed[:-1] + bytes([packed[-1] ^ 1]), r"line \d+"),
        (b"\xff\xfe" + VALID[name].encode("utf-16-le"), r"line 1: byte 1 isn't UTF-8"),
    ]:
        with pytest.raises(TraceError, match=says):
            build(name, {"path": write(data)})
    for path in (tmp_path, tmp_path / "absent", "nul\0path", "~nobody-of-this-name/x"):
        with pytest.raises(TraceError, match=r"can't be read: .*; set trace\.path"):
            build(name, {"path": str(path)})


def test_an_offset_beyond_the_file_says_how_long_the_file_is(write):
    with pytest.raises(TraceError, match=r"has 3 requests; trace\.offset=7 skips all"):
        build("tenants", {"path": write(TENANTS), "offset": 7})


SPLICES = [
    b"",
    b'"',
    b"\n",
    b",",
    b"-",
    b"\xff",
    b"\0",
    b"\r",
    b"{}",
    b"[[[[",
    b"1e999",
    b"NaN",
    b"true",
    b"null",
]
SPLICES += [
    b"9" * 400,
    b"9" * 5000,
    b"[" * 3000,
    b'"\\ud800"',
    b"\xd9\xa3",
    b"Infinity",
    b"\xef\xbb\xbf",
    b"0",
]
EDIT = st.tuples(st.integers(0, 600), st.integers(0, 30), st.sampled_from(SPLICES) | st.binary(max_size=4))


@pytest.mark.parametrize("name", VALID)
@given(
    edits=st.lists(EDIT, min_size=1, max_size=4), packed=st.booleans(), cut=st.none() | st.integers(0, 400)
)
@example(edits=[(0, 0, b"")], packed=False, cut=None)
@example(
    edits=[(0, 0, b'"'), (119, 30, b'"')], packed=False, cut=None
)  # a header that goes on in the next line
@settings(max_examples=150, deadline=None)
def test_a_mutated_file_loads_or_says_where_it_is_broken(name, edits, packed, cut, tmp_path_factory):
    data = VALID[name].encode()
    for at, drop, insert in edits:
        at %= len(data) + 1
        data = data[:at] + insert + data[at + drop :]
    data = (gzip.compress(data) if packed else data)[:cut]
    path = tmp_path_factory.mktemp("mutated") / "trace"
    path.write_bytes(data)
    try:
        workload = build(name, {"path": str(path)})
    except TraceError as error:
        message = str(error)
    else:
        assert all(
            len(r.prompt.token_ids(10)) == len(r.prompt) for r in workload.requests if len(r.prompt) < 9999
        )
        return
    assert str(path) in message
    assert re.search(r"line \d+|has no requests", message)
    assert "\n" not in message


def test_names_and_options_that_nothing_answers_to_get_a_suggestion():
    with pytest.raises(
        UnknownNameError, match=r"unknown trace 'azure_2023_con'; did you mean 'azure_2023_conv'\?"
    ):
        build("azure_2023_con")
    with pytest.raises(
        UnknownNameError, match=r"unknown option 'trace\.limt'; did you mean 'trace\.limit'\?"
    ):
        build("chat", {"limt": 3})
    with pytest.raises(ConfigError, match=r"trace\.limit is '3'; expected an integer or null"):
        build("chat", {"limit": "3"})
    with pytest.raises(ConfigError, match=r"trace\.rate_scale is -1\.0; expected a number > 0"):
        build("chat", {"rate_scale": -1})


@pytest.mark.parametrize("name", [name for name, spec in TRACES.items() if spec.needs_path])
def test_a_missing_path_says_where_the_trace_comes_from_and_which_option_to_set(name):
    with pytest.raises(ConfigError, match=rf"trace '{name}' needs a file: .+, then set trace\.path=PATH$"):
        build(name)


@pytest.mark.parametrize("name", TRACES)
def test_options_make_a_typed_schema_with_their_defaults(name):
    schema = OmegaConf.structured(TRACES[name].options)
    schema.limit = 4
    assert OmegaConf.to_object(schema) == TRACES[name].options(limit=4)
    if not TRACES[name].needs_path:
        assert build(name, schema) == build(name, {"limit": 4}) == build(name, TRACES[name].options(limit=4))
