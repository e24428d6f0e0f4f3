"""Small HTTP servers for tests of commands that ask others: a table of answers, and a gateway with workers in memory."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
import uuid
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import parse_qs, urlsplit

Answer = tuple[int, bytes]


@contextlib.contextmanager
def serving(answer: Callable[[str, str, dict[str, str], bytes], Answer]) -> Iterator[str]:
    """The base URL of a server that answers (method, target, headers, body) with (status, body)."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            headers = {name.lower(): value for name, value in self.headers.items()}
            status, content = answer(self.command, self.path, headers, body)
            self.send_response(status)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PATCH = do_DELETE = handle_any

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class FakeGateway:
    """The worker API of contract section 10, as far as `smg workers` uses it. `requests` are those it got."""

    def __init__(self, api_key: str | None = None) -> None:
        self.workers: dict[str, dict[str, Any]] = {}
        self.requests: list[tuple[str, str, Any]] = []
        self.polls_until_ready = 0
        self._api_key = api_key

    def answer(self, method: str, target: str, headers: dict[str, str], body: bytes) -> Answer:
        if self._api_key is not None and headers.get("authorization") != f"Bearer {self._api_key}":
            return _json(401, {"error": {"message": "Invalid API key", "code": "invalid_api_key"}})
        document = json.loads(body) if body else None
        self.requests.append((method, target, document))
        parts = urlsplit(target)
        if parts.path == "/workers":
            return (
                self._create(document) if method == "POST" else self._list(parse_qs(parts.query).get("model"))
            )
        worker_id = parts.path.removeprefix("/workers/")
        if worker_id not in self.workers:
            return _json(404, {"error": f"Worker {worker_id} not found", "code": "WORKER_NOT_FOUND"})
        return self._one(method, worker_id, document)

    def add(self, url: str, **members: Any) -> str:
        worker_id = str(uuid.uuid5(uuid.NAMESPACE_URL, url))
        self.workers[worker_id] = {
            "id": worker_id, "url": url, "model_id": "m1", "models": [{"id": "m1"}, {"id": "m2"}],
            "worker_type": "regular", "runtime_type": "vllm", "priority": 50, "cost": 1.0,
            "status": "ready", "is_healthy": True, "load": 3, **members,
        }  # fmt: skip
        return worker_id

    def _create(self, spec: Any) -> Answer:
        if any(worker["url"] == spec["url"] for worker in self.workers.values()):
            return _json(409, {"error": "Worker already exists", "code": "WORKER_ALREADY_EXISTS"})
        status = "pending" if self.polls_until_ready else "ready"
        worker_id = self.add(spec["url"], status=status, is_healthy=status == "ready")
        return _json(
            202, {"status": "accepted", "worker_id": worker_id, "url": spec["url"], "message": "being added"}
        )

    def _list(self, models: list[str] | None) -> Answer:
        found = [
            worker
            for worker in self.workers.values()
            if models is None or any(model["id"] == models[0] for model in worker["models"])
        ]
        return _json(200, {"workers": found, "total": len(found), "stats": {}})

    def _one(self, method: str, worker_id: str, document: Any) -> Answer:
        worker = self.workers[worker_id]
        if method == "DELETE":
            del self.workers[worker_id]
            return _json(202, {"status": "accepted", "worker_id": worker_id, "message": "draining"})
        if method == "PATCH":
            worker.update({name: value for name, value in document.items() if name != "api_key"})
            return _json(202, {"status": "accepted", "worker_id": worker_id, "message": "changed"})
        if worker["status"] == "pending":
            self.polls_until_ready -= 1
            if self.polls_until_ready == 0:
                worker.update(status="ready", is_healthy=True)
            else:
                worker["job_status"] = {"status": "processing", "message": "connection refused"}
        return _json(200, worker)


def _json(status: int, document: Any) -> Answer:
    return status, json.dumps(document).encode()
