"""Counters, gauges and histograms, and the Prometheus text they are read by.

This room owns every counted number of the process. A value is a plain attribute that the loop's thread alone
changes: no lock, no label look-up and no string on the hot path (`docs/decisions/0003-own-counters.md` has the
measurements against prometheus_client's children). It must never be told a label value that a client invents;
the cap of series per family is the last resort, not the plan.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import TypeAlias

import trio
from prometheus_client import ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from smg.telemetry.catalog import COUNTER, DURATION_BUCKETS_S, FAMILIES, GAUGE, HISTOGRAM, Family
from smg.telemetry.series import HttpSeries, RequestSeries

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
"""The content type of what `Metrics.render` returns."""

SERIES_MAX = 4096
"""Children of one family. Label values are bounded by their callers (route templates, served models, workers); a
fleet of 1,000 workers with 3 breaker states has 6,000 possible transitions of which a few hundred ever happen.
Past the cap a bug would otherwise grow the process and the scrape without end."""

OTHER = "other"
"""The value of every label of the child that takes what no longer fits."""

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
"""Methods that are label values; a client may invent others, which count as `other`."""

PIECE_LINES = 512
"""Lines of text made between two checkpoints of `render_text`: about 0.25 ms, below the noise of the loop."""

Sample: TypeAlias = tuple[str, tuple[str, ...], float]
"""What a source yields: family name, label values in the catalog's order, value."""

Source: TypeAlias = Callable[[], Iterable[Sample]]


class Counter:
    """A number that only grows. `value` may be raised in place where a call would cost too much."""

    __slots__ = ("labels", "value")

    def __init__(self, labels: str = "") -> None:
        self.labels = labels
        self.value: float = 0

    def add(self, n: float = 1) -> None:
        """Raise by `n` >= 0."""
        self.value += n


class Gauge:
    """A number that goes up and down."""

    __slots__ = ("labels", "value")

    def __init__(self, labels: str = "") -> None:
        self.labels = labels
        self.value: float = 0

    def set(self, value: float) -> None:
        """Replace the value."""
        self.value = value

    def add(self, n: float = 1) -> None:
        """Raise by `n`, or lower by a negative one."""
        self.value += n


class Histogram:
    """Observations counted by upper bound. `counts[i]` holds those in (bounds_s[i-1], bounds_s[i]], not added up."""

    __slots__ = ("bounds_s", "counts", "labels", "sum_s")

    def __init__(self, bounds_s: Sequence[float], labels: str = "") -> None:
        self.labels = labels
        self.bounds_s = bounds_s
        self.counts = [0] * (len(bounds_s) + 1)
        self.sum_s = 0.0

    def observe(self, seconds: float) -> None:
        """Count one observation; a bound belongs to its bucket, as `le` says."""
        self.counts[bisect_left(self.bounds_s, seconds)] += 1
        self.sum_s += seconds

    @property
    def count(self) -> int:
        """All observations."""
        return sum(self.counts)


Child: TypeAlias = Counter | Gauge | Histogram
"""`labels` of each is its text as it stands in the exposition, made once: `a="b",c="d"`."""


class _Store:
    """The children of one family by their label values."""

    __slots__ = ("bounds_s", "bounds_text", "children", "family", "overflow")

    def __init__(self, family: Family, bounds_s: Sequence[float]) -> None:
        self.family = family
        self.bounds_s = list(family.buckets_s or bounds_s)
        self.bounds_text = [*map(_number, self.bounds_s), "+Inf"]
        self.children: dict[tuple[str, ...], Child] = {}
        self.overflow = (OTHER,) * len(family.labels)

    def values_of(self, labels: Mapping[str, str]) -> tuple[str, ...]:
        """Label values in the catalog's order. Raises ValueError when the names are not exactly the declared ones."""
        family = self.family
        try:
            values = tuple([labels[name] for name in family.labels])
        except KeyError:
            values = ()
        if len(values) != len(labels) or len(values) != len(family.labels):
            raise ValueError(f"{family.name} has the labels {family.labels}, not {tuple(labels)}")
        return values

    def new_child(self, values: tuple[str, ...]) -> Child:
        labels = ",".join(
            [f'{name}="{_escape(value)}"' for name, value in zip(self.family.labels, values, strict=True)]
        )
        if self.family.kind == COUNTER:
            return Counter(labels)
        if self.family.kind == GAUGE:
            return Gauge(labels)
        return Histogram(self.bounds_s, labels)

    def head(self) -> str:
        family = self.family
        return f"# HELP {family.name} {family.help}\n# TYPE {family.name} {family.kind}\n"

    def lines(self, child: Child) -> list[str]:
        name, labels = self.family.name, child.labels
        braced = f"{{{labels}}}" if labels else ""
        if not isinstance(child, Histogram):
            return [f"{name}{braced} {_number(child.value)}\n"]
        opening = f'{name}_bucket{{{labels},le="' if labels else f'{name}_bucket{{le="'
        totals = list(accumulate(child.counts))
        lines = [
            f'{opening}{bound}"}} {total}\n' for bound, total in zip(self.bounds_text, totals, strict=True)
        ]
        lines.append(f"{name}_sum{braced} {_number(child.sum_s)}\n{name}_count{braced} {totals[-1]}\n")
        return lines


class Metrics:
    """Every metric of the process, and their text.

    All methods belong to the loop's thread. `duration_buckets` are the upper bounds in seconds of all duration
    histograms (`--prometheus-duration-buckets`; none means the default ones). Raises ValueError when they are not finite, positive and rising.
    """

    def __init__(
        self, duration_buckets: Sequence[float] = DURATION_BUCKETS_S, series_max: int = SERIES_MAX
    ) -> None:
        bounds_s = [float(bound) for bound in duration_buckets or DURATION_BUCKETS_S]
        rising = all(low < high for low, high in pairwise(bounds_s))
        if not bounds_s or not rising or bounds_s[0] <= 0 or not all(map(math.isfinite, bounds_s)):
            raise ValueError(f"duration buckets must be positive, finite and rising: {bounds_s}")
        self._series_max = series_max
        self._stores = {family.name: _Store(family, bounds_s) for family in FAMILIES}
        self._sources: list[Source] = []
        self._process = ProcessCollector(registry=None)
        self._process_limiter = trio.CapacityLimiter(1)
        # Bundles by their label values; bounded like a family.
        self._http_series: dict[tuple[str, ...], HttpSeries] = {}
        self._request_series: dict[tuple[str, ...], RequestSeries] = {}
        self._responses: dict[tuple[str, int, str], Counter] = {}
        self._upstream_responses: dict[tuple[str, int, str], Counter] = {}

    # -- binding: once per combination of labels, never per event

    def counter(self, name: str, **labels: str) -> Counter:
        """The counter of these labels (write `from_=` for `from`).

        Raises ValueError when the catalog has no such counter or other label names.
        """
        child = self._bind(name, COUNTER, labels)
        assert isinstance(child, Counter)
        return child

    def gauge(self, name: str, **labels: str) -> Gauge:
        """The gauge of these labels. Raises like `counter`."""
        child = self._bind(name, GAUGE, labels)
        assert isinstance(child, Gauge)
        return child

    def histogram(self, name: str, **labels: str) -> Histogram:
        """The histogram of these labels. Raises like `counter`."""
        child = self._bind(name, HISTOGRAM, labels)
        assert isinstance(child, Histogram)
        return child

    def http_series(self, method: str, path: str) -> HttpSeries:
        """The bundle of a route that serves no model; cached."""
        key = (method, path)
        series = self._http_series.get(key)
        if series is None and method not in METHODS:
            key = (OTHER, path)
            series = self._http_series.get(key)
        if series is None:
            if len(self._http_series) >= self._series_max:
                key = (OTHER, OTHER)
            series = self._http_series[key] = HttpSeries(self, *key)
        return series

    def request_series(
        self,
        method: str,
        path: str,
        model: str,
        endpoint: str,
        streaming: bool,
        router_type: str,
        backend_type: str,
        connection_mode: str,
    ) -> RequestSeries:
        """The bundle of one kind of inference request; cached (a dict look-up after the first)."""
        key = (
            method,
            path,
            model,
            endpoint,
            "true" if streaming else "false",
            router_type,
            backend_type,
            connection_mode,
        )
        series = self._request_series.get(key)
        if series is None:
            if len(self._request_series) >= self._series_max:
                key = (OTHER,) * 8
            series = self._request_series[key] = RequestSeries(self, *key)
        return series

    def response(self, path: str, status: int, error_code: str) -> Counter:
        """The child of `smg_http_responses_total`, cached without making a string of the status."""
        key = (path, status, error_code)
        child = self._responses.get(key)
        if child is None:
            child = self.counter(
                "smg_http_responses_total", path=path, status_code=str(status), error_code=error_code
            )
            self._remember(self._responses, key, child)
        return child

    def upstream_response(self, router_type: str, status: int, error_code: str) -> Counter:
        """The child of `smg_router_upstream_responses_total`, cached like `response`."""
        key = (router_type, status, error_code)
        child = self._upstream_responses.get(key)
        if child is None:
            child = self.counter(
                "smg_router_upstream_responses_total",
                router_type=router_type,
                status_code=str(status),
                error_code=error_code,
            )
            self._remember(self._upstream_responses, key, child)
        return child

    def children(self, name: str) -> Iterable[tuple[tuple[str, ...], Child]]:
        """What is bound of a family, with label values in the catalog's order; what sources yield is not among it.

        Raises ValueError when the catalog has no such family.
        """
        store = self._stores.get(name)
        if store is None:
            raise ValueError(f"the catalog has no family {name}")
        return store.children.items()

    # -- values that are read at scrape time, and values that go

    def add_source(self, source: Source) -> None:
        """Ask `source` for gauges (or counters kept elsewhere) at each scrape.

        It is called on the loop's thread and must not wait. Values of equal labels add up, so that a source may
        yield 1 per worker for `smg_worker_pool_size`. What it no longer yields is no longer exposed.
        """
        self._sources.append(source)

    def forget(self, **labels: str) -> None:
        """Drop every child that has all of these labels, as when a worker or a model is removed (MET-10).

        Whoever still holds such a child counts where nobody looks; bind again after this.
        """
        wanted = _without_underscore(labels)
        for store in self._stores.values():
            names = store.family.labels
            if not wanted or not all(name in names for name in wanted):
                continue
            places = [(names.index(name), value) for name, value in wanted.items()]
            store.children = {
                values: child
                for values, child in store.children.items()
                if not all(values[place] == value for place, value in places)
            }
        # Bundles and caches hold children: the next request binds them anew.
        gone = set(wanted.values())
        self._http_series = {k: v for k, v in self._http_series.items() if gone.isdisjoint(k)}
        self._request_series = {k: v for k, v in self._request_series.items() if gone.isdisjoint(k)}
        self._responses.clear()
        self._upstream_responses.clear()

    # -- exposition

    def render(self) -> bytes:
        """The Prometheus text at once; blocks for about 9 us per histogram."""
        return b"".join([*self._pieces(), generate_latest(self._process)])

    async def render_text(self) -> bytes:
        """The Prometheus text, made in pieces of about 0.25 ms with a checkpoint between them.

        A thread would not spare the loop: it holds the interpreter's lock for 5 ms at a time (decision 0003).
        Every series is consistent in itself; families are read at slightly different moments.
        """
        pieces = []
        for piece in self._pieces():
            pieces.append(piece)
            await trio.lowlevel.checkpoint()
        # The kernel lists open files for this one: 9 ms with 10,000 connections, and the lock is free meanwhile.
        process = await trio.to_thread.run_sync(generate_latest, self._process, limiter=self._process_limiter)
        return b"".join([*pieces, process])

    # -- private

    def _bind(self, name: str, kind: str, labels: Mapping[str, str]) -> Child:
        store = self._stores.get(name)
        if store is None or store.family.kind != kind:
            raise ValueError(f"the catalog has no {kind} {name}")
        values = store.values_of(_without_underscore(labels))
        child = store.children.get(values)
        if child is None:
            child = self._new_child(store, values)
        return child

    def _new_child(self, store: _Store, values: tuple[str, ...]) -> Child:
        if len(store.children) >= self._series_max and values != store.overflow:
            self.counter("smg_telemetry_series_folded_total", family=store.family.name).add()
            values = store.overflow
        child = store.children.get(values)
        if child is None:
            child = store.children[values] = store.new_child(values)
        return child

    def _remember(
        self, cache: dict[tuple[str, int, str], Counter], key: tuple[str, int, str], child: Counter
    ) -> None:
        if len(cache) < self._series_max:
            cache[key] = child

    def _pieces(self) -> Iterator[bytes]:
        sourced = self._read_sources()
        lines: list[str] = []
        for name, store in self._stores.items():
            # A copy: between two pieces the loop may bind or forget children.
            children = [*store.children.values(), *sourced.get(name, {}).values()]
            if children:
                lines.append(store.head())
            for child in children:
                lines += store.lines(child)
                if len(lines) >= PIECE_LINES:
                    # A label that is no valid Unicode must not cost the whole scrape.
                    yield "".join(lines).encode("utf-8", "replace")
                    lines = []
        yield "".join(lines).encode("utf-8", "replace")

    def _read_sources(self) -> dict[str, dict[tuple[str, ...], Child]]:
        sourced: dict[str, dict[tuple[str, ...], Child]] = {}
        for source in self._sources:
            for name, values, value in source():
                store = self._stores.get(name)
                if store is None or store.family.kind == HISTOGRAM or len(values) != len(store.family.labels):
                    raise ValueError(f"the catalog has no counter or gauge {name} with {len(values)} labels")
                assert values not in store.children, "a series has one owner"
                found = sourced.setdefault(name, {})
                child = found.get(values)
                if child is None:
                    if len(found) >= self._series_max:
                        values = store.overflow
                    child = found.setdefault(values, store.new_child(values))
                assert not isinstance(child, Histogram)
                child.value += value
        return sourced


def _without_underscore(labels: Mapping[str, str]) -> Mapping[str, str]:
    return {name.rstrip("_"): value for name, value in labels.items()}


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def _number(value: float) -> str:
    """As Go's strconv reads it."""
    if math.isfinite(value):
        return repr(value)
    return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"
