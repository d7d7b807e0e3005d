"""Text from a model: prompts are prefilled packed, then all rows decode together, one token a step from a KV cache.

Sampling has transformers' semantics and order: repetition penalty, temperature, top-k, top-p, min-p. Each row draws
its own random numbers, seeded by ``seed`` and its prompt, so its text does not depend on the rows beside it.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from afina.engine.kv_cache import KVCache
from afina.engine.sampling import Sampling
from afina.errors import DataError
from afina.loaders.text.render import Example, render_prompt
from afina.loaders.text.turns import Tools

if TYPE_CHECKING:
    from afina.engine.model import GPT
    from afina.loaders.text.tokenizer import Tokenizer

Prompt = str | Sequence[Mapping[str, Any]] | Example  # continued as it is; chat messages to answer; a row of data
REPLACEMENT = "\ufffd"  # what decoding puts for bytes that are no character (yet)


class Completion(NamedTuple):
    """What a model wrote, and how many tokens it took."""

    text: str
    tokens: int


def generate(model: GPT, tokenizer: Tokenizer, prompt: Prompt, *, tools: Tools | None = None, **sampling: Any) -> str:
    """Return the model's continuation of a text, or its answer to chat messages; keywords are those of ``Sampling``.

    ``tools``: the functions that the model may call in its answer to messages, as JSON schemas. Raises ConfigError for
    a wrong keyword value, DataError for a prompt that is empty or longer than the context.
    """
    return generate_batch(model, tokenizer, [prompt], tools=tools, **sampling)[0]


def generate_batch(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    tools: Tools | None = None,
    batch_size: int = 32,
    **sampling: Any,
) -> list[str]:
    """``generate`` for many prompts, ``batch_size`` at a time; the texts are in the order of the prompts."""
    names = ["the prompt"] if len(prompts) == 1 else [f"prompt {i + 1}" for i in range(len(prompts))]
    rows = [
        encode_prompt(model, tokenizer, prompt, tools=tools, where=name)
        for prompt, name in zip(prompts, names, strict=True)
    ]
    done = complete(model, tokenizer, rows, Sampling(**sampling), batch_size=batch_size)
    return [completion.text for completion in done]


def complete(
    model: GPT, tokenizer: Tokenizer, prompts: Sequence[list[int]], sampling: Sampling, *, batch_size: int = 32
) -> Iterator[Completion]:
    """The completions of encoded prompts, in order, as each batch is done."""
    for first in range(0, len(prompts), batch_size):
        batch = Decoding(model, tokenizer, prompts[first : first + batch_size], sampling)
        while batch.alive:
            batch.step()
        for row, new in enumerate(batch.new):
            yield Completion(batch.text(row, final=True), len(new))


def stream(
    model: GPT, tokenizer: Tokenizer, prompt: Prompt, *, tools: Tools | None = None, **sampling: Any
) -> Iterator[str]:
    """``generate`` in pieces as they become certain: no half character, and no part of a stop string."""
    batch = Decoding(model, tokenizer, [encode_prompt(model, tokenizer, prompt, tools=tools)], Sampling(**sampling))
    sent = ""
    while batch.alive:
        batch.step()
        text = batch.text(0, final=not batch.alive)
        if len(text) > len(sent) and text.startswith(sent):
            yield text[len(sent) :]
            sent = text


def encode_prompt(
    model: GPT, tokenizer: Tokenizer, prompt: Prompt, *, tools: Tools | None = None, where: str = "the prompt"
) -> list[int]:
    """The token ids of a prompt as training rendered it; DataError when it is empty or fills the model's context."""
    ids = list(tokenizer.encode(render_prompt(tokenizer, prompt, tools=tools), add_special=False))
    limit = model.config.max_positions
    if not ids:
        raise DataError(f"{where} is empty; expected at least one token to continue")
    if len(ids) >= limit:
        raise DataError(f"{where} has {len(ids)} tokens and the model reads {limit} at most: shorten it")
    return ids


class Decoding:
    """A batch of prompts being continued. ``step`` adds one token to every row in ``alive``; ``new`` holds them."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, prompts: Sequence[list[int]], sampling: Sampling) -> None:
        self.model, self.tokenizer, self.prompts, self.sampling = model, tokenizer, prompts, sampling
        self.new: list[list[int]] = [[] for _ in prompts]
        self.alive = list(range(len(prompts)))
        # A stop string may be a control token, which the text does not show.
        self.ends = {*tokenizer.eos_ids, *(tokenizer.token_id(s) for s in sampling.stop)}
        self.device = model.embed.weight.device
        room = model.config.max_positions
        self.limits = [min(sampling.max_new_tokens, room - len(ids)) for ids in prompts]
        # A stop string of n bytes lies within the last n tokens; a few more keep the window's first character whole.
        self.window = max((len(s.encode()) for s in sampling.stop), default=0) + 4
        self.generators = [_generator(sampling.seed, ids) for ids in prompts]
        self.seen: Tensor | None = None
        if sampling.repetition_penalty != 1.0:
            self.seen = torch.zeros(len(prompts), model.config.vocab_size, dtype=torch.bool, device=self.device)
            for row, ids in enumerate(prompts):
                self.seen[row, torch.tensor(ids, device=self.device)] = True
        longest = max(len(ids) + limit for ids, limit in zip(prompts, self.limits, strict=True))
        self.cache = KVCache(model.config, len(prompts), longest, self.device, model.embed.weight.dtype)

    @torch.no_grad()
    def step(self) -> None:
        """Choose the next token of every row that is alive, and retire the rows that it ends."""
        logits = self._decode() if self.cache.longest else self._prefill()
        chosen = next_tokens(logits.float(), self.seen, self.sampling, [self.generators[row] for row in self.alive])
        if self.seen is not None:
            self.seen.scatter_(1, chosen[:, None].to(self.device), True)
        kept = []
        for i, (row, token) in enumerate(zip(self.alive, chosen.tolist(), strict=True)):
            if token in self.ends:
                continue
            self.new[row].append(token)
            if len(self.new[row]) < self.limits[row] and not self._stopped(row):
                kept.append(i)
        if 0 < len(kept) < len(self.alive):
            rows = torch.tensor(kept, device=self.device)
            self.cache.keep(rows)
            self.seen = self.seen[rows] if self.seen is not None else None
        self.alive = [self.alive[i] for i in kept]

    def _prefill(self) -> Tensor:
        """All prompts packed into one row of tokens -> the logits (B, V) after each prompt's last token."""
        packed = torch.tensor([[token for ids in self.prompts for token in ids]], device=self.device)
        starts = [0, *itertools.accumulate(len(ids) for ids in self.prompts)]
        cu_seqlens = torch.tensor(starts, dtype=torch.int32, device=self.device)
        last = cu_seqlens[1:].long() - 1
        return self.model.logits(self.model.hidden(packed, cu_seqlens=cu_seqlens, cache=self.cache, positions=last))

    def _decode(self) -> Tensor:
        last = torch.tensor([[self.new[row][-1]] for row in self.alive], device=self.device)
        return self.model(last, cache=self.cache)[:, 0]

    def _stopped(self, row: int) -> bool:
        stop = self.sampling.stop
        if not stop:
            return False
        tail = self.tokenizer.decode(self.new[row][-self.window :], skip_special=True)
        return any(s in tail for s in stop) and _first_stop(self._decoded(row), self.sampling.stop) is not None

    def _decoded(self, row: int) -> str:
        """The row's new tokens as text; decoded behind the prompt's end, as some tokenizers strip a first space."""
        before = self.prompts[row][-4:]
        start = self.tokenizer.decode(before, skip_special=True)
        text = self.tokenizer.decode(before + self.new[row], skip_special=True)
        return text[len(start) :] if text.startswith(start) else self.tokenizer.decode(self.new[row], skip_special=True)

    def text(self, row: int, *, final: bool) -> str:
        """What row ``row`` says: up to the first stop string, whole characters only.

        Unless ``final``, an ending that could become a stop string is kept back.
        """
        text = self._decoded(row)
        cut = _first_stop(text, self.sampling.stop)
        if cut is not None:
            return text[:cut]
        text = text.rstrip(REPLACEMENT)
        if not final:
            held = (n for s in self.sampling.stop for n in range(len(s) - 1, 0, -1) if text.endswith(s[:n]))
            text = text[: len(text) - max(held, default=0)]
        return text


def filtered(logits: Tensor, seen: Tensor | None, sampling: Sampling) -> Tensor:
    """Logits (B, V) float32 -> the same, penalised, tempered, and -inf where a token may not be chosen.

    ``seen`` (B, V) marks the tokens of the prompt and of the text so far. Greedy: only the penalty applies.
    """
    if seen is not None:
        penalty = sampling.repetition_penalty
        logits = torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)
    if sampling.temperature == 0:
        return logits
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        lowest = torch.topk(logits, sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < lowest, -math.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        ascending, order = torch.sort(logits)
        dropped = ascending.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        dropped[:, -1] = False
        logits = logits.masked_fill(dropped.scatter(1, order, dropped), -math.inf)
    if sampling.min_p is not None:
        probabilities = logits.softmax(-1)
        low = probabilities < sampling.min_p * probabilities.amax(-1, keepdim=True)
        logits = logits.masked_fill(low, -math.inf)
    return logits


def next_tokens(
    logits: Tensor, seen: Tensor | None, sampling: Sampling, generators: Sequence[torch.Generator]
) -> Tensor:
    """Logits (B, V) -> one token a row, int64 (B,): the likeliest, or drawn with the row's own generator."""
    logits = filtered(logits, seen, sampling)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    # Inverse of the cumulative distribution in float64: one random number a row, the same on every device.
    cumulative = logits.double().softmax(-1).cumsum(-1)
    draws = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in generators]).to(logits.device)
    chosen = torch.searchsorted(cumulative, draws[:, None] * cumulative[:, -1:], right=True)[:, 0]
    return chosen.clamp(max=logits.shape[-1] - 1)


def _generator(seed: int, ids: list[int]) -> torch.Generator:
    digest = hashlib.blake2b(repr((seed, ids)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def _first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the earliest stop string begins in ``text``, or None."""
    return min((at for s in stop if (at := text.find(s)) >= 0), default=None)
