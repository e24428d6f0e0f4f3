"""Traces: recorded traffic as hashes and lengths, in the formats people have.

Owns the readers and the one form that the simulation replays: `TraceRequest`. It knows no policies and
no engines. Text in engine logs is hashed while it is read and never kept.

Accepted, told apart line by line (unknown lines are counted and passed over):

* Mooncake JSON lines: `timestamp` (ms), `input_length`, `output_length` (tokens), `hash_ids` (one id
  per 512 tokens; equal ids at equal positions are equal prefixes). Our own record (`--record-trace`)
  has the same members, and `block_tokens`, or `block_chars` where blocks are text: how many tokens
  that is comes out of the lengths.
* JSON lines with `at` (seconds), `tokens` or `chars`, `output_tokens`, `blocks` (chained hashes, hex or
  int), `block_tokens` or `block_chars`.
* SGLang with `--log-requests --log-requests-format json`: `timestamp`, `event` "request.received" or
  "request.finished", `rid`, `obj` with `text` or `input_ids` (and `sampling_params.max_new_tokens`),
  and for finished ones `out.meta_info` with `prompt_tokens`, `completion_tokens`.
* vLLM with `--enable-log-requests`: text lines "... Received request ID: prompt: '...', params:
  SamplingParams(..., max_tokens=N, ...), prompt_token_ids: [...] ...".
* Anything else in JSON lines with a time (`timestamp`, `time`, `created`, `arrival_time`), a prompt
  (`prompt`, `text`, `messages`, `prompt_token_ids`, `input_ids`) and perhaps `usage`, `max_tokens`.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import msgspec

from smg.fleet.block_hashes import BlockHasher, BlockSettings

MOONCAKE_BLOCK_TOKENS = 512
OUTPUT_TOKENS = 128
"""Assumed answer where a log tells neither its length nor a bound."""
CHARS_PER_TOKEN = 4
LINES_MAX = 50_000_000
"""A bound for files that are no traces."""


class TraceRequest(msgspec.Struct, frozen=True, gc=False):
    """One request: when, how long, and which blocks its prompt is made of."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...]
    """One number per block of `Trace.block_tokens`; equal at equal positions means equal prefixes."""


class Trace(msgspec.Struct, frozen=True):
    """Requests in order of time, starting at 0 s."""

    name: str
    requests: tuple[TraceRequest, ...]
    block_tokens: int
    skipped_lines: int = 0

    @property
    def duration_s(self) -> float:
        """From the first to the last arrival."""
        return self.requests[-1].at_s - self.requests[0].at_s if self.requests else 0.0

    def scaled(self, factor: float) -> Trace:
        """The same requests in 1/`factor` of the time."""
        return msgspec.structs.replace(
            self,
            requests=tuple(
                TraceRequest(
                    request.at_s / factor, request.prompt_tokens, request.output_tokens, request.blocks
                )
                for request in self.requests
            ),
        )

    def first(self, count: int | None) -> Trace:
        """The first `count` requests (all for None)."""
        return self if count is None else msgspec.structs.replace(self, requests=self.requests[:count])


class TraceError(ValueError):
    """The file holds no request that we can read; says what was tried."""


def load(path: str | Path, limit: int | None = None, seed: int = 0) -> Trace:
    """Read a trace file; the first `limit` requests of it. Raises `TraceError` and `OSError`.

    Stamps that were rounded to a grid (Mooncake's conversation trace: 3 s) are spread over their cell
    by `seed`, else every cell would be a burst that nobody sent.
    """
    path = Path(path)
    with path.open(encoding="utf-8", errors="replace") as lines:
        return parse(lines, path.stem, limit, seed)


def parse(lines: Iterable[str], name: str, limit: int | None = None, seed: int = 0) -> Trace:
    """The same from lines."""
    reader = _Reader()
    count = 0
    for line in lines:
        count += 1
        if count > LINES_MAX or (limit is not None and len(reader.rows) >= limit):
            break
        reader.feed(line)
    rows = list(reader.rows.values())
    if not rows:
        raise TraceError(
            f"{name}: none of {count} lines is a request (Mooncake, SGLang json, vLLM text, own record)"
        )
    rows = _sized(rows)
    sizes = {row[4] for row in rows}
    if len(sizes) != 1:
        raise TraceError(f"{name}: requests with blocks of different sizes ({sorted(sizes)} tokens)")
    stamps = _spread([row[0] for row in rows], seed)
    order = sorted(range(len(rows)), key=lambda number: stamps[number])
    start = stamps[order[0]]
    requests = tuple(
        TraceRequest(
            stamps[number] - start, max(1, rows[number][1]), max(1, rows[number][2]), rows[number][3]
        )
        for number in order
    )
    return Trace(name, requests, sizes.pop(), reader.skipped)


def record_line(
    at_s: float, tokens: int, output_tokens: int, blocks: Iterable[int], block_tokens: int
) -> str:
    """One line of our own record, without its newline: lengths and hashes, never text."""
    return json.dumps(
        {
            "at": round(at_s, 6),
            "tokens": tokens,
            "output_tokens": output_tokens,
            "blocks": [f"{block:x}" for block in blocks],
            "block_tokens": block_tokens,
        },
        separators=(",", ":"),
    )


_Row = tuple[float, int, int, tuple[int, ...], int]
"""(time in s, prompt tokens, output tokens, blocks, tokens per block)"""

_VLLM = re.compile(
    r"(?P<month>\d\d)-(?P<day>\d\d) (?P<clock>\d\d:\d\d:\d\d(?:[.,]\d+)?).*?"
    r"Received request (?P<id>\S+?): prompt: (?P<prompt>None|'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"), "
    r"(?:params: )?(?P<rest>.*)"
)
_MAX_TOKENS = re.compile(r"max_tokens=(\d+)")
_TOKEN_IDS = re.compile(r"prompt_token_ids: (\[[\d, ]*\])")


class _Reader:
    """Turns lines into rows, one per request id."""

    def __init__(self) -> None:
        self.rows: dict[object, _Row] = {}
        self.skipped = 0
        self._hasher = BlockHasher(BlockSettings(block_bytes=512, block_tokens=128))
        self._seed = self._hasher.seed("trace")

    def feed(self, line: str) -> None:
        line = line.strip()
        if not line:
            return
        try:
            if line.startswith("{"):
                key, row = self._from_json(json.loads(line))
            else:
                key, row = self._from_vllm(line)
        except (ValueError, KeyError, TypeError, AttributeError, SyntaxError):
            self.skipped += 1
            return
        if row is None:
            self.skipped += 1
        else:
            self.rows[key if key is not None else len(self.rows)] = row

    def _from_json(self, document: dict[str, Any]) -> tuple[object, _Row | None]:
        if "hash_ids" in document:
            blocks = tuple(int(block) + 1 for block in document["hash_ids"])  # 0 stands for "no parent"
            length, output = int(document["input_length"]), document["output_length"]
            size = (
                0 if "block_chars" in document else int(document.get("block_tokens", MOONCAKE_BLOCK_TOKENS))
            )
            return None, (
                float(document["timestamp"]) / 1_000.0,
                length,
                OUTPUT_TOKENS if output is None else int(output),
                blocks,
                size,
            )
        if "blocks" in document:
            return None, _own_row(document)
        if "event" in document and "obj" in document:
            return self._from_sglang(document)
        return None, self._from_any(document)

    def _from_sglang(self, document: dict[str, Any]) -> tuple[object, _Row | None]:
        key = document.get("rid") or document["obj"].get("rid")
        key = tuple(key) if isinstance(key, list) else key
        at_s = _seconds(document.get("timestamp"))
        before = self.rows.get(key)
        if document["event"] == "request.finished":
            told = (document.get("out") or {}).get("meta_info") or {}
            if before is not None:
                output = int(told.get("completion_tokens") or before[2])
                return key, (before[0], int(told.get("prompt_tokens") or before[1]), output, *before[3:])
            at_s -= float(told.get("e2e_latency") or 0.0)  # its arrival, of which there is no line
        elif document["event"] != "request.received":
            return key, None
        row = self._row(at_s, document["obj"])
        if row is not None and document["event"] == "request.finished":
            told = (document.get("out") or {}).get("meta_info") or {}
            output = int(told.get("completion_tokens") or row[2])
            row = (row[0], int(told.get("prompt_tokens") or row[1]), output, *row[3:])
        return key, row

    def _from_any(self, document: dict[str, Any]) -> _Row | None:
        stamp = next(
            (
                document[name]
                for name in ("timestamp", "time", "created", "arrival_time", "at")
                if document.get(name) is not None
            ),
            None,
        )
        body = next(
            (document[name] for name in ("request", "body", "obj") if isinstance(document.get(name), dict)),
            document,
        )
        row = self._row(_seconds(stamp), body)
        usage = document.get("usage") or (document.get("response") or {}).get("usage") or {}
        if row is None or not usage:
            return row
        return (
            row[0],
            int(usage.get("prompt_tokens") or row[1]),
            int(usage.get("completion_tokens") or row[2]),
            *row[3:],
        )

    def _from_vllm(self, line: str) -> tuple[object, _Row | None]:
        found = _VLLM.search(line)
        if found is None:
            return None, None
        # The log has no year; 2000 was a leap year, and only differences count.
        clock = found["clock"].replace(",", ".")
        stamp = datetime.fromisoformat(f"2000-{found['month']}-{found['day']}T{clock}").replace(tzinfo=UTC)
        body: dict[str, Any] = {}
        bound = _MAX_TOKENS.search(found["rest"])
        if bound is not None:
            body["max_tokens"] = int(bound[1])
        ids = _TOKEN_IDS.search(found["rest"])
        if ids is not None and len(ids[1]) > 2:
            body["prompt_token_ids"] = [int(token) for token in ids[1][1:-1].split(",")]
        if found["prompt"] != "None":
            body["prompt"] = ast.literal_eval(found["prompt"])
        return found["id"], self._row(stamp.timestamp(), body)

    def _row(self, at_s: float, body: dict[str, Any]) -> _Row | None:
        sampling = body.get("sampling_params") or {}
        output = (
            body.get("output_tokens")
            or body.get("max_tokens")
            or body.get("max_completion_tokens")
            or sampling.get("max_new_tokens")
            or OUTPUT_TOKENS
        )
        size = self._hasher.settings.block_tokens
        text = _text(body)
        if text is not None:
            data = text.encode("utf-8", "surrogatepass")
            tokens = -(-len(data) // CHARS_PER_TOKEN)
            return at_s, tokens, int(output), tuple(self._hasher.text_blocks(data, self._seed)), size
        ids = body.get("prompt_token_ids") or body.get("input_ids")
        if isinstance(ids, list) and ids and isinstance(ids[0], int):
            return at_s, len(ids), int(output), tuple(self._hasher.token_blocks(ids, self._seed)), size
        return None


def _sized(rows: list[_Row]) -> list[_Row]:
    """Gives blocks of text, whose size was left open (0), the tokens that they have on average.

    A prompt of more tokens than its blocks account for has a rest of its own; one of fewer loses its last blocks.
    """
    if all(row[4] for row in rows):
        return rows
    size = next((row[4] for row in rows if row[4]), 0)
    if not size:
        texts = [row for row in rows if row[3]]
        # A prompt's last block is half full on average, and not among its blocks.
        total = sum(len(row[3]) + 0.5 for row in texts)
        size = max(1, round(sum(row[1] for row in texts) / total)) if texts else MOONCAKE_BLOCK_TOKENS
    return [(*row[:3], row[3][: max(1, row[1]) // size], size) if not row[4] else row for row in rows]


def _own_row(document: dict[str, Any]) -> _Row:
    blocks = tuple(int(block, 16) if isinstance(block, str) else int(block) for block in document["blocks"])
    size = document.get("block_tokens")
    if size is None:
        size = int(document["block_chars"]) // CHARS_PER_TOKEN
    tokens = document.get("tokens")
    if tokens is None:
        tokens = int(document["chars"]) // CHARS_PER_TOKEN
    return (
        float(document["at"]),
        int(tokens),
        int(document.get("output_tokens") or OUTPUT_TOKENS),
        blocks,
        int(size),
    )


def _text(body: dict[str, Any]) -> str | None:
    for name in ("prompt", "text"):
        given = body.get(name)
        if isinstance(given, str):
            return given
    messages = body.get("messages")
    if not isinstance(messages, list):
        return None
    return "\n".join(_contents(messages))


def _contents(messages: list[Any]) -> Iterator[str]:
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, str):
            yield content
        elif isinstance(content, list):
            for part in content:
                if isinstance(part, dict) and isinstance(part.get("text"), str):
                    yield part["text"]


def _seconds(stamp: Any) -> float:
    """Seconds of a time in any usual form: seconds or milliseconds since 1970, or ISO 8601."""
    if isinstance(stamp, str):
        try:
            stamp = float(stamp)
        except ValueError:
            return datetime.fromisoformat(stamp).timestamp()
    if stamp is None:
        raise ValueError("a request without a time")
    value = float(stamp)
    return value / 1_000.0 if value > 1e11 else value


def _spread(stamps: list[float], seed: int) -> list[float]:
    """Spread stamps over the cells of the grid that they were rounded to; others are left alone."""
    distinct = sorted(set(stamps))
    if len(distinct) >= 0.5 * len(stamps) or len(distinct) < 2:
        return stamps
    cell = min(right - left for left, right in pairwise(distinct))
    rng = Random(seed)
    return [stamp + rng.random() * cell for stamp in stamps]
