"""The settings of the server, without torch and without the HTTP libraries, for the command line too."""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass

from afina.engine.settings import NOT_NEGATIVE, POSITIVE, Limit, Settings, setting
from afina.errors import ConfigError

MAX_BODY = 2 * 2**20  # bytes of a request
HEADER_BYTES = 16 * 2**10  # of a request's line and headers
HEADER_SECONDS = 10.0  # for a request's line and headers, once a client is connected
BODY_SECONDS = 30.0  # for the body behind them
WRITE_SECONDS = 30.0  # that a client may take nothing of what is being sent
KEEP_ALIVE_SECONDS = 30
MAX_CONNECTIONS = 512
LEAVE_SECONDS = 2.0  # of the grace time, for telling those who are still waiting that it is over, and for leaving

PORT: Limit = ("from 0 to 65535", lambda v: 0 <= v <= 65535)
_ORIGIN = re.compile(r"https?://[A-Za-z0-9.\-\[\]:]+")


@dataclass(frozen=True)
class ServeConfig(Settings):
    """Where the server listens, who may ask, and how much it takes on. Raises ConfigError.

    An address that other machines reach needs a key: whoever reaches it may otherwise use the model.
    """

    host: str = setting("127.0.0.1", "address to listen on; one that other machines reach needs api_key")
    port: int = setting(8000, "port to listen on; 0: any that is free", limit=PORT)
    api_key: str | None = setting(None, "clients must send it as a bearer token; also AFINA_API_KEY")
    cors_origin: tuple[str, ...] = setting((), "a web page's origin that may ask; may be given several times")
    max_rows: int = setting(32, "texts that are written at the same time", limit=POSITIVE)
    max_queue: int = setting(128, "texts that may wait behind them; more are refused with 429", limit=NOT_NEGATIVE)
    cache_gb: float | None = setting(None, "GB for keys and values, of all models together", limit=POSITIVE)
    request_timeout: float = setting(600.0, "seconds for a request, after which it is given up", limit=POSITIVE)
    grace: float = setting(30.0, "seconds to finish what runs after SIGTERM", limit=("3 or more", lambda v: v >= 3))
    log_requests: bool = setting(False, "write what is asked and answered to the log, which has no text otherwise")

    def __post_init__(self) -> None:
        if self.api_key is None and (key := os.environ.get("AFINA_API_KEY")):
            object.__setattr__(self, "api_key", key)
        super().__post_init__()
        if self.api_key is not None and not re.fullmatch(r"[!-~]+", self.api_key):
            raise ConfigError("api_key holds spaces or other than ASCII characters, which no header can carry")
        for origin in self.cors_origin:
            if not _ORIGIN.fullmatch(origin):
                raise ConfigError(f"cors_origin is {origin!r}; expected a page's origin, such as https://example.com")
        if not self.loopback and self.api_key is None:
            raise ConfigError(
                f"host {self.host} can be reached from other machines: give --api_key or set AFINA_API_KEY, or listen "
                "on 127.0.0.1"
            )

    @property
    def loopback(self) -> bool:
        """Whether only this machine reaches the address."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def capacity(self) -> int:
        """Texts that may be written or wait at one time."""
        return self.max_rows + self.max_queue
