"""The API as clients use it: the real command, afina-tiny with an adapter, plain HTTP and the official client."""

from __future__ import annotations

import json
import re
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPO
from serving import Served

import afina
from afina.engine.lora import new_adapter, save_adapter, set_adapter
from afina.engine.model import GPT
from afina.loaders.text.tokenizer import Tokenizer
from afina.loaders.weights.peft import AdapterConfig

ASKED = ["How do I reset my password?", "Where is my parcel?", "Tell me a story about the sea.", "Grüße! 🙂 naïve?"]
TALK = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": ASKED[0]}]
TOOL = {"type": "function", "function": {"name": "look", "description": "Look.", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def model() -> GPT:
    """afina-tiny with an adapter that changes what it says; the adapter is active."""
    model = afina.load_model("afina-tiny", device="cpu")
    adapter = new_adapter(model, AdapterConfig(base="afina-tiny", r=4, alpha=8), targets=["all-linear"], seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for lora in adapter.loras.values():
            lora.B.normal_(0, 0.05, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return afina.load_tokenizer("afina-tiny")


@pytest.fixture(scope="module")
def server(model: GPT, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(model, None, folder / "tuned")
    adapter = f"tuned={folder / 'tuned'}"
    served = Served("-m", "afina", "serve", "afina-tiny", "--adapter", adapter, "--port", "0", "--threads", "1")
    try:
        yield served.ready()
        assert served.end() == 0
    finally:
        served.end(signal.SIGKILL)


def expected(model: GPT, tokenizer: Tokenizer, prompt: Any, *, name: str = "afina-tiny", **sampling: Any) -> str:
    adapter = model.adapter
    if name == "afina-tiny":
        set_adapter(model, None)
    try:
        return afina.generate(model, tokenizer, prompt, **sampling)
    finally:
        set_adapter(model, adapter)


def joined(events: Iterator[Any]) -> str:
    """The text of a stream, in which no half character may come."""
    found = ""
    for event in events:
        if event is None or not event["choices"]:
            continue
        choice = event["choices"][0]
        found += choice["text"] if "text" in choice else choice["delta"].get("content", "")
    return found


# Texts


def test_texts_are_those_of_generate(server: Served, model: GPT, tokenizer: Tokenizer) -> None:
    """Many at once, of both models, whole and streamed, greedy and sampled."""
    jobs = [
        (name, prompt, settings, stream)
        for name in ("afina-tiny", "tuned")
        for prompt in ASKED
        for settings, stream in (({"temperature": 0}, False), ({"temperature": 1.3, "seed": 5, "top_p": 0.9}, True))
    ]

    def ask(job: tuple[str, str, dict[str, Any], bool]) -> str:
        name, prompt, settings, stream = job
        body = {"model": name, "prompt": prompt, "max_tokens": 12, **settings}
        if not stream:
            text: str = server.post("/v1/completions", body).json["choices"][0]["text"]
            return text
        with server.stream("/v1/completions", body) as events:
            return joined(events)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, jobs))
    for (name, prompt, settings, _), text in zip(jobs, found, strict=True):
        assert text == expected(model, tokenizer, prompt, name=name, max_new_tokens=12, **settings)
    assert found[0] != found[len(found) // 2]  # the adapter says something else


def test_chats_are_rendered_as_in_training(server: Served, model: GPT, tokenizer: Tokenizer) -> None:
    body = {"messages": TALK, "max_tokens": 20, "temperature": 0}
    reply = server.post("/v1/chat/completions", body).json
    (choice,) = reply["choices"]
    text = expected(model, tokenizer, TALK, max_new_tokens=20)
    assert choice == {
        "index": 0,
        "message": {"role": "assistant", "content": text, "refusal": None},
        "logprobs": None,
        "finish_reason": "length",
    }
    rendered = tokenizer.render(TALK, add_generation_prompt=True)
    ids = tokenizer.encode(rendered, add_special=False)
    assert reply["usage"]["prompt_tokens"] == len(ids)
    assert reply["usage"]["completion_tokens"] == 20
    assert reply["usage"]["total_tokens"] == 20 + len(ids)
    assert server.post("/apply-template", {"messages": TALK}).json == {"prompt": rendered}
    assert server.post("/tokenize", {"messages": TALK}).json["tokens"] == ids
    with_tools = server.post("/apply-template", {"messages": TALK, "tools": [TOOL]}).json["prompt"]
    assert with_tools == tokenizer.render(TALK, tools=[TOOL], add_generation_prompt=True)
    asked = server.post("/v1/chat/completions", {**body, "tools": [TOOL]}).json
    assert asked["usage"]["prompt_tokens"] == len(tokenizer.encode(with_tools, add_special=False))
    by_ids = server.post("/v1/completions", {"prompt": ids, "max_tokens": 20, "temperature": 0}).json
    assert by_ids["choices"][0]["text"] == text


def test_a_stream_has_a_role_pieces_a_reason_and_the_usage(server: Served, model: GPT, tokenizer: Tokenizer) -> None:
    body = {"messages": TALK, "max_tokens": 20, "temperature": 0, "stop": " sure"}
    with server.stream("/v1/chat/completions", {**body, "stream_options": {"include_usage": True}}) as events:
        first, *pieces, last, usage, end = events
    assert end is None
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert {event["object"] for event in (first, *pieces, last, usage)} == {"chat.completion.chunk"}
    assert len({event["id"] for event in (first, *pieces, last, usage)}) == 1
    assert all(piece["usage"] is None and piece["choices"][0]["finish_reason"] is None for piece in pieces)
    text = "".join(piece["choices"][0]["delta"]["content"] for piece in pieces)
    assert text == expected(model, tokenizer, TALK, max_new_tokens=20, stop=(" sure",))
    assert (last["choices"][0]["delta"], last["choices"][0]["finish_reason"]) == ({}, "stop")
    assert usage["choices"] == []
    assert usage["usage"] == server.post("/v1/chat/completions", body).json["usage"] | {
        "prompt_tokens_details": usage["usage"]["prompt_tokens_details"]
    }


def test_no_half_character_and_no_part_of_a_stop_string(server: Served, model: GPT, tokenizer: Tokenizer) -> None:
    letters = [tokenizer.token_id(letter) for letter in ("Ã", "©", "ð", "Ł", "Ļ", "Ĥ", "a")]  # bytes of é, 🙂 and a
    bias = {str(number): 100 for number in letters}
    for seed in range(6):
        body = {"prompt": "x", "max_tokens": 30, "seed": seed, "logit_bias": bias, "stop": ["aa", "é©"]}
        with server.stream("/v1/completions", body) as events:
            pieces = [event["choices"][0]["text"] for event in events if event]
        text = "".join(pieces)
        sampling = {"logit_bias": {int(key): value for key, value in bias.items()}, "temperature": 1.0, "seed": seed}
        assert text == expected(model, tokenizer, "x", max_new_tokens=30, stop=("aa", "é©"), **sampling)
        assert not text.endswith("\ufffd")
        assert "aa" not in text


def test_n_texts_of_several_prompts(server: Served, model: GPT, tokenizer: Tokenizer) -> None:
    body = {"prompt": ASKED[:2], "n": 2, "max_tokens": 8, "seed": 3, "echo": True}
    reply = server.post("/v1/completions", body).json
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2, 3]
    for choice, (prompt, seed) in zip(reply["choices"], [(p, s) for p in ASKED[:2] for s in (3, 4)], strict=True):
        text = expected(model, tokenizer, prompt, max_new_tokens=8, temperature=1.0, seed=seed)
        assert choice["text"] == prompt + text
    prompts = sum(len(tokenizer.encode(prompt)) for prompt in ASKED[:2])
    assert reply["usage"]["prompt_tokens"] == prompts
    with server.stream("/v1/completions", body) as events:
        found = ["", "", "", ""]
        for event in events:
            for choice in event["choices"] if event else ():
                found[choice["index"]] += choice["text"]
    assert found == [choice["text"] for choice in reply["choices"]]


def test_logprobs_of_completions(server: Served, model: GPT, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(ASKED[3], add_special=False)
    adapter = model.adapter
    set_adapter(model, None)
    with torch.no_grad():
        scores = torch.log_softmax(model(torch.tensor([ids]))[0].float(), -1)
    set_adapter(model, adapter)
    body = {"prompt": ids, "max_tokens": 1, "temperature": 0, "logprobs": 2, "echo": True}
    (choice,) = server.post("/v1/completions", body).json["choices"]
    found = choice["logprobs"]
    assert len(found["tokens"]) == len(ids) + 1
    assert (found["token_logprobs"][0], found["top_logprobs"][0]) == (None, None)
    for place, number in enumerate(ids[1:]):
        assert found["token_logprobs"][place + 1] == pytest.approx(float(scores[place, number]), abs=1e-4)
        best = scores[place].topk(2).values.tolist()
        assert sorted(found["top_logprobs"][place + 1].values())[-2:] == pytest.approx(best[::-1], abs=1e-4)
    assert found["top_logprobs"][-1][found["tokens"][-1]] == found["token_logprobs"][-1]  # the likeliest was chosen
    assert found["text_offset"][-1] == len(ASKED[3])
    assert choice["text"].startswith(ASKED[3])
    only = server.post("/v1/completions", {**body, "max_tokens": 0}).json
    assert only["choices"][0]["text"] == ASKED[3]
    assert only["choices"][0]["logprobs"] == {name: column[:-1] for name, column in found.items()}
    assert only["usage"]["completion_tokens"] == 0
    with server.stream("/v1/completions", {**body, "max_tokens": 6}) as events:
        pieces = [event["choices"][0] for event in events if event]
    whole = server.post("/v1/completions", {**body, "max_tokens": 6}).json["choices"][0]
    for name, column in whole["logprobs"].items():
        assert [value for piece in pieces if piece["logprobs"] for value in piece["logprobs"][name]] == column


def test_an_end_token_is_scored_behind_an_echo(server: Served, tokenizer: Tokenizer) -> None:
    """lm-evaluation-harness leaves out the last token of the answer, which must not be one of the prompt's."""
    end = tokenizer.eos_ids[0]
    body = {
        "prompt": "a b",
        "max_tokens": 1,
        "logprobs": 1,
        "echo": True,
        "logit_bias": {str(end): 100},
        "temperature": 0,
    }
    (choice,) = server.post("/v1/completions", body).json["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["text"] == "a b"
    assert len(choice["logprobs"]["tokens"]) == len(tokenizer.encode("a b")) + 1
    assert choice["logprobs"]["tokens"][-1] == tokenizer.token(end)


def test_logprobs_of_chats(server: Served, tokenizer: Tokenizer) -> None:
    body = {"messages": TALK, "max_tokens": 6, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    (choice,) = server.post("/v1/chat/completions", body).json["choices"]
    content = choice["logprobs"]["content"]
    assert "".join(entry["token"] for entry in content) == choice["message"]["content"]
    assert bytes(b for entry in content for b in entry["bytes"]).decode() == choice["message"]["content"]
    assert all(entry["top_logprobs"][0]["logprob"] == entry["logprob"] for entry in content)
    assert all(len(entry["top_logprobs"]) == 2 for entry in content)
    with server.stream("/v1/chat/completions", body) as events:
        pieces = [event["choices"][0] for event in events if event]
    assert [entry for piece in pieces if piece["logprobs"] for entry in piece["logprobs"]["content"]] == content


# What stands beside texts


def test_models_tokens_metrics_and_the_page(server: Served, tokenizer: Tokenizer) -> None:
    cards = server.ask("GET", "/v1/models").json
    assert [(card["id"], card["parent"], card["max_model_len"]) for card in cards["data"]] == [
        ("afina-tiny", None, 512),
        ("tuned", "afina-tiny", 512),
    ]
    assert server.ask("GET", "/v1/models/tuned").json == cards["data"][1]
    ids = tokenizer.encode(ASKED[3])
    found = server.post("/tokenize", {"prompt": ASKED[3]}).json
    assert found == {"tokens": ids, "count": len(ids), "max_model_len": 512}
    assert server.post("/detokenize", {"tokens": ids}).json == {"prompt": ASKED[3]}
    text = server.ask("GET", "/metrics").body.decode()
    for line in text.splitlines():
        assert re.fullmatch(
            r'# (HELP|TYPE) afina_\w+ .+|afina_\w+(\{[a-z]+="[^"\\]*"(,[a-z]+="[^"\\]*")*\})? [0-9.e+-]+', line
        )
    names = ("generated_tokens_total", "time_to_first_token_seconds_count", "prompt_tokens_total")
    before = [server.metric(name) for name in names]
    server.post("/v1/completions", {"prompt": [5, 6, 7], "max_tokens": 4, "logit_bias": {"5": 100}})
    assert [server.metric(name) - one for name, one in zip(names, before, strict=True)] == [4, 1, 3]
    assert server.metric("cache_bytes") > 10**6
    page = server.ask("GET", "/")
    assert page.status == 200
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert not re.search(rb"(?:https?:)?//\w|<(?:link|img|iframe)\b|@import|url\(| on\w+=| style=", page.body)


def test_a_shared_beginning_is_computed_once(server: Served) -> None:
    body = {"messages": [{"role": "system", "content": "word " * 300}, TALK[1]], "max_tokens": 2}
    server.post("/v1/chat/completions", body)
    again = server.post("/v1/chat/completions", body).json
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] >= 256


# Wrong input that only the model can tell

LONG: list[tuple[str, dict[str, Any], str, str | None]] = [
    ("/v1/completions", {"prompt": [5] * 512}, "prompt", "context_length_exceeded"),
    ("/v1/completions", {"prompt": [5] * 10, "max_tokens": 503}, "prompt", "context_length_exceeded"),
    ("/v1/completions", {"prompt": "word " * 100_000}, "prompt", "context_length_exceeded"),
    ("/v1/chat/completions", {"messages": [{**TALK[1], "content": "a " * 999}]}, "messages", "context_length_exceeded"),
    ("/v1/chat/completions", {"messages": TALK, "max_tokens": 512}, "messages", "context_length_exceeded"),
    ("/v1/completions", {"prompt": ""}, "prompt", None), ("/v1/completions", {"prompt": ["a", []]}, "prompt", None),
    ("/v1/completions", {"prompt": [4096]}, "prompt", None), ("/v1/completions", {"prompt": [-1]}, "prompt", None),
    ("/v1/completions", {"prompt": [10**300]}, "prompt", None), ("/detokenize", {"tokens": [4096]}, "tokens", None),
    ("/v1/completions", {"prompt": "a", "logit_bias": {"4096": 1}}, "logit_bias", None),
    ("/detokenize", {"tokens": "a"}, "tokens", None), ("/tokenize", {}, "prompt", None),
    ("/tokenize", {"prompt": "a", "x": 1}, "x", "unknown_field"), ("/apply-template", {}, "messages", None),
    ("/v1/chat/completions", {"messages": [{"role": "tool", "content": {}}]}, "messages", None),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(LONG)))
def test_refusals(server: Served, number: int) -> None:
    path, body, param, code = LONG[number]
    reply = server.post(path, body)
    assert (reply.status, reply.error["param"], reply.error["code"]) == (400, param, code)
    if code == "context_length_exceeded":
        assert "512 tokens" in reply.error["message"]
        assert re.search(r"has \d+ tokens and \d+ are to be written, \d+ together", reply.error["message"])


def test_unknown_models_are_404(server: Served) -> None:
    for path, body in (
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": TALK}),
        ("/tokenize", {"prompt": "a"}),
    ):
        reply = server.post(path, {**body, "model": "gpt-4"})
        assert (reply.status, reply.error["param"], reply.error["code"]) == (404, "model", "model_not_found")
        assert "afina-tiny, tuned" in reply.error["message"]


def test_a_prompt_that_fills_the_context(server: Served) -> None:
    reply = server.post("/v1/completions", {"prompt": [5] * 511, "max_tokens": 1}).json
    assert reply["usage"]["total_tokens"] in (511, 512)
    most = server.post(
        "/v1/chat/completions", {"messages": [{**TALK[1], "content": "a " * 480}], "temperature": 0}
    ).json
    assert (most["usage"]["total_tokens"] == 512) == (most["choices"][0]["finish_reason"] == "length")


# Clients


def test_the_official_client(server: Served, model: GPT, tokenizer: Tokenizer) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0)
    with client:
        assert [card.id for card in client.models.list()] == ["afina-tiny", "tuned"]
        assert client.models.retrieve("tuned").id == "tuned"
        text = expected(model, tokenizer, TALK, name="tuned", max_new_tokens=12)
        chat = {"model": "tuned", "messages": TALK, "max_tokens": 12, "temperature": 0}
        answer = client.chat.completions.create(**chat, logprobs=True, top_logprobs=1, user="me")
        assert answer.choices[0].message.content == text
        assert len(answer.choices[0].logprobs.content) == answer.usage.completion_tokens == 12
        stream = client.chat.completions.create(**chat, stream=True, stream_options={"include_usage": True})
        *pieces, usage = stream
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == text
        assert usage.usage.completion_tokens == 12
        with client.chat.completions.stream(**chat, stop=text[4:7]) as helper:  # it wants no text that was cut
            assert helper.get_final_completion().choices[0].message.content == text[:4]
        plain = {"model": "afina-tiny", "prompt": "The sea", "max_tokens": 6, "temperature": 0}
        whole = client.completions.create(**plain, logprobs=1, echo=True)
        assert whole.choices[0].text.startswith("The sea")
        assert whole.choices[0].logprobs.token_logprobs[0] is None
        assert "The sea" + "".join(p.choices[0].text for p in client.completions.create(**plain, stream=True)) == (
            whole.choices[0].text
        )
        with pytest.raises(openai.NotFoundError) as missing:
            client.chat.completions.create(model="gpt-4", messages=TALK)
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as wrong:
            client.chat.completions.create(**{**chat, "temperature": 3})
        assert (wrong.value.param, wrong.value.type) == ("temperature", "invalid_request_error")
        assert wrong.value.request_id


def test_bodies_without_sense_are_refused_or_answered(server: Served) -> None:
    """The short form of the 10,000 that `benchmarks/bench_serve.py` sends."""
    sys.path.insert(0, str(REPO / "benchmarks"))
    import bench_serve

    counts = bench_serve.fuzz(server.port, 150, seed=7)
    assert set(counts) <= {200, 400, 404, 413}
    assert counts[200] > 5
    assert counts[400] > 50
    assert json.loads(server.ask("GET", "/health").body) == {"status": "ok"}


def test_lm_evaluation_harness_scores_as_with_its_own_model(
    server: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The harness has its own requests, tokens and sums; log-likelihoods are as those of its `hf` model to 1e-4."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    folder = Path(afina.__file__).parent / "data" / "afina-tiny"
    pairs = [(asked, f" {other}") for asked in ASKED for other in ASKED] + [("The sky is", " blue")]
    asked = [Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(pairs)]
    address = f"http://127.0.0.1:{server.port}/v1/completions"
    ours = LocalCompletionsAPI(
        base_url=address, model="afina-tiny", tokenizer=str(folder), tokenizer_backend="huggingface", max_length=512,
        batch_size=4, num_concurrent=1,
    ).loglikelihood(asked)  # fmt: skip
    theirs = HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=1).loglikelihood(asked)
    for (one, one_greedy), (other, other_greedy) in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, abs=1e-4)
        assert one_greedy == other_greedy
