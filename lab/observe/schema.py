"""What stands in a run directory, file by file and column by column. Observation path.

    python -m lab.observe.schema > docs/run-directory.md

Types come from `columns.py`, by which the tables are written; units and meanings stand here. A test holds the two, and
the page, together: a column without a meaning can't be added, nor a meaning kept for a column that is gone.
"""

from __future__ import annotations

from collections.abc import Sequence

from lab.observe.boundaries import EPOCH_NS, SCHEMA_VERSION
from lab.observe.columns import FLEET, PLANS, REQUESTS, SPANS, STEPS, WORKLOAD
from lab.observe.parquet import Column

Meanings = dict[str, tuple[str, str]]
"""Column -> unit ("" for none) and meaning."""

NS, TOKENS, BLOCKS = "ns", "tokens", "blocks"

FILES: dict[str, str] = {
    "config.yaml": "The resolved configuration: every option, also those left at their defaults.",
    "environment.json": "Where and how it ran: command, machine, packages, revision, the backend and its capacity, "
    "what was chosen for each seam, and the OpenTelemetry resource. All that depends on the machine or the calendar is "
    "here.",
    "cost.json": "What the cost model has to say of its durations, such as how often it extrapolated; "
    "steps that failures cut off.",
    "workload.parquet": "The requests that were to be served, without loss: they can be served again.",
    "requests.parquet": "What became of each request.",
    "steps.parquet": "How long each step took, and the state it left.",
    "plans.parquet": "What each step decided, in full.",
    "fleet.parquet": "When replicas came and went.",
    "spans.parquet": "Every boundary that a request or a step crossed (declared in `lab/observe/boundaries.py`).",
    "metrics.json": "What is measured of the run (`docs/metrics.md`). `wall_s` alone depends on the machine.",
    "metrics.prom": "The same as Prometheus text, under vLLM's names.",
    "log.jsonl": "The log, which grows while the run goes on; `trace_id` and `span_id` join it with the spans.",
    "spans.otlp.jsonl": "The spans as an OTLP file (`export.otlp_file=true`, or `python -m lab.export`).",
    "timeline.perfetto-trace": "The run for ui.perfetto.dev; of an experiment on both backends one beside its two run "
    "directories, with both of them in it.",
    "report.html": "The report page.",
}
"""What each file is for. `_SUCCESS` or `PARTIAL` stands beside them."""

_WORKLOAD: Meanings = {
    "id": ("", "the request's name, unique in the workload"),
    "arrival_ns": (NS, "when it arrives"),
    "prompt_tokens": (TOKENS, "length of the prompt"),
    "pieces": (
        "",
        "the prompt: token ids (`tokens`), or `length` tokens from `start` on of a random stream's identity "
        "(`stream`); equal pieces are equal content",
    ),
    "max_tokens": (TOKENS, "longest output"),
    "output_len": (TOKENS, "the output's length where it is forced; null where the model itself ends it"),
    "stop_ids": ("", "token ids that end the output"),
    "temperature": ("", "of sampling; 0 is greedy"),
    "top_k": ("", "keep the k likeliest tokens; 0 keeps all"),
    "top_p": ("", "keep the smallest set of tokens with this probability"),
    "min_p": ("", "drop tokens below this share of the likeliest"),
    "sampling_seed": ("", "seed of this request's draws"),
    "logprobs": ("", "how many alternatives have their log-probabilities recorded; null: none is recorded"),
    "tenant": ("", "who sent it; empty where nobody is named"),
    "session": ("", "the conversation it belongs to; empty without one"),
    "priority": ("", "as its sender gave it; lower is more urgent"),
    "ttft_slo_ns": (NS, "objective for the time to the first token; null: none"),
    "tpot_slo_ns": (NS, "objective for the mean time per token after the first; null: none"),
    "cache_salt": ("", "prefixes are shared among equal salts only"),
    "stop": ("", "texts that end the output"),
    "n": ("", "outputs of this request, which share the prompt's KV"),
    "parent": ("", "the request that this one is a further output of; empty: it is none"),
    "sample": ("", "which of its parent's outputs it is"),
    "min_tokens": (TOKENS, "no end before this many"),
    "repetition_penalty": ("", "tokens of prompt and output are made less likely; 1: not"),
    "presence_penalty": ("", "taken off the logits of tokens in the output"),
    "frequency_penalty": ("", "the same, for each time that they stand there"),
    "logit_bias": ("", "added to the logits of single tokens"),
}

_REQUESTS: Meanings = {
    "id": ("", "as in the workload; further outputs of a request have names of their own"),
    "seq": ("", "order of entry into the engine; -1: it never entered"),
    "parent": ("", "the request that it is a further output of"),
    "sample": ("", "which of its parent's outputs it is"),
    "tenant": ("", "as in the workload"),
    "session": ("", "as in the workload"),
    "priority": ("", "as in the workload"),
    "arrival_ns": (NS, "when it arrived, as intended: waiting at the client counts"),
    "end_ns": (NS, "when its last token was there, or it was refused, aborted or cut off"),
    "outcome": ("", "`finished`, `rejected`, `aborted` or `unfinished`"),
    "reason": ("", "`length`, `stop`, `aborted`, `interrupted`, or why it was rejected"),
    "replica": ("", "the replica that routing chose; -1: none"),
    "admitted": ("", "what the admission policy said"),
    "admit_reason": ("", "... and why"),
    "route_reason": ("", "why routing chose this replica"),
    "ingest_lag_ns": (
        NS,
        "from the arrival until it was taken in: what a busy loop costs under a wall clock",
    ),
    "prompt_tokens": (TOKENS, "length of the prompt"),
    "output_tokens": (TOKENS, "generated"),
    "cached_tokens": (TOKENS, "of the prompt, supplied by the prefix cache at the first admission"),
    "cached_blocks": (BLOCKS, "the same in blocks"),
    "computed_tokens": (TOKENS, "put through the model, recomputation included"),
    "preemptions": ("", "how often it was preempted"),
    "predicted_output": (TOKENS, "output length that the predictor foresaw; 0: it never entered an engine"),
    "dropped_tokens": (TOKENS, "whose KV compression gave up"),
    "first_scheduled_ns": (NS, "start of the first step that worked on it; null: none did"),
    "first_token_ns": (NS, "when the first token was there; null: none was"),
    "last_token_ns": (NS, "when the last token was there; null: none was"),
    "queue_ns": (NS, "all time spent waiting, after preemptions too"),
    "prefill_ns": (NS, "all time in prefill"),
    "decode_ns": (NS, "all time in decode"),
    "ttft_slo_ns": (NS, "as in the workload"),
    "tpot_slo_ns": (NS, "as in the workload"),
    "token_times_ns": (NS, "when each token was there (`run.record=everything`; else empty)"),
    "intervals": (
        "",
        "its life, without a gap from arrival to end: `phase` (`queue`, `prefill`, `decode`), `start_ns`, "
        "`end_ns`, `cause` of waiting (`arrival`, `preempted`, `swapped`, `transfer`, `failed`), and the steps",
    ),
    "output": (
        "",
        "generated token ids; a simulator's carry no meaning (`run.record=everything`; else empty)",
    ),
    "logprobs": (
        "",
        "for each token its own log-probability and the likeliest others, where they were asked for",
    ),
    "transfers": (
        "",
        "moves of its KV to the replica that decodes it: `source`, `destination`, `tokens`, `bytes`, and when it was "
        "ready, had room reserved, was sent and had arrived, in ns",
    ),
}

_STEPS: Meanings = {
    "step": ("", "number of the step on its replica, from 0"),
    "replica": ("", "which replica took it"),
    "policy": ("", "the scheduling policy that planned it"),
    "start_ns": (NS, "when planning began"),
    "plan_ns": (NS, "planning: the policy and the block tables"),
    "prepare_ns": (NS, "making the batch's tensors"),
    "forward_ns": (NS, "the model"),
    "sample_ns": (NS, "drawing the next tokens"),
    "commit_ns": (NS, "putting the tokens to the requests' accounts"),
    "transfer_ns": (NS, "moving KV blocks between device and host, or copying them"),
    "compact_ns": (NS, "giving up KV that compression doesn't keep"),
    "end_ns": (NS, "start plus all of these"),
    "batch": ("requests", "work items of the step"),
    "prefill_tokens": (TOKENS, "of work that continues a prompt (recomputation included)"),
    "decode_tokens": (TOKENS, "of work that extends a generated sequence by one"),
    "context_tokens": (TOKENS, "attended to, summed over the work items"),
    "samples": ("", "work items that draw a token"),
    "running": ("requests", "running right after planning"),
    "waiting": ("requests", "waiting right after planning"),
    "blocks_free": (BLOCKS, "empty, right after planning"),
    "blocks_cached": (BLOCKS, "unreferenced with reusable content, right after planning"),
    "blocks_held": (BLOCKS, "referenced by requests, right after planning"),
    "allocated": (BLOCKS, "taken while planning"),
    "evicted": (BLOCKS, "whose cached content was dropped to make room"),
    "released_plan": (BLOCKS, "given back while planning (preemption, abort)"),
    "released_commit": (BLOCKS, "given back at commit (finish)"),
    "preempted": ("requests", "preempted"),
    "moved_blocks": (BLOCKS, "swapped out and in"),
    "dropped_tokens": (TOKENS, "whose KV compression gave up"),
    "copied_blocks": (BLOCKS, "copied since several outputs shared them"),
    "rejected": ("requests", "given up by the policy"),
    "digest": ("", "of this decision and all before it: equal digests are equal schedules"),
    "weights_term_ns": (NS, "of a modelled step (null otherwise): linear layers and the LM head"),
    "attention_term_ns": (NS, "... attention of prompt chunks"),
    "kv_read_term_ns": (NS, "... attention of single tokens: reading their KV"),
    "collectives_term_ns": (NS, "... devices waiting for each other's data"),
    "host_term_ns": (NS, "... launching and preparing"),
    "transfer_term_ns": (NS, "... KV between device and host"),
    "ranks": ("", "where several ranks computed: each one's place and time in each phase, in ns"),
}

_PLANS: Meanings = {
    "step": ("", "as in steps"),
    "replica": ("", "as in steps"),
    "now_ns": (NS, "when it was planned"),
    "digest": ("", "as in steps"),
    "request": ("", "the requests it works on; the next five columns say for each of them:"),
    "start": (TOKENS, "... how many were computed before"),
    "tokens": (TOKENS, "... how many are computed now"),
    "samples": ("", "... whether a token is drawn"),
    "blocks": ("", "... the blocks added to its table"),
    "dropped": (TOKENS, "... how many of those before compression has dropped"),
    "new": ("", "requests that the data plane hears of for the first time"),
    "admitted": ("", "requests that went from waiting to running"),
    "preempted": ("", "requests that went from running to waiting"),
    "preempted_how": ("", "... each by `recompute` or `swap`"),
    "swap_out": ("", "per request, device blocks and the host blocks they are copied to"),
    "swap_in": ("", "per request, device blocks and the host blocks they are copied from"),
    "compactions": ("", "per request, what compression keeps and the blocks it gives back"),
    "rejected": ("", "waiting requests that the policy gave up"),
    "rejected_reason": ("", "... each with why"),
    "released": ("", "requests that the data plane may forget"),
    "copy_request": ("", "requests whose blocks are copied, since another output of theirs goes on in them"),
    "copy_from": ("", "... the blocks"),
    "copy_to": ("", "... and their copies"),
    "reread": ("tokens", "of the context, in blocks that another running request reads before"),
}

_FLEET: Meanings = {
    "at_ns": (NS, "when"),
    "replica": ("", "which"),
    "event": ("", "`start` (cold), `ready`, `drain`, `recall` (ready again before it was empty), `gone`"),
    "target": ("replicas", "wanted, as far as the event was a decision"),
    "reason": ("", "why"),
}

_SPANS: Meanings = {
    "trace_id": (
        "",
        "32 hex digits: one trace a request, one a replica, one for the gateway; equal on both backends",
    ),
    "span_id": (
        "",
        "16 hex digits, of the trace, the name and the span's number in it: equal on both backends",
    ),
    "parent_span_id": ("", "null for the root of a trace"),
    "name": ("", "as declared"),
    "kind": ("", "`SERVER` for requests, else `INTERNAL`"),
    "start_time_unix_nano": (NS, "run time plus the epoch above"),
    "end_time_unix_nano": (NS, "the same"),
    "plane": ("", "`control` decides, `data` computes"),
    "path": ("", "what moves: a `request`, `state` (KV blocks), an `observation`"),
    "attributes": ("", "JSON with sorted keys. Links of steps to requests are the rows of plans"),
}

TABLES: dict[str, tuple[Sequence[Column[object]], Meanings]] = {
    "workload": (WORKLOAD, _WORKLOAD),  # type: ignore[dict-item]
    "requests": (REQUESTS, _REQUESTS),  # type: ignore[dict-item]
    "steps": (STEPS, _STEPS),  # type: ignore[dict-item]
    "plans": (PLANS, _PLANS),  # type: ignore[dict-item]
    "fleet": (FLEET, _FLEET),  # type: ignore[dict-item]
    "spans": (SPANS, _SPANS),  # type: ignore[dict-item]
}
"""Table -> its columns, and what they mean."""

_SHAPES = {
    "unique": "string",
    "hex": "string",
    "word": "string",
    "varied": "int64",
    "pieces": "list<struct>",
    "intervals": "list<struct>",
    "biases": "list<struct>",
}
_SHAPES |= dict.fromkeys(("moves", "compactions", "ranks", "logprobs", "transfers"), "list<struct>")


def page() -> str:
    """`docs/run-directory.md`."""
    lines = [
        "# A run directory",
        "",
        "Everything a report shows can be computed again from these files: workload, requests, steps and plans "
        "together give back the records that they were made from (`lab.analysis.load(PATH).recorded()`). Files are put "
        "in place whole; `_SUCCESS` comes last, and until then `PARTIAL` says why the run isn't complete.",
        "",
        f"Times named `*_ns` are whole nanoseconds since the run began. Spans have them on top of {EPOCH_NS:,} "
        "(2000-01-01), since some tools take 0 for no time. Tables are Parquet with zstd, and equal content is equal "
        f"bytes. The schema's version, in each table's metadata as `lab.schema.version`, is {SCHEMA_VERSION}.",
        "",
        "This page is made by `python -m lab.observe.schema > docs/run-directory.md`.",
        "",
        "| file | what it holds |",
        "|---|---|",
        *(f"| `{name}` | {what} |" for name, what in FILES.items()),
    ]
    for table, (columns, meanings) in TABLES.items():
        lines += ["", f"## {table}.parquet", "", FILES[f"{table}.parquet"], ""]
        lines += ["| column | type | unit | meaning |", "|---|---|---|---|"]
        for name, kind, _ in columns:
            unit, meaning = meanings[name]
            lines.append(f"| `{name}` | {_SHAPES.get(kind, kind)} | {unit} | {meaning} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
