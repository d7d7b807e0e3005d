"""What the tokens of the rows say: lengths, what is learnt, ends that are not, tokens that the model never met."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from afina.loaders.data.check_findings import Problem, at_rows
from afina.loaders.data.check_rows import LISTED, RowFacts
from afina.loaders.data.files import kind_of_file
from afina.loaders.data.token_cache import TokenCache
from afina.loaders.text.tokenizer import Tokenizer

CHUNK = 1 << 18  # tokens looked at at once
FEW = 2  # trained tokens: with fewer, only the end of the text is learnt


def length_problems(facts: RowFacts, *, max_length: int, on_long: str) -> Iterator[Problem]:
    """Rows that are longer than ``max_length`` tokens, and rows that have nothing to learn."""
    tokens = np.asarray(facts.tokens)
    dropped = facts.with_fate("dropped")
    longest = int(tokens.max(initial=0))
    what = f"rows of more than {max_length:,} tokens ({{}}); the longest has {longest:,}"
    mend = f"--max_length {longest} takes all of them, or shorten them; a cut answer is never learnt"
    severity, fate = ("error", "training refuses them") if on_long == "error" else ("warning", "left out")
    yield from at_rows(facts, dropped, "too_long", severity, what.format(fate), mend, longest=longest)
    what = what.format("their prompts are cut at the start")
    yield from at_rows(facts, facts.with_fate("truncated"), "truncated", "warning", what, mend, longest=longest)
    mend = "give them an answer, or remove them"
    yield from at_rows(
        facts, facts.with_fate("untrained"), "nothing_to_learn", "warning", "rows without a token to learn", mend
    )


def loss_tokens(facts: RowFacts, cache: TokenCache) -> NDArray[np.int64]:
    """How many tokens of each row are learnt, (rows,)."""
    result = np.zeros(len(facts), np.int64)
    np.add.at(result, np.asarray(facts.cached, np.int64), cache.loss_tokens)
    return result


def token_problems(
    facts: RowFacts, cache: TokenCache, tokenizer: Tokenizer, unmet: NDArray[np.bool_] | None
) -> Iterator[Problem]:
    """The problems that the tokens of the rows show, as the model will see them."""
    numbers = np.asarray(facts.cached, np.int64)
    few = np.unique(numbers[cache.loss_tokens < FEW])
    few = few[loss_tokens(facts, cache)[few] < FEW]
    mend = "look at them: the answer may be empty, or its mask wrong"
    yield from at_rows(facts, few, "few_trained_tokens", "note", f"rows with fewer than {FEW} trained tokens", mend)

    ends = np.zeros(tokenizer.vocab_size, np.bool_)
    ends[tokenizer.eos_ids] = True
    unended, doubled, met = list[NDArray[np.int64]](), list[NDArray[np.int64]](), list[NDArray[np.int64]]()
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    split = np.isin(numbers, facts.with_fate("split")) | (kind_of_file(facts.paths[0]) == ".txt")
    for rows, ids, mask, row in _chunks(cache):
        # A run of trained tokens is an answer: one of them must be the end.
        opens = mask & ~np.concatenate([[False], mask[:-1] & (row[1:] == row[:-1])])
        run = np.cumsum(opens) - 1
        ended = np.bincount(run[mask & ends[ids]], minlength=int(opens.sum())) > 0
        unended.append(rows[np.unique(row[opens][~ended])])
        twice = (ids[1:] == tokenizer.bos_id) & (ids[:-1] == tokenizer.bos_id) & (row[1:] == row[:-1])
        doubled.append(rows[np.unique(row[1:][twice])])
        if unmet is not None:
            counts += np.bincount(ids[unmet[ids]], minlength=len(counts))
            met.append(rows[np.unique(row[unmet[ids]])])
    open_rows = np.concatenate([*unended, np.empty(0, np.int64)])
    open_rows = np.unique(numbers[open_rows[~split[open_rows]]])  # of a text in several rows, one has the end
    what = "rows with an answer whose end is not learnt: the model would not stop after it"
    mend = "use a chat template that ends the assistant's turn, or check eos_token"
    yield from at_rows(facts, open_rows, "end_of_turn_not_trained", "warning", what, mend)
    if doubled:
        twice_rows = np.unique(numbers[np.concatenate(doubled)])
        what, mend = "rows with two BOS tokens in a row", "take the BOS out of the data or of the chat template"
        yield from at_rows(facts, twice_rows, "double_bos", "warning", what, mend)
    if met and counts.any():
        found = np.argsort(-counts, kind="stable")[: int((counts > 0).sum())]
        some = [{"id": int(i), "token": tokenizer.token(int(i)), "times": int(counts[i])} for i in found[:LISTED]]
        notes = [f"{token['token']!r} (id {token['id']}): {token['times']:,} times" for token in some]
        what = (
            f"rows with some of {len(found):,} tokens that the model has not learnt: their embeddings are unused ones"
        )
        mend = (
            "method full learns them; adapters need --modules_to_save embed_tokens,lm_head; or write the rows otherwise"
        )
        rows_met = np.unique(numbers[np.concatenate(met)])
        yield from at_rows(facts, rows_met, "unmet_tokens", "warning", what, mend, notes=notes, tokens=some)


def _chunks(
    cache: TokenCache,
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_], NDArray[np.int64]]]:
    """Yield the tokens of some rows after the other: the rows' numbers in the cache, the ids, the mask, and of each
    token the place of its row among them."""
    ends = np.asarray(cache.start) + np.asarray(cache.length)
    first = 0
    while first < len(ends):
        start = int(cache.start[first])
        last = max(first + 1, int(np.searchsorted(ends, start + CHUNK, "right")))
        stop = int(ends[last - 1])
        row = np.repeat(np.arange(last - first), cache.length[first:last])
        ids, mask = np.asarray(cache.ids[start:stop], np.int64), np.asarray(cache.loss_mask[start:stop])
        yield np.arange(first, last), ids, mask, row
        first = last
