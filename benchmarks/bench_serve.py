"""`afina serve` under load: many streaming clients at once, some of which leave, malformed requests among them.

    python benchmarks/bench_serve.py [--minutes 5] [--clients 64] [--fuzz 10000] [--model afina-tiny]

First each of the requests is sent alone, which gives the texts to compare with and one client's speed. Then the clients
send them at random for the given minutes: most read their text to its end and compare it, some leave in the middle,
some send what is no request. A client that waits a minute for anything counts as stuck. The memory is the server's
resident set; its growth is that from the end of the warm-up, a fifth of the time, to the last tenth. At last come so
many request bodies of a generator with a seed, which must be answered with 2xx or 4xx. One JSON line goes to standard
output; the exit status is 1 where a text was wrong, a client stuck, or an answer of another kind.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
PATIENCE = 60.0  # seconds after which a client is stuck
LEAVING, MALFORMED = 0.2, 0.1  # the share of requests
PATHS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/apply-template")
TEXT = "the sea is calm and my parcel has not come yet so tell me how do I reset a password 🙂 naïve Grüße"
WORDS = TEXT.split()
MALFORMED_BODIES = (b"", b"{", b'{"prompt": NaN}', b'{"prompt": "a", "n": -1}', b'{"messages": [], "x": 1}', b"[" * 999)


# Requests


def requests(count: int, seed: int) -> list[tuple[str, dict[str, Any]]]:
    """Streaming requests of different kinds and lengths: their path and body."""
    draw = random.Random(seed)
    found: list[tuple[str, dict[str, Any]]] = []
    for number in range(count):
        text = " ".join(draw.choices(WORDS, k=draw.randint(1, 60)))
        body: dict[str, Any] = {"max_tokens": draw.randint(4, 96), "seed": number, "stream": True}
        body |= draw.choice(
            [{"temperature": 0}, {"temperature": 1.2, "top_p": 0.9}, {"temperature": 0.8, "stop": [" the"]}]
        )
        body["stream_options"] = {"include_usage": True}
        if number % 2:
            shared = [{"role": "system", "content": "Answer kindly and in one sentence. " * 10}]
            found.append(("/v1/chat/completions", {**body, "messages": [*shared, {"role": "user", "content": text}]}))
        else:
            found.append(("/v1/completions", {**body, "prompt": text}))
    return found


def fuzzed(draw: random.Random) -> tuple[str, bytes]:
    """A path and a body: a good request with something done to its fields or to its bytes."""
    path = draw.choice(PATHS)
    body: dict[str, Any] = {
        "/v1/completions": {"prompt": "a b", "max_tokens": 2, "n": 1, "logprobs": 1, "echo": True, "stop": ["x"]},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "logprobs": True},
        "/tokenize": {"prompt": "a", "add_special_tokens": True},
        "/detokenize": {"tokens": [5, 6]},
        "/apply-template": {"messages": [{"role": "user", "content": "a"}]},
    }[path]
    extra = (
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "seed",
        "stream",
        "stream_options",
        "logit_bias",
        "tools",
        "model",
    )
    for _ in range(draw.choice((0, 1, 1, 1, 2, 3))):
        name = draw.choice([*body, *extra, "frequency_penalty", "top_logprobs", draw.choice(WORDS)])
        if name == "max_tokens":  # else a chat may fill the context
            body[name] = draw.choice((-1, 0, 1, 3, 10**9, 10**40, 1.5, "1", True, []))
        else:
            body[name] = _value(draw, 3)
    if draw.random() < 0.2 and isinstance(body.get("messages"), list):
        body["messages"] = [*body["messages"], _value(draw, 3), {"role": _value(draw, 1), "content": _value(draw, 2)}]
    data = bytearray(json.dumps(body, ensure_ascii=draw.random() < 0.5).encode(errors="surrogatepass"))
    if draw.random() < 0.3:
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(len(data) + 1)
            kind = draw.random()
            if kind < 0.4:
                data[at:at] = draw.choice(
                    (b"NaN", b'"', b"{", b"]", b"\\ud800", b"\xff", b"\x00", b"1e999", b",", b"9" * 50)
                )
            elif kind < 0.7:
                del data[at : at + draw.randint(1, 9)]
            else:
                data = data[:at]
    return path, bytes(data)


def _value(draw: random.Random, depth: int) -> Any:
    plain = (
        None, True, False, 0, 1, -1, 2, 0.5, 1e300, -1e300, 10**30, -(10**30), 2**63, 4095, 4096, "", "a", "true",
        "\x00", "\ud800", "🙂" * 9, "<|end|>", "<|user|>", "{{ 1 / 0 }}", "x" * 5000,
        " " * 50, "user", "assistant", "system",
    )  # fmt: skip
    if depth == 0 or draw.random() < 0.6:
        return draw.choice(plain)
    if draw.random() < 0.5:
        return [_value(draw, depth - 1) for _ in range(draw.randint(0, 4))]
    keys = (
        "role",
        "content",
        "type",
        "function",
        "name",
        "text",
        "include_usage",
        "12",
        "tool_calls",
        "weight",
        "train",
    )
    return {draw.choice(keys): _value(draw, depth - 1) for _ in range(draw.randint(0, 4))}


def fuzz(port: int, count: int, seed: int) -> Counter[int]:
    """Send ``count`` bodies; how often each status came, and 0 for what was no answer."""
    draw, statuses = random.Random(seed), Counter[int]()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    for _ in range(count):
        path, body = fuzzed(draw)
        try:
            connection.request("POST", path, body, {"content-type": "application/json"})
            answer = connection.getresponse()
            answer.read()
            statuses[answer.status] += 1
            if answer.status >= 500:
                print(f"{answer.status} for {path}: {body[:2000]!r}", file=sys.stderr)
        except (OSError, http.client.HTTPException) as problem:
            print(f"{type(problem).__name__} for {path}: {body[:2000]!r}", file=sys.stderr)
            statuses[0] += 1
            connection.close()
    connection.close()
    return statuses


# Clients


@dataclass
class Seen:
    """What the clients saw: seconds to the first token and for each further one, and how requests ended."""

    first: list[float] = field(default_factory=list)
    each: list[float] = field(default_factory=list)
    tokens: int = 0
    ends: Counter[str] = field(default_factory=Counter)


async def post(port: int, path: str, data: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, int]:
    """Send a request; where the body comes, what to close, and the status."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
    writer.write(head.encode() + f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
    status = int((await reader.readuntil(b"\r\n\r\n")).split()[1])
    return reader, writer, status


async def read_text(
    port: int, path: str, body: dict[str, Any], seen: Seen, leave_after: int | None = None
) -> str | None:
    """The text of a stream, or None after leaving it."""
    began = last = time.perf_counter()
    reader, writer, status = await post(port, path, json.dumps(body).encode())
    text, pieces = "", 0
    try:
        if status != 200:
            raise ValueError(f"status {status}")
        while line := await reader.readline():
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise ValueError(event["error"]["message"])
            if event.get("usage"):
                seen.tokens += event["usage"]["completion_tokens"]
            for choice in event["choices"]:
                piece = choice["text"] if "text" in choice else choice["delta"].get("content", "")
                if piece:
                    now = time.perf_counter()
                    (seen.each if text else seen.first).append(now - (last if text else began))
                    text, last, pieces = text + piece, now, pieces + 1
            if leave_after is not None and pieces >= leave_after:
                return None
        return text
    finally:
        writer.close()


async def client(port: int, jobs: list[Any], texts: list[str], end: float, seen: Seen, draw: random.Random) -> None:
    while time.perf_counter() < end:
        number, kind = draw.randrange(len(jobs)), draw.random()
        path, body = jobs[number]
        try:
            async with asyncio.timeout(PATIENCE):
                if kind < MALFORMED:
                    reader, writer, status = await post(port, path, draw.choice(MALFORMED_BODIES))
                    await reader.read()
                    writer.close()
                    seen.ends["refused" if 400 <= status < 500 else f"status {status}"] += 1
                elif kind < MALFORMED + LEAVING:
                    await read_text(port, path, body, seen, leave_after=draw.randint(0, 20))
                    seen.ends["left"] += 1
                else:
                    text = await read_text(port, path, body, seen)
                    seen.ends["right" if text == texts[number] else "wrong"] += 1
        except TimeoutError:
            seen.ends["stuck"] += 1
        except (OSError, ValueError, asyncio.IncompleteReadError) as problem:
            seen.ends[f"{type(problem).__name__}: {problem}"] += 1


async def load(port: int, pid: int, args: argparse.Namespace) -> dict[str, Any]:
    jobs, texts, alone = requests(args.requests, args.seed), [], Seen()
    for path, body in jobs[:8]:  # the first ones pay for what is made once
        await read_text(port, path, body, Seen())
    began = time.perf_counter()
    for path, body in jobs:
        texts.append(await read_text(port, path, body, alone) or "")
    alone_speed = alone.tokens / (time.perf_counter() - began)

    seen, seconds = Seen(), args.minutes * 60
    began, before = time.perf_counter(), counted(port)
    draws = [random.Random(f"{args.seed} {number}") for number in range(args.clients)]
    running = [asyncio.create_task(client(port, jobs, texts, began + seconds, seen, draw)) for draw in draws]
    memory: list[tuple[float, float]] = []
    while any(not task.done() for task in running):
        memory.append((time.perf_counter() - began, resident_mb(pid)))
        await asyncio.sleep(min(1.0, seconds / 100))
    took, written = time.perf_counter() - began, counted(port) - before
    await asyncio.sleep(1)
    warm = statistics.mean([mb for at, mb in memory if 0.2 * seconds <= at <= 0.3 * seconds])
    late = statistics.mean([mb for at, mb in memory if 0.9 * seconds <= at <= seconds])
    return {
        "ends": dict(seen.ends),
        "wrong": seen.ends["wrong"],
        "stuck": seen.ends["stuck"] + int(counted(port, "texts_running") + counted(port, "texts_waiting")),
        "tokens_per_second": round(written / took, 1),
        "one_client": {"tokens_per_second": round(alone_speed, 1), **times(alone)},
        "times_one_client": round(written / took / alone_speed, 2),
        **times(seen),
        "memory_mb": {"warm": round(warm, 1), "end": round(late, 1), "growth": round(late / warm - 1, 4)},
    }


def times(seen: Seen) -> dict[str, Any]:
    """p50, p95 and p99 in milliseconds."""

    def shown(values: list[float]) -> list[float]:
        ordered = sorted(values) or [0.0]
        return [
            round(1e3 * ordered[min(len(ordered) - 1, int(share * len(ordered)))], 2) for share in (0.5, 0.95, 0.99)
        ]

    return {"first_token_ms": shown(seen.first), "token_ms": shown(seen.each)}


def counted(port: int, name: str = "generated_tokens_total") -> float:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    found = re.search(rf"^afina_{name} (\S+)$", text, re.MULTILINE)
    assert found is not None
    return float(found[1])


def resident_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=96, help="different ones")
    parser.add_argument("--fuzz", type=int, default=10_000)
    parser.add_argument("--model", default="afina-tiny")
    parser.add_argument("--max_rows", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    command = [sys.executable, "-m", "afina", "serve", args.model, "--port", "0"]
    command += ["--max_rows", str(args.max_rows), "--threads", str(args.threads)]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, cwd=REPO)
    assert server.stderr is not None
    try:
        port = 0
        for line in server.stderr:
            if match := re.search(r"listening on http://\S+:(\d+)", line):
                port = int(match[1])
            if "ready:" in line:
                break
        # The rest of the log is drained, so that the server never waits for a reader.
        drain = subprocess.Popen(["cat"], stdin=server.stderr, stdout=subprocess.DEVNULL)
        result = asyncio.run(load(port, server.pid, args))
        statuses = fuzz(port, args.fuzz, args.seed)
        server.terminate()
        result["exit_status"] = server.wait(60)
        drain.wait(10)
    finally:
        server.kill()
    bad = sum(count for status, count in statuses.items() if not 200 <= status < 300 and not 400 <= status < 500)
    result["fuzz"] = {"bodies": args.fuzz, "statuses": {str(k): v for k, v in sorted(statuses.items())}, "bad": bad}
    head = {"command": " ".join(["python", "benchmarks/bench_serve.py", *sys.argv[1:]]), "model": args.model}
    tail = {
        "load_average": round(os.getloadavg()[0], 1),
        "machine": platform.machine(),
        "versions": {name: version(name) for name in ("afina", "torch", "starlette", "uvicorn")},
    }
    print(json.dumps({**head, "clients": args.clients, "minutes": args.minutes, **result, **tail}))
    good = {"right", "left", "refused"}
    return int(bool(bad or result["stuck"] or set(result["ends"]) - good or result["exit_status"]))


if __name__ == "__main__":
    sys.exit(main())
