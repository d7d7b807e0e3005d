"""Tasks: a model's answers to rows, measured, with intervals, and compared with another model's.

=============  ====================================================================================================
`generate`     greedy answers against the rows' own: exact match, token F1, ROUGE-L, chrF and BLEU
`translate`    the same, by chrF
`classify`     the likeliest of some options: accuracy, macro-F1, confusion matrix, calibration
`retrieve`     the rows' candidates ranked by likelihood: MRR@10, recall@k, nDCG@10
`chat`         conversations: the loss of each assistant turn, and the last turn as in `generate`
`loss`         how likely the model holds the rows' answers (or texts)
=============  ====================================================================================================

`exact_match` and `classification` are the generated answers with these figures alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from afina.engine import scores
from afina.engine.evaluate import evaluate_loss, loss_text_bytes
from afina.engine.generate import complete, encode_prompt
from afina.engine.intervals import ratio
from afina.engine.likelihood import pair_log_likelihoods, row_losses
from afina.engine.questions import (
    SHOT_END,
    answer_of,
    answers_of,
    candidates_of,
    name_of,
    option_pairs,
    options_of,
    prompt_of,
    with_shots,
)
from afina.engine.sampling import Sampling
from afina.engine.task_results import MAIN, Answered, Comparison, Sample, TaskResult, compare, f1_sample, sample_of
from afina.errors import ConfigError, DataError, nearest
from afina.loaders.data.batches import EncodedRows
from afina.loaders.text.encode import encode_rendered
from afina.loaders.text.render import Example, render_example

if TYPE_CHECKING:
    from afina.engine.model import GPT
    from afina.loaders.text.tokenizer import Tokenizer

ALIASES = ("exact_match", "classification")
TASKS = ("auto", "loss", "generate", "classify", "translate", "retrieve", "chat", *ALIASES)
MAX_LABELS, LABEL_LENGTH, LABEL_ROWS = 200, 60, 3  # what answers must be like to be taken for labels
SPARE_TOKENS = 8  # an answer may be so much longer than the longest reference: room to be wrong
Poll = Callable[[], object]
__all__ = ["TASKS", "Comparison", "TaskResult", "compare", "guess_task", "run_task"]


def guess_task(schema: str, examples: Sequence[Example]) -> tuple[str, str]:
    """The task that rows are probably meant for, and why. ``schema``: as `read_rows` calls it, "" where unknown."""
    if not examples or all(example.text is not None for example in examples):
        return "loss", "the rows are texts without answers"
    if all(example.candidates is not None for example in examples):
        return "retrieve", "every row brings candidates"
    if schema == "text/label":
        return "classify", "the rows are texts with labels"
    answers = [answer_of(example) for example in examples]
    if None in answers:
        return "loss", f"{name_of(examples[answers.index(None)])} has no answer to compare with"
    labels = {str(answer).strip() for answer in answers}
    few = 2 <= len(labels) <= MAX_LABELS and len(answers) >= LABEL_ROWS * len(labels)
    if few and max(map(len, labels)) <= LABEL_LENGTH:
        return "classify", f"{len(answers):,} rows share {len(labels)} short answers"
    if all(example.messages is not None for example in examples):
        turns = max(sum(m["role"] == "assistant" for m in example.messages or ()) for example in examples)
        if turns > 1:
            return "chat", f"the rows are conversations of up to {turns} answers"
    return "generate", "every row has a prompt and an answer of its own"


def run_task(
    model: GPT,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    task: str,
    *,
    options: Sequence[str] | None = None,
    few_shot: Sequence[Example] = (),
    batch_size: int = 32,
    max_new_tokens: int | None = None,
    ignore_case: bool = False,
    seed: int = 0,
    intervals: bool = True,
    progress: bool = False,
    poll: Poll | None = None,
) -> TaskResult:
    """Measure a model on rows.

    ``options``: what to choose from (classify; default: each row's candidates, or the rows' own answers).
    ``few_shot``: solved rows that stand before each prompt. ``max_new_tokens``: of an answer (default: a few more than
    the longest reference has). ``seed``: of the intervals, which take some time and can be left out. ``poll`` is called
    between batches and may raise to stop. The model's mode, gradients and the global random numbers stay as they were.

    Raises ConfigError for an unknown task or a metric whose package is missing, DataError naming a row that does not
    fit: without an answer, with one that is not among its options, longer than the model reads.
    """
    if task == "auto":
        task, _ = guess_task("", examples)
    if task not in MAIN:
        raise ConfigError(f"task is {task!r}; expected {', '.join(TASKS)}{nearest(task, TASKS)}")
    if not examples:
        raise DataError(f"no row to measure task {task} on")
    run = _Run(model, tokenizer, examples, task, few_shot, batch_size, max_new_tokens, ignore_case, progress, poll)
    if task == "loss":
        answered = run.loss()
    elif task == "classify":
        answered = run.classify(options)
    elif task == "retrieve":
        answered = run.retrieve()
    else:
        answered = run.generate()
    return answered.result(task, MAIN[task], seed if intervals else None)


@dataclass
class _Run:
    """A model before some rows: each method asks them as one kind of task does."""

    model: GPT
    tokenizer: Tokenizer
    examples: Sequence[Example]
    task: str
    few_shot: Sequence[Example]
    batch_size: int
    max_new_tokens: int | None
    ignore_case: bool
    progress: bool
    poll: Poll | None

    def bar(self, total: int) -> tqdm[Any]:
        return tqdm(total=total, unit="row", desc=self.task, delay=1, disable=None if self.progress else True)

    def row(self, example: Example, prediction: str, reference: str) -> dict[str, Any]:
        return {
            "where": example.where,
            "prompt": prompt_of(example),
            "prediction": prediction,
            "reference": reference,
        }

    def written(self, references: Sequence[str]) -> list[str]:
        """The model's greedy answers, in the order of the rows; rows of like length go together."""
        tokenizer, asked = self.tokenizer, [with_shots(example, self.few_shot) for example in self.examples]
        prompts = [encode_prompt(self.model, tokenizer, row, where=name_of(row)) for row in asked]
        longest = max(len(ids) for ids in tokenizer.encode_batch(list(references), add_special=False))
        # A model that goes on with another example has ended its answer.
        text = bool(self.few_shot) and self.examples[0].messages is None
        stop = (SHOT_END,) if text and not any(SHOT_END in answer.strip() for answer in references) else ()
        sampling = Sampling(max_new_tokens=self.max_new_tokens or longest + SPARE_TOKENS, stop=stop)
        order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
        answers = [""] * len(prompts)
        was_training = self.model.training
        self.model.eval()
        try:
            with self.bar(len(prompts)) as bar:
                done = complete(
                    self.model, tokenizer, [prompts[i] for i in order], sampling, batch_size=self.batch_size
                )
                for count, (number, completion) in enumerate(zip(order, done, strict=True)):
                    if self.poll and count % self.batch_size == 0:
                        self.poll()
                    answers[number] = completion.text
                    bar.update()
        finally:
            self.model.train(was_training)
        return answers

    def generate(self) -> Answered:
        references = answers_of(self.examples, self.task)
        if self.task == "translate":
            scores.chrf([""], [""])  # says what is missing before the model has worked
        if self.task == "chat" and (other := next((e for e in self.examples if e.messages is None), None)):
            raise DataError(f"{name_of(other)}: is no conversation, which task chat needs: use task generate")
        answers = self.written(references)
        rows = [self.row(e, p, r) for e, p, r in zip(self.examples, answers, references, strict=True)]
        count: dict[str, float] = {"answered": len(answers)}
        if self.task == "classification":
            return self.labelled(rows, count)
        match = [scores.exact_match(p, r, ignore_case=self.ignore_case) for p, r in zip(answers, references)]
        if self.task == "exact_match":
            return Answered(rows, {"exact_match": sample_of(match)}, match, count)
        rouge = [scores.rouge_l(p, r) for p, r in zip(answers, references)]
        samples = {
            "exact_match": sample_of(match),
            "token_f1": sample_of([scores.token_f1(p, r) for p, r in zip(answers, references)]),
            "rouge_l": sample_of(rouge),
        }
        details: dict[str, Any] = {}
        own = rouge
        if scores.has_sacrebleu():
            plain = [[text.strip() for text in texts] for texts in (answers, references)]
            for name, function in (("chrf", scores.chrf), ("bleu", scores.bleu)):
                samples[name] = Sample(scores.corpus_counts(name, *plain), partial(scores.score_of_counts, name))
                details.setdefault("signatures", {})[name] = function(*plain)[1]
            if self.task == "translate":
                own = scores.sentence_scores("chrf", *plain)
        else:
            details["left_out"] = "chrF and BLEU need sacrebleu: pip install 'afina[eval]'"
        result = Answered(rows, samples, own, count, details)
        if self.task == "chat":
            self.add_turns(result)
        return result

    def labelled(self, rows: list[dict[str, Any]], count: dict[str, Any]) -> Answered:
        """Generated answers taken as labels."""
        predicted, wanted = (
            [scores.plain(row[key], self.ignore_case) for row in rows] for key in ("prediction", "reference")
        )
        found = scores.classification(predicted, wanted)
        right = [float(p == w) for p, w in zip(predicted, wanted)]
        samples = {"accuracy": sample_of(right), "macro_f1": f1_sample(predicted, wanted)}
        metrics = {name: found[name] for name in ("labels", "unknown")} | count
        return Answered(rows, samples, right, metrics, {"confusion": found["confusion"]})

    def likelihoods(self, answers: Sequence[str], options: Sequence[Sequence[str]]) -> list[list[float]]:
        """The log-likelihood (nats) of each option of each row."""
        asked = [with_shots(example, self.few_shot) for example in self.examples]
        pairs = [
            option_pairs(self.tokenizer, row, answer, texts)
            for row, answer, texts in zip(asked, answers, options, strict=True)
        ]
        with self.bar(len(asked)) as bar:
            found = pair_log_likelihoods(
                self.model,
                pairs,
                batch_size=self.batch_size,
                names=[name_of(row) for row in asked],
                progress=bar.update,
                poll=self.poll,
            )
        return [[score for score, _ in row] for row in found]

    def classify(self, given: Sequence[str] | None) -> Answered:
        references = answers_of(self.examples, self.task)
        options = options_of(self.examples, references, given)
        likelihoods = self.likelihoods(references, options)
        wanted = [reference.strip() for reference in references]
        rows, sure = [], []
        for example, texts, found, label in zip(self.examples, options, likelihoods, wanted):
            best = int(np.argmax(found))
            probability = 1.0 / float(np.exp(np.array(found) - found[best]).sum())
            sure.append(probability)
            row = self.row(example, texts[best], label)
            rows.append(row | {"probability": probability, "log_likelihoods": dict(zip(texts, found))})
        predicted = [row["prediction"] for row in rows]
        right = [float(p == w) for p, w in zip(predicted, wanted)]
        figures = scores.classification(predicted, wanted, sorted({text for texts in options for text in texts}))
        samples = {
            "accuracy": sample_of(right),
            "macro_f1": f1_sample(predicted, wanted),
            "ece": Sample(np.array([sure, right]).T, scores.calibration_error),
        }
        details = {
            "confusion": figures["confusion"],
            "calibration": scores.calibration(sure, right),
            "options": max(map(len, options)),
        }
        return Answered(rows, samples, right, {"labels": figures["labels"]}, details)

    def retrieve(self) -> Answered:
        references = answers_of(self.examples, self.task)
        candidates = candidates_of(self.examples, references)
        likelihoods = self.likelihoods(references, candidates)
        rows, ranks = [], []
        for example, texts, found, reference in zip(self.examples, candidates, likelihoods, references):
            own = found[texts.index(reference.strip())]
            # What is as likely as the right one comes before it: no rank is won by a tie.
            rank = sum(score >= own for score in found)
            ranks.append(rank)
            row = self.row(example, texts[int(np.argmax(found))], reference.strip())
            rows.append(row | {"rank": rank, "candidates": texts, "log_likelihoods": found})
        figures = scores.ranking(ranks, [len(texts) for texts in candidates])
        gains = [scores.reciprocal_rank(rank) for rank in ranks]
        samples = {"mrr@10": sample_of(gains)}
        samples |= {f"recall@{k}": sample_of([float(rank <= k) for rank in ranks]) for k in scores.RECALLS}
        samples["ndcg@10"] = sample_of([scores.discounted_gain(rank) for rank in ranks])
        return Answered(rows, samples, gains, {"chance@1": figures["chance@1"]})

    def loss(self) -> Answered:
        rendered = [render_example(self.tokenizer, with_shots(e, self.few_shot)) for e in self.examples]
        encoded = EncodedRows(*encode_rendered(self.tokenizer, rendered))
        self.check(encoded)
        found = evaluate_loss(self.model, encoded, batch_size=self.batch_size, poll=self.poll)
        samples = found.samples(loss_text_bytes(encoded, self.tokenizer))
        samples["log_likelihood"] = Sample(samples["loss"].values * [-1.0, 1.0], ratio)
        means = (found.sums / found.tokens).tolist()
        rows = [self.row(e, "", answer_of(e) or "") for e in self.examples]
        rows = [row | {"loss": m, "tokens": n} for row, m, n in zip(rows, means, found.tokens.tolist(), strict=True)]
        return Answered(rows, samples, [-value for value in means])

    def check(self, encoded: EncodedRows) -> None:
        """Refuse rows that do not fit the model, or in which nothing is predicted."""
        limit = self.model.config.max_positions
        for example, row, mask in zip(self.examples, encoded.ids, encoded.loss_masks, strict=True):
            mask[:1] = False  # nothing predicts the first token
            if len(row) > limit or not mask.any():
                what = f"has {len(row)} tokens and the model reads {limit} at most" if len(row) > limit else "is empty"
                raise DataError(f"{name_of(example)}: {what}: shorten it, or leave it out")

    def add_turns(self, result: Answered) -> None:
        """The loss of each assistant turn of the conversations."""
        ids, masks, turns = [], [], []
        for example in self.examples:
            numbers = [i for i, message in enumerate(example.messages or ()) if message["role"] == "assistant"]
            alone = [replace(example, trained=frozenset({number})) for number in numbers]
            texts, parts = encode_rendered(self.tokenizer, [render_example(self.tokenizer, row) for row in alone])
            ids.append(texts[0])
            masks.append(np.any(parts, axis=0))
            turns.append(parts)
        encoded = EncodedRows(ids, masks)
        self.check(encoded)
        losses = row_losses(self.model, encoded, batch_size=self.batch_size, poll=self.poll)
        sums: list[list[tuple[float, int]]] = []
        for found, mask, parts in zip(losses, masks, turns, strict=True):
            places = [part[mask] for part in parts]
            sums.append([(float(found[place].sum(dtype=np.float64)), int(place.sum())) for place in places])
        for row, own in zip(result.rows, sums, strict=True):
            row["turn_losses"] = [total / tokens for total, tokens in own]
        result.samples["loss"] = Sample(np.array([np.sum(own, axis=0) for own in sums]), ratio)
        result.details["turns"] = [
            {"turn": turn, "rows": len(found), "loss": sum(t for t, _ in found) / sum(n for _, n in found)}
            for turn, found in enumerate(_by_turn(sums), 1)
        ]


def _by_turn(sums: Sequence[Sequence[tuple[float, int]]]) -> Iterator[list[tuple[float, int]]]:
    """First turns, second turns and so on, of the rows that have them."""
    for turn in range(max(map(len, sums))):
        yield [own[turn] for own in sums if len(own) > turn]
