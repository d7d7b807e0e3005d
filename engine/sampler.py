"""How a row's next token is chosen from its logits.

In this order: logit bias; repetition penalty (prompt and text, as in transformers); frequency and presence penalty (the
text alone, as OpenAI's API defines them); temperature, top-k, top-p and min-p with transformers' semantics. Each row
draws its own random numbers, so what is chosen does not depend on the rows beside it.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from afina.engine.sampling import Sampling

NUCLEUS = 256  # tokens that nearly always reach top-p: to find them takes a tenth of sorting a large vocabulary
TOGETHER = 1 << 16  # logits of rows that are chosen from at once; more of them leave the cache, and take longer


class TokenLogprob(NamedTuple):
    """How likely a token was: of the model's own distribution, before bias, penalties, temperature and filters."""

    token: int
    logprob: float | None  # nats; None for the first token of a prompt, which nothing predicts
    top: list[tuple[int, float]]  # the likeliest tokens and their log-probabilities, likeliest first
    offset: int  # where the token begins in the text


def filtered(logits: Tensor, seen: Tensor | None, sampling: Sampling, counts: Tensor | None = None) -> Tensor:
    """Logits (B, V) float32 -> the same, biased, penalised, tempered, and -inf where a token may not be chosen.

    ``seen`` (B, V) marks the tokens of the prompt and of the text so far, ``counts`` (B, V) says how often the text has
    each. Greedy: only bias and penalties apply.
    """
    if sampling.logit_bias:
        tokens = torch.tensor(list(sampling.logit_bias), device=logits.device)
        numbers = torch.tensor(list(sampling.logit_bias.values()), device=logits.device)
        logits = logits.index_add(1, tokens, numbers.expand(len(logits), -1))
    if seen is not None:
        penalty = sampling.repetition_penalty
        logits = torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)
    if counts is not None:
        logits = logits - sampling.frequency_penalty * counts - sampling.presence_penalty * (counts > 0)
    if sampling.temperature == 0:
        return logits
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        lowest = torch.topk(logits, sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < lowest, -math.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        logits = logits.masked_fill(~_nucleus(logits.softmax(-1), sampling.top_p, NUCLEUS), -math.inf)
    if sampling.min_p is not None:
        probabilities = logits.softmax(-1)
        low = probabilities < sampling.min_p * probabilities.amax(-1, keepdim=True)
        logits = logits.masked_fill(low, -math.inf)
    return logits


def _nucleus(probabilities: Tensor, top_p: float, most: int) -> Tensor:
    """The likeliest tokens of each row (B, V) that sum to ``top_p``, the one that reaches it included: bool (B, V).
    They are looked for among the ``most`` likeliest, and of rows where these do not reach it among all."""
    likeliest, tokens = torch.topk(probabilities, min(most, probabilities.shape[-1]))
    wide = likeliest.double()
    before = wide.cumsum(-1) - wide
    kept = torch.zeros_like(probabilities, dtype=torch.bool).scatter_(1, tokens, before < top_p)
    if likeliest.shape[-1] < probabilities.shape[-1]:
        for row in ((before + wide)[:, -1] < top_p).nonzero()[:, 0].tolist():
            kept[row] = _nucleus(probabilities[row : row + 1], top_p, probabilities.shape[-1])[0]
    return kept


def next_tokens(
    logits: Tensor,
    seen: Tensor | None,
    sampling: Sampling,
    generators: Sequence[torch.Generator],
    counts: Tensor | None = None,
) -> Tensor:
    """Logits (B, V) -> one token a row, int64 (B,): the likeliest, or drawn with the row's own generator."""
    logits = filtered(logits, seen, sampling, counts)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    # Inverse of the cumulative distribution in float64: one random number a row, the same on every device.
    cumulative = logits.double().softmax(-1).cumsum(-1)
    draws = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in generators]).to(logits.device)
    chosen = torch.searchsorted(cumulative, draws[:, None] * cumulative[:, -1:], right=True)[:, 0]
    return chosen.clamp(max=logits.shape[-1] - 1)


class Chooser:
    """Chooses the tokens of one row, and remembers what its settings need: its random numbers, the tokens it had."""

    def __init__(self, prompt: Sequence[int], sampling: Sampling, vocab: int, device: torch.device) -> None:
        self.sampling = sampling
        self.generator = seeded(sampling.seed, prompt)
        self.seen: Tensor | None = None
        self.counts: Tensor | None = None
        if sampling.repetition_penalty != 1.0:
            self.seen = torch.zeros(1, vocab, dtype=torch.bool, device=device)
            self.seen[0, torch.tensor(list(prompt), device=device)] = True
        if sampling.frequency_penalty or sampling.presence_penalty:
            self.counts = torch.zeros(1, vocab, device=device)
        own = self.seen is not None or self.counts is not None or bool(sampling.logit_bias)
        self.plain = sampling.temperature == 0 and not own
        # Equal for rows whose tokens one call chooses; None where it depends on the row's tokens.
        shape = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
        self.alike = None if own else shape

    def choose(self, logits: Tensor) -> int:
        """The next token, from logits (1, V) in any dtype."""
        chosen = next_tokens(logits.float(), self.seen, self.sampling, [self.generator], self.counts)
        token = int(chosen)
        if self.seen is not None:
            self.seen[0, token] = True
        if self.counts is not None:
            self.counts[0, token] += 1
        return token


def choose_together(choosers: Sequence[Chooser], logits: Tensor) -> dict[int, int]:
    """The tokens that ``choose`` would give for rows of logits (B, V), by row, of those rows that one call can choose
    for with another; each of the others is left to its chooser."""
    alike = defaultdict[object, list[int]](list)
    for row, chooser in enumerate(choosers):
        if chooser.alike is not None:
            alike[chooser.alike].append(row)
    tokens: dict[int, int] = {}
    step = TOGETHER // logits.shape[-1]
    for rows in alike.values() if step > 1 else ():
        for part in (rows[first : first + step] for first in range(0, len(rows), step)):
            if len(part) > 1:
                own = logits if len(part) == len(logits) else logits[part]
                generators = [choosers[row].generator for row in part]
                found = next_tokens(own.float(), None, choosers[part[0]].sampling, generators)
                tokens.update(zip(part, found.tolist(), strict=True))
    return tokens


def logprobs_of(logits: Tensor, tokens: Sequence[int], top: int) -> list[tuple[float, list[tuple[int, float]]]]:
    """Of logits (n, V), row by row: the token's log-probability, and the ``top`` likeliest tokens with theirs."""
    found = []
    for row, token in zip(logits, tokens, strict=True):  # A row of its own shape: its sum has one order.
        every = torch.log_softmax(row.float(), -1)
        best = torch.topk(every, min(top, len(every))) if top else None
        likeliest = [] if best is None else list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        found.append((float(every[token]), likeliest))
    return found


def seeded(seed: int, ids: Sequence[int]) -> torch.Generator:
    """The random numbers of a prompt: they follow from the seed and its tokens."""
    digest = hashlib.blake2b(repr((seed, list(ids))).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
