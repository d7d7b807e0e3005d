"""The server's own behaviour through a socket, with a fake for a model: limits, queue, time, failures, its end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from conftest import REPO
from serving import Served, fake

HELLO = {"messages": [{"role": "user", "content": "Hello"}]}


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    """A server of two rows with room for two more behind them; a step takes 2 ms, so a text at most a second."""
    limits = {"HEADER_SECONDS": 0.5, "BODY_SECONDS": 0.5, "WRITE_SECONDS": 0.5, "MAX_CONNECTIONS": 40}
    served = fake(max_rows=2, max_queue=2, seconds=0.002, request_timeout=1.5, **limits)
    try:
        yield served.ready()
        assert served.end() == 0
    finally:
        served.end(signal.SIGKILL)


# Who may ask


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]", "LOCALHOST:80", "127.0.0.1:1", "[::1]:8000"])
def test_this_machine_by_its_names(server: Served, host: str) -> None:
    assert server.ask("GET", "/health", host=host).status == 200


@pytest.mark.parametrize("host", ["evil.com", "evil.com:8000", "localhost.evil.com", "127.0.0.1.evil.com", "", "[::2]"])
def test_a_name_that_points_here_is_not_this_machine(server: Served, host: str) -> None:
    reply = server.ask("GET", "/v1/models", host=host)
    assert (reply.status, reply.error["code"]) == (403, "wrong_host")


def test_pages_of_other_sites_may_not_ask(server: Served) -> None:
    for origin in ("https://evil.com", "null", f"http://localhost:{server.port + 1}"):
        reply = server.post("/v1/completions", {"prompt": "a"}, origin=origin)
        assert (reply.status, reply.error["code"]) == (403, "wrong_origin")
        assert "access-control-allow-origin" not in reply.headers
    assert server.ask("OPTIONS", "/v1/completions", origin="https://evil.com").status == 403
    own = f"http://127.0.0.1:{server.port}"
    assert server.post("/v1/completions", {"prompt": "a", "max_tokens": 1}, origin=own).status == 200


# What cannot be read


def test_a_body_is_read_up_to_its_limit(server: Served) -> None:
    most = 2 * 2**20
    body = json.dumps({"prompt": "a", "max_tokens": 1}).encode()
    assert server.post("/v1/completions", body + b" " * (most - len(body))).status == 200
    reply = server.post("/v1/completions", body + b" " * (most + 1 - len(body)))
    assert (reply.status, reply.error["code"]) == (413, "too_large")
    assert server.post("/tokenize", b" " * (4 * most)).status == 413


def test_a_large_body_is_refused_while_it_comes(server: Served) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
    announced = server.raw(head + b"Content-Length: 99999999\r\n\r\n" + b" " * 1000)
    chunk = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
    chunked = server.raw(head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 3)
    waiting = server.raw(head + b"Content-Length: 99999999\r\nExpect: 100-continue\r\n\r\n")
    for reply in (announced, chunked, waiting):
        assert reply.startswith(b"HTTP/1.1 413 "), reply


def test_what_is_no_http_and_headers_without_end(server: Served) -> None:
    for data in (b"GARBAGE\r\n\r\n", b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 40_000):
        reply = server.raw(data)
        assert reply.startswith(b"HTTP/1.1 400 ")
        assert json.loads(reply.partition(b"\r\n\r\n")[2])["error"]["code"] == "bad_request"
    assert server.ask("GET", "/health", x="a" * 20_000).status == 431


def test_slow_clients_are_cut_off(server: Served) -> None:
    began = time.monotonic()
    assert server.raw(b"") == b""
    assert server.raw(b"GET /health HTTP/1.1\r\nHost: local") == b""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{"
    assert server.raw(head).startswith(b"HTTP/1.1 408 ")
    with socket.create_connection((server.host, server.port)) as dripping:  # a byte now and then does not help
        dripping.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        while not dripping.recv(1000).endswith(b"}"):
            pass
        with contextlib.suppress(OSError):
            for _ in range(20):
                dripping.sendall(b"G")
                time.sleep(0.05)
        dripping.settimeout(2)
        with contextlib.suppress(ConnectionResetError):
            assert dripping.recv(100) == b""
    assert time.monotonic() - began < 6


def test_a_reader_that_takes_nothing_is_cut_off(server: Served) -> None:
    data = json.dumps({"prompt": "aé1?" * 180_000}, ensure_ascii=False).encode()
    with socket.create_connection((server.host, server.port), timeout=10) as connection:
        head = f"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
        connection.sendall(head.encode() + data)
        answer = connection.recv(1000)
        assert answer.startswith(b"HTTP/1.1 200 ")
        expected = int(answer.lower().partition(b"content-length: ")[2].split()[0])
        time.sleep(1)
        size = 0
        with contextlib.suppress(ConnectionResetError):
            while part := connection.recv(1 << 20):
                size += len(part)
        assert size < expected


def test_connections_have_a_bound(server: Served) -> None:
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.create_connection((server.host, server.port))) for _ in range(60)]
        closed = 0
        for connection in held:
            connection.settimeout(0.02)
            with contextlib.suppress(TimeoutError):
                try:
                    closed += connection.recv(1) == b""
                except ConnectionResetError:
                    closed += 1
        assert closed >= 15
    server.wait(lambda: server.ask("GET", "/health").status == 200)


JSONS: dict[str, bytes] = {
    "empty": b"",
    "no JSON": b"{prompt}",
    "a list": b"[]",
    "null": b"null",
    "UTF-16": '{"prompt": "a"}'.encode("utf-16"),
    "a key twice": b'{"prompt": "a", "prompt": "b"}',
    "NaN": b'{"prompt": "a", "temperature": NaN}',
    "infinity": b'{"prompt": "a", "temperature": -Infinity}',
    "out of range": b'{"prompt": "a", "temperature": 1e999}',
    "a long number": b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}",
    "deep": b'{"prompt": ' + b"[" * 70 + b"]" * 70 + b"}",
    "very deep": b'{"prompt": ' + b"[" * 200_000,
    "half a character": b'{"prompt": "\\ud800"}',
    "half a character in a key": b'{"\\udfff": 1}',
}


@pytest.mark.parametrize("name", JSONS)
def test_bodies_that_readers_differ_on(server: Served, name: str) -> None:
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize"):
        reply = server.post(path, JSONS[name])
        assert (reply.status, reply.error["code"]) == (400, "invalid_json")


def test_addresses_and_methods(server: Served) -> None:
    for method, path, status in (
        ("GET", "/nothing", 404), ("GET", "/v1/models/other", 404), ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models", 405), ("POST", "/", 405), ("GET", "/..%2f..%2fetc/passwd", 404), ("GET", "/%00", 404),
    ):  # fmt: skip
        reply = server.ask(method, path)
        assert (reply.status, type(reply.error["code"])) == (status, str), path


# The queue, time, and clients that leave


def test_a_full_queue_is_429_and_says_when(server: Served) -> None:
    body = {"prompt": "a", "n": 4, "max_tokens": 200}
    with server.stream("/v1/completions", body) as events:
        next(events)
        reply = server.post("/v1/completions", {"prompt": "a"})
        assert (reply.status, reply.error["code"]) == (429, "queue_full")
        assert 1 <= int(reply.headers["retry-after"]) <= 60
    reply = server.post("/v1/completions", {**body, "n": 5})  # which no waiting would help
    assert (reply.status, reply.error["param"]) == (400, "n")
    server.wait(lambda: server.metric("texts_running") == 0)
    assert server.post("/v1/completions", {"prompt": "a", "max_tokens": 1}).status == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_stops_its_texts(server: Served, stream: bool) -> None:
    server.wait(lambda: server.metric("texts_running") == 0)
    before = server.metric("cancelled_total")
    if stream:
        with server.stream("/v1/completions", {"prompt": "a", "n": 2, "max_tokens": 400}) as events:
            next(events)
    else:
        data = json.dumps({"prompt": "a", "n": 2, "max_tokens": 400}).encode()
        with socket.create_connection((server.host, server.port)) as connection:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
            connection.sendall(head.encode() + data)
            server.wait(lambda: server.metric("texts_running") == 2)
    server.wait(lambda: server.metric("cancelled_total") == before + 2)
    server.wait(lambda: server.metric("texts_running") == 0, 1)
    written = server.metric("generated_tokens_total")
    time.sleep(0.05)
    assert server.metric("generated_tokens_total") == written


def test_a_request_has_its_time(server: Served) -> None:
    body = {"prompt": "a", "n": 4, "max_tokens": 509}  # two after two, so about 2 s
    reply = server.post("/v1/completions", body)
    assert (reply.status, reply.error["code"]) == (504, "timeout")
    with server.stream("/v1/completions", body) as events:
        last = list(events)[-1]
    assert last["error"]["code"] == "timeout"
    server.wait(lambda: server.metric("texts_running") + server.metric("texts_waiting") == 0)


# Failures


def test_a_text_that_fails_fails_alone(server: Served) -> None:
    with server.stream("/v1/completions", {"prompt": "a", "max_tokens": 50}) as events:
        next(events)
        reply = server.post("/v1/completions", {"prompt": [667]})
        assert (reply.status, reply.error["code"]) == (500, "internal_error")
        assert "".join(e["choices"][0]["text"] for e in events if e).endswith("VWX")
    reply = server.post("/v1/completions", {"prompt": [669]})
    assert (reply.status, reply.error["code"]) == (500, "internal_error")
    refused = server.post("/v1/completions", {"prompt": [668]})
    assert (refused.status, refused.error["param"]) == (400, "prompt")


def test_a_step_that_fails_does_not_end_the_server(server: Served) -> None:
    with server.stream("/v1/completions", {"prompt": [666], "max_tokens": 50}) as events:
        (failure,) = list(events)
        assert failure["error"]["code"] == "internal_error"
    assert server.post("/v1/completions", {"prompt": "a", "max_tokens": 3}).json["choices"][0]["text"] == "ABC"
    assert any("failed: RuntimeError at " in line for line in server.lines)


def test_the_log_has_no_text_of_requests(server: Served) -> None:
    secret = "a-secret-that-nobody-may-read"
    server.post("/v1/completions", {"prompt": secret, "max_tokens": 1})
    server.post("/v1/completions", {"prompt": secret, secret: 1})
    server.ask("GET", f"/{secret}?{secret}", authorization=secret)
    server.wait(lambda: any(" other 404 " in line for line in server.lines))
    log = "\n".join(server.lines)
    assert secret not in log
    assert "secret text of a prompt" not in log  # of the failures above
    assert "POST /v1/completions 200" in log


# The key, other addresses, the end


def test_keys_other_addresses_and_pages_that_may_ask() -> None:
    served = fake(host="0.0.0.0", api_key="key", cors_origin=["https://mine.com"], log_requests=True, wait=0.3)
    try:
        loading = served.ask("GET", "/health", host="any.name")
        assert (loading.status, loading.json) == (503, {"status": "loading"})
        key = {"authorization": "Bearer key"}
        refused = served.post("/v1/completions", {"prompt": "a"}, **key)
        assert (refused.status, refused.error["code"], refused.headers["retry-after"]) == (503, "loading", "1")
        served.ready()
        for given in ("", "Bearer kex", "key", "Bearer", "Bearer k\u00e9y", "Basic key"):
            wrong = {"authorization": given} if given else {}
            for path in ("/v1/models", "/metrics", "/tokenize", "/nothing"):
                reply = served.ask("GET", path, **wrong)
                assert (reply.status, reply.error["code"]) == (401, "invalid_api_key")
                assert reply.headers["www-authenticate"] == "Bearer"
        assert served.ask("GET", "/v1/models", **key).status == 200
        assert served.ask("GET", "/").status == 200
        reply = served.post("/v1/completions", {"prompt": "a word"}, origin="https://mine.com", **key)
        assert (reply.status, reply.headers["access-control-allow-origin"]) == (200, "https://mine.com")
        asking = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
        reply = served.ask("OPTIONS", "/v1/completions", origin="https://mine.com", **asking)
        assert (reply.status, reply.headers["access-control-allow-headers"]) == (204, "authorization")
        assert any("a word" in line for line in served.lines)
        assert served.end(signal.SIGTERM) == 0
    finally:
        served.end(signal.SIGKILL)


def test_sigterm_lets_texts_finish_as_far_as_the_grace_time_goes() -> None:
    served = fake(seconds=0.02, grace=4).ready()
    try:
        with (
            served.stream("/v1/completions", {"prompt": "a", "max_tokens": 30}) as short,
            served.stream("/v1/completions", {"prompt": "a", "max_tokens": 500}) as long,
        ):
            next(short), next(long)
            began = time.monotonic()
            served.process.send_signal(signal.SIGTERM)
            served.wait(lambda: served.ask("GET", "/health").status == 503)
            assert served.ask("GET", "/health").json == {"status": "draining"}
            refused = served.post("/v1/completions", {"prompt": "a"})
            assert (refused.status, refused.error["code"]) == (503, "draining")
            *_, last, end = short
            assert (last["choices"][0]["finish_reason"], end) == ("length", None)
            assert list(long)[-1]["error"]["code"] == "draining"
        assert served.end() == 0
        assert time.monotonic() - began < 4
    finally:
        served.end(signal.SIGKILL)


def test_the_end_while_the_model_is_loaded() -> None:
    served = fake(wait=30)
    began = time.monotonic()
    assert served.end(signal.SIGTERM) == 0
    assert time.monotonic() - began < 5


def test_a_log_that_nobody_reads() -> None:
    command = [sys.executable, str(REPO / "tests" / "fake_batcher.py"), json.dumps({"port": 0, "wait": 30})]
    with subprocess.Popen(command, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(REPO)}) as process:
        assert process.stderr is not None
        assert b"listening" in process.stderr.readline()
        process.stderr.close()
        process.terminate()
        try:
            assert process.wait(10) == 0
        finally:
            process.kill()
