"""The page `/ui` in a real browser: what it shows, that it follows, and that nothing of it can be abused.

The browser's complaints are part of every test: a script that the policy refuses, a file that is missing or an exception is one.
"""

from __future__ import annotations

import json
import socket
from typing import Any

import trio

from tests.e2e.browser import Page, running_browser
from tests.e2e.cluster import cluster
from tests.e2e.fake_worker import DONE, event, fake_worker, fake_workers, streams
from tests.e2e.gateway import CHAT, Client, Gateway, drained, eventually, running_gateway
from tests.e2e.process import free_ports

PROMPT = "canary-prompt " * 100
LIVE = "document.getElementById('link').dataset.state === 'live'"
LOST = "document.getElementById('link').dataset.state === 'lost'"
ONE_NODE = ("--policy", "round_robin")


def ui(gateway: Gateway) -> str:
    return f"http://127.0.0.1:{gateway.metrics_port}/ui"


def chat(**members: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": PROMPT}], **members}


async def rows(page: Page, table: str) -> list[str]:
    return await page.texts(f"#{table} tbody tr")


async def snapshot(client: Client) -> Any:
    """The next snapshot of a stream, whose head was read."""
    piece = await client.read_chunk()
    assert piece is not None and piece.startswith(b"event: snapshot\ndata: ") and piece.endswith(b"\n\n"), (
        piece
    )
    return json.loads(piece.removeprefix(b"event: snapshot\ndata: "))


async def test_the_page_shows_members_and_workers_and_follows_what_happens() -> None:
    async with fake_workers(2, "m") as workers, cluster("a", "b", "c", workers=workers) as nodes:
        async with running_browser() as browser:
            page = await browser.page(ui(nodes["a"]))
            await page.until(LIVE)
            await page.until("document.querySelectorAll('#members tbody tr').length === 3")
            members = await rows(page, "members")
            assert [text.split("\n")[0].split()[0] for text in members] == ["a", "b", "c"]
            assert all("Alive" in text for text in members) and "this node" in members[0]
            shown = await rows(page, "workers")
            assert [text.split("\n")[0] for text in shown] == [
                f"127.0.0.1:{worker.port}" for worker in workers
            ]
            assert all("Ready" in text for text in shown)
            assert await page.texts("#decisions-empty") != [""]

            stream = streams(event({"choices": [{"delta": {"content": "x"}}]}), DONE)
            for worker in workers:
                worker.plays.append(stream)
            answer = await nodes["a"].ask(CHAT, chat(stream=True), "x-request-id: canary-request")
            assert answer.status == 200
            await page.until("document.querySelectorAll('#decisions tbody tr').length === 1")
            (decision,) = await rows(page, "decisions")
            assert "m" in decision.split() and "cache_aware" in decision and "127.0.0.1:" in decision
            await page.until("document.querySelector('#tile-ttft [data-is=value]').textContent !== '–'")
            text = await page.ask("document.documentElement.outerHTML")
            assert "canary" not in text

            await nodes.crash("c")
            await page.until("document.querySelector('#members tbody').innerText.includes('Dead')")
            await nodes.start("c")
            await page.until("!document.querySelector('#members tbody').innerText.includes('Dead')")
            assert page.complaints == []
            asked = {address for address in page.requests if not address.startswith("data:")}
            assert asked == {ui(nodes["a"]), ui(nodes["a"]) + "/events"}


async def test_names_that_are_markup_are_shown_as_text() -> None:
    evil = "<img src=x onerror=\"document.title='owned'\">"
    async with fake_worker(evil, name="a") as worker, running_gateway(*ONE_NODE, workers=[worker]) as gateway:
        async with running_browser() as browser:
            page = await browser.page(ui(gateway))
            await page.until("document.querySelectorAll('#workers tbody tr').length === 1")
            answer = await gateway.ask(CHAT, {**chat(), "model": evil})
            assert answer.status == 200
            await page.until("document.querySelectorAll('#decisions tbody tr').length === 1")
            for table in ("workers", "decisions"):
                assert evil in (await rows(page, table))[0]
            assert await page.ask("document.querySelectorAll('img, script:not(:last-of-type)').length") == 0
            assert await page.ask("document.title") != "owned"
            assert page.complaints == []


async def test_an_empty_node_says_what_to_do_and_fits_a_phone() -> None:
    async with running_gateway() as gateway, running_browser() as browser:
        page = await browser.page(ui(gateway), width=360, height=740)
        await page.until(LIVE)
        for part, words in (
            ("workers-empty", "smg workers add"),
            ("mesh-empty", "--ha-mesh"),
            ("decisions-empty", "Send a request"),
        ):
            (text,) = await page.texts(f"#{part}")
            assert words in text, part
        assert await page.ask("document.documentElement.scrollWidth") == 360
        assert page.complaints == []


async def test_a_page_whose_node_was_started_again_is_live_again() -> None:
    (port,) = free_ports(1)

    async def serve(gateway: Gateway, scope: trio.CancelScope) -> None:
        listener = socket.create_server(("127.0.0.1", port))
        listener.setblocking(False)
        with scope:
            await gateway.node.metrics_server().serve([listener])

    async with running_gateway() as former, running_gateway() as latter, running_browser() as browser:
        async with trio.open_nursery() as nursery:
            life = trio.CancelScope()
            nursery.start_soon(serve, former, life)
            page = await browser.page(f"http://127.0.0.1:{port}/ui")
            await page.until(LIVE)
            assert page.complaints == []
            life.cancel()
            await page.until(LOST)
            (banner,) = await page.texts("#banner")
            assert "trying again" in banner
            life = trio.CancelScope()
            nursery.start_soon(serve, latter, life)
            await page.until(LIVE)
            assert await page.ask("document.getElementById('banner').hidden")
            life.cancel()


async def test_a_paused_or_hidden_page_costs_nothing() -> None:
    async with running_gateway() as gateway, running_browser() as browser:
        page = await browser.page(ui(gateway))
        await page.until(LIVE)
        assert gateway.metric("smg_ui_viewers") == 1
        await page.ask("document.getElementById('pause').click()")
        await eventually(lambda: gateway.metric("smg_ui_viewers") == 0)
        assert await page.texts("#link") == ["Paused"]
        await page.ask("document.getElementById('pause').click()")
        await page.until(LIVE)
        await page.close()
        await eventually(lambda: gateway.metric("smg_ui_viewers") == 0)


async def test_decisions_are_noted_while_somebody_looks_and_not_after() -> None:
    async with fake_workers(2, "m") as workers, running_gateway(*ONE_NODE, workers=workers) as gateway:
        await gateway.ask(CHAT, chat())
        client = await gateway.connect(gateway.metrics_port)
        await client.send(b"GET /ui/events HTTP/1.1\r\nhost: x\r\n\r\n")
        head = await client.read_head()
        assert (head.status, head["content-type"]) == (200, "text/event-stream")
        told = await snapshot(client)
        assert told["decisions"] == [] and told["traffic"]["requests"] == 1
        assert [row["status"] for row in told["workers"]["rows"]] == ["ready", "ready"]
        await gateway.ask(CHAT, chat())
        told = await snapshot(client)
        assert [row["decided_by"] for row in told["decisions"]] == ["policy"]
        assert told["decisions"][0]["policy"] == "round_robin" and told["decisions"][0]["model"] == "m"
        assert "canary" not in json.dumps(told)
        await client.leave()
        gateway.clients.remove(client)
        await eventually(lambda: gateway.metric("smg_ui_viewers") == 0)
        decisions = gateway.node._decisions
        assert not decisions.is_on
        await gateway.ask(CHAT, chat())
        assert decisions.last() == ()


async def test_no_ui_means_no_page() -> None:
    async with running_gateway("--no-ui") as gateway:
        for path in ("/ui", "/ui/events"):
            answer = await gateway.ask(path, port=gateway.metrics_port)
            assert answer.is_error(404, "page_is_off")
            assert "--no-ui" in answer.document["error"]["message"]
        assert (await gateway.ask("/metrics", port=gateway.metrics_port)).status == 200


async def test_the_serving_port_has_no_page() -> None:
    async with running_gateway() as gateway:
        assert (await gateway.ask("/ui")).is_error(404, "unknown_url")


async def test_the_paths_of_the_page_are_only_read() -> None:
    async with running_gateway() as gateway:
        for path in ("/ui", "/ui/events"):
            answer = await gateway.ask(path, {}, port=gateway.metrics_port)
            assert answer.is_error(405, "method_not_allowed")
            head = await gateway.ask(path, method="HEAD", port=gateway.metrics_port)
            assert head.status == 200 and head.body == b""
        page = await gateway.ask("/ui", port=gateway.metrics_port)
        assert page["content-type"] == "text/html; charset=utf-8"
        assert page["x-content-type-options"] == "nosniff" and page["referrer-policy"] == "no-referrer"


async def test_a_drain_sends_viewers_away() -> None:
    async with running_gateway() as gateway:
        client = await gateway.connect(gateway.metrics_port)
        await client.send(b"GET /ui/events HTTP/1.1\r\nhost: x\r\n\r\n")
        await client.read_head()
        await snapshot(client)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(drained, gateway, 0.2)
            assert await client.read_chunk() == b"event: end\ndata: draining\n\n"
            assert await client.read_chunk() is None
            refused = await gateway.ask("/ui/events", port=gateway.metrics_port)
            assert refused.is_error(503, "no_available_workers")
