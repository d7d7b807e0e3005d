"""What a client is told when its request is refused, in the shape that clients of OpenAI's API read."""

from __future__ import annotations

import json
from typing import Any


class RequestError(Exception):
    """A request that is refused. ``param`` names the field that is wrong, with dots; ``retry_after`` is in seconds."""

    def __init__(
        self,
        message: str,
        param: str | None = None,
        *,
        status: int = 400,
        code: str | None = None,
        retry_after: int | None = None,
        headers: tuple[tuple[str, str], ...] = (),
        close: bool = False,
    ) -> None:
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code
        self.headers = dict(headers)
        if retry_after is not None:
            self.headers["retry-after"] = str(retry_after)
        if close:  # the rest of the request is not read
            self.headers["connection"] = "close"

    @property
    def body(self) -> dict[str, Any]:
        kind = _KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def to_json(self) -> bytes:
        return json.dumps(self.body, ensure_ascii=False).encode(errors="backslashreplace")


_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def loading() -> RequestError:
    return RequestError("the model is being loaded: ask again soon", status=503, code="loading", retry_after=1)


def draining() -> RequestError:
    return RequestError("the server is being stopped", status=503, code="draining", retry_after=5, close=True)


def internal() -> RequestError:
    return RequestError("the server failed on this request; its log says where", status=500, code="internal_error")
