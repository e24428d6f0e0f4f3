"""`handle`: the straight line from a request head to its endpoint.

Owns the order: request id, route, gate, endpoint, error body. Inference paths are matched on the raw target first,
because they are nearly every request. Never serves anything itself.
"""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from random import Random

import trio

from smg.api.endpoints import ENDPOINTS, Endpoint
from smg.errors import ClientGone, GatewayError
from smg.gateway import problem, routes
from smg.gateway.audit import Audit
from smg.gateway.gates import ADMIN, SERVING, Cors, Gates, authorise
from smg.gateway.generate import Generate
from smg.net.exchange import Exchange
from smg.net.plain import PlainHandler, Request, answer
from smg.telemetry.log import Logger
from smg.telemetry.metrics import Metrics
from smg.tenancy.keys import Principal
from smg.wire.headers import new_request_id, split_target
from smg.wire.headers import request_id as given_request_id


class App:
    """The gateway's handler for `net.Server`.

    `endpoints` maps the endpoint names of `gateway/routes.py` to plain handlers. `id_headers` are the names of
    `--request-id-headers` (RID-1). `audit` is told of every admin call (SEC-8).
    """

    def __init__(
        self,
        generate: Generate,
        endpoints: Mapping[str, PlainHandler],
        gates: Gates,
        cors: Cors | None,
        metrics: Metrics,
        log: Logger,
        rng: Random,
        *,
        id_headers: Sequence[str],
        audit: Audit | None = None,
    ) -> None:
        self._generate = generate
        self._endpoints = endpoints
        self._gates = gates
        self._audit = audit
        self._cors = cors
        self._metrics = metrics
        self._log = log
        self._rng = rng
        self._id_headers = tuple(name.lower().encode("latin-1") for name in id_headers)
        # Without keys and CORS nothing stands between the route and the endpoint.
        self._is_direct = gates.is_serving_open and cors is None
        self._inference: dict[bytes, Endpoint] = {
            path.encode(): endpoint for path, endpoint in ENDPOINTS.items()
        }
        known = {name for methods in routes.ROUTES.values() for name, _ in methods.values()}
        missing = known - set(endpoints) - {routes.GENERATE, routes.NOT_IMPLEMENTED}
        assert not missing, f"endpoints without code: {sorted(missing)}"

    def handle(self, exchange: Exchange) -> Awaitable[None]:
        """Serves one request. Raises `GatewayError` for `refuse`, `ClientGone`, `ShuttingDown`."""
        head = exchange.head
        endpoint = head.endpoint
        if endpoint is not None:
            # The head repeats one that was found to need nothing but a new id.
            assert isinstance(endpoint, Endpoint)
            exchange.request_id = f"{endpoint.id_prefix}{self._rng.getrandbits(96):024x}"
            return self._generate.serve(exchange, endpoint, b"")
        endpoint = self._inference.get(head.target)
        if endpoint is None or head.method != b"POST":
            return self._serve_by_path(exchange)
        self.identify(exchange, endpoint.id_prefix)
        if not self._is_direct:
            return self._infer(exchange, endpoint, b"")
        if head.fields.keys().isdisjoint(self._id_headers):
            head.endpoint = endpoint
        return self._generate.serve(exchange, endpoint, b"")

    async def _serve_by_path(self, exchange: Exchange) -> None:
        path, query = split_target(exchange.head.target)
        endpoint = ENDPOINTS.get(path)
        self.identify(exchange, endpoint.id_prefix if endpoint is not None else "req-")
        if endpoint is not None and exchange.head.method == b"POST":
            await self._infer(exchange, endpoint, query.encode("latin-1"))
            return
        await self._serve_other(exchange, path, query)

    async def refuse(self, exchange: Exchange, error: GatewayError) -> None:
        """Answers with an error in the family of the path (section 8)."""
        path, _ = split_target(exchange.head.target)
        if not exchange.request_id:
            self.identify(exchange, "req-")
            self._metrics.http_series(_method(exchange), routes.UNKNOWN_TEMPLATE).finished(
                error.status, error.code, trio.current_time() - exchange.started_s
            )
        dialect = routes.dialect_of(path)
        status, block, body = problem.render(error, dialect, exchange.request_id)
        await exchange.respond(status, block, body)

    def report(self, exchange: Exchange, error: BaseException) -> None:
        """Logs a fault of the gateway itself (ERR-21)."""
        self._log.exception(
            "request failed by a fault of the gateway", error=error, request_id=exchange.request_id
        )

    async def _infer(self, exchange: Exchange, endpoint: Endpoint, query: bytes) -> None:
        head = exchange.head
        if head.principal is None and not self._gates.is_serving_open:
            try:
                head.principal = self._gates.serving(head.headers, query)
            except GatewayError as error:
                self._metrics.http_series("POST", endpoint.path).finished(
                    error.status, error.code, trio.current_time() - exchange.started_s
                )
                raise
            if self._cors is None and not query and head.fields.keys().isdisjoint(self._id_headers):
                # Until the keys change (`Server.forget_heads`) a head that repeats needs nothing but a new id.
                head.endpoint = endpoint
        await self._generate.serve(exchange, endpoint, query)

    async def _serve_other(self, exchange: Exchange, path: str, query: str) -> None:
        template = routes.UNKNOWN_TEMPLATE
        method = _method(exchange)
        status, code = 500, "internal_error"
        is_admin, principal, fault = False, None, None
        try:
            found = routes.find(path)
            # OPTIONS on a known path needs no key: browsers send none with a preflight (SEC-9).
            if found is None or (method not in found[0].methods and method != "OPTIONS"):
                if is_admin := routes.is_admin_path(path):
                    principal = await self._administrator(exchange)
                if found is None:
                    raise problem.unknown_url(method, path)
            route, parameters = found
            template = route.template
            if method not in route.methods:
                status, code = await self._other_method(exchange, method, path, route), ""
                return
            name, gate = route.methods[method]
            if is_admin := gate == ADMIN:
                principal = await self._administrator(exchange)
                authorise(principal, method)
            elif gate == SERVING:
                self._gates.serving(exchange.head.headers, query.encode("latin-1"))
            if name == routes.NOT_IMPLEMENTED:
                raise problem.not_implemented(template)
            response = await exchange.parking.run(
                self._endpoints[name], Request(exchange, path, query, parameters)
            )
            if response is None:
                raise ClientGone
            status, code = response.status, dict(response.headers).get("x-smg-error-code", "")
            await answer(exchange, response)
        except GatewayError as error:
            status, code, fault = error.status, error.code, error
            raise
        except ClientGone:
            status, code = 499, "client_gone"
            raise
        finally:
            self._metrics.http_series(method, template).finished(
                status, code, trio.current_time() - exchange.started_s
            )
            if is_admin and self._audit is not None:
                self._audit.called(exchange, principal, method, path, status, fault)

    async def _administrator(self, exchange: Exchange) -> Principal:
        """Who calls an admin route; raises what `Gates.admin` does, and `ClientGone`."""
        gates = self._gates
        principal: Principal | None = await exchange.parking.run(gates.admin, exchange.head.headers)
        if principal is None:
            raise ClientGone
        return principal

    async def _other_method(self, exchange: Exchange, method: str, path: str, route: routes.Route) -> int:
        """OPTIONS gives 204 with `Allow` or a preflight's 200 (HTTP-9, SEC-9); anything else is 405 (HTTP-10)."""
        if method != "OPTIONS":
            raise problem.method_not_allowed(method, path, route.allow)
        fields = exchange.head.fields
        if self._cors is not None:
            lines = self._cors.preflight(
                fields.get(b"origin"),
                fields.get(b"access-control-request-method"),
                fields.get(b"access-control-request-headers"),
            )
            if lines is not None:
                exchange.extra_lines = b""  # the preflight's own lines say it all
                await exchange.respond(
                    200, "".join(f"{name}: {value}\r\n" for name, value in lines).encode(), b""
                )
                return 200
        await exchange.respond(204, f"allow: {route.allow}\r\n".encode(), b"")
        return 204

    def identify(self, exchange: Exchange, prefix: str) -> None:
        """Gives a request its id (RID-1) and the header lines that every answer of it carries."""
        fields = exchange.head.fields
        if fields.keys().isdisjoint(self._id_headers):
            exchange.request_id = new_request_id(prefix, self._rng)
        else:
            exchange.request_id = given_request_id(exchange.head.headers, self._id_headers, prefix, self._rng)
        if self._cors is not None:
            exchange.extra_lines = self._cors.block(fields.get(b"origin"))


def _method(exchange: Exchange) -> str:
    return exchange.head.method.decode("ascii", "replace")
