"""The tables of the use cases' pages, from the lines of bench_cases.py.

    python benchmarks/case_tables.py [CASE ...]

A page under examples/ holds its table as this prints it: a test compares them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results" / "cases_cpu.jsonl"
MODELS = {"afina-tiny": "`afina-tiny`", "smollm2-135m-instruct": "SmolLM2-135M-Instruct"}
SYSTEMS = {
    "zero_shot": "asked as it is (zero-shot)",
    "few_shot": "with solved rows in its prompt",
    "fine_tuned": "**fine-tuned**",
    "majority": "simple: the commonest answer",
    "copied": "simple: the question copied",
    "nearest": "simple: the answer of the nearest training row",
    "tfidf_lr": "simple: TF-IDF and logistic regression",
    "tfidf_ranking": "simple: search by TF-IDF",
}
FIGURES = {
    "accuracy": "accuracy",
    "exact_match": "word for word",
    "rouge_l": "ROUGE-L",
    "in_style": "in style",
    "chrf": "chrF",
    "mrr@10": "MRR@10",
    "recall@1": "recall@1",
    "number_right": "number right",
}
SHARES = {"accuracy", "exact_match", "in_style", "recall@1", "number_right"}  # in per cent; others as they are


def read() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]


def shown(figure: str, values: list[float]) -> str:
    """A figure with its interval: "81.7 (71.7 to 90.0)"; shares in per cent."""
    scale, digits = (100, 1) if figure in SHARES else (1, 1) if figure == "chrf" else (1, 2)
    value, low, high = (f"{scale * x:.{digits}f}" for x in values[:3])
    return f"{value} ({low} to {high})"


def seconds(line: dict[str, Any]) -> str:
    took = line["seconds"]["training"]
    return f"{took['cpu']:.0f} s of a core"


def table(case: str, lines: list[dict[str, Any]]) -> str:
    """The Markdown table of a case: a row a system, a column a model and figure, and what training took."""
    mine = {line["model"]: line for line in lines if line["case"] == case}  # the last line of a model counts
    models = [model for model in MODELS if model in mine]
    figures = list(mine[models[0]]["figures"]["fine_tuned"])
    heads = [
        f"{MODELS[model]}: {FIGURES[figure]}{', %' if figure in SHARES else ''}"
        for model in models
        for figure in figures
    ]
    rows = ["|  | " + " | ".join(heads) + " |", "| -- |" + " -- |" * len(heads)]
    for system, name in SYSTEMS.items():
        if any(system in mine[model]["figures"] for model in models):
            cells = [
                shown(figure, mine[model]["figures"][system][figure])
                if system in mine[model]["figures"]
                else "too long"
                for model in models
                for figure in figures
            ]
            rows.append(f"| {name} | " + " | ".join(cells) + " |")
    blank = " |" * (len(figures) - 1)
    rows.append(
        "| dev rows, training rows |"
        + "".join(f" {mine[m]['dev_rows']}, {mine[m]['train_rows']} |{blank}" for m in models)
    )
    rows.append(
        "| steps; training took |" + "".join(f" {mine[m]['steps']}; {seconds(mine[m])} |{blank}" for m in models)
    )
    return "\n".join(rows)


def overview(lines: list[dict[str, Any]], cases: list[str]) -> str:
    """A row a case and model: before, best prompt, after, best simple method, and the verdict against each."""
    rows = [
        "| Case | Model | Figure | Zero-shot | Few-shot | Fine-tuned | Best simple method | Against it |",
        "| -- | -- | -- | -- | -- | -- | -- | -- |",
    ]
    for case in cases:
        for model, name in MODELS.items():
            line = next((line for line in reversed(lines) if (line["case"], line["model"]) == (case, model)), None)
            if line is None:
                continue
            figure = next(iter(line["figures"]["fine_tuned"]))
            simple = {
                s: f[figure] for s, f in line["figures"].items() if s not in ("zero_shot", "few_shot", "fine_tuned")
            }
            best = max(simple, key=lambda s: simple[s][0])
            gain = line["fine_tuned_against"][best]
            found = [
                shown(figure, line["figures"][s][figure]) if s in line["figures"] else "too long"
                for s in ("zero_shot", "few_shot", "fine_tuned")
            ]
            title = f"{FIGURES[figure]}{', %' if figure in SHARES else ''}"
            method = SYSTEMS[best].removeprefix("simple: ")
            cells = [case, name, title, *found, f"{shown(figure, simple[best])}: {method}", gain[-1]]
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


OWN = ["support", "content", "translation", "retrieval", "sentiment"]
REAL = ["banking77", "sst2", "multi30k", "gsm8k"]

if __name__ == "__main__":
    found = read()
    for name in sys.argv[1:]:
        print(table(name, found))
    if not sys.argv[1:]:
        print(overview(found, OWN), overview(found, REAL), sep="\n\n")
