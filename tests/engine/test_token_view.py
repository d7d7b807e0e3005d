"""A row token by token: figures as computed by hand from the logits, and texts that join to what was tokenised."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from awkward_texts import AWKWARD, TEXTS
from hypothesis import example, given, settings
from metaspace import SCHEMES, metaspace_files
from tiny_model import CONFIG, tiny_model, tiny_tokenizer

from afina.engine import token_view
from afina.engine.model import GPT
from afina.engine.token_view import token_texts, view_row
from afina.engine.weights import new_model
from afina.loaders.data.batches import collate
from afina.loaders.data.dataset import prepare
from afina.loaders.text.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("own_cache")
TOKENIZER = tiny_tokenizer()
TOKENIZERS = [TOKENIZER, *(Tokenizer(metaspace_files(scheme), scheme) for scheme in SCHEMES)]
TEXT = "how do I reset the café — naïve 🙂 fox?"


@pytest.fixture(scope="module")
def model() -> GPT:
    return tiny_model(TOKENIZER)


def test_the_figures_are_those_of_the_logits(model: GPT) -> None:
    ids = TOKENIZER.encode(TEXT)
    views = view_row(model, TOKENIZER, ids, [False, True] * (len(ids) // 2) + [True] * (len(ids) % 2), top=7)
    with torch.no_grad():
        log_probs = torch.log_softmax(model(torch.tensor([ids]))[0].double(), dim=1)
    first = views[0]
    assert (first.position, first.id, first.loss, first.probability, first.rank, first.top) == (
        0,
        ids[0],
        None,
        None,
        None,
        (),
    )
    assert [v.position for v in views] == list(range(len(ids)))
    assert [v.id for v in views] == ids
    assert [v.trained for v in views][:4] == [False, True, False, True]
    for view, row in zip(views[1:], log_probs):
        order = row.argsort(descending=True)
        assert view.loss == pytest.approx(-row[view.id].item(), abs=1e-4)
        assert view.probability == pytest.approx(row[view.id].exp().item(), rel=1e-3)
        assert view.rank == 1 + order.tolist().index(view.id)
        assert [t.id for t in view.top] == order[:7].tolist()
        assert [t.probability for t in view.top] == pytest.approx(row[order[:7]].exp().tolist(), rel=1e-3)


def test_ids_and_mask_are_those_of_training_and_so_is_the_loss(model: GPT, tmp_path: Path) -> None:
    rows = [{"prompt": f"one two {i}", "completion": f" three {i}"} for i in range(5)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    token_set = prepare(tmp_path / "rows.jsonl", TOKENIZER, max_length=64, val_size=0.0).train
    batch = collate(token_set, range(5), packing=True)
    with torch.no_grad():
        packed = model.loss(batch.input_ids, batch.labels, cu_seqlens=batch.cu_seqlens, reduction="none")[0]
    losses: list[float] = []
    for number in range(5):
        ids, loss_mask = token_set.row(number)
        views = view_row(model, TOKENIZER, ids, loss_mask)
        assert [v.trained for v in views] == loss_mask.tolist()
        assert sum(v.trained for v in views) == token_set.loss_tokens[number] > 0
        losses += [v.loss if v.trained and v.loss is not None else 0.0 for v in views]
    assert losses == pytest.approx(packed.tolist(), abs=1e-4)


@pytest.mark.parametrize("changes", [{}, {"model_type": "gemma2", "final_logit_softcapping": 3.0}])
def test_chunks_change_nothing(model: GPT, changes: dict[str, object]) -> None:
    if changes:
        gemma = {"head_dim": 8, "sliding_window": 32, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 50.0}
        gemma |= {"architectures": ["Gemma2ForCausalLM"], "hidden_activation": "gelu_pytorch_tanh", **changes}
        model = tiny_model(TOKENIZER, **gemma)
    ids = TOKENIZER.encode(TEXT)
    whole = view_row(model, TOKENIZER, ids, np.ones(len(ids)))
    if changes:
        logits = model(torch.tensor([ids]))[0].detach()
        assert logits.abs().max() <= 3.0
        assert whole[5].loss == pytest.approx(-torch.log_softmax(logits[4], 0)[ids[5]].item(), abs=1e-4)
    for chunk in (1, 1000, 5000):
        parts = view_row(model, TOKENIZER, ids, np.ones(len(ids)), chunk=chunk)
        assert [(v.id, v.text, v.rank) for v in parts] == [(v.id, v.text, v.rank) for v in whole]
        assert [v.loss for v in parts[1:]] == pytest.approx([v.loss for v in whole[1:]], abs=1e-4)


def test_logits_are_never_all_there(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    chunks = token_view._logits

    def watched(*args: object) -> object:
        for logits, targets in chunks(*args):  # type: ignore[arg-type]
            sizes.append(logits.numel())
            yield logits, targets

    monkeypatch.setattr(token_view, "_logits", watched)
    ids = TOKENIZER.encode(TEXT)
    view_row(model, TOKENIZER, ids, np.ones(len(ids)), chunk=1000)
    assert max(sizes) <= 1000
    assert sum(sizes) == (len(ids) - 1) * model.head_weight.shape[0]


def test_a_bf16_model_has_fp32_statistics() -> None:
    model = tiny_model(TOKENIZER).bfloat16()
    ids = TOKENIZER.encode(TEXT)
    views = view_row(model, TOKENIZER, ids, np.ones(len(ids)))
    with torch.no_grad():
        hidden = model.hidden(torch.tensor([ids]))[0].double()
    log_probs = torch.log_softmax(hidden @ model.head_weight.detach().double().T, dim=1)
    assert [v.loss for v in views[1:]] == pytest.approx(
        [-log_probs[n, i].item() for n, i in enumerate(ids[1:])], abs=1e-4
    )


def test_the_mode_of_the_model_and_the_random_numbers_stay(model: GPT) -> None:
    state = torch.get_rng_state()
    for mode in (True, False):
        model.train(mode)
        views = view_row(model, TOKENIZER, [5, 6, 7], [False, True, True])
        assert model.training is mode
    assert torch.equal(torch.get_rng_state(), state)
    assert len(views) == 3
    assert all(p.grad is None for p in model.parameters())


def test_a_row_of_one_token_and_wrong_shapes(model: GPT) -> None:
    (only,) = view_row(model, TOKENIZER, [5], [False])
    assert (only.loss, only.top) == (None, ())
    with pytest.raises(ValueError, match=r"ids and loss_mask: expected both \(T,\), found \(3,\) and \(2,\)"):
        view_row(model, TOKENIZER, [1, 2, 3], [True, False])


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda t: t.where[:9])
@settings(max_examples=60)
@given(text=AWKWARD)
def test_texts_join_to_what_was_tokenised(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == tokenizer.decode(ids)
    if tokenizer is TOKENIZER:
        assert "".join(texts) == text
        # No half character, and each with the token that completes it: so much of the bytes was there.
        size = 0
        for n, piece in enumerate(texts):
            size += len(piece.encode())
            known = b"".join(bytes(token_view.LETTER_BYTES[c] for c in tokenizer.token(i) or "") for i in ids[: n + 1])
            assert "\ufffd" in text or (size <= len(known) and len(known) - size < 4)


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda t: t.where[:9])
def test_texts_do_not_depend_on_the_window(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in [" ".join(TEXTS[1:60]).replace("\ufffd", ""), "a 🙂世界 " * 60]:
        ids = tokenizer.encode(text)
        found = []
        for window in (1, 5, 64, len(ids)):
            monkeypatch.setattr(token_view, "WINDOW", window)
            found.append(token_texts(tokenizer, ids))
        assert found[1:] == found[:-1]


def test_a_character_belongs_to_the_token_that_completes_it() -> None:
    ids = TOKENIZER.encode("a🙂b")
    assert token_texts(TOKENIZER, ids) == ["a", "", "", "", "🙂", "b"]
    # A row that begins and ends inside a character, as the pieces of a long text may.
    assert token_texts(TOKENIZER, ids[3:] + ids[1:3]) == ["\ufffd", "\ufffd", "b", "\ufffd", ""]


class Ending:
    """A decoder that writes an end only where it sees more than five tokens."""

    def decode(self, ids: list[int]) -> str:
        return "".join(map(str, ids)) + "!" * (len(ids) > 5)


def test_texts_join_whatever_a_decoder_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_view, "WINDOW", 1)
    assert token_texts(Ending(), [1, 2, 3, 4, 5, 6, 7]) == [*"123456", "7!"]  # type: ignore[arg-type]


@settings(max_examples=60)
@example(text="one ' two . six ' n't ? ten")
@given(text=AWKWARD.filter(lambda text: "\ufffd" not in text))
def test_what_is_left_behind_changes_nothing(text: str) -> None:
    """A window of one token against decoding every beginning of the row. (Of a U+FFFD in the text nobody can tell
    whether it is whole.)"""
    mending = tiny_tokenizer()
    mending._mends_spaces = True
    for tokenizer in (*TOKENIZERS, mending):
        ids = tokenizer.encode(text)
        whole = tokenizer.decode(ids)
        ends = token_view._ends(tokenizer, ids, whole, len(ids))
        assert ends[-1] == len(whole)
        assert token_view._ends(tokenizer, ids, whole, 1) == ends


def test_decoding_that_looks_back_is_followed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """WordPiece's way of decoding takes the space before a full stop away again."""
    tokenizer = tiny_tokenizer()
    tokenizer._mends_spaces = True
    monkeypatch.setattr(token_view, "WINDOW", 1)
    ids = tokenizer.encode("one ") + tokenizer.encode("n't ") + tokenizer.encode(". two ' x")
    texts = token_texts(tokenizer, ids)
    assert "".join(texts) == tokenizer.decode(ids) == "onen't. two'x"


def test_alternatives_are_named_by_themselves() -> None:
    pieces = token_view.TokenPieces(TOKENIZER)
    by_text = {text: TOKENIZER.encode(text, add_special=False) for text in (" the", "\n", "🙂", "<|end|>")}
    assert pieces[by_text[" the"][0]] == " the"
    assert pieces[by_text["\n"][0]] == "\n"
    assert [pieces[i] for i in by_text["🙂"]] == ["\\xf0", "\\x9f", "\\x99", "\\x82"]
    assert pieces[by_text["<|end|>"][0]] == "<|end|>"
    assert pieces[5000] == "<id 5000>"
    metaspace = TOKENIZERS[1]
    pieces = token_view.TokenPieces(metaspace)
    assert pieces[metaspace.token_id("▁he")] == " he"  # type: ignore[index]
    assert pieces[metaspace.token_id("<0xF0>")] == "<0xF0>"  # type: ignore[index]


def test_an_embedding_row_without_a_token_can_be_among_the_alternatives(model: GPT) -> None:
    assert model.head_weight.shape[0] == TOKENIZER.vocab_size
    larger = new_model(CONFIG, vocab_size=TOKENIZER.vocab_size + 8)
    views = view_row(larger, TOKENIZER, [5, 6], [False, True], top=larger.head_weight.shape[0] + 3)
    assert len(views[1].top) == larger.head_weight.shape[0]
    assert f"<id {TOKENIZER.vocab_size}>" in {t.text for t in views[1].top}
