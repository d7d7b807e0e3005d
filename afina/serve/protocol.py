"""uvicorn's HTTP/1.1 protocol with the limits that it lacks: time for headers, stalled readers, connections in all."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from afina.serve.config import HEADER_SECONDS, MAX_CONNECTIONS, WRITE_SECONDS
from afina.serve.errors import RequestError

UNREADABLE = RequestError("this is no HTTP/1.1 request, or its headers are too long", code="bad_request")


class Protocol(H11Protocol):
    """One connection. A client that sends its headers too slowly, or does not read its answer, is cut off."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._headers_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()
        else:
            self._headers_timer = self.loop.call_later(HEADER_SECONDS, transport.abort)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        # A request has begun whose headers have not all come, or it was answered before its body had.
        answered = self.conn.our_state is h11.DONE and self.conn.their_state is h11.SEND_BODY
        unread = answered or self.conn.their_state is h11.IDLE
        if unread and self._headers_timer is None:
            self._headers_timer = self.loop.call_later(HEADER_SECONDS, self.transport.abort)
        elif not unread:
            self._stop_headers_timer()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(WRITE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_write_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_headers_timer()
        self._stop_write_timer()

    def _stop_headers_timer(self) -> None:
        if self._headers_timer is not None:
            self._headers_timer.cancel()
            self._headers_timer = None

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP in the shape of all refusals, and end the connection."""
        running = self.cycle is not None and not self.cycle.response_complete
        if running:  # what cannot be read is the rest of a request that is being answered
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            self.transport.abort()
            return
        body = UNREADABLE.to_json()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        head = h11.Response(status_code=400, headers=[*headers, (b"connection", b"close")], reason=b"Bad Request")
        for event in (head, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
