"""Whether two models compute the same: logits on rows that the run held out, as one number and as choices that change.

The rows are the run's own dev rows, found again by its recipe; or those of a file; or random tokens where there are
none, which show a broken matrix just as well but say nothing about how much of an answer changes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from afina.engine.lora import set_adapter
from afina.engine.model import GPT
from afina.engine.run_folder import RECIPE, RUN
from afina.engine.run_inputs import read_data
from afina.engine.train_config import TrainConfig
from afina.errors import AfinaError
from afina.inside import own_path
from afina.loaders.data.dataset import TokenSet, prepare
from afina.loaders.text.render import Example, render_example, render_prompt
from afina.loaders.text.tokenizer import Tokenizer

ROWS, TEXTS = 8, 64
TOKENS = 2048  # of all rows: on a CPU a model of a billion weights reads them in a minute
KEPT = 1 << 26  # logits that are held to be compared: 0.25 GB
MAX_LENGTH = 1024  # of rows of a file: what training does when nothing is said
# Where there are no rows: words, numbers, spaces, other scripts.
SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "In 2024, 3.14 of 1,000 people didn't pay $5 -- why?",
    "def f(x):\n    return [x ** 2 for _ in range(10)]  # twice\n",
    "Grüße aus Köln; 日本語のテキスト; русский текст; العربية 😀",
)


class Rows(NamedTuple):
    """``ids``: int64 (T,) each; ``texts``: what a vocabulary is compared on; ``where``: they come from, in words;
    ``examples``: the rows of the texts."""

    ids: list[Tensor]
    texts: list[str]
    where: str
    examples: Sequence[Example] = ()


@dataclass(frozen=True)
class Likeness:
    """``error``: the largest difference of two logits as a share of the largest logit; ``same``: the share of tokens
    after which the most likely next one is the same."""

    error: float
    same: float


def held_out(folder: Path, tokenizer: Tokenizer, data: str | None, longest: int) -> Rows:
    """Up to ``ROWS`` rows of ``data`` or, where that is None, of the dev rows of the run that ``folder`` is the best
    model of, cut to ``longest`` tokens each and ``TOKENS`` in all. Without either, or where the run's data is gone, 64
    random tokens.

    Raises DataError for what is wrong with ``data``.
    """
    if data is not None:
        length = min(longest, MAX_LENGTH)
        rows = prepare(data, tokenizer, max_length=length, on_long="truncate", val_size=0.0, progress=False).train
        return _rows(rows, tokenizer, f"rows of {data}", longest)
    run = folder.parent
    missing = "no run folder, so no dev rows"
    if folder.name == "best" and (run / RUN).is_file():
        try:
            dev = read_data(TrainConfig.resolve(own_path(run / RECIPE)), tokenizer, progress=False).dev
        except AfinaError as problem:
            missing = f"the run's dev rows cannot be read ({problem}); --data FILE names others"
        else:
            if len(dev):
                return _rows(dev, tokenizer, "the run's dev rows", longest)
            missing = "the run has no dev rows"
    ids = torch.randint(0, tokenizer.vocab_size, (min(64, longest),), generator=torch.Generator().manual_seed(0))
    return Rows([ids], list(SENTENCES), f"random tokens: {missing}")


def _rows(rows: TokenSet, tokenizer: Tokenizer, where: str, longest: int) -> Rows:
    count = min(ROWS, len(rows))
    chosen = [i * len(rows) // count for i in range(count)]  # spread over the set, which may be sorted
    texts, examples = [], []
    for row in itertools.islice(rows.source_rows(), TEXTS):
        examples.append(row.example)
        texts += [render_prompt(tokenizer, row.example), render_example(tokenizer, row.example).text]
    longest = min(longest, TOKENS // count)
    return Rows([torch.from_numpy(rows.row(i)[0]).long()[:longest] for i in chosen], texts, where, examples)


@torch.no_grad()
def logits(model: GPT, rows: Rows) -> Tensor:
    """Logits (n, V) fp32 at all tokens of all rows; of long rows and large vocabularies, at evenly spread ones."""
    total = sum(map(len, rows.ids))
    step = -(-total * model.config.vocab_size // KEPT)
    found, offset = [], 0
    for ids in rows.ids:
        at = torch.arange(len(ids))[-offset % step :: step]
        offset += len(ids)
        if len(at):
            found.append(model.logits(model.hidden(ids[None], positions=at)).float())
    return torch.cat(found)


def without_adapter(model: GPT, rows: Rows) -> Tensor:
    """The logits of the base alone."""
    adapter = model.adapter
    set_adapter(model, None)
    try:
        return logits(model, rows)
    finally:
        set_adapter(model, adapter)


def compare(found: Tensor, expected: Tensor) -> Likeness:
    error = float((found - expected).abs().max() / expected.abs().max())
    return Likeness(error, float((found.argmax(1) == expected.argmax(1)).double().mean()))
