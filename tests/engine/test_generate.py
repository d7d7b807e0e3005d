"""Generation: cached and batched decoding equal the plain loop; sampling equals transformers' processors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from metaspace import SCHEMES, metaspace_files
from tiny_model import tiny_model, tiny_tokenizer

from afina.engine import batcher as module
from afina.engine.batcher import Batcher
from afina.engine.generate import encode_prompt, generate, generate_batch, stream
from afina.engine.model import GPT
from afina.engine.row import Row
from afina.engine.sampler import TOGETHER, Chooser, choose_together, filtered, next_tokens
from afina.engine.sampling import Sampling
from afina.errors import ConfigError, DataError
from afina.loaders.text.render import Example, render_prompt
from afina.loaders.text.tokenizer import Tokenizer

PROMPTS = [
    "the quick brown",
    "how do I reset my password? open",
    "one",
    "a card payment was declined; the café is",
    "two",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> GPT:
    return tiny_model(tokenizer)


def plain_greedy(model: GPT, tokenizer: Tokenizer, prompt: str, count: int) -> list[int]:
    """No cache, no batch: the whole sequence at every step."""
    ids = tokenizer.encode(prompt, add_special=False)
    new: list[int] = []
    with torch.no_grad():
        while len(new) < count:
            token = int(model(torch.tensor([ids + new]))[0, -1].argmax())
            if token in tokenizer.eos_ids:
                break
            new.append(token)
    return new


def ids_of(model: GPT, tokenizer: Tokenizer, prompts: list[Any], **sampling: Any) -> list[list[int]]:
    return [
        row.new for row in finished(model, tokenizer, [encode_prompt(model, tokenizer, p) for p in prompts], sampling)
    ]


def finished(model: GPT, tokenizer: Tokenizer, prompts: list[list[int]], sampling: dict[str, Any]) -> list[Row]:
    batcher = Batcher(model, tokenizer)
    rows = [batcher.submit(ids, Sampling(**sampling)) for ids in prompts]
    while not batcher.idle:
        batcher.step()
    return rows


def test_a_batch_gives_each_row_the_tokens_of_the_plain_loop(model: GPT, tokenizer: Tokenizer) -> None:
    expected = [plain_greedy(model, tokenizer, prompt, 24) for prompt in PROMPTS]
    assert len({tuple(row) for row in expected}) == len(PROMPTS)
    assert ids_of(model, tokenizer, PROMPTS, max_new_tokens=24) == expected
    assert [ids_of(model, tokenizer, [p], max_new_tokens=24)[0] for p in PROMPTS] == expected


def test_rows_that_end_leave_the_others_alone(
    model: GPT, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = [plain_greedy(model, tokenizer, prompt, 20) for prompt in PROMPTS]
    # Make the row's own third, seventh and twelfth token an end: rows retire at different steps.
    ends = {full[0][3], full[2][7], full[4][12]}
    monkeypatch.setattr(tokenizer, "eos_ids", sorted(ends))
    expected = [row[: next((i for i, t in enumerate(row) if t in ends), 20)] for row in full]
    assert len({len(row) for row in expected}) >= 3
    sizes: list[int] = []
    monkeypatch.setattr(Batcher, "_guessed", lambda self, rows: sizes.append(len(rows)) or [[] for _ in rows])
    assert ids_of(model, tokenizer, PROMPTS, max_new_tokens=20) == expected
    assert sizes[0] == sum(len(row) > 0 for row in expected) >= 4
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 4
    assert sum(sizes) == sum(min(len(row), 19) for row in expected)  # no work for a row that has ended


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 32])
def test_texts_do_not_depend_on_the_batch(model: GPT, tokenizer: Tokenizer, batch_size: int) -> None:
    options: dict[str, Any] = {"max_new_tokens": 16, "temperature": 1.3, "top_k": 50, "top_p": 0.95, "seed": 3}
    options["repetition_penalty"] = 1.2
    expected = [generate(model, tokenizer, prompt, **options) for prompt in PROMPTS]
    assert generate_batch(model, tokenizer, PROMPTS, batch_size=batch_size, **options) == expected
    backwards = generate_batch(model, tokenizer, PROMPTS[::-1], batch_size=batch_size, **options)
    assert backwards == expected[::-1]
    assert generate_batch(model, tokenizer, PROMPTS, **(options | {"seed": 4})) != expected


def test_sampling_neither_reads_nor_moves_the_global_random_numbers(model: GPT, tokenizer: Tokenizer) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = generate(model, tokenizer, "one two", temperature=1.5, max_new_tokens=12)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert generate(model, tokenizer, "one two", temperature=1.5, max_new_tokens=12) == first


@pytest.mark.parametrize(
    "choice",
    [
        {"temperature": 0.7},
        {"temperature": 1.0, "top_k": 7},
        {"temperature": 1.0, "top_k": 5000},
        {"temperature": 1.4, "top_p": 0.8},
        {"temperature": 1.0, "top_p": 1e-9},
        {"temperature": 1.0, "min_p": 0.2},
        {"temperature": 0.8, "repetition_penalty": 1.5},
        {"temperature": 2.0, "top_k": 40, "top_p": 0.7, "min_p": 0.05, "repetition_penalty": 0.8},
    ],
)
def test_filters_equal_transformers(choice: dict[str, Any]) -> None:
    from transformers import generation as hf

    logits = torch.randn(6, 300, generator=torch.Generator().manual_seed(5)) * 3
    ids = torch.randint(0, 300, (6, 20), generator=torch.Generator().manual_seed(6))
    sampling = Sampling(**choice)
    processors = hf.LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        processors.append(hf.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    processors.append(hf.TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        processors.append(hf.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p:
        processors.append(hf.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        processors.append(hf.MinPLogitsWarper(sampling.min_p))
    expected = processors(ids, logits.clone())
    seen = torch.zeros(6, 300, dtype=torch.bool).scatter(1, ids, True) if sampling.repetition_penalty != 1 else None
    torch.testing.assert_close(filtered(logits, seen, sampling), expected, rtol=0, atol=0)


@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.9, 0.99, 1 - 1e-9])
@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])  # from nearly even to a few tokens that have all
def test_top_p_keeps_the_likeliest_that_reach_it_however_many_they_are(top_p: float, spread: float) -> None:
    logits = spread * torch.randn(5, 3000, generator=torch.Generator().manual_seed(1))
    kept = filtered(logits, None, Sampling(temperature=1.0, top_p=top_p)) > -torch.inf
    for row, found in zip(logits.softmax(-1).double(), kept, strict=True):
        most, order = row.sort(descending=True)
        count = int(((most.cumsum(0) - most) < top_p).sum())
        assert found.nonzero()[:, 0].tolist() == sorted(order[:count].tolist())


@pytest.mark.parametrize("vocab", [300, TOGETHER // 3])  # all rows at once, and three at a time
def test_rows_chosen_together_have_the_tokens_they_have_alone(vocab: int) -> None:
    rows = [
        {"temperature": 1.2, "top_p": 0.9},
        {"temperature": 1.2, "top_p": 0.9, "frequency_penalty": 0.5},
        {"temperature": 0.9, "top_k": 20, "min_p": 0.01},
        {"temperature": 1.2, "top_p": 0.9, "logit_bias": {3: 2.0}},
        *[{"temperature": 1.2, "top_p": 0.9}] * 6,
        {"temperature": 0.9, "top_k": 20, "min_p": 0.01},
        {},
    ]

    def choosers() -> list[Chooser]:
        return [
            Chooser([number, 5], Sampling(seed=number, **options), vocab, torch.device("cpu"))
            for number, options in enumerate(rows)
        ]

    together, alone = choosers(), choosers()
    draw = torch.Generator().manual_seed(0)
    for _ in range(5):
        logits = 4 * torch.randn(len(rows), vocab, generator=draw)
        expected = [chooser.choose(logits[row : row + 1]) for row, chooser in enumerate(alone)]
        found = choose_together(together, logits)
        assert {0, 2, 4, 10} <= found.keys()
        assert not found.keys() & {1, 3, 11}
        left = {row: chooser.choose(logits[row : row + 1]) for row, chooser in enumerate(together) if row not in found}
        assert [(found | left)[row] for row in range(len(rows))] == expected


def test_greedy_takes_the_penalty_and_nothing_else() -> None:
    logits = torch.tensor([[3.0, 2.9, -1.0]])
    seen = torch.tensor([[True, False, False]])
    assert next_tokens(logits, seen, Sampling(repetition_penalty=1.1, top_k=1, min_p=1.0), []).tolist() == [1]
    assert next_tokens(logits, None, Sampling(), []).tolist() == [0]
    negative = torch.tensor([[-1.0, -1.05, -9.0]])
    assert next_tokens(negative, seen, Sampling(repetition_penalty=1.1), []).tolist() == [1]


def test_draws_follow_the_distribution() -> None:
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2])
    logits = probabilities.log().expand(20_000, 4)
    generators = [torch.Generator().manual_seed(i) for i in range(20_000)]
    drawn = next_tokens(logits, None, Sampling(temperature=1.0), generators)
    shares = torch.bincount(drawn, minlength=4) / len(drawn)
    torch.testing.assert_close(shares, probabilities, atol=0.015, rtol=0)
    assert shares[1] == 0


def test_a_draw_of_zero_takes_no_token_that_is_ruled_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand", lambda *shape, **kwargs: torch.zeros((), dtype=torch.float64))
    logits = torch.tensor([[-float("inf"), -float("inf"), 0.0, 1.0]])
    assert next_tokens(logits, None, Sampling(temperature=1.0), [torch.Generator()]).tolist() == [2]


def test_the_penalty_counts_prompt_and_new_tokens(model: GPT, tokenizer: Tokenizer) -> None:
    """Against the plain loop with transformers' processor, rows retiring on the way."""
    from transformers import RepetitionPenaltyLogitsProcessor

    penalty = RepetitionPenaltyLogitsProcessor(1.7)
    expected = []
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt, add_special=False)
        new: list[int] = []
        with torch.no_grad():
            while len(new) < 20:
                logits = model(torch.tensor([ids + new]))[:, -1]
                token = int(penalty(torch.tensor([ids + new]), logits).argmax())
                if token in tokenizer.eos_ids:
                    break
                new.append(token)
        expected.append(new)
    assert ids_of(model, tokenizer, PROMPTS, max_new_tokens=20, repetition_penalty=1.7) == expected


def scripted(monkeypatch: pytest.MonkeyPatch, *rows: list[int]) -> None:
    """Make generation choose these tokens, whatever the model says."""
    scripts = iter(rows)

    class Scripted:
        plain, alike = False, None

        def __init__(self, *args: Any) -> None:
            self.tokens = iter(next(scripts))

        def choose(self, logits: torch.Tensor) -> int:
            return next(self.tokens)

    monkeypatch.setattr(module, "Chooser", Scripted)


def test_stop_strings_are_cut_with_all_that_follows(
    model: GPT, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = tokenizer.encode(" one two.\nthree four\n\nfive six", add_special=False)
    for stop, expected in (
        (["\n\n"], " one two.\nthree four"),
        (["four\n\nfi", "\n"], " one two."),
        ("wo", " one t"),
        (["absent"], " one two.\nthree four\n\nfive six"),
        ([" one"], ""),
    ):
        scripted(monkeypatch, ids)
        assert generate(model, tokenizer, "x", max_new_tokens=len(ids), stop=stop) == expected
        scripted(monkeypatch, ids)
        assert "".join(stream(model, tokenizer, "x", max_new_tokens=len(ids), stop=stop)) == expected


def test_a_stop_string_ends_the_work(model: GPT, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = tokenizer.encode(" one two three four", add_special=False)
    scripted(monkeypatch, ids)
    (row,) = finished(model, tokenizer, [[5]], {"stop": (" two",), "max_new_tokens": len(ids)})
    assert len(row.new) < len(ids)
    assert tokenizer.decode(row.new).endswith(" two")
    assert row.finish_reason == "stop"


def test_control_tokens_stop_and_stay_out_of_the_text(
    model: GPT, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    word = tokenizer.encode(" one", add_special=False)
    user, end = tokenizer.token_id("<|user|>"), tokenizer.token_id("<|end|>")
    assert user is not None
    assert end in tokenizer.eos_ids
    scripted(monkeypatch, [*word, user, *word, end])
    assert generate(model, tokenizer, "x") == " one one"
    scripted(monkeypatch, [*word, user, *word, end])
    assert generate(model, tokenizer, "x", stop="<|user|>") == " one"


def test_streaming_never_shows_half_a_character_or_part_of_a_stop_string(
    model: GPT, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = " Grüße 🙂 日本, END-of it. EN"
    ids = tokenizer.encode(text, add_special=False)
    assert len(ids) > len(text)  # several tokens a character, somewhere
    scripted(monkeypatch, ids)
    pieces = list(stream(model, tokenizer, "x", max_new_tokens=len(ids), stop="END-off"))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    shown = ""
    for piece in pieces[:-1]:
        shown += piece
        assert not any(shown.endswith("END-off"[:n]) for n in range(1, 7)), shown
    # Cut in the middle of a character: its bytes are dropped.
    ids = tokenizer.encode("ab 🙂", add_special=False)
    scripted(monkeypatch, ids)
    assert generate(model, tokenizer, "x", max_new_tokens=len(ids) - 1) == "ab "


@settings(max_examples=40)
@given(st.lists(st.integers(0, 319), min_size=1, max_size=30))
def test_streams_of_any_tokens_are_what_generating_gives(model: GPT, tokenizer: Tokenizer, ids: list[int]) -> None:
    """Bytes that make no character among them."""
    prompt = encode_prompt(model, tokenizer, "he")
    ids = [token for token in ids if token not in tokenizer.eos_ids] or [5]
    with pytest.MonkeyPatch.context() as monkeypatch:
        scripted(monkeypatch, ids)
        pieces = list(stream(model, tokenizer, "he", max_new_tokens=len(ids)))
        scripted(monkeypatch, ids)
        assert "".join(pieces) == generate(model, tokenizer, "he", max_new_tokens=len(ids))
    assert "he" + "".join(pieces) == tokenizer.decode(prompt + ids, skip_special=True).rstrip("\ufffd")


@settings(max_examples=40)
@given(st.text(max_size=20), st.sampled_from([None, *SCHEMES]))
def test_streams_give_whole_characters(model: GPT, tokenizer: Tokenizer, text: str, scheme: str | None) -> None:
    """``scheme``: with a tokenizer whose decoding strips the space of a first word."""
    if scheme:
        tokenizer = Tokenizer(metaspace_files(scheme), "x")
    prompt = encode_prompt(model, tokenizer, "he")
    ids = tokenizer.encode("x " + text, add_special=False)
    ids = [token for token in ids if token not in tokenizer.eos_ids]
    with pytest.MonkeyPatch.context() as monkeypatch:
        scripted(monkeypatch, ids)
        pieces = list(stream(model, tokenizer, "he", max_new_tokens=len(ids)))
    assert "he" + "".join(pieces) == tokenizer.decode(prompt + ids, skip_special=True).rstrip("\ufffd")
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


def test_streaming_equals_generating(model: GPT, tokenizer: Tokenizer) -> None:
    for prompt in PROMPTS:
        options: dict[str, Any] = {"max_new_tokens": 20, "temperature": 1.0, "seed": 8}
        assert "".join(stream(model, tokenizer, prompt, **options)) == generate(model, tokenizer, prompt, **options)


def test_chat_messages_go_through_the_template(model: GPT, tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "how do I reset my password?"}]
    rendered = tokenizer.render(messages, add_generation_prompt=True)
    assert rendered.endswith("<|assistant|>")
    expected = plain_greedy(model, tokenizer, rendered, 12)
    assert ids_of(model, tokenizer, [messages], max_new_tokens=12) == [expected]
    row = Example(messages=(*messages, {"role": "assistant", "content": "open the settings page"}))
    assert ids_of(model, tokenizer, [row], max_new_tokens=12) == [expected]
    assert render_prompt(tokenizer, "one two ") == "one two"


def test_the_context_is_respected(model: GPT, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = model.config.max_positions
    long = " one two three" * 40
    with pytest.raises(DataError, match=rf"the prompt has \d+ tokens and the model reads {limit} at most"):
        generate(model, tokenizer, long)
    with pytest.raises(DataError, match="prompt 2 has"):
        generate_batch(model, tokenizer, ["fine", long])
    with pytest.raises(DataError, match="is empty"):
        generate(model, tokenizer, "")
    assert len(encode_prompt(model, tokenizer, "<|user|>" * (limit - 1))) == limit - 1
    with pytest.raises(DataError, match=f"has {limit} tokens"):
        encode_prompt(model, tokenizer, "<|user|>" * limit)
    near = [7] * (limit - 3)
    monkeypatch.setattr(tokenizer, "eos_ids", [])
    rows = finished(model, tokenizer, [near, [7, 8]], {"max_new_tokens": 10})
    assert [len(row.new) for row in rows] == [3, 10]


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("max_new_tokens", 0, "above 0"),
        ("temperature", -0.1, "0 or more"),
        ("temperature", float("nan"), "a number"),
        ("top_k", 0, "above 0"),
        ("top_p", 0, "above 0 and at most 1"),
        ("top_p", 1.1, "at most 1"),
        ("min_p", 2, "from 0 to 1"),
        ("repetition_penalty", 0, "above 0"),
        ("presence_penalty", 2.1, "from -2 to 2"),
        ("frequency_penalty", -3, "from -2 to 2"),
        ("logit_bias", {3: 101}, "from -100 to 100"),
        ("logit_bias", {-3: 1}, "token ids and numbers"),
        ("logit_bias", "3", "token ids and numbers"),
        ("logprobs", 21, "from 0 to 20"),
        ("stop", "", "not empty"),
        ("stop", [3], "not empty"),
        ("seed", -1, "from 0"),
    ],
)
def test_wrong_sampling(model: GPT, tokenizer: Tokenizer, name: str, value: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        generate(model, tokenizer, "one", **{name: value})
