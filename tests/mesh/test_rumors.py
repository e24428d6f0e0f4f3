"""The queue of rumors: limits, order, replacement, bytes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mesh.codec import news_bytes
from mesh.member import Accusation, Status
from mesh.rumors import Rumors, transmit_limit
from tests.mesh.swim_play import record


def _doubt(name: str, accuser: str = "a") -> Accusation:
    return Accusation(name, b"12345678", 5 << 16, Status.SUSPECT, accuser)


def test_the_limit_grows_with_the_logarithm_and_has_a_floor() -> None:
    assert [transmit_limit(4.0, members) for members in (1, 3, 10, 99, 100, 1000)] == [8, 8, 8, 12, 12, 16]


def test_a_rumor_misses_somebody_in_less_than_one_of_a_thousand_cases() -> None:
    for members in range(11, 1001):
        # each of the others tells `limit` members of the ring, nobody twice
        is_missed_by_one = 1 - transmit_limit(4.0, members) / (members - 1)
        assert members * is_missed_by_one ** (members - 2) < 1e-3


def test_a_rumor_is_told_as_often_as_the_limit_says() -> None:
    rumors = Rumors("me", news_bytes)
    rumors.put(_doubt("x"))
    told = [rumors.fill(1000, 4, 64) for _ in range(6)]
    assert [len(news) for news in told] == [1, 1, 1, 1, 0, 0]
    assert len(rumors) == 0


def test_the_least_told_goes_first_and_among_those_the_newest() -> None:
    rumors = Rumors("me", news_bytes)
    for name in ("x", "y"):
        rumors.put(_doubt(name))
    one = news_bytes(_doubt("x"))
    assert [news.name for news in rumors.fill(one, 9, 64)] == ["y"]
    rumors.put(_doubt("z"))
    assert [news.name for news in rumors.fill(3 * one, 9, 64)] == ["z", "x", "y"]


def test_news_of_ourselves_goes_before_all_others_twice() -> None:
    rumors = Rumors("me", news_bytes)
    rumors.put(record("me"))
    for name in ("x", "y", "z"):
        rumors.put(_doubt(name))
    room = news_bytes(record("me"))
    assert [rumors.fill(room, 9, 64)[0].name for _ in range(2)] == ["me", "me"]
    rest = [news.name for _ in range(4) for news in rumors.fill(room, 9, 64)]
    assert set(rest) == {"me", "x", "y", "z"}


def test_a_newer_rumor_about_a_name_replaces_the_older_and_starts_anew() -> None:
    rumors = Rumors("me", news_bytes)
    rumors.put(_doubt("x", "a"))
    rumors.fill(1000, 3, 64)
    rumors.put(_doubt("x", "b"))
    assert len(rumors) == 1 and "x" in rumors
    accusers = [news.accuser for _ in range(3) for news in rumors.fill(1000, 3, 64)]  # type: ignore[union-attr]
    assert accusers == ["b", "b", "b"]
    rumors.put(_doubt("x"))
    rumors.drop("x")
    assert rumors.fill(1000, 3, 64) == []


@given(
    st.lists(st.sampled_from([f"n{number}" for number in range(30)]), max_size=60),
    st.integers(0, 900),
    st.integers(0, 10),
)
def test_a_packet_is_never_overfilled_nor_told_twice(names: list[str], room: int, count_max: int) -> None:
    rumors = Rumors("n0", news_bytes)
    for name in names:
        rumors.put(record(name) if name == "n0" else _doubt(name))
    news = rumors.fill(room, 4, count_max)
    assert sum(news_bytes(each) for each in news) <= room
    assert len(news) <= count_max
    assert len({each.name for each in news}) == len(news)
    if room > 800 and count_max > 0 and names:
        assert news
