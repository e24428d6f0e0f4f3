"""Several Prometheus texts made into one, every sample labelled with where it comes from (OPS-7).

Owns the reading of the text format as far as merging needs it: families stay together and are described once, as the
format demands. Numbers are never parsed and pass as they are written.
"""

from __future__ import annotations

import re

_LABEL_NAME = rb"[a-zA-Z_][a-zA-Z0-9_]*"
_LABEL = _LABEL_NAME + rb' *= *"(?:[^"\\\n]++|\\.)*+"'
SAMPLE = re.compile(
    rb"([a-zA-Z_:][a-zA-Z0-9_:]*) *(?:\{ *((?:" + _LABEL + rb" *,? *)*)\})? +"
    rb"([+-]?(?:[0-9][0-9.eE+-]*|\.[0-9][0-9.eE+-]*|[iI]nf|NaN|nan|Infinity))(?: +-?[0-9.]+)?(?: # .*)?\Z"
)
"""A sample: name, labels without braces or None, value."""
COMMENT = re.compile(rb"# (HELP|TYPE|UNIT) ([a-zA-Z_:][a-zA-Z0-9_:]*)(?: .*)?\Z")
"""A comment that means something: its kind and the family."""
_SUFFIXES = (b"_bucket", b"_sum", b"_count", b"_total", b"_created", b"_info", b"_gsum", b"_gcount")


class Merger:
    """Takes texts in with `add`, gives one text with `render`.

    `label` is the name of the label that every sample gets. Description and type of a family are those of the first
    text that has it. What is in memory is what was added: bounded by who fetched it.
    """

    def __init__(self, label: str) -> None:
        self._label = label
        self._own = re.compile(rb"\b" + label.encode() + rb' *= *"(?:[^"\\\n]++|\\.)*+" *,? *')
        self._families: dict[bytes, tuple[dict[bytes, bytes], list[bytes]]] = {}  # name -> comments, samples

    def add(self, source: str, text: bytes) -> bool:
        """Adds one text with the label's value `source`; False, and nothing is added, when it is not such a text."""
        label = f'{self._label}="{_escaped(source)}"'.encode()
        found: list[tuple[bytes, bytes | None, bytes]] = []  # family, kind of comment or None, line
        family = b""
        if not _is_utf8(text):
            return False
        for raw in text.split(b"\n"):
            line = raw.strip()
            if not line:
                continue
            if line.startswith(b"#"):
                comment = COMMENT.match(line)
                if comment is not None:
                    family = comment[2]
                    found.append((family, comment[1], line))
                continue
            sample = SAMPLE.match(line)
            if sample is None:
                return False
            name, labels = sample[1], sample[2]
            if not belongs(name, family):
                family = name
            kept = self._own.sub(b"", labels).rstrip(b" ,") if labels else b""
            inside = label + b"," + kept if kept else label
            found.append((family, None, name + b"{" + inside + b"} " + sample[3]))
        if not found:
            return False
        for name, kind, line in found:
            comments, samples = self._families.setdefault(name, ({}, []))
            if kind is None:
                samples.append(line)
            else:
                comments.setdefault(kind, line)
        return True

    def render(self) -> bytes:
        """All of it, family by family in the order of their first appearance."""
        lines: list[bytes] = []
        for comments, samples in self._families.values():
            if samples:
                lines += comments.values()
                lines += samples
        return b"\n".join(lines) + b"\n" if lines else b""


def gauge(name: str, text: str, label: str, values: dict[str, int]) -> bytes:
    """One family of our own: a gauge with a value per value of `label`."""
    lines = [f"# HELP {name} {text}", f"# TYPE {name} gauge"]
    lines += [f'{name}{{{label}="{_escaped(source)}"}} {value}' for source, value in values.items()]
    return ("\n".join(lines) + "\n").encode()


def belongs(name: bytes, family: bytes) -> bool:
    """Whether a sample of this name is of the family that was described last."""
    return bool(family) and (name == family or (name.startswith(family) and name[len(family) :] in _SUFFIXES))


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
