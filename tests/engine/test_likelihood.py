"""Likelihoods: equal to the plain forward pass, whatever shares it; options as lm-evaluation-harness takes them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_model import LINES, saved, tiny_model, tiny_tokenizer

from afina.engine import likelihood
from afina.engine.likelihood import encode_pairs, option_log_likelihoods, pair_log_likelihoods, row_losses
from afina.engine.model import GPT
from afina.engine.weights import load_model
from afina.errors import DataError
from afina.loaders.data.batches import EncodedRows
from afina.loaders.data.dataset import prepare
from afina.loaders.text.source import load_tokenizer
from afina.loaders.text.tokenizer import Tokenizer

CONTEXTS = ["how do I reset", "one two ", "a card payment was", "one two three four five six", "how do I reset", "the "]
OPTIONS = ["card", " card payment", " seven eight nine ten", " x", "\ncafé naïve", " card pay"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> GPT:
    return tiny_model(tokenizer)


def alone(model: GPT, context: list[int], option: list[int]) -> tuple[float, bool]:
    """The whole logits of one context and option, in fp64 from there on."""
    with torch.no_grad():
        logits = model(torch.tensor([context + option]))[0, len(context) - 1 : -1].double()
    chosen = logits.log_softmax(-1).gather(1, torch.tensor(option)[:, None])
    return float(chosen.sum()), bool((logits.argmax(-1) == torch.tensor(option)).all())


@pytest.mark.parametrize("packing", [True, False])
def test_row_losses_are_those_of_the_plain_forward_pass(
    model: GPT, tokenizer: Tokenizer, tmp_path: Path, packing: bool
) -> None:
    rows = [{"prompt": LINES[i % 4][: 5 + i], "completion": " x" * (1 + i * i % 11)} for i in range(9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"max_length": 96, "val_size": 0.0, "cache_dir": tmp_path / "cache", "progress": False}
    token_set = prepare(tmp_path / "rows.jsonl", tokenizer, **options).train  # type: ignore[arg-type]
    found = row_losses(model, token_set, batch_size=4, packing=packing)
    assert [len(row) for row in found] == token_set.loss_tokens.tolist()
    for number, losses in enumerate(found):
        ids, loss_mask = token_set.row(number)
        with torch.no_grad():
            plain = model(torch.as_tensor(ids).long()[None])[0].double().log_softmax(-1)
        expected = [-float(plain[t - 1, ids[t]]) for t in range(1, len(ids)) if loss_mask[t]]
        assert losses.dtype == np.float32
        assert losses == pytest.approx(expected, rel=1e-5)


def test_rows_in_memory_are_measured_like_those_of_a_cache(model: GPT) -> None:
    ids = np.array([5, 9, 7, 8, 6], np.int32)
    masks = [np.array(mask) for mask in ([0, 1, 1, 1, 1], [0, 0, 1, 0, 1])]
    whole, some = row_losses(model, EncodedRows([ids, ids], [mask.astype(bool) for mask in masks]))
    assert some == pytest.approx(whole[[1, 3]], rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 4, 32])
@pytest.mark.parametrize("cache_bytes", [1, 1 << 15, 1 << 28])
def test_options_score_as_each_does_alone(
    model: GPT, tokenizer: Tokenizer, batch_size: int, cache_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many contexts run together, and however few options fit beside each other."""
    monkeypatch.setattr(likelihood, "MAX_CACHE_BYTES", cache_bytes)
    monkeypatch.setattr(likelihood, "MAX_LOGITS", 3 * model.config.vocab_size)
    done: list[int] = []
    options = [OPTIONS[: 1 + number % 6] for number in range(len(CONTEXTS))]
    found = option_log_likelihoods(model, tokenizer, CONTEXTS, options, batch_size=batch_size, progress=done.append)
    assert sum(done) == len(CONTEXTS)
    for context, texts, scores in zip(CONTEXTS, options, found, strict=True):
        ids, encoded = encode_pairs(tokenizer, context, texts)
        for text, option, score in zip(texts, encoded, scores, strict=True):
            expected, greedy = alone(model, ids, option)
            assert score.log_likelihood == pytest.approx(expected, abs=1e-5 * max(1, abs(expected)))
            assert (score.tokens, score.is_greedy, score.bytes) == (len(option), greedy, len(text.encode()))


def test_what_greedy_decoding_writes_is_greedy(model: GPT, tokenizer: Tokenizer) -> None:
    context = tokenizer.encode("one two")
    option: list[int] = []
    for _ in range(5):
        with torch.no_grad():
            option.append(int(model(torch.tensor([context + option]))[0, -1].argmax()))
    pairs = [[(tuple(context), tuple(option)), (tuple(context), (*option[:-1], option[-1] ^ 1))]]
    ((_, first), (_, second)) = pair_log_likelihoods(model, pairs)[0]
    assert (first, second) == (True, False)


def test_context_ids_are_continued_by_the_options_own(model: GPT, tokenizer: Tokenizer) -> None:
    context = tokenizer.encode("how do I")
    (found,) = option_log_likelihoods(model, tokenizer, [context], [[" reset", " card"]])
    for text, score in zip((" reset", " card"), found, strict=True):
        expected, _ = alone(model, context, tokenizer.encode(text, add_special=False))
        assert score.log_likelihood == pytest.approx(expected, rel=1e-5)


def test_nothing_is_disturbed(model: GPT, tokenizer: Tokenizer) -> None:
    model.train()
    before = torch.get_rng_state()
    option_log_likelihoods(model, tokenizer, ["one"], [[" two", " three"]])
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in model.parameters())
    assert torch.is_grad_enabled()
    model.eval()


def test_what_does_not_fit_is_named(model: GPT, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"row 2: context and option have \d+ tokens and the model reads 96"):
        option_log_likelihoods(model, tokenizer, ["one", "x y " * 100], [[" a"], [" b"]])
    with pytest.raises(DataError, match="row 1: an option has no token"):
        option_log_likelihoods(model, tokenizer, ["one"], [[" a", ""]])


class AsHarness:
    """`_encode_pair` and `loglikelihood` of lm-evaluation-harness 0.4.13 on a tokenizer of transformers."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if context == "":
            bos = self.tokenizer.bos_token_id
            prefix = bos if bos is not None else self.tokenizer.eos_token_id
            return [prefix], self.tokenizer.encode(continuation, add_special_tokens=False)
        spaces = len(context) - len(context.rstrip())
        if spaces > 0:
            continuation = context[-spaces:] + continuation
            context = context[:-spaces]
        whole, start = self.tokenizer.encode(context + continuation), self.tokenizer.encode(context)
        return start, whole[len(start) :]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("model") / "hf")


def test_sums_are_those_of_lm_evaluation_harness(folder: Path) -> None:
    """Computed as it does, with transformers: tokenised by its rule, padded on the right, log_softmax of the logits."""
    transformers = pytest.importorskip("transformers")
    harness = AsHarness(folder)
    other = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model, tokenizer = load_model(str(folder), dtype="float32"), load_tokenizer(str(folder))
    contexts = [*CONTEXTS, "", "card", "two\n"]
    found = option_log_likelihoods(model, tokenizer, contexts, [OPTIONS] * len(contexts))
    for context, scores in zip(contexts, found, strict=True):
        pairs = [harness.pair(context, option) for option in OPTIONS]
        inputs = [(start + option)[:-1] for start, option in pairs]
        padded = torch.zeros(len(inputs), max(map(len, inputs)), dtype=torch.long)
        for row, ids in enumerate(inputs):
            padded[row, : len(ids)] = torch.tensor(ids)
        with torch.no_grad():
            logits = other(padded).logits.log_softmax(-1)
        for row, ((start, option), score) in enumerate(zip(pairs, scores, strict=True)):
            own = logits[row, len(start) - 1 : len(start) - 1 + len(option)]
            expected = own.gather(1, torch.tensor(option)[:, None]).sum().item()
            assert score.tokens == len(option)
            assert score.log_likelihood == pytest.approx(expected, abs=1e-4)
            assert score.is_greedy == bool((own.argmax(-1) == torch.tensor(option)).all())


def test_pairs_are_split_as_lm_evaluation_harness_does(folder: Path) -> None:
    """The space before a word belongs to the word, and a word that goes on is not cut where the texts meet."""
    harness, tokenizer = AsHarness(folder), load_tokenizer(str(folder))
    for context in (*CONTEXTS, "ca", "the quick brown fox jum", "", "two \n"):
        for option in (*OPTIONS, "rd", "ps over"):
            ids, (own,) = encode_pairs(tokenizer, context, [option])
            assert (ids, own) == harness.pair(context, option)
