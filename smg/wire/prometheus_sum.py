"""The metrics pages of several processes of one gateway as one page: what counts is added, what measures is told apart.

Owns the rule. Counters and histograms are sums over all processes and over their former lives, so that a process that dies does
not set a counter back; a series shows as long as a living process has it, so those of removed workers go (MET-10). Gauges that
count what a process holds are added too; every other gauge keeps its value per process, under a label. It parses pages and
nothing else: who is asked, and how long, is the caller's matter.
"""

from __future__ import annotations

from collections.abc import Collection

from smg.wire.prometheus_merge import COMMENT, SAMPLE, belongs

PAST_SERIES_MAX = 100_000
"""Series remembered of processes that ended: the pages of a fleet of 1,000 workers twice. More are dropped, oldest first."""

_SUMMED_KINDS = frozenset({b"counter", b"histogram", b"summary"})

_Number = int | float
_Key = tuple[bytes, bytes, bytes]  # family, sample name, labels


class _Page:
    """One page, read: comments and kinds of its families, and the value of each series in the order of the page."""

    __slots__ = ("comments", "kinds", "values")

    def __init__(self) -> None:
        self.comments: dict[bytes, list[bytes]] = {}
        self.kinds: dict[bytes, bytes] = {}
        self.values: dict[_Key, _Number] = {}


class Totals:
    """The pages of processes by name, and what their former lives had counted.

    `summed_gauges` are the names of gauges that are added; `label` the name of the label of all others.
    """

    def __init__(self, summed_gauges: Collection[str], label: str = "process") -> None:
        self._start = label.encode() + b'="'
        self._summed = frozenset(name.encode() for name in summed_gauges)
        self._label = label
        self._pages: dict[str, _Page] = {}
        self._lives: dict[str, int] = {}
        self._past: dict[_Key, _Number] = {}

    def life(self, process: str) -> int:
        """Which life of this process a page that is asked for now belongs to."""
        return self._lives.get(process, 0)

    def take(self, process: str, life: int, text: bytes) -> bool:
        """The page of a process; False, and nothing has changed, when it is no such page or of a life that is over."""
        if life != self.life(process):
            return False
        page = _read(text)
        if page is None:
            return False
        self._pages[process] = page
        return True

    def end(self, process: str) -> None:
        """The process has ended: what it had counted when it was last asked stays counted."""
        self._lives[process] = self.life(process) + 1
        page = self._pages.pop(process, None)
        if page is None:
            return
        past = self._past
        for key, value in page.values.items():
            if page.kinds.get(key[0]) in _SUMMED_KINDS:
                past[key] = past.pop(key, 0) + value
        while len(past) > PAST_SERIES_MAX:
            del past[next(iter(past))]

    def _has_label(self, labels: bytes) -> bool:
        """Whether the page tells processes apart itself. A quote inside a value is escaped, so this finds labels only."""
        return labels.startswith(self._start) or b"," + self._start in labels

    def render(self, fresh: Collection[str]) -> bytes:
        """One page of all. Gauges are those of the `fresh` processes, which have just answered; counts those of all."""
        comments: dict[bytes, list[bytes]] = {}
        sums: dict[bytes, dict[tuple[bytes, bytes], _Number]] = {}
        for process, page in self._pages.items():
            own = f'{self._label}="{_escaped(process)}"'.encode()
            for (family, name, labels), value in page.values.items():
                is_count = page.kinds.get(family) in _SUMMED_KINDS
                if not is_count:
                    if process not in fresh:
                        continue
                    if family not in self._summed and not self._has_label(labels):
                        labels = labels + b"," + own if labels else own
                comments.setdefault(family, page.comments.get(family, []))
                found = sums.setdefault(family, {})
                before = found.get((name, labels))
                if before is None:
                    before = self._past.get((family, name, labels), 0) if is_count else 0
                found[name, labels] = before + value
        lines: list[bytes] = []
        for family, samples in sums.items():
            lines += comments[family]
            for (name, labels), value in samples.items():
                braced = b"{" + labels + b"}" if labels else b""
                lines.append(name + braced + b" " + _text(value))
        return b"\n".join(lines) + b"\n" if lines else b""


def _read(text: bytes) -> _Page | None:
    """The page, or None for what is none."""
    page = _Page()
    family = b""
    for line in text.split(b"\n"):
        if not line:
            continue
        comment = COMMENT.match(line)
        if comment is not None:
            family = comment[2]
            page.comments.setdefault(family, []).append(line)
            if comment[1] == b"TYPE":
                page.kinds[family] = line.rpartition(b" ")[2]
            continue
        if line.startswith(b"#"):
            continue
        sample = SAMPLE.match(line)
        if sample is None:
            return None
        name, labels = sample[1], sample[2] or b""
        if not belongs(name, family):
            family = name
        page.values[family, name, labels] = _number(sample[3])
    return page if page.values else None


def _number(text: bytes) -> _Number:
    return int(text) if text.isdigit() else float(text)


def _text(value: _Number) -> bytes:
    if value in (float("inf"), float("-inf")):
        return b"+Inf" if value > 0 else b"-Inf"
    return b"NaN" if value != value else repr(value).encode()


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
