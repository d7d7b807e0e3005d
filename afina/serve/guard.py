"""What stands before every route: who may ask, what may reach the log, and that nothing gets out but an answer."""

from __future__ import annotations

import hmac
import secrets
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from afina.serve.body import ClientGone
from afina.serve.config import HEADER_BYTES, ServeConfig
from afina.serve.errors import RequestError, internal
from afina.serve.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import Mapping

OPEN = ("/", "/health")  # without a key: the page holds nothing, and probes have none
LOCAL = ("localhost", "127.0.0.1", "[::1]")
ROUTES = {
    *("/", "/health", "/metrics", "/v1/models", "/v1/chat/completions", "/v1/completions"),
    *("/tokenize", "/detokenize", "/apply-template"),
}


class Guard:
    """An ASGI application around another. ``in_flight``: requests that are being answered."""

    def __init__(self, app: ASGIApp, config: ServeConfig, metrics: Metrics, log: Callable[[str], None]) -> None:
        self._app, self._config, self._metrics, self._log = app, config, metrics, log
        self._key = config.api_key.encode() if config.api_key else None
        self.in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        began, status, name = time.perf_counter(), 0, secrets.token_hex(8)
        headers = Headers(scope=scope)
        origin = headers.get("origin")

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = MutableHeaders(scope=message)
                own["x-request-id"] = name
                own["x-content-type-options"] = "nosniff"
                own["referrer-policy"] = "no-referrer"
                own["cache-control"] = "no-store"
                if origin in self._config.cors_origin:
                    own["access-control-allow-origin"] = str(origin)
                    own["vary"] = "Origin"
            await send(message)

        self.in_flight += 1
        try:
            if scope["method"] == "OPTIONS" and origin in self._config.cors_origin:
                await _reply(answer, 204, b"", _preflight(headers))
            else:
                self._check(scope, headers)
                await self._app(scope, receive, answer)
        except RequestError as problem:
            await _reply(answer, problem.status, problem.to_json(), problem.headers)
        except ClientGone:
            pass  # nobody is left to read an answer
        except Exception as problem:  # the boundary of a request: it fails alone, and tells no more than that
            self._log(f"{name} failed: {type(problem).__name__} at {_place(problem)}")
            if not status:
                await _reply(answer, 500, internal().to_json(), {"connection": "close"})
            elif status != 500:
                raise  # the answer has begun: all that is left is to end the connection
        finally:
            self.in_flight -= 1
            route = scope["path"] if scope["path"] in ROUTES else "other"
            status = status or 499  # the client left before an answer began
            self._metrics.requests.add(1, route, str(status))
            client = scope["client"][0] if scope["client"] else "-"
            seconds = time.perf_counter() - began
            self._log(f"{name} {client} {scope['method'][:10]} {route} {status} {seconds:.3f} s")

    def _check(self, scope: Scope, headers: Headers) -> None:
        """Raise RequestError where the request is not for this server, or not allowed to ask it."""
        if sum(len(key) + len(value) for key, value in headers.raw) > HEADER_BYTES:
            raise RequestError("the headers are too long", status=431, code="too_large", close=True)
        host = headers.get("host", "")
        if self._config.loopback and _without_port(host).lower() not in (*LOCAL, self._config.host):
            # A name that an attacker lets point to 127.0.0.1 would make this server part of the attacker's site.
            told = "the Host header names another machine; expected localhost, 127.0.0.1 or [::1]"
            raise RequestError(told, status=403, code="wrong_host", close=True)
        origin = headers.get("origin")
        if origin is not None and origin not in self._config.cors_origin and origin.partition("://")[2] != host:
            told = "pages of other sites may not ask this server: allow it with --cors_origin"
            raise RequestError(told, status=403, code="wrong_origin", close=True)
        if self._key is not None and scope["path"] not in OPEN:
            kind, _, given = headers.get("authorization", "").partition(" ")
            if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self._key):
                told = "the API key is missing or wrong: send it as Authorization: Bearer KEY"
                challenge = (("www-authenticate", "Bearer"),)
                raise RequestError(told, status=401, code="invalid_api_key", headers=challenge, close=True)


def _without_port(host: str) -> str:
    name, _, port = host.rpartition(":")
    return name if port.isdecimal() and port.isascii() else host


def _preflight(headers: Headers) -> dict[str, str]:
    asked = headers.get("access-control-request-headers", "authorization, content-type")
    return {
        "access-control-allow-methods": "GET, POST",
        "access-control-allow-headers": asked,
        "access-control-max-age": "600",
    }


async def _reply(send: Send, status: int, body: bytes, headers: Mapping[str, str]) -> None:
    fields = {"content-type": "application/json", "content-length": str(len(body)), **headers}
    if status == 204:
        fields = dict(headers)
    encoded = [(key.encode(), value.encode("latin-1")) for key, value in fields.items()]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})


def _place(problem: BaseException) -> str:
    """Where it was raised: messages and tracebacks may hold a request's text, and the log must not."""
    place = problem.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    return f"{place.tb_frame.f_code.co_filename}:{place.tb_lineno}" if place else "an unknown place"
