"""How good a model is on rows it has not learnt: loss, perplexity, bits per byte, and metrics of a task."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from afina.engine.generate import complete, encode_prompt
from afina.engine.objectives import Objective, sft
from afina.engine.sampling import Sampling
from afina.errors import DataError
from afina.loaders.data.batches import eval_batches
from afina.loaders.text.render import Example

if TYPE_CHECKING:
    from afina.engine.model import GPT
    from afina.loaders.data.dataset import TokenSet
    from afina.loaders.text.tokenizer import Tokenizer

TASKS = ("auto", "loss", "exact_match", "classification")


@torch.no_grad()
def evaluate_loss(
    model: GPT,
    token_set: TokenSet,
    *,
    batch_size: int = 8,
    packing: bool = True,
    objective: Objective = sft,
    text_bytes: int | None = None,
    poll: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Mean of the objective's loss (nats per loss token) over all rows, with ``tokens``, ``perplexity`` and, given the
    UTF-8 size of what is predicted, ``bits_per_byte``.

    Each token weighs the same whatever batch it falls in. Logits are never kept, no random number is drawn, gradients
    and the model's train or eval mode stay as they were. ``poll`` is called before each batch and may raise to stop.
    """
    was_training = model.training
    model.eval()
    total, tokens = 0.0, 0
    try:
        for batch in eval_batches(token_set, batch_size=batch_size, packing=packing):
            if poll:
                poll()
            losses, count = objective(model, batch)
            total += losses.item()
            tokens += count
    finally:
        model.train(was_training)
    loss = total / tokens
    result = {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": tokens}
    if text_bytes:
        result["bits_per_byte"] = total / math.log(2) / text_bytes
    return result


def loss_text_bytes(token_set: TokenSet, tokenizer: Tokenizer) -> int:
    """UTF-8 bytes of the text that is predicted, control tokens aside: what the loss is spread over in bits per byte,
    a measure that does not depend on the tokenizer."""
    rows = (token_set.row(number) for number in range(len(token_set)))
    return sum(len(tokenizer.decode(ids[loss_mask], skip_special=True).encode()) for ids, loss_mask in rows)


def evaluate_task(
    model: GPT,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    task: str,
    *,
    batch_size: int = 32,
    ignore_case: bool = False,
    max_new_tokens: int | None = None,
) -> dict[str, Any]:
    """Metrics of greedy answers to the examples' prompts against the examples' own answers; ``answered`` counts them.

    ``task``: "exact_match" or "classification". ``max_new_tokens`` defaults to a few more than the longest answer has.
    Raises DataError when there is no answer to compare with, or a prompt fills the model's context.
    """
    references = [answer_of(example) for example in examples]
    if None in references:
        where = examples[references.index(None)].where
        raise DataError(f"{where}: has no answer to compare with; task {task} needs one in every row")
    longest = max(len(ids) for ids in tokenizer.encode_batch([str(text) for text in references], add_special=False))
    prompts = [encode_prompt(model, tokenizer, example, where=example.where) for example in examples]
    sampling = Sampling(max_new_tokens=max_new_tokens or longest + 8)
    answers = [done.text for done in complete(model, tokenizer, prompts, sampling, batch_size=batch_size)]
    wanted = [str(text) for text in references]
    if task == "classification":
        return {**classification(answers, wanted, ignore_case=ignore_case), "answered": len(answers)}
    return {"exact_match": exact_match(answers, wanted, ignore_case=ignore_case), "answered": len(answers)}


def answer_of(example: Example) -> str | None:
    """What a row says should be answered: its completion, or the assistant's last turn; None where it says nothing."""
    if example.messages is not None:
        last = example.messages[-1]
        return str(last["content"]) if last["role"] == "assistant" else None
    return example.completion or None


def exact_match(predictions: Sequence[str], references: Sequence[str], *, ignore_case: bool = False) -> float:
    """Share of predictions equal to their reference, surrounding whitespace aside."""
    pairs = zip(_plain(predictions, ignore_case), _plain(references, ignore_case), strict=True)
    return sum(p == r for p, r in pairs) / len(references)


def classification(
    predictions: Sequence[str], references: Sequence[str], *, ignore_case: bool = False
) -> dict[str, Any]:
    """Accuracy, and macro-F1: the plain mean of F1 over the labels that the references hold.

    A prediction that is no such label counts as wrong (and is counted in ``unknown``); it belongs to no label's F1 as a
    false positive.
    """
    predicted, wanted = _plain(predictions, ignore_case), _plain(references, ignore_case)
    support, guesses = Counter(wanted), Counter(predicted)
    right = Counter(w for p, w in zip(predicted, wanted, strict=True) if p == w)
    f1 = [2 * right[label] / (support[label] + guesses[label]) for label in support]
    return {
        "accuracy": sum(right.values()) / len(wanted),
        "macro_f1": sum(f1) / len(f1),
        "labels": len(support),
        "unknown": sum(count for label, count in guesses.items() if label not in support),
    }


def _plain(texts: Sequence[str], ignore_case: bool) -> list[str]:
    return [text.strip().casefold() if ignore_case else text.strip() for text in texts]
