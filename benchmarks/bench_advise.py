"""How often advice is right: its verdict on a set of rows, then the full runs and the alternatives on rows held out.

    python benchmarks/bench_advise.py sst2-300 support ... [--model afina-tiny] [--minutes 1] [--max_steps 400]

Of every set a test part is put aside that advice never sees. Afterwards the base model (zero-shot and few-shot), the
simple method, LoRA and full fine-tuning (all rows, the rate and the passes that were advised, ``--max_steps`` at most)
are scored on it, and, where advice asks for more rows or finds too few, a run on three times as many if there are. The
outcome is the cheapest way that none of the others beats by more than `SMALLEST_GAIN` and beyond chance; "nothing"
where no way beats the answer that looks at no input. Times are those of the process, so that what else the machine does
has no part in them. One JSON line a set goes to standard output; docs/advice.md has the table (``--table FILE``).
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import afina
from afina.advise import verdict
from afina.advise.baselines import Pair, pair_of, scored, simple_answers, trivial_answers
from afina.advise.measure import Advice, advise
from afina.advise.parts import Request
from afina.advise.training import FULL_MODEL, passes
from afina.engine.intervals import bootstrap, paired
from afina.engine.likelihood import row_losses
from afina.engine.methods import default_learning_rate
from afina.engine.tasks import run_task
from afina.loaders.data.dataset import prepare
from afina.loaders.data.rows import read_rows

REPO = Path(__file__).resolve().parent.parent
DATA = REPO.parent / "shared" / "data"
TEST = 200  # rows held out at most
PICKS = {verdict.PROMPT: "prompt", verdict.SIMPLER: "simple", verdict.LORA: "LoRA", verdict.FULL: "full"}
Rows = list[dict[str, Any]]


def sst2() -> tuple[Rows, Rows]:
    def read(name: str) -> Rows:
        with (DATA / "sentiment" / name).open(newline="", encoding="utf-8") as file:
            found = [(t, ("negative", "positive")[int(n)]) for t, n in csv.reader(file, delimiter="\t", quoting=3)]
        return [{"text": text, "label": label} for text, label in found]

    return read("sst2_train.tsv"), read("sst2_dev.tsv")


def banking77() -> tuple[Rows, Rows]:
    with (DATA / "support" / "banking77.csv").open(newline="", encoding="utf-8") as file:
        return [{"text": row["text"].strip(), "label": row["category"]} for row in csv.DictReader(file)], []


def captions(source: str, target: str) -> tuple[Rows, Rows]:
    def read(part: str) -> Rows:
        names = [next((DATA / "translation").glob(f"{part}.{language}")) for language in (source, target)]
        lines = [path.read_text(encoding="utf-8").splitlines() for path in names]
        return [{"prompt": one + "\n", "completion": other} for one, other in zip(*lines, strict=True)]

    return read("train"), read("val")


def gsm8k() -> tuple[Rows, Rows]:
    lines = (DATA / "math" / "gsm8k_train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [{"prompt": row["question"] + "\n", "completion": row["answer"]} for row in rows], []


def french() -> tuple[Rows, Rows]:
    train, test = captions("en", "fr")
    return [{"text": row["completion"]} for row in train], [{"text": row["completion"]} for row in test]


def package(name: str) -> tuple[Rows, Rows]:
    def read(part: str) -> Rows:
        path = REPO / "afina" / "data" / name / f"{part}.jsonl"
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    return read("train"), read("dev")


def example(name: str) -> tuple[Rows, Rows]:
    recipe = yaml.safe_load((REPO / "examples" / name / "recipe.yaml").read_text(encoding="utf-8"))
    ours = {theirs: key for key, theirs in recipe.get("columns", {}).items()}

    def read(path: Path) -> Rows:
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        else:
            with path.open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))
        return [{ours.get(key, key): value for key, value in row.items()} for row in rows]

    return read(REPO / recipe["data"]), read(REPO / recipe["val_file"])


EXAMPLES = ("content", "retrieval", "translation", "sentiment", "support")
SOURCES: dict[str, Callable[[], tuple[Rows, Rows]]] = {
    "sst2": sst2,
    "banking77": banking77,
    "multi30k": lambda: captions("en", "fr"),
    "multi30k-back": lambda: captions("fr", "en"),
    "gsm8k": gsm8k,
    "french": french,
    "support": lambda: package("support"),
    "sentiment": lambda: package("sentiment"),
    **{f"example-{name}": partial(example, name) for name in EXAMPLES},
}


def make(name: str) -> tuple[Rows, Rows, Rows]:
    """The rows of a set, three times as many where they exist (else none), and its test rows.

    A name is SOURCE, SOURCE-COUNT or SOURCE-COUNT-shuffled, whose answers are dealt out anew.
    """
    plain = name.removesuffix("-shuffled")
    source, _, count = plain.rpartition("-")
    if plain in SOURCES or not count.isdigit():
        source, count = plain, ""
    rows, test = SOURCES[source]()
    rng = random.Random(11)
    rng.shuffle(rows)
    rng.shuffle(test)
    if not test:
        held = min(TEST, len(rows) // 5)
        rows, test = rows[held:], rows[:held]
    test = test[:TEST]
    seen = {json.dumps(row, sort_keys=True) for row in test}
    rows = [row for row in rows if json.dumps(row, sort_keys=True) not in seen]
    wanted = int(count or len(rows))
    more = rows[: 3 * wanted] if len(rows) >= 3 * wanted else []
    if name != plain:
        shuffle(rows, rng)
        shuffle(test, rng)
        more = rows[: 3 * wanted]
    return rows[:wanted], more, test


def shuffle(rows: Rows, rng: random.Random) -> None:
    """Deal the labels out anew: what is left follows from nothing."""
    labels = [row["label"] for row in rows]
    rng.shuffle(labels)
    for row, label in zip(rows, labels, strict=True):
        row["label"] = label


def write(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


class Trial:
    """One set: what advice says of it, and what is true of it."""

    def __init__(self, name: str, model: str, minutes: float, max_steps: int, folder: Path) -> None:
        self.name, self.model, self.folder, self.max_steps = name, model, folder, max_steps
        rows, more, test = make(name)
        self.files = {"rows": write(folder / "rows.jsonl", rows), "test": write(folder / "test.jsonl", test)}
        if more:
            self.files["more"] = write(folder / "more.jsonl", more)
        self.tokenizer = afina.load_tokenizer(model)
        self.chat = self.tokenizer.chat_template is not None
        self.reading = {"max_length": 256}
        self.request = Request(
            str(self.files["rows"]), model, minutes=minutes, reading=self.reading, clock=time.process_time
        )
        self.scores: dict[str, list[float]] = {}
        self.seconds: dict[str, float] = {}
        self.steps: dict[str, int] = {}

    def examples(self, which: str) -> list[Any]:
        return [row.example for row in read_rows(self.files[which], chat=self.chat)]

    def train(self, advice: Advice, method: str, which: str = "rows") -> Path:
        """The full run: all rows, the rate that was best for this method, and the passes advised."""
        tried = [t for t in advice.evidence.trials if t.method == method and np.isfinite(t.loss)]
        base = afina.load_model(self.model)
        usual = default_learning_rate(method, base.config.hidden_size)[0]
        rate = min(tried, key=lambda t: t.loss).learning_rate if tried else usual
        count = sum(1 for _ in self.files[which].open(encoding="utf-8"))
        epochs = (advice.recipe or {}).get("epochs") or passes(count, 8)
        steps = min(self.max_steps, int(np.ceil(epochs * 0.9 * count / 8)))
        began = time.process_time()
        result = afina.finetune(
            model=self.model,
            data=str(self.files[which]),
            output_dir=str(self.folder / f"{method}-{which}"),
            quiet=True,
            method=method,
            learning_rate=rate,
            max_steps=steps,
            eval_steps=max(1, steps // 5),
            save_steps=10**6,
            seed=0,
            **self.reading,
        )
        self.seconds[f"{method} {which}"] = round(time.process_time() - began, 1)
        self.steps[f"{method} {which}"] = steps
        return result.best

    def losses(self, source: str | Path) -> list[float]:
        data = prepare(self.files["test"], self.tokenizer, max_length=256, val_size=0.0, progress=False)
        return [-float(row.mean()) for row in row_losses(afina.load_model(source), data.train)]

    def score(self, task: str, source: str | Path, **settings: Any) -> list[float]:
        if task == "loss":
            return self.losses(source)
        return list(run_task(afina.load_model(source), self.tokenizer, self.examples("test"), task, **settings).scores)

    def run(self) -> dict[str, Any]:
        began = time.process_time()
        advice = advise(self.request, say=lambda text: print(text, file=sys.stderr, flush=True))
        self.seconds["advise"] = round(time.process_time() - began, 1)
        evidence = advice.evidence
        print(advice.decision, file=sys.stderr, flush=True)
        task, unit = evidence.task, evidence.unit
        settings: dict[str, Any] = {}
        if task != "loss":
            pairs = {name: [pair_of(e) for e in self.examples(name)] for name in ("rows", "test")}
            train, test = ([pair for pair in pairs[name] if pair is not None] for name in ("rows", "test"))
            if task == "classify":
                settings["options"] = sorted({pair.answer for pair in [*train, *test]})
            self.cheap(evidence.metric, train, test)
        self.scores["prompt"] = self.score(task, self.model, **settings)
        best = evidence.prompt
        if best is not None and best.name == "few-shot":
            self.scores["prompt"] = self.score(task, self.model, few_shot=advice.shots, **settings)
        for method in ("LoRA", "full") if evidence.parameters < FULL_MODEL else ("LoRA",):
            self.scores[method] = self.score(task, self.train(advice, method.lower()), **settings)
        outcome = self.outcome(unit)
        tuned = "full" if evidence.method == "full" else "LoRA"
        more = None
        if "more" in self.files and advice.decision.verdict in (verdict.COLLECT, verdict.ROWS):
            more = self.score(task, self.train(advice, tuned.lower(), "more"), **settings)
        return self.told(advice, outcome, tuned, more)

    def cheap(self, metric: str, train: list[Pair], test: list[Pair]) -> None:
        """The trivial answer, and the simple method that is best on every tenth training row."""
        self.scores["trivial"] = scored(metric, trivial_answers(train, test)[1], test)
        tuning, rest = train[::10], [pair for number, pair in enumerate(train) if number % 10]
        on_tuning = {name: scored(metric, a, tuning) for name, a in simple_answers(rest, tuning).items()}
        chosen = max(on_tuning, key=lambda name: float(np.mean(on_tuning[name])))
        answers = simple_answers(train, test)
        self.scores["simple"] = scored(metric, answers.get(chosen) or next(iter(answers.values())), test)

    def outcome(self, unit: float) -> str:
        """The cheapest way that no other beats; "nothing" where none beats what looks at no input."""
        ways = [way for way in ("prompt", "simple", "LoRA", "full") if way in self.scores]
        if "trivial" in self.scores and not any(self.beats(way, "trivial", 0.0) for way in ways):
            return "nothing"
        smallest = verdict.SMALLEST_GAIN * unit if "trivial" in self.scores else 0.0
        return next(way for way in ways if not any(self.beats(other, way, smallest) for other in ways))

    def beats(self, one: str, other: str, smallest: float) -> bool:
        gain = paired(self.scores[other], self.scores[one])
        return verdict.better(gain) and gain.difference >= smallest

    def told(self, advice: Advice, outcome: str, tuned: str, more: list[float] | None) -> dict[str, Any]:
        evidence, found = advice.evidence, advice.decision.verdict
        means = {way: float(np.mean(scores)) for way, scores in self.scores.items()}
        pick = PICKS.get(found) or self.kept(advice)
        rise = None if more is None else paired(self.scores[tuned], more)
        if found == verdict.COLLECT:  # right where three times the rows help, and these rows alone are not enough
            right = None if rise is None else verdict.better(rise) and outcome not in ("LoRA", "full")
        else:
            right = outcome == ("nothing" if found == verdict.ROWS else pick)
        return {
            "set": self.name,
            "model": self.model,
            "task": evidence.task,
            "metric": evidence.metric,
            "rows": evidence.rows,
            "test_rows": len(self.scores["prompt"]),
            "verdict": found,
            "reasons": advice.decision.reasons,
            "outcome": outcome,
            "right": right,
            "cost": round(max(0.0, max(means.values()) - means[pick]), 4),
            "test": {way: [round(v, 4) for v in bootstrap(scores)] for way, scores in self.scores.items()},
            "three_times_the_rows": None
            if rise is None
            else {"score": round(float(np.mean(more or [0])), 4)}
            | {name: round(value, 4) for name, value in rise._asdict().items()},
            "evidence": evidence.to_dict(),
            "seconds": self.seconds,
            "steps": self.steps,
            "minutes": self.request.minutes,
            "versions": {p: version(p) for p in ("afina", "torch", "scikit-learn")},
        }

    def kept(self, advice: Advice) -> str:
        """What somebody who does not train now would use meanwhile: the best of the rest, as far as was measured."""
        evidence = advice.evidence
        rest = {"prompt": evidence.prompt, "simple": next(iter(evidence.simple), None), "trivial": evidence.trivial}
        known = {way: score.value for way, score in rest.items() if score is not None and way in self.scores}
        return max(known, key=lambda way: known[way], default="prompt")


def table(path: Path) -> str:
    """The results of a file as a Markdown table."""
    ways = ("trivial", "prompt", "simple", "LoRA", "full")
    lines = [
        f"| Set | Rows | Metric | {' | '.join(ways)} | Verdict | Best in truth | Right | Cost |",
        "| -- " * 12 + "|",
    ]
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        scores = [f"{row['test'][way][0]:.3g}" if way in row["test"] else "" for way in ways]
        right = {True: "yes", False: "no", None: "?"}[row["right"]]
        told = [row["set"], f"{row['rows']:,}", row["metric"], *scores, row["verdict"], row["outcome"], right]
        cost = f"{row['cost']:.3g}"
        lines.append(f"| {' | '.join([*told, cost])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", metavar="SET")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the results in FILE as a table, and stop")
    parser.add_argument("--model", default="afina-tiny")
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--max_steps", type=int, default=400, help="of a full run")
    args = parser.parse_args()
    if args.table:
        print(table(args.table))
    for name in args.sets:
        with tempfile.TemporaryDirectory() as folder:
            found = Trial(name, args.model, args.minutes, args.max_steps, Path(folder)).run()
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
