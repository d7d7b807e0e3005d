"""The routes: each reads its request, lets the worker write, and answers in OpenAI's shape."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
from collections.abc import Awaitable, Callable, Sequence
from functools import cached_property
from importlib.resources import files
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from afina.errors import AfinaError, DataError
from afina.serve.answers import Answer
from afina.serve.body import read_body
from afina.serve.config import ServeConfig
from afina.serve.errors import RequestError, draining, internal, loading
from afina.serve.fields import Fields, read_object
from afina.serve.requests import Chat, Completion, Talk, read_chat, read_completion, read_talk
from afina.serve.worker import Loaded, Served, Worker, Writing

if TYPE_CHECKING:
    from afina.serve.tokens import Speller

Asked = TypeVar("Asked", Chat, Completion)
Read = TypeVar("Read")
LARGE = 1 << 16  # bytes of a body that takes a while to parse
ENCODERS = 2  # prompts that are rendered and encoded at the same time
PAGE = files("afina.serve").joinpath("page.html").read_bytes()


class State:
    """What the routes share. ``draining``: no request for texts is begun any more."""

    def __init__(self, config: ServeConfig, worker: Worker, log: Callable[[str], None]) -> None:
        self.config, self.worker, self.log = config, worker, log
        self.draining = False
        self.encoders = asyncio.Semaphore(ENCODERS)

    def loaded(self) -> Loaded:
        if self.worker.loaded is None:
            raise loading()
        return self.worker.loaded

    @cached_property
    def speller(self) -> Speller:
        from afina.serve.tokens import Speller  # it needs torch, which this thread has no time to import

        return Speller(self.loaded().tokenizer)

    async def off_loop(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What takes long for a long prompt, on another thread. Raises RequestError for what the prompt does wrong."""
        tokenizer = self.loaded().tokenizer
        async with self.encoders:
            try:
                return await asyncio.to_thread(function, *arguments)
            except AfinaError as problem:
                # It names the folder of the tokenizer, which is nobody's business.
                told = str(problem).replace(f"{tokenizer.where}: ", "").replace(tokenizer.where, "the model")
                raise DataError(told) from problem


def build(state: State) -> Starlette:
    """The ASGI application, without what `Guard` puts around it."""

    def route(path: str, handler: Callable[[State, Request], Awaitable[Response]], *methods: str) -> Route:
        async def endpoint(request: Request) -> Response:
            return await handler(state, request)

        return Route(path, endpoint, methods=list(methods), name=path)

    routes = [
        route("/v1/chat/completions", _chat, "POST"),
        route("/v1/completions", _completions, "POST"),
        route("/v1/models", _models, "GET"),
        route("/v1/models/{name:path}", _model, "GET"),
        route("/health", _health, "GET"),
        route("/metrics", _metrics, "GET"),
        route("/tokenize", _tokenize, "POST"),
        route("/detokenize", _detokenize, "POST"),
        route("/apply-template", _apply_template, "POST"),
        route("/", _page, "GET"),
    ]
    handlers: dict[Any, Any] = {RequestError: _refused, HTTPException: _unrouted, Exception: _failed}
    return Starlette(routes=routes, exception_handlers=handlers)


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    # The name of a folder may hold bytes that are no UTF-8, which Python has as halves of surrogates: JSON's escapes.
    body = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(errors="backslashreplace")
    return Response(body, status, headers, "application/json")


async def _refused(request: Request, problem: Exception) -> Response:
    assert isinstance(problem, RequestError)
    return Response(problem.to_json(), problem.status, problem.headers, "application/json")


async def _failed(request: Request, problem: Exception) -> Response:
    return Response(internal().to_json(), 500, {"connection": "close"}, "application/json")


async def _unrouted(request: Request, problem: Exception) -> Response:
    assert isinstance(problem, HTTPException)
    if problem.status_code == 405:
        error = RequestError(f"{request.method} is no method of this address", status=405, code="method_not_allowed")
    else:
        error = RequestError("there is nothing at this address", status=problem.status_code, code="not_found")
    headers = {**(problem.headers or {}), "connection": "close"}  # a body that may be there is not read
    return Response(error.to_json(), error.status, headers, "application/json")


# Texts


async def _completions(state: State, request: Request) -> Response:
    worker = _open(state)
    asked = await _asked(state, request, read_completion)
    served, tokenizer = worker.find(asked.model), state.loaded().tokenizer

    def encode() -> tuple[list[list[int]], list[str]]:
        ids = [
            tokenizer.encode(_rendered(state, prompt), add_special=False) if isinstance(prompt, str) else prompt
            for prompt in asked.prompts
        ]
        if not asked.echo:
            return ids, []
        return ids, [p.rstrip(" ") if isinstance(p, str) else tokenizer.decode(p) for p in asked.prompts]

    _check_ids(state, [prompt for prompt in asked.prompts if isinstance(prompt, list)], "prompt")
    prompts, echoed = await _encoded(state, encode, "prompt")
    return _answer(state, asked, served, prompts, echoed, "prompt")


async def _chat(state: State, request: Request) -> Response:
    worker = _open(state)
    asked = await _asked(state, request, read_chat)
    served = worker.find(asked.model)
    ids = await _encoded(state, lambda: _talk_ids(state, asked.talk), "messages")
    return _answer(state, asked, served, [ids], [], "messages")


def _open(state: State) -> Worker:
    if state.draining:
        raise draining()
    state.loaded()
    return state.worker


async def _asked(state: State, request: Request, read: Callable[[dict[str, Any], int], Asked]) -> Asked:
    """What a request for texts asks for, as ``read`` makes it of its body."""
    return await _body(state, request, lambda body: read(body, state.config.capacity))


async def _body(state: State, request: Request, read: Callable[[dict[str, Any]], Read]) -> Read:
    """What ``read`` makes of the JSON object in a request's body."""
    data = await read_body(request)
    if state.config.log_requests:
        state.log(f"asked: {data.decode(errors='replace')!a}")
    if len(data) < LARGE:
        return read(read_object(data))
    return await asyncio.to_thread(lambda: read(read_object(data)))  # streams go on meanwhile


async def _encoded(state: State, function: Callable[[], Any], param: str) -> Any:
    try:
        return await state.off_loop(function)
    except DataError as problem:
        raise RequestError(str(problem), param) from problem


def _rendered(state: State, prompt: str | Talk) -> str:
    """The text of a prompt as training rendered it."""
    from afina.loaders.text.render import render_prompt  # it needs torch, which the socket does not wait for

    if isinstance(prompt, str):
        return render_prompt(state.loaded().tokenizer, prompt)
    return render_prompt(state.loaded().tokenizer, prompt.messages, tools=prompt.tools)


def _talk_ids(state: State, talk: Talk) -> list[int]:
    return state.loaded().tokenizer.encode(_rendered(state, talk), add_special=False)


def _check_ids(state: State, prompts: Sequence[list[int]], param: str) -> None:
    size = state.loaded().model.config.vocab_size
    for ids in prompts:
        if ids and not (min(ids) >= 0 and max(ids) < size):
            wrong = next(number for number in ids if not 0 <= number < size)
            shown = wrong if abs(wrong) < 10**12 else "far outside"
            raise RequestError(f"{param} holds the token id {shown}; expected ids from 0 to {size - 1}", param)


def _answer(
    state: State,
    asked: Chat | Completion,
    served: Served,
    prompts: Sequence[Sequence[int]],
    echoed: Sequence[str],
    param: str,
) -> Response:
    longest, room = max(map(len, prompts)), served.batcher.max_length
    wanted = 1 if asked.max_tokens is None else max(1, asked.max_tokens)
    if not all(prompts):
        raise RequestError(f"{param} is empty; expected at least one token to continue", param)
    if longest + wanted > room:
        told = f"{param} has {longest} tokens and {wanted} are to be written, {longest + wanted} together"
        code = "context_length_exceeded"
        raise RequestError(f"a text may have {room} tokens here: {told}; shorten it or ask for fewer", param, code=code)
    # An answer without a limit of its own may fill the context; each prompt of several has the same limit.
    samplings = asked.samplings(room - longest if asked.max_tokens is None else wanted)
    unknown = [number for number in asked.sampling["logit_bias"] if number >= state.loaded().model.config.vocab_size]
    if unknown:
        raise RequestError(f"logit_bias names the token {unknown[0]}, which the model does not have", "logit_bias")
    if state.draining:
        raise draining()
    scored = bool(echoed) and asked.logprobs is not None
    writing = state.worker.submit(served, prompts, samplings, echo=scored, param=param)
    speller = None if asked.logprobs is None else state.speller
    return _Texts(state, writing, Answer(asked, writing, speller, echoed))


class _Texts(Response):
    """The answer to a request for texts, in pieces or whole. What is not done when its client leaves is given up."""

    def __init__(self, state: State, writing: Writing, answer: Answer) -> None:
        super().__init__()
        self._state, self._writing, self._answer = state, writing, answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writing = self._writing
        seconds = self._state.config.request_timeout
        told = f"the request took longer than {seconds:g} seconds"
        late = RequestError(told, status=504, code="timeout")
        timer = asyncio.get_running_loop().call_later(seconds, writing.fail, late)
        watch = asyncio.create_task(self._watch(receive))
        try:
            if self._answer.asked.stream:
                await self._stream(send)
            else:
                await self._whole(scope, receive, send)
        finally:
            timer.cancel()
            watch.cancel()
            self._state.worker.cancel(writing)
        if self._state.config.log_requests:
            self._state.log(f"answered: {[text.text for text in writing.texts]!a}")

    async def _watch(self, receive: Receive) -> None:
        """Wait until the client leaves."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self._writing.gone = True
        self._state.worker.cancel(self._writing)  # at once: a stream may be waiting for its reader
        self._writing.changed.set()

    async def _changed(self) -> bool:
        """Wait for something new; False where the client has left."""
        await self._writing.changed.wait()
        self._writing.changed.clear()
        return not self._writing.gone

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        writing = self._writing
        while not writing.done and writing.failure is None:
            if not await self._changed():
                return
        if writing.failure is not None:
            problem = writing.failure
            response = Response(problem.to_json(), problem.status, problem.headers, "application/json")
        else:
            response = json_response(self._answer.whole())
        await response(scope, receive, send)

    async def _stream(self, send: Send) -> None:
        writing = self._writing
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        piece = self._answer.opening()
        while True:
            if piece:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            if writing.done or writing.failure is not None:
                break
            if not await self._changed():
                return
            piece = self._answer.pieces()
        end = b"data: " + writing.failure.to_json() + b"\n\n" if writing.failure else self._answer.closing()
        await send({"type": "http.response.body", "body": end, "more_body": False})


# What stands beside them


def _card(state: State, name: str) -> dict[str, Any]:
    served = state.worker.find(name)
    base = next((each.name for each in state.worker.served.values() if each.adapter is None), None)
    about = {"id": name, "object": "model", "created": state.worker.created, "owned_by": "afina"}
    return about | {"max_model_len": served.batcher.max_length, "parent": None if served.adapter is None else base}


async def _models(state: State, request: Request) -> Response:
    state.loaded()
    return json_response({"object": "list", "data": [_card(state, name) for name in state.worker.served]})


async def _model(state: State, request: Request) -> Response:
    return json_response(_card(state, state.worker.find(request.path_params["name"]).name))


async def _health(state: State, request: Request) -> Response:
    status = "draining" if state.draining else "loading" if state.worker.loaded is None else "ok"
    return json_response({"status": status}, 200 if status == "ok" else 503)


async def _metrics(state: State, request: Request) -> Response:
    return Response(state.worker.metrics.to_text(), media_type="text/plain; version=0.0.4")


async def _tokenize(state: State, request: Request) -> Response:
    tokenizer = state.loaded().tokenizer
    fields = await _body(state, request, Fields)
    name = fields.text("model")
    text = next((value for key in ("prompt", "content") if (value := fields.text(key)) is not None), None)
    special = fields.any("add_special_tokens") is None or fields.flag("add_special_tokens")
    if fields.any("messages") is not None:
        talk = read_talk(fields)
        fields.done()
        served = state.worker.find(name)
        ids = await _encoded(state, lambda: _talk_ids(state, talk), "messages")
    else:
        fields.done()
        served = state.worker.find(name)
        if text is None:
            raise RequestError("prompt is missing; expected a text, or messages", "prompt")
        ids = await _encoded(state, lambda: tokenizer.encode(text, add_special=special), "prompt")
    return json_response({"tokens": ids, "count": len(ids), "max_model_len": served.batcher.max_length})


async def _detokenize(state: State, request: Request) -> Response:
    fields = await _body(state, request, Fields)
    name, ids = fields.text("model"), fields.any("tokens")
    fields.done()
    state.worker.find(name)
    if not isinstance(ids, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise fields.wrong("tokens", "a list of token ids")
    _check_ids(state, [ids], "tokens")
    text = await _encoded(state, lambda: state.loaded().tokenizer.decode(ids), "tokens")
    return json_response({"prompt": text})


async def _apply_template(state: State, request: Request) -> Response:
    fields = await _body(state, request, Fields)
    name, talk = fields.text("model"), read_talk(fields)
    fields.done()
    state.worker.find(name)
    text = await _encoded(state, lambda: _rendered(state, talk), "messages")
    return json_response({"prompt": text})


async def _page(state: State, request: Request) -> Response:
    return Response(PAGE, headers={"content-security-policy": _policy(PAGE.decode())}, media_type="text/html")


def _policy(page: str) -> str:
    """A content security policy that lets the page run its own script and style, and ask this server; nothing else."""
    hashes = {}
    for tag in ("script", "style"):
        (inner,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        hashes[tag] = base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()
    parts = [f"{tag}-src 'sha256-{value}'" for tag, value in hashes.items()]
    own = "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    return "; ".join(["default-src 'none'", *parts, own])
