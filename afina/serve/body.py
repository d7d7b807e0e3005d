"""The body of a request, read no further than the limit, and in no more time than it may take."""

from __future__ import annotations

import asyncio

from starlette.requests import Request

from afina.serve.config import BODY_SECONDS, MAX_BODY
from afina.serve.errors import RequestError

DISCARDED = 4 * MAX_BODY  # bytes over the limit that are still taken from a client before it is refused
DISCARD_SECONDS = 1.0


class ClientGone(Exception):
    """The client has left before its request was whole."""


async def read_body(request: Request) -> bytes:
    """The bytes of a request's body. Raises RequestError (413, 408) and ClientGone."""
    announced = int(request.headers.get("content-length", "0"))
    if announced > MAX_BODY and request.headers.get("expect", "").lower() == "100-continue":
        raise too_large()  # before a byte of it is sent
    parts: list[bytes] = []
    size, more = 0, True
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while more and max(size, announced) <= MAX_BODY:
                part, more = await _next(request)
                size += len(part)
                parts.append(part)
    except TimeoutError:
        told = f"the body did not come within {BODY_SECONDS:g} seconds"
        raise RequestError(told, status=408, code="timeout", close=True) from None
    if max(size, announced) > MAX_BODY:
        parts.clear()
        await _discard(request, more)
        raise too_large()
    return b"".join(parts)


def too_large() -> RequestError:
    return RequestError(f"the body is larger than {MAX_BODY:,} bytes", status=413, code="too_large", close=True)


async def _next(request: Request) -> tuple[bytes, bool]:
    message = await request.receive()
    if message["type"] == "http.disconnect":
        raise ClientGone
    return message.get("body", b""), message.get("more_body", False)


async def _discard(request: Request, more: bool) -> None:
    """Take a little more from a client that is refused: many read no answer before they have sent all they have, and a
    connection that is closed with bytes unread may take the answer away with it."""
    size = 0
    try:
        async with asyncio.timeout(DISCARD_SECONDS):
            while more and size < DISCARDED:
                part, more = await _next(request)
                size += len(part)
    except TimeoutError:
        pass
