"""An engine's own word about its load: Prometheus text and JSON answers -> `LoadReport`.

Owns the metric and member names of vLLM, SGLang and llama.cpp, and how the ranks of one engine add up. Called for
every worker up to four times a second with texts of 100 kB and more, so it searches the few lines it needs and never
parses the rest. It trusts nothing: what is missing, negative or not a number is absent, and an answer without any
load in it is None, never an exception. It never fetches; `services/load_reports.py` does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import msgspec

from smg.fleet.worker import LoadReport

RANKS_MAX = 1024
"""Most ranks (or label sets of one metric) that one answer may have; more are passed over."""


class RankLoad(msgspec.Struct, kw_only=True):
    """What one rank of an engine says of itself, in SGLang's words; the rows of `GET /get_loads` (OPS-2).

    Tokens and requests are counts, ratios are 0..1, throughput is tokens per second. None = not told.
    """

    dp_rank: int = 0
    num_running_reqs: int | None = None
    num_waiting_reqs: int | None = None
    num_waiting_uncached_tokens: int | None = None
    num_used_tokens: int | None = None
    max_total_num_tokens: int | None = None
    max_running_requests: int | None = None
    token_usage: float | None = None
    gen_throughput: float | None = None
    cache_hit_rate: float | None = None
    utilization: float | None = None


_COUNTS = frozenset(
    {
        "num_running_reqs",
        "num_waiting_reqs",
        "num_waiting_uncached_tokens",
        "num_used_tokens",
        "max_total_num_tokens",
        "max_running_requests",
    }
)
_RATIOS = frozenset({"token_usage", "cache_hit_rate", "utilization"})
_MEMBERS = tuple(name for name in RankLoad.__struct_fields__ if name != "dp_rank")

# Which metric fills which member of a rank; several names are alternatives, the first present one counts.
_METRICS: dict[bytes, dict[str, tuple[bytes, ...]]] = {
    b"vllm:": {
        "num_running_reqs": (b"num_requests_running",),
        "num_waiting_reqs": (b"num_requests_waiting",),
        # Named "perc", but 0..1. V1 engines say kv_, older ones gpu_.
        "token_usage": (b"kv_cache_usage_perc", b"gpu_cache_usage_perc"),
        "cache_hit_rate": (b"gpu_prefix_cache_hit_rate",),
    },
    b"sglang:": {
        "num_running_reqs": (b"num_running_reqs",),
        "num_waiting_reqs": (b"num_queue_reqs",),
        "num_used_tokens": (b"num_used_tokens",),
        "max_total_num_tokens": (b"max_total_num_tokens",),
        "token_usage": (b"token_usage",),
        "gen_throughput": (b"gen_throughput",),
        "cache_hit_rate": (b"cache_hit_rate",),
        "utilization": (b"utilization",),
    },
    b"llamacpp:": {
        "num_running_reqs": (b"requests_processing",),
        "num_waiting_reqs": (b"requests_deferred",),
        "token_usage": (b"kv_cache_usage_ratio",),
    },
}
_RANK_LABEL = re.compile(rb'[{,] *(?:dp_rank|engine)="([0-9]{1,6})"')
_BLOCKS_LABEL = re.compile(rb'[{,] *num_gpu_blocks="([0-9]{1,12})"')
_BLOCK_TOKENS_LABEL = re.compile(rb'[{,] *block_size="([0-9]{1,6})"')

_METRICS[b"sglang_"] = _METRICS[b"sglang:"]  # SGLang behind a collector that does not like colons


def metrics_ranks(text: bytes) -> list[RankLoad]:
    """The ranks of an engine in its Prometheus text, in order of rank; empty when it tells no load."""
    for prefix, members in _METRICS.items():
        if text.find(prefix) < 0:
            continue
        ranks: dict[int, RankLoad] = {}
        for member, names in members.items():
            for name in names:
                if _fill(ranks, member, _samples(text, prefix + name)):
                    break
        if prefix == b"vllm:":
            _add_vllm_cache(ranks, text)
        told = [ranks[rank] for rank in sorted(ranks) if _tells_load(ranks[rank])]
        if told:
            return told
    return []


def loads_ranks(body: bytes) -> list[RankLoad]:
    """The ranks in an answer of `/v1/loads` or SGLang's `/get_load`; empty when the body is no such answer."""
    try:
        document = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return []
    rows: Any = document
    if isinstance(document, dict):
        rows = document.get("loads")
        if not isinstance(rows, list):
            rows = [document]
    if not isinstance(rows, list):
        return []
    ranks: dict[int, RankLoad] = {}
    for position, row in enumerate(rows[:RANKS_MAX]):
        if isinstance(row, dict):
            rank = _json_rank(row, position)
            if _tells_load(rank):
                ranks.setdefault(rank.dp_rank, rank)
    return [ranks[rank] for rank in sorted(ranks)]


def combined(ranks: Iterable[RankLoad], at_s: float, only_rank: int | None = None) -> LoadReport | None:
    """One report for the ranks of a worker: counts add up, ratios are means. None when there is no rank.

    `only_rank` is the rank of a worker `url@rank` (WRK-17): alone its numbers count when the engine tells them
    apart; an engine that tells one number for all ranks is believed as it is.
    """
    told = list(ranks)
    if only_rank is not None and len(told) > 1:
        told = [rank for rank in told if rank.dp_rank == only_rank]
    if not told:
        return None

    def total(member: str) -> int | None:
        values = [value for rank in told if (value := getattr(rank, member)) is not None]
        return sum(values) if values else None

    def mean(member: str) -> float | None:
        values = [value for rank in told if (value := getattr(rank, member)) is not None]
        return sum(values) / len(values) if values else None

    throughputs = [rank.gen_throughput for rank in told if rank.gen_throughput is not None]
    return LoadReport(
        at_s=at_s,
        running=total("num_running_reqs") or 0,
        waiting=total("num_waiting_reqs") or 0,
        waiting_tokens=total("num_waiting_uncached_tokens"),
        running_tokens=total("num_used_tokens"),
        kv_usage=mean("token_usage"),
        kv_capacity_tokens=total("max_total_num_tokens"),
        throughput_tps=sum(throughputs) if throughputs else None,
        cache_hit_rate=mean("cache_hit_rate"),
    )


def _tells_load(rank: RankLoad) -> bool:
    return (
        rank.num_running_reqs is not None or rank.num_waiting_reqs is not None or rank.token_usage is not None
    )


# -- JSON ----------------------------------------------------------------------------------------------------------


def _json_rank(row: dict[str, Any], position: int) -> RankLoad:
    number = row.get("dp_rank")
    rank = RankLoad(dp_rank=number if type(number) is int and 0 <= number < RANKS_MAX else position)
    for member in _MEMBERS:
        value = row.get(member)
        if type(value) is int or type(value) is float:
            _put(rank, member, float(value))
    if rank.num_running_reqs is None:
        # SGLang's /get_load: num_reqs counts running and waiting together; older ones say only {"load": n}.
        everything = row.get("num_reqs", row.get("num_total_reqs", row.get("load")))
        if type(everything) is int and everything >= 0:
            rank.num_running_reqs = max(0, everything - (rank.num_waiting_reqs or 0))
            tokens = row.get("num_tokens")
            if rank.num_used_tokens is None and type(tokens) is int:
                _put(rank, "num_used_tokens", float(tokens))
    return rank


# -- Prometheus text -----------------------------------------------------------------------------------------------


def _samples(text: bytes, name: bytes) -> Iterator[tuple[bytes, float]]:
    """(labels, value) of every sample of one metric; label braces included, empty without labels."""
    length = len(name)
    found = 0 if text.startswith(name) else text.find(b"\n" + name) + 1
    for _ in range(RANKS_MAX):
        if found == 0 and not text.startswith(name):
            return
        end = text.find(b"\n", found)
        line = text[found:] if end < 0 else text[found:end]
        rest = line[length:]
        if rest[:1] in (b"{", b" ", b"\t"):
            # A label value may contain a brace, so the last one ends the labels; exemplars begin with " # ".
            rest = rest.partition(b" # ")[0]
            labels, brace, number = rest.rpartition(b"}")
            if value := number.split():
                try:
                    yield labels + brace, float(value[0])
                except ValueError:
                    pass
        if end < 0:
            return
        found = text.find(b"\n" + name, end) + 1
        if found == 0:
            return


def _fill(ranks: dict[int, RankLoad], member: str, samples: Iterable[tuple[bytes, float]]) -> bool:
    """Sets one member of every rank that has a sample; True if any had. Of several samples the largest counts:

    with SGLang's metrics of all schedulers, each tensor- and pipeline-parallel rank repeats the same number.
    """
    is_found = False
    for labels, value in samples:
        number = _rank_of(labels)
        rank = ranks.get(number)
        if rank is None:
            rank = ranks[number] = RankLoad(dp_rank=number)
        before = getattr(rank, member)
        if before is None or value > before:
            _put(rank, member, value)
        is_found = True
    return is_found


def _rank_of(labels: bytes) -> int:
    """The data-parallel rank that a sample belongs to; 0 when no label tells."""
    found = _RANK_LABEL.search(labels)
    return min(int(found[1]), RANKS_MAX - 1) if found else 0


def _add_vllm_cache(ranks: dict[int, RankLoad], text: bytes) -> None:
    """KV capacity out of the info metric, and the hit rate of V1 engines out of two counters.

    The rate is over the engine's whole life, not a window: it is shown, no policy decides by it.
    """
    for labels, _ in _samples(text, b"vllm:cache_config_info"):
        rank = ranks.get(_rank_of(labels))
        blocks, block_tokens = _BLOCKS_LABEL.search(labels), _BLOCK_TOKENS_LABEL.search(labels)
        if rank is not None and blocks and block_tokens:
            rank.max_total_num_tokens = int(blocks[1]) * int(block_tokens[1])
            if rank.token_usage is not None:
                rank.num_used_tokens = round(rank.token_usage * rank.max_total_num_tokens)
    hits = {_rank_of(labels): value for labels, value in _samples(text, b"vllm:prefix_cache_hits_total")}
    for labels, value in _samples(text, b"vllm:prefix_cache_queries_total"):
        number = _rank_of(labels)
        rank = ranks.get(number)
        if rank is not None and rank.cache_hit_rate is None and number in hits and value > 0:
            _put(rank, "cache_hit_rate", hits[number] / value)


# -- numbers -------------------------------------------------------------------------------------------------------


def _put(rank: RankLoad, member: str, value: float) -> None:
    """Sets a member when the value is one: finite, not negative; ratios end at 1."""
    if not math.isfinite(value) or value < 0:
        return
    convert: Callable[[float], float]
    if member in _COUNTS:
        convert = int
    elif member in _RATIOS:
        convert = _ratio
    else:
        convert = float
    setattr(rank, member, convert(value))


def _ratio(value: float) -> float:
    return min(value, 1.0)
