"""The load balancers of `deploy/`, run for real in front of three nodes: streams, departures, a rolling restart, a kill.

Owns what must not happen to a client then. Every figure of docs/operate/operations.md about load balancers comes from here.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterator

import pytest
import trio

from tests.deploy.front import NODES, Site
from tests.deploy.load import Browser, Load, question

CLIENTS = 12
"""Per balancer; with two of them each node has some eight requests in flight at any moment."""

KILLED_WITHIN_S = 0.05
"""A request that began so long after the kill cannot have been held by the killed node."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """One site for all tests of this file, which leave it whole."""
    made = Site(tmp_path_factory.mktemp("site"))
    try:
        trio.run(made.start)
        yield made
    finally:
        made.close()


@pytest.fixture(params=["haproxy", "nginx"])
def port(request: pytest.FixtureRequest, place: Site) -> int:
    """The clients' port of each load balancer."""
    return place.haproxy_port if request.param == "haproxy" else place.nginx_port


async def under_load(place: Site, load: Load, story: Callable[[], Awaitable[None]]) -> None:
    """Runs `story` while both load balancers are asked without pause."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(load.run, "haproxy", place.haproxy_port, CLIENTS)
        nursery.start_soon(load.run, "nginx", place.nginx_port, CLIENTS)
        await trio.sleep(0.5)
        await story()
        await trio.sleep(0.5)
        load.is_over = True


async def test_a_stream_passes_event_by_event(port):
    """24 tokens come 12 ms apart; a balancer that buffers would hand them over in one or two pieces."""
    browser = Browser("127.0.0.1", port)
    arrivals_s: list[float] = []
    answer = await browser.ask(
        "POST", "/v1/chat/completions", question("a stream", is_stream=True, tokens=24), arrivals_s
    )
    browser.leave()
    assert answer.status == 200 and answer.body.rstrip().endswith(b"data: [DONE]")
    assert len(arrivals_s) > 12, f"{len(arrivals_s)} pieces"
    assert arrivals_s[-1] - arrivals_s[0] > 0.15


async def test_a_plain_answer_and_its_id_pass_whole(port):
    browser = Browser("127.0.0.1", port)
    answer = await browser.ask("POST", "/v1/chat/completions", question("plain", is_stream=False))
    browser.leave()
    assert json.loads(answer.body)["usage"]["completion_tokens"] == 32
    assert answer.headers["x-request-id"]


async def test_a_long_prompt_passes(port):
    browser = Browser("127.0.0.1", port)
    answer = await browser.ask(
        "POST", "/v1/chat/completions", question("x" * 200_000, is_stream=False, tokens=1)
    )
    browser.leave()
    assert answer.status == 200, answer.body
    assert answer.headers["x-request-id"]


async def test_a_client_that_leaves_ends_its_request_on_the_node(port, place):
    async with trio.open_nursery() as nursery:
        browser = Browser("127.0.0.1", port)
        nursery.start_soon(
            browser.ask, "POST", "/v1/chat/completions", question("for long", is_stream=False, tokens=2000)
        )
        with trio.fail_after(5):
            while sum([await place.held(name) for name in NODES]) == 0:
                await trio.sleep(0.02)
        nursery.cancel_scope.cancel()
    browser.leave()
    with trio.fail_after(5):  # HTTP-14, and the way through the balancer
        while sum([await place.held(name) for name in NODES]):
            await trio.sleep(0.02)


async def test_a_rolling_restart_under_load_fails_no_request(place):
    async def restart_one_by_one() -> None:
        for name in NODES:
            await place.stop_node(name)
            place.start_node(name)
            await place.node_ready(name)

    load = Load()
    await under_load(place, load, restart_one_by_one)
    assert [f"{outcome.name}: {outcome.failure}" for outcome in load.failures] == []
    assert place.blamed() == {"haproxy": set(), "nginx": set()}
    assert len(load.outcomes) > 500, "too few to mean something"


async def test_a_killed_node_takes_only_what_it_held(place):
    load = Load()
    killed_s = 0.0
    in_flight: set[str] = set()

    async def kill() -> None:
        nonlocal killed_s, in_flight
        while not await place.held("b"):
            pass
        in_flight, killed_s = set(load.running), trio.current_time()
        place.kill_node("b")
        await trio.sleep(1.5)
        place.start_node("b")
        await place.node_ready("b")

    await under_load(place, load, kill)
    assert load.failures and len(load.outcomes) > 200
    for outcome in load.failures:
        assert outcome.started_s < killed_s + KILLED_WITHIN_S, f"{outcome.name}: {outcome.failure}"
        assert outcome.ended_s > killed_s, f"{outcome.name}: {outcome.failure}"
    survivors = {outcome.name for outcome in load.outcomes if not outcome.failure}
    assert in_flight & survivors, "those of the other nodes have gone on"
    assert place.blamed() == {"haproxy": {"b"}, "nginx": {"b"}}
