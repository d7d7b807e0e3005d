"""What the base model and the simple methods do with the rows, before anything is trained; and the time there is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from afina.advise.baselines import scored, simple_answers, trivial_answers
from afina.advise.evidence import Evidence, Score
from afina.advise.parts import Request, Rows
from afina.advise.verdict import MIN_JUDGE, before_training
from afina.engine.intervals import Paired, bootstrap, paired
from afina.engine.likelihood import row_losses
from afina.engine.model import GPT
from afina.engine.tasks import TaskResult, guess_task, run_task
from afina.engine.train_config import TrainConfig
from afina.errors import ConfigError, DataError
from afina.loaders.data.dataset import TokenSet, permutation, prepare
from afina.loaders.text.render import Example
from afina.loaders.text.tokenizer import Tokenizer

REFERENCE = Path(__file__).resolve().parent.parent / "data" / "reference.txt"
SHOTS = 4  # examples of a few-shot prompt; of labels, one each up to twice as many
PROMPTS_UNTIL = 0.25  # share of the time after which no few-shot prompts are asked any more
SCORING, CHUNK = 0.08, 32  # share of the time that answering the judging rows once may take; rows at once
CROSS_VALIDATED, FOLDS = 150, 5  # judging rows below which simple methods are cross-validated; parts of the rows then


class Work:
    """The measuring of one request: its rows, its time, and what was answered so far."""

    def __init__(
        self,
        request: Request,
        tokenizer: Tokenizer,
        rows: Rows,
        started: float,
        seconds: float,
        say: Callable[[str], None],
    ) -> None:
        self.request, self.tokenizer, self.rows, self.say = request, tokenizer, rows, say
        self.clock = request.clock
        self.started, self.seconds = started, seconds
        self.judged: list[Example] = []  # the judging rows that are answered
        self.shots: list[Example] = []  # of the few-shot prompt
        self.options: list[str] | None = None  # the labels, where answers are labels
        self.scores: dict[str, list[float]] = {}  # the rows' scores by "trivial", "prompt", "simple"
        self.base_losses: NDArray[np.float64] = np.empty(0)  # of the judging rows, nats a token
        self.batch_size = TrainConfig.resolve(
            overrides=request.reading | {"data": "-", "model": "-", "output_dir": "-"}
        ).batch_size
        self.width = 0  # of the model
        self.scoring = 0.0  # seconds that answering the judged rows took

    def moment(self, share: float) -> float:
        """When this share of the time has passed, as the clock tells it."""
        return self.started + share * self.seconds

    def without_training(self, model: GPT) -> Evidence:
        """What the base model and the simple methods do, and what the rows are."""
        rows, self.width = self.rows, model.config.hidden_size
        task, why = guess_task(rows.report["schema"], [e for part in rows.examples.values() for e in part])
        if self.request.task != "auto":
            task, why = self.request.task, "as asked for"
            if task != "loss" and rows.unanswered:
                raise DataError(f"{rows.unanswered}: has no answer in words to score; use --task loss")
        elif task != "loss" and rows.unanswered:
            task, why = "loss", f"{rows.unanswered} has no answer in words"
        evidence = Evidence(
            task=task,
            metric="loss",
            task_reason=why,
            rows=rows.total,
            train_rows=len(rows.train),
            tune_rows=len(rows.tune),
            judge_rows=len(rows.judge),
            duplicates=rows.report["duplicates"],
            contradictory=rows.contradictory,
            parameters=model.config.num_parameters(),
        )
        left_out = [f"{evidence.duplicates:,} exact duplicates left out"] if evidence.duplicates else []
        left_out += [f"{evidence.contradictory:,} contradict each other"] if evidence.contradictory else []
        self.say(
            f"{'; '.join([f'{evidence.rows:,} rows', *left_out])}: {evidence.train_rows:,} to learn from, "
            f"{evidence.tune_rows:,} to tune on, {evidence.judge_rows:,} to judge on; task {task} ({why})"
        )
        if before_training(evidence):
            return evidence
        self.base_losses = losses(model, rows.judge)
        reference = self.reference_loss(model)
        evidence = replace(evidence, rows_loss=float(self.base_losses.mean()), reference_loss=reference)
        told = f", on ordinary English {reference:.2f}" if reference is not None else ""
        self.say(f"the base model's loss on them: {evidence.rows_loss:.2f} nats a token{told}")
        return evidence if task == "loss" else self.with_answers(model, evidence)

    def reference_loss(self, model: GPT) -> float | None:
        """The base model's loss on the reference text, nats a token."""
        data = prepare(
            REFERENCE,
            self.tokenizer,
            max_length=self.rows.max_length,
            val_size=0.0,
            progress=False,
        )
        return float(np.concatenate(row_losses(model, data.train)).mean())

    def with_answers(self, model: GPT, evidence: Evidence) -> Evidence:
        """Zero-shot, few-shot, the trivial answer and the simple methods on the judging rows."""
        rows, task = self.rows, evidence.task
        if task == "classify":
            self.options = sorted({pair.answer.strip() for part in rows.pairs.values() for pair in part})
        zero: list[float] = []
        metric, began, each = "", self.clock(), 0.0
        for size in (MIN_JUDGE, *[CHUNK] * len(rows.judge)):  # as many as there is time for
            before = self.clock()
            chunk = rows.examples["judge"][len(zero) : len(zero) + size]
            if not chunk or before - began + size * each > SCORING * self.seconds:
                break
            result = self.answer(model, task, chunk)
            metric, zero = result.metric, zero + list(result.scores)
            # The first rows also warm up, and a small batch takes longer for each of its rows.
            each = (self.clock() - before) / len(chunk) / (2 if len(zero) == len(chunk) else 1)
        self.scoring = self.clock() - began
        if self.scoring > 2 * SCORING * self.seconds:
            raise ConfigError(
                f"--minutes {self.seconds / 60:g} is too short: answering {len(zero)} rows takes {self.scoring:.0f} s; "
                f"give at least {math.ceil(self.scoring / SCORING / 60)}"
            )
        self.judged = rows.examples["judge"][: len(zero)]
        prompts = {"zero-shot": zero}
        shots = self.choose_shots()
        longer = 1 + len(shots)
        if shots and self.clock() + longer * self.scoring < self.moment(PROMPTS_UNTIL):
            self.shots = shots
            prompts["few-shot"] = list(self.answer(model, task, self.judged, few_shot=shots).scores)
        told = tuple(score(name, scores) for name, scores in prompts.items())
        for shown in told:
            self.say(f"{shown.name}: {metric} {shown.value:.3f} on {len(zero)} rows")
        self.scores["prompt"] = prompts[max(told, key=lambda shown: shown.value).name]
        evidence = replace(evidence, metric=metric, scored_rows=len(zero), prompts=told)
        return self.with_simple_methods(evidence)

    def with_simple_methods(self, evidence: Evidence) -> Evidence:
        """The trivial answer and the simple methods: chosen on the tuning rows, scored on those that judge."""
        pairs, seed = self.rows.pairs, self.request.seed
        judge, count = pairs["judge"], len(self.judged)
        name, answers = trivial_answers(pairs["train"], judge, seed=seed)
        told = {name: scored(evidence.metric, answers, judge)}
        found = simple_answers(pairs["train"], [*pairs["tune"], *judge], seed=seed)
        tuning = len(pairs["tune"])

        def on_tuning_rows(name: str) -> float:
            return float(np.mean(scored(evidence.metric, found[name][:tuning], pairs["tune"])))

        best = sorted(found, key=on_tuning_rows, reverse=True)
        told |= {name: scored(evidence.metric, found[name][tuning:], judge) for name in best}
        trivial, *simple = (score(name, scores) for name, scores in told.items())
        for shown in (trivial, *simple):
            self.say(f"{shown.name}: {evidence.metric} {shown.value:.3f} on {len(judge)} rows")
        # Beside a model's answers only the rows count that it has answered too.
        self.scores |= {"trivial": told[name][:count], "simple": told[best[0]][:count]}
        gains = {
            "prompt - trivial": paired(self.scores["trivial"], self.scores["prompt"], seed=seed),
            "simple - trivial": self.simple_gain(evidence.metric, best[0]),
            "simple - prompt": paired(self.scores["prompt"], self.scores["simple"], seed=seed),
        }
        return replace(evidence, trivial=trivial, simple=tuple(simple), gains=evidence.gains | gains)

    def simple_gain(self, metric: str, method: str) -> Paired:
        """The chosen simple method against the trivial answer, cross-validated over all rows where those that judge are
        few: unlike a model these methods can be fitted again and again."""
        pairs, seed = self.rows.pairs, self.request.seed
        folds = [(pairs["train"] + pairs["tune"], pairs["judge"])]
        if len(pairs["judge"]) < CROSS_VALIDATED:
            shuffled = [pair for part in pairs.values() for pair in part]
            shuffled = [shuffled[number] for number in permutation(len(shuffled), seed, 3)]
            folds = [([p for i, p in enumerate(shuffled) if i % FOLDS != k], shuffled[k::FOLDS]) for k in range(FOLDS)]
        simple: list[float] = []
        trivial: list[float] = []
        for known, asked in folds:
            found = simple_answers(known, asked, seed=seed)
            trivial += scored(metric, trivial_answers(known, asked, seed=seed)[1], asked)
            simple += scored(metric, found.get(method) or next(iter(found.values())), asked)
        return paired(trivial, simple, seed=seed)

    def choose_shots(self) -> list[Example]:
        """Examples for a few-shot prompt, as many as fit: of labels one of each in turn, else the first ones."""
        examples, lengths = self.rows.examples["train"], self.rows.train.lengths
        wanted = SHOTS
        order = list(range(len(examples)))
        if self.options:
            wanted = min(2 * SHOTS, max(SHOTS, len(self.options)))
            seen: dict[str, int] = {}
            turn = []
            for number in order:
                answer = self.rows.pairs["train"][number].answer
                turn.append((seen.get(answer, 0), number))
                seen[answer] = seen.get(answer, 0) + 1
            order = [number for _, number in sorted(turn)]
        room = self.rows.max_length - 2 * int(self.rows.judge.lengths.max())
        chosen: list[int] = []
        for number in order:
            if len(chosen) == wanted:
                break
            if lengths[number] <= room:
                room -= int(lengths[number])
                chosen.append(number)
        return [examples[number] for number in chosen]

    def answer(
        self, model: GPT, task: str, examples: Sequence[Example], few_shot: Sequence[Example] = ()
    ) -> TaskResult:
        """The model's answers to these rows, and their scores."""
        return run_task(
            model, self.tokenizer, examples, task, options=self.options, few_shot=few_shot, seed=self.request.seed
        )


def losses(model: GPT, rows: TokenSet) -> NDArray[np.float64]:
    """The mean loss of each row, nats a token, fp64 (rows,)."""
    return np.array([float(np.mean(row)) for row in row_losses(model, rows)])


def score(name: str, scores: Sequence[float]) -> Score:
    value = bootstrap(scores)
    return Score(name, value.value, value.low, value.high)
