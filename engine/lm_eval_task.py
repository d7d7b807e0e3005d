"""Run a task file of lm-evaluation-harness: the same requests to the model, and the same figures of the answers."""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from afina.engine import scores
from afina.engine.generate import complete
from afina.engine.intervals import Values
from afina.engine.likelihood import Pair, encode_pairs, encode_texts, pair_log_likelihoods
from afina.engine.lm_eval_file import Doc, LmEvalTask
from afina.engine.sampling import Sampling
from afina.engine.task_results import Answered, Sample, TaskResult, sample_of
from afina.errors import DataError

if TYPE_CHECKING:
    from afina.engine.model import GPT
    from afina.loaders.text.tokenizer import Tokenizer

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def run_lm_eval_task(
    model: GPT,
    tokenizer: Tokenizer,
    task: LmEvalTask,
    docs: Sequence[Doc],
    pool: Sequence[Doc] = (),
    *,
    same: bool = False,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = False,
) -> TaskResult:
    """Measure a model on a task; ``docs``, ``pool`` and ``same`` are those of ``LmEvalTask.docs``.

    Where lm-evaluation-harness cuts a context that is longer than the model reads, and counts an answer that is no
    choice as wrong, DataError names the row.
    """
    contexts, targets = task.contexts(docs, pool, same=same), [task.target(doc) for doc in docs]
    rows = [
        {"where": doc.where, "prompt": context, "prediction": "", "reference": target}
        for doc, context, target in zip(docs, contexts, targets, strict=True)
    ]
    bar = tqdm(total=len(docs), unit="row", desc=task.name, delay=1, disable=None if progress else True)
    with bar:
        if task.output_type == "generate_until":
            answered = _generate(model, tokenizer, task, rows, batch_size, bar)
        else:
            answered = _score(model, tokenizer, task, docs, rows, batch_size, bar)
    return answered.result(task.name, task.metrics[0][0], seed)


def _generate(
    model: GPT, tokenizer: Tokenizer, task: LmEvalTask, rows: list[dict[str, Any]], batch_size: int, bar: tqdm[Any]
) -> Answered:
    limit, prompts = model.config.max_positions, []
    for row in rows:
        (ids,) = encode_texts(tokenizer, [row["prompt"]])
        if len(ids) >= limit or not ids:
            raise DataError(f"{row['where']}: the context has {len(ids)} tokens; expected 1 to {limit - 1}")
        prompts.append(ids)
    order = sorted(range(len(rows)), key=lambda number: len(prompts[number]))
    sampling = Sampling(max_new_tokens=task.max_new_tokens, stop=task.until)
    done = complete(model, tokenizer, [prompts[i] for i in order], sampling, batch_size=batch_size)
    for number, completion in zip(order, done, strict=True):
        rows[number]["prediction"] = completion.text
        bar.update()
    predictions, references = ([row[key] for row in rows] for key in ("prediction", "reference"))
    samples: dict[str, Sample] = {}
    details: dict[str, Any] = {}
    for name, options in task.metrics:
        if name == "exact_match":
            folded = [[_folded(text, **options) for text in texts] for texts in (predictions, references)]
            samples[name] = sample_of([float(p == r) for p, r in zip(*folded)])
        else:
            function = scores.chrf if name == "chrf" else scores.bleu
            details.setdefault("signatures", {})[name] = function(predictions, references)[1]
            counts = scores.corpus_counts(name, predictions, references)
            samples[name] = Sample(counts, partial(scores.score_of_counts, name))
    values, statistic = samples[task.metrics[0][0]]
    own = [statistic(values[number : number + 1]) for number in range(len(rows))]
    return Answered(rows, samples, own, details=details)


def _folded(text: str, ignore_case: bool = False, ignore_punctuation: bool = False) -> str:
    text = text.lower() if ignore_case else text
    return text.translate(_PUNCTUATION) if ignore_punctuation else text


def _score(
    model: GPT,
    tokenizer: Tokenizer,
    task: LmEvalTask,
    docs: Sequence[Doc],
    rows: list[dict[str, Any]],
    batch_size: int,
    bar: tqdm[Any],
) -> Answered:
    several = task.output_type == "multiple_choice"
    choices = [task.choices(doc) if several else [row["reference"]] for doc, row in zip(docs, rows)]
    delimiter = task.target_delimiter if several else ""
    pairs: list[list[Pair]] = []
    for row, texts in zip(rows, choices):
        context, options = encode_pairs(tokenizer, row["prompt"], [delimiter + text for text in texts])
        pairs.append([(tuple(context), tuple(option)) for option in options])
    names = [row["where"] for row in rows]
    found = pair_log_likelihoods(model, pairs, batch_size=batch_size, names=names, progress=bar.update)
    totals = [[total for total, _ in row] for row in found]
    for row, texts, sums in zip(rows, choices, totals):
        row["log_likelihoods"] = sums
        if several:
            row |= {"choices": texts, "prediction": texts[int(np.argmax(sums))]}
    if not several:
        greedy = [float(row[0][1]) for row in found]
        samples = {"acc": sample_of(greedy), "perplexity": Sample(np.array(totals)[:, 0], _perplexity)}
    else:
        wanted = [texts.index(row["reference"]) for row, texts in zip(rows, choices)]
        sizes = {"acc": lambda text: 1, "acc_norm": len, "acc_bytes": lambda text: len(text.encode())}
        samples = {
            name: sample_of(
                [
                    float(int(np.argmax([total / size(text) for total, text in zip(sums, texts)])) == right)
                    for sums, texts, right in zip(totals, choices, wanted)
                ]
            )
            for name, size in sizes.items()
        }
    samples = {name: samples[name] for name, _ in task.metrics}
    values = samples[task.metrics[0][0]].values
    return Answered(rows, samples, values.tolist())


def _perplexity(values: Values) -> float:
    return math.exp(min(-float(values.mean()), 700.0))
