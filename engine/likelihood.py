"""How likely a model holds given tokens: the loss of each token of rows, and the log-likelihood of options.

An option's log-likelihood is the sum over its tokens of log p(token | context, the option's tokens before it), as
lm-evaluation-harness computes it (https://github.com/EleutherAI/lm-evaluation-harness, `api/model.py`). A context is
run once; its keys and values are then repeated for its options, whose tokens run packed.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from afina.engine.kv_cache import KVCache
from afina.errors import DataError
from afina.loaders.data.batches import IGNORE, Rows, eval_batches

if TYPE_CHECKING:
    from afina.engine.model import GPT
    from afina.loaders.text.tokenizer import Tokenizer

MAX_CACHE_BYTES = 1 << 26  # of keys and values that options share a forward pass with
MAX_LOGITS = 1 << 24  # logits that exist at a time
Pair = tuple[tuple[int, ...], tuple[int, ...]]  # the ids of a context and of an option


class OptionScore(NamedTuple):
    """An option's log-likelihood (nats, summed over its ``tokens``), whether it is what greedy decoding would write,
    and the UTF-8 size of its text."""

    log_likelihood: float
    tokens: int
    is_greedy: bool
    bytes: int


@torch.no_grad()
def row_losses(
    model: GPT,
    token_set: Rows,
    *,
    batch_size: int = 8,
    packing: bool = True,
    poll: Callable[[], object] | None = None,
) -> list[NDArray[np.float32]]:
    """The loss (nats, fp32) of each loss token of each row, in order.

    Logits are never kept, no random number is drawn, gradients and the model's train or eval mode stay as they were.
    ``poll`` is called before each batch and may raise to stop.
    """
    was_training = model.training
    model.eval()
    result: list[NDArray[np.float32]] = []
    try:
        for batch in eval_batches(token_set, batch_size=batch_size, packing=packing):
            if poll:
                poll()
            ids = batch.input_ids.to(model.device, non_blocking=True)
            losses = model.loss(ids, batch.labels, cu_seqlens=batch.cu_seqlens, reduction="none")
            wanted = batch.labels != IGNORE
            found = losses.cpu()[wanted].numpy()
            result += np.split(found, np.cumsum(_loss_counts(wanted, batch.cu_seqlens))[:-1])
    finally:
        model.train(was_training)
    return result


def _loss_counts(wanted: Tensor, cu_seqlens: Tensor | None) -> list[int]:
    """How many tokens of each row are ``wanted`` (B, T), or (1, T) packed."""
    if cu_seqlens is None:
        return wanted.sum(1).tolist()
    return [int(part.sum()) for part in wanted[0].tensor_split(cu_seqlens[1:-1].long())]


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """The ids of texts, with what the tokenizer puts around a text unless it begins with a BOS of its own."""
    bos = tokenizer.bos_token
    spelt = [bool(bos) and text.startswith(str(bos)) for text in texts]
    if not any(spelt):
        return tokenizer.encode_batch(texts)
    return [tokenizer.encode(text, add_special=not own) for text, own in zip(texts, spelt)]


def encode_pairs(tokenizer: Tokenizer, context: str, options: Sequence[str]) -> tuple[list[int], list[list[int]]]:
    """The ids of a context and of what each option adds to it, as lm-evaluation-harness takes them.

    Whitespace at the end of the context goes to the options; context and option are tokenised as one text, and the
    option's tokens are those behind as many as the context has alone. An empty context is BOS, or the end of a text.
    Raises DataError where neither exists.
    """
    bare = context.rstrip()
    options = [context[len(bare) :] + option for option in options]
    if not bare:
        prefix = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.token_id(tokenizer.eos_token)
        if prefix is None:
            raise DataError(f"{tokenizer.where}: neither BOS nor EOS, so nothing can stand for an empty context")
        return [prefix], tokenizer.encode_batch(options, add_special=False)
    ids, *whole = encode_texts(tokenizer, [bare, *(bare + option for option in options)])
    return ids, [row[len(ids) :] for row in whole]


def option_log_likelihoods(
    model: GPT,
    tokenizer: Tokenizer,
    contexts: Sequence[str | Sequence[int]],
    options: Sequence[Sequence[str]],
    *,
    batch_size: int = 32,
    progress: Callable[[int], object] | None = None,
) -> list[list[OptionScore]]:
    """The score of each option of each row, behind the row's context.

    A context is a text, which is tokenised together with each option (``encode_pairs``), or token ids, behind which the
    options' own ids follow. ``progress`` is called with the number of rows done since its last call. Raises DataError
    where an option has no token, or context and option are longer than the model reads.
    """
    pairs: list[list[Pair]] = []
    for context, texts in zip(contexts, options, strict=True):
        if isinstance(context, str):
            ids, encoded = encode_pairs(tokenizer, context, texts)
        else:
            ids, encoded = list(context), tokenizer.encode_batch(list(texts), add_special=False)
        pairs.append([(tuple(ids), tuple(option)) for option in encoded])
    found = pair_log_likelihoods(model, pairs, batch_size=batch_size, progress=progress)
    return [
        [OptionScore(total, len(pair[1]), greedy, len(text.encode())) for (total, greedy), pair, text in zip(*row)]
        for row in zip(found, pairs, options)
    ]


@torch.no_grad()
def pair_log_likelihoods(
    model: GPT,
    rows: Sequence[Sequence[Pair]],
    *,
    batch_size: int = 32,
    names: Sequence[str] | None = None,
    progress: Callable[[int], object] | None = None,
    poll: Callable[[], object] | None = None,
) -> list[list[tuple[float, bool]]]:
    """(log-likelihood, whether it is greedy) of each pair of each row. Pairs with equal contexts share their run.

    ``names``: what messages call the rows. ``poll`` is called between chunks of pairs and may raise to stop.
    """
    wanted: dict[tuple[int, ...], dict[tuple[int, ...], tuple[float, bool]]] = {}
    ends: Counter[tuple[int, ...]] = Counter()  # rows whose last context this is: when it is done, so are they
    for number, row in enumerate(rows):
        for context, option in row:
            _check(model, context, option, names[number] if names else f"row {number + 1}")
            wanted.setdefault(context, {})[option] = (0.0, False)
        ends[max((context for context, _ in row), key=len)] += 1
    was_training = model.training
    model.eval()
    try:
        contexts = sorted(wanted, key=len)  # neighbours of one length attend together
        for start in range(0, len(contexts), batch_size):
            batch = contexts[start : start + batch_size]
            if poll:
                poll()
            for context, option, score in _scored(model, batch, wanted, poll):
                wanted[context][option] = score
            if progress:
                progress(sum(ends[context] for context in batch))
    finally:
        model.train(was_training)
    return [[wanted[context][option] for context, option in row] for row in rows]


def _check(model: GPT, context: tuple[int, ...], option: tuple[int, ...], name: str) -> None:
    limit = model.config.max_positions
    if not context or not option:
        raise DataError(f"{name}: {'an option' if context else 'the context'} has no token")
    if len(context) + len(option) > limit:
        raise DataError(
            f"{name}: context and option have {len(context) + len(option)} tokens and the model reads {limit} at "
            "most: shorten them"
        )


def _scored(
    model: GPT,
    contexts: Sequence[tuple[int, ...]],
    options: dict[tuple[int, ...], dict[tuple[int, ...], tuple[float, bool]]],
    poll: Callable[[], object] | None,
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], tuple[float, bool]]]:
    """Score the options of some contexts: the contexts run packed, then chunks of (context, option)."""
    device, dtype = model.device, model.dtype
    room = max(len(context) + max(map(len, options[context])) for context in contexts)
    cache = KVCache(model.config, len(contexts), room, device, dtype)
    hidden = _packed(model, contexts, cache)
    ends = list(itertools.accumulate(map(len, contexts)))
    last = hidden[torch.tensor(ends, device=device) - 1]  # (contexts, C): what predicts each option's first token
    pairs = [(row, option) for row, context in enumerate(contexts) for option in sorted(options[context], key=len)]
    per_row = sum(x[0].numel() * x.element_size() for x in (*cache.keys, *cache.values))
    size = max(1, MAX_CACHE_BYTES // per_row)
    for start in range(0, len(pairs), size):
        if poll:
            poll()
        chunk = pairs[start : start + size]
        for (row, option), score in zip(chunk, _continued(model, cache, last, chunk), strict=True):
            yield contexts[row], option, score


def _continued(
    model: GPT, cache: KVCache, last: Tensor, pairs: Sequence[tuple[int, tuple[int, ...]]]
) -> list[tuple[float, bool]]:
    """Scores of pairs (row of the cache, option). ``last`` (rows, C): the hidden state of each row's last token."""
    device = last.device
    rows = torch.tensor([row for row, _ in pairs], device=device)
    starts = last[rows]  # (pairs, C)
    longer = [i for i, (_, option) in enumerate(pairs) if len(option) > 1]
    states = list(starts.split(1))
    if longer:
        fanned = cache.fanned(rows[torch.tensor(longer, device=device)])
        inputs = [pairs[i][1][:-1] for i in longer]
        for i, more in zip(longer, _packed(model, inputs, fanned).split([len(ids) for ids in inputs]), strict=True):
            states[i] = torch.cat([starts[i : i + 1], more])
    lengths = [len(option) for _, option in pairs]
    targets = torch.tensor([token for _, option in pairs for token in option], device=device)
    found, greedy = _token_scores(model, torch.cat(states), targets)
    sums = [float(part.sum()) for part in np.split(found, np.cumsum(lengths)[:-1])]
    return list(zip(sums, [bool(part.all()) for part in np.split(greedy, np.cumsum(lengths)[:-1])]))


def _packed(model: GPT, rows: Sequence[Sequence[int]], cache: KVCache) -> Tensor:
    """Run the rows' tokens behind what the cache holds of each -> hidden states (tokens, C), row after row."""
    device = model.device
    ids = torch.tensor([[token for row in rows for token in row]], device=device)
    starts = torch.tensor([0, *itertools.accumulate(map(len, rows))], dtype=torch.int32, device=device)
    return model.hidden(ids, cu_seqlens=starts, cache=cache)[0]


def _token_scores(model: GPT, hidden: Tensor, targets: Tensor) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """log p of each target (n,) from the hidden state (n, C) before it, and whether none is likelier."""
    found, greedy = [], []
    size = max(1, MAX_LOGITS // model.config.vocab_size)
    for states, wanted in zip(hidden.split(size), targets.split(size)):
        logits = model.logits(states).float()
        chosen = logits.gather(1, wanted[:, None])[:, 0]
        found.append((chosen - logits.logsumexp(1)).cpu())
        greedy.append((logits.argmax(1) == wanted).cpu())
    return torch.cat(found).double().numpy(), torch.cat(greedy).numpy()
