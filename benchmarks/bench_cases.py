"""A use case of examples/ from end to end: the model before, with examples in its prompt and after training, beside the
simple methods, on held-out rows.

    afina fetch smollm2-135m-instruct
    python benchmarks/bench_cases.py CASE [--model smollm2] [--dev_rows 60] [--shots 4] [NAME=VALUE ...]

CASE is a folder of examples/, trained by its recipe (`recipe-smollm2.yaml` with --model smollm2), or real rows under
the recipe of a like task: banking77 and sst2 (that of sentiment), multi30k (of translation, into French), gsm8k (of
support). NAME=VALUE changes a setting of the recipe. Every figure comes with its 95 % interval over rows; the trained
model is compared row by row with everything else. One JSON line goes to standard output.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

import afina
from afina.engine import scores
from afina.engine.intervals import bootstrap, mean, paired, verdict
from afina.engine.questions import answer_of, prompt_of
from afina.engine.tasks import run_task
from afina.engine.train import finetune
from afina.engine.train_config import TrainConfig
from afina.loaders.data.dataset import prepare
from afina.loaders.text.render import Example

REPO = Path(__file__).resolve().parent.parent
SHARED = REPO.parent / "shared" / "data"
sys.path += [str(REPO / "examples" / "content"), str(REPO / "examples")]
MODELS = {"afina-tiny": ("afina-tiny", "recipe.yaml"), "smollm2": ("smollm2-135m-instruct", "recipe-smollm2.yaml")}

Answers = list[dict[str, Any]]  # a row: prediction, reference, and its rank where candidates are ranked
Baseline = Callable[[Sequence[Example], Sequence[Example]], Answers]  # from training and dev rows


# --- The simple methods ----------------------------------------------------------------------------------------------


def asked(rows: Iterable[Example]) -> list[str]:
    return [prompt_of(row) for row in rows]


def answers(rows: Iterable[Example]) -> list[str]:
    return [str(answer_of(row)).strip() for row in rows]


def paired_up(predictions: Iterable[str], dev: Sequence[Example]) -> Answers:
    return [{"prediction": p, "reference": r} for p, r in zip(predictions, answers(dev), strict=True)]


def majority(train: Sequence[Example], dev: Sequence[Example]) -> Answers:
    """The commonest answer, always."""
    return paired_up([Counter(answers(train)).most_common(1)[0][0]] * len(dev), dev)


def copied(train: Sequence[Example], dev: Sequence[Example]) -> Answers:
    """What was asked, word for word."""
    return paired_up(asked(dev), dev)


def tfidf_lr(train: Sequence[Example], dev: Sequence[Example]) -> Answers:
    """Logistic regression on TF-IDF of words and pairs of words, an answer being a class."""
    vectors = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    fitted = make_pipeline(vectors, LogisticRegression(C=30.0, max_iter=1000)).fit(asked(train), answers(train))
    return paired_up(fitted.predict(asked(dev)), dev)


def nearest(train: Sequence[Example], dev: Sequence[Example]) -> Answers:
    """The answer of the training row whose question is most alike, by the cosine of their TF-IDF."""
    vectors = TfidfVectorizer(sublinear_tf=True)
    known = vectors.fit_transform(asked(train))
    found = (vectors.transform(asked(dev)) @ known.T).toarray().argmax(1)
    texts = answers(train)
    return paired_up([texts[number] for number in found], dev)


def tfidf_ranking(train: Sequence[Example], dev: Sequence[Example]) -> Answers:
    """Candidates by the cosine of their TF-IDF with the question, as a search over the dev passages, which needs no
    training. Of parts of words, so that "swim" finds "swimmers"; what is equally alike stays in its drawn order."""
    passages = sorted({text for example in dev for text in example.candidates or ()})
    vectors = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), sublinear_tf=True).fit(passages)
    made = paired_up([""] * len(dev), dev)
    for row, example in zip(made, dev, strict=True):
        candidates = list(example.candidates or ())
        question = prompt_of(example).rpartition("Question:")[2]
        alike = (vectors.transform([question]) @ vectors.transform(candidates).T).toarray()[0]
        order = np.argsort(-alike, kind="stable")
        row["prediction"] = candidates[order[0]]
        row["rank"] = 1 + order.tolist().index(candidates.index(row["reference"]))
    return made


# --- Figures: the values of rows, and what makes a figure of them -----------------------------------------------------


def number_at_end(text: str) -> str:
    """The number after GSM8K's mark."""
    found = re.search(r"####\s*\$?(-?[\d,.]+)", text)
    return found[1].replace(",", "").rstrip(".") if found else ""


def in_style(row: dict[str, Any]) -> float:
    from make_data import breaches  # of examples/content

    return float(not breaches(row["prediction"]))


ROW_FIGURES: dict[str, Callable[[dict[str, Any]], float]] = {
    "accuracy": lambda row: float(row["prediction"].strip() == row["reference"].strip()),
    "exact_match": lambda row: scores.exact_match(row["prediction"], row["reference"]),
    "rouge_l": lambda row: scores.rouge_l(row["prediction"], row["reference"]),
    "mrr@10": lambda row: scores.reciprocal_rank(row["rank"]),
    "recall@1": lambda row: float(row["rank"] == 1),
    "in_style": in_style,
    "number_right": lambda row: float(number_at_end(row["prediction"]) == number_at_end(row["reference"])),
}


def sample(figure: str, rows: Answers) -> tuple[Any, Callable[[Any], float]]:
    """The values of rows, and the statistic that makes the figure of them."""
    if figure == "chrf":
        texts = [[row[key].strip() for row in rows] for key in ("prediction", "reference")]
        return scores.corpus_counts("chrf", *texts), partial(scores.score_of_counts, "chrf")
    return np.array([ROW_FIGURES[figure](row) for row in rows]), mean


def rounded(values: Iterable[float]) -> list[float]:
    return [round(float(value), 4) for value in values]


# --- The cases -------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    folder: str  # of examples/: whose recipe
    task: str
    figures: tuple[str, ...]  # the first decides
    baselines: tuple[Baseline, ...]
    real: Callable[[Path], None] | None = None  # writes train.jsonl and dev.jsonl
    settings: dict[str, Any] = {}  # noqa: RUF012 (read only)
    new_tokens: int | None = None


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def split(
    folder: Path, train: Sequence[Any], dev: Sequence[Any], row: Callable[[Any], dict[str, Any]], keep: int
) -> None:
    """Write ``keep`` training rows that no dev row repeats, and the dev rows."""
    known = {json.dumps(row(one)) for one in dev}
    write_rows(folder / "dev.jsonl", map(row, dev))
    write_rows(folder / "train.jsonl", [row(one) for one in train if json.dumps(row(one)) not in known][:keep])


def shuffled(rows: Sequence[Any], seed: int = 2) -> list[Any]:
    rows = list(rows)
    random.Random(seed).shuffle(rows)
    return rows


def sst2(folder: Path) -> None:
    train, dev = (
        shuffled([line.split("\t") for line in (SHARED / "sentiment" / f"sst2_{name}.tsv").read_text().splitlines()])
        for name in ("train", "dev")
    )
    word = {"0": "negative", "1": "positive"}
    split(folder, train, dev[:200], lambda row: {"text": row[0], "label": word[row[1]]}, 600)


def banking77(folder: Path) -> None:
    with (SHARED / "support" / "banking77.csv").open(newline="", encoding="utf-8") as file:
        rows = shuffled(list(csv.DictReader(file)))
    split(folder, rows[200:], rows[:200], lambda row: {"text": row["text"].strip(), "label": row["category"]}, 1000)


def multi30k(folder: Path) -> None:
    def read(name: str) -> list[tuple[str, str]]:
        english, french = (
            (SHARED / "translation" / f"{name}.{side}").read_text().splitlines() for side in ("en", "fr")
        )
        return shuffled(list(zip(english, french, strict=True)))

    def row(pair: tuple[str, str]) -> dict[str, str]:
        # The recipe's columns, whose names say Spanish.
        return {"instruction": "Translate into French.", "english": pair[0], "spanish": pair[1]}

    split(folder, read("train"), read("test_2016_flickr")[:100], row, 600)


def gsm8k(folder: Path) -> None:
    rows = shuffled([json.loads(line) for line in (SHARED / "math" / "gsm8k_train.jsonl").read_text().splitlines()])

    def row(pair: dict[str, str]) -> dict[str, Any]:
        turns = (("user", pair["question"]), ("assistant", pair["answer"]))
        return {"messages": [{"role": role, "content": content} for role, content in turns]}

    split(folder, rows[100:], rows[:100], row, 400)


CASES = {
    "support": Case("support", "generate", ("exact_match", "rouge_l"), (majority, nearest, tfidf_lr)),
    "content": Case("content", "generate", ("rouge_l", "in_style", "exact_match"), (nearest,)),
    "translation": Case("translation", "translate", ("chrf", "exact_match"), (copied, nearest)),
    "retrieval": Case("retrieval", "retrieve", ("mrr@10", "recall@1"), (tfidf_ranking,)),
    "sentiment": Case("sentiment", "classify", ("accuracy",), (majority, tfidf_lr)),
    "sst2": Case("sentiment", "classify", ("accuracy",), (majority, tfidf_lr), sst2),
    "banking77": Case("sentiment", "classify", ("accuracy",), (majority, nearest, tfidf_lr), banking77),
    "multi30k": Case("translation", "translate", ("chrf", "exact_match"), (copied, nearest), multi30k),
    "gsm8k": Case(
        "support", "generate", ("number_right", "rouge_l"), (majority, nearest), gsm8k,
        {"max_length": 512, "max_steps": 50}, 160,
    ),
}  # fmt: skip


def shots_of(case: Case, train: Sequence[Example], count: int) -> list[Example]:
    """Training rows for the prompt, chosen by a fixed seed: of labels one each in turn, as far as ``count`` goes."""
    rows = shuffled(train, seed=4)
    if case.task != "classify":
        return rows[:count]
    turns: Counter[str] = Counter()
    keys = []
    for row in rows:
        keys.append(turns[label := answers([row])[0]])
        turns[label] += 1
    return [rows[number] for number in sorted(range(len(rows)), key=lambda number: keys[number])][:count]


def run(case: Case, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    source, recipe = MODELS[args.model]
    overrides: dict[str, Any] = dict(case.settings)
    if case.real:
        case.real(folder)
        overrides |= {"data": str(folder / "train.jsonl"), "val_file": str(folder / "dev.jsonl")}
    overrides |= {"output_dir": args.output_dir or str(folder / "run")}
    overrides |= dict(pair.split("=", 1) for pair in args.settings)
    config = TrainConfig.resolve(str(REPO / "examples" / case.folder / recipe), overrides)
    tokenizer = afina.load_tokenizer(source)
    data = prepare(
        config.data, tokenizer, max_length=config.max_length, val_file=config.val_file, columns=config.columns,
        cache_dir=folder, progress=False,
    )  # fmt: skip
    train, dev = ([row.example for row in rows.source_rows()] for rows in (data.train, data.dev))
    dev = dev[: args.dev_rows]
    options = sorted({*answers(train), *answers(dev)}) if case.task == "classify" else None
    seconds: dict[str, dict[str, float]] = {}

    def timed(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        result = function(*arguments)
        seconds[name] = {"wall": round(time.perf_counter() - wall, 1), "cpu": round(time.process_time() - cpu, 1)}
        print(f"{args.case}, {args.model}: {name} {seconds[name]}", file=sys.stderr, flush=True)
        return result

    def measured(source: str | Path, shots: Sequence[Example] = ()) -> Answers:
        model = afina.load_model(source)
        found = run_task(
            model, tokenizer, dev, case.task, options=options, few_shot=shots, max_new_tokens=case.new_tokens
        )
        return found.rows

    shots = shots_of(case, train, args.shots)
    systems = {"zero_shot": timed("zero_shot", measured, source)}
    while shots:
        try:
            systems["few_shot"] = timed("few_shot", measured, source, shots)
            break
        except afina.AfinaError:  # a context too short for so many
            shots = shots[:-1]
    result = timed("training", lambda: finetune(config, overwrite=True, quiet=True))
    tuned = timed("after", measured, result.best)
    for baseline in case.baselines:
        systems[baseline.__name__] = baseline(train, dev)

    figures = {
        name: {figure: rounded(bootstrap(*sample(figure, rows))) for figure in case.figures}
        for name, rows in {**systems, "fine_tuned": tuned}.items()
    }
    gains = {}
    for name, rows in systems.items():
        (one, statistic), (two, _) = sample(case.figures[0], rows), sample(case.figures[0], tuned)
        change = paired(one, two, statistic)
        gains[name] = [*rounded(change[:4]), verdict(change)]
    return {
        "case": args.case,
        "model": source,
        "task": case.task,
        "train_rows": len(train),
        "dev_rows": len(dev),
        "shots": len(shots),
        "figures": figures,
        "fine_tuned_against": gains,
        "samples": [{key: tuned[i].get(key) for key in ("prompt", "prediction", "reference")} for i in range(3)],
        "steps": result.metrics["steps"],
        "dev_loss": rounded([result.metrics["dev_loss_before"], result.metrics["dev_loss"]]),
        "seconds": seconds,
        "load_average": rounded(os.getloadavg()),
        "recipe": f"examples/{case.folder}/{recipe}",
        "settings": {
            key: str(value) for key, value in overrides.items() if key not in ("data", "val_file", "output_dir")
        },
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=list(CASES))
    parser.add_argument("settings", nargs="*", metavar="NAME=VALUE", help="settings over those of the recipe")
    parser.add_argument("--model", choices=list(MODELS), default="afina-tiny")
    parser.add_argument("--dev_rows", type=int, default=60, help="measure on so many of the dev rows (default 60)")
    parser.add_argument("--shots", type=int, default=4, help="solved rows in the prompt (default 4)")
    parser.add_argument("--output_dir", help="keep the run here (default: a temporary folder)")
    args = parser.parse_intermixed_args(argv)
    case = CASES[args.case]
    if case.real and not SHARED.is_dir():
        sys.exit(f"no real data at {SHARED}")
    os.chdir(REPO)  # the paths in a recipe are those of the repository's root
    with tempfile.TemporaryDirectory() as folder:
        line = run(case, args, Path(folder))
    words = " ".join(["python", "benchmarks/bench_cases.py", *(sys.argv[1:] if argv is None else argv)])
    versions = {name: version(name) for name in ("afina", "torch", "scikit-learn", "sacrebleu")}
    print(json.dumps({"command": words, **line, "versions": versions}, ensure_ascii=False))


if __name__ == "__main__":
    main()
