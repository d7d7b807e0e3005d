"""Fine-tuning: the loop, top to bottom.

A step (`training_step.py`) moves the weights once. A held-out dev set is measured before the first step, every
``eval_steps`` and at the end; the weights with the best dev loss (or ``eval_metric``) are kept in ``best/``. Everything
needed to go on bit for bit is in ``checkpoint-N/`` (`run_state.py`). A loss, gradient or weight that is not finite is
dealt with in `nonfinite.py`.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from afina.engine.checkpoint import Checkpoint, publish_best, save_checkpoint
from afina.engine.cuda_graph import open_graphs
from afina.engine.dev_metric import DevMetric
from afina.engine.dev_rows import DevRows, MetricRows, read_dev_rows
from afina.engine.evaluate import evaluate_loss
from afina.engine.lora import save_adapter
from afina.engine.memory import MemoryPlan
from afina.engine.metrics import MetricsWriter, Progress, run_metrics, step_row
from afina.engine.model import GPT
from afina.engine.nonfinite import NonFiniteError, check_weights, go_on, lower_rate, many_skipped, report_skipped
from afina.engine.objectives import training_objective
from afina.engine.optim import AdamW
from afina.engine.optim_offload import offloaded
from afina.engine.run_folder import RunFolder, now
from afina.engine.run_inputs import device_of, read_data, read_model
from afina.engine.run_record import bytes_needed, data_facts, facts, predicted_memory
from afina.engine.run_state import check_best, restore, run_state
from afina.engine.runtime import flushed_denormals, peak_memory_gb, prepare_process
from afina.engine.schedule import lr_factor
from afina.engine.stop import Stop, StopRequest
from afina.engine.train_config import TrainConfig
from afina.engine.training_step import LaunchedStep, TrainingStep
from afina.engine.weights import save_model
from afina.loaders.data.batches import Batches
from afina.loaders.data.dataset import Data
from afina.loaders.text.source import load_tokenizer
from afina.loaders.text.tokenizer import Tokenizer
from afina.manifest import read_manifest
from afina.streams import is_terminal, say


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to stop; a resumable checkpoint has been written."""


@dataclass(frozen=True)
class RunResult:
    """What a run left: its folder, the best model's folder, and its figures (the keys of ``afina train --json``)."""

    output_dir: Path
    best: Path
    metrics: dict[str, Any]


def finetune(
    train_config: TrainConfig | None = None,
    /,
    *,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    **settings: Any,
) -> RunResult:
    """Fine-tune a model on rows of data and return the best one.

    The settings are a ``TrainConfig``, or its fields as keywords. ``resume`` goes on from the newest whole checkpoint
    in ``output_dir``; ``overwrite`` replaces an earlier run there; ``quiet`` prints nothing.

    Raises AfinaError for anything wrong with the request or its files (before anything is written), NonFiniteError when
    three steps in a row have no finite gradient, Interrupted after a signal, a resumable checkpoint being on disk then.
    """
    if train_config is not None and settings:
        raise TypeError("finetune takes a TrainConfig or its fields as keywords, not both")
    config = train_config or TrainConfig.resolve(overrides=settings)
    begun = False
    try:
        with open_run(config, resume=resume, overwrite=overwrite, quiet=quiet) as run:
            with StopRequest() as stop, flushed_denormals():
                begun = True
                run.begin()
                run.loop(stop, show_bar=not quiet and is_terminal(sys.stderr))
            return run.finish()
    except KeyboardInterrupt as stopped:
        if begun:
            raise
        told = f"{str(stopped) or 'interrupted'} while rows and model were read, before the first step"
        raise KeyboardInterrupt(f"{told}: nothing in {config.output_dir} was changed; start it again") from stopped


def check_run(
    config: TrainConfig, *, resume: bool = False, overwrite: bool = False
) -> tuple[TrainConfig, Mapping[str, str]]:
    """Raise what ``finetune`` would raise before its first step; return the config with what depended on the model,
    and notes on settings that it had left open.

    The weights alone are not read, and nothing is written but the cache of tokens.
    """
    with open_run(config, resume=resume, overwrite=overwrite, quiet=True, weights=False) as run:
        run.check()
        return run.config, run.notes


@contextlib.contextmanager
def open_run(
    config: TrainConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    weights: bool = True,
    data: Data | None = None,
) -> Iterator[Run]:
    """Hold the run's folder, prepare its rows and load its model; yield the run, of which nothing is written yet.

    Without ``weights`` the model has shapes only: enough to check everything that training would refuse. ``data``:
    rows that were read before, in place of those that the config names.
    """
    prepare_process(threads=config.threads, seed=config.seed)
    log = (lambda text: None) if quiet else say
    with RunFolder(str(config.output_dir), resume=resume, overwrite=overwrite) as folder:
        tokenizer = load_tokenizer(str(config.tokenizer or config.model))
        if data is None:
            data = read_data(config, tokenizer, progress=not quiet)
            log(data.summary())
        model, config, notes = read_model(config, tokenizer, folder, weights=weights)
        yield Run(config, model, tokenizer, data, folder, log, notes)


@dataclass
class Run:
    """One training run: what it works on, and where it stands (``progress``)."""

    config: TrainConfig
    model: GPT
    tokenizer: Tokenizer
    data: Data
    folder: RunFolder
    log: Callable[[str], None]
    notes: Mapping[str, str] = field(default_factory=dict)  # on settings that the config left open
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        c, model = self.config, self.model
        assert c.learning_rate is not None  # open_run has set it
        self.peak_lr = c.learning_rate
        self.device = device_of(model, c)
        model.set_attention_backend(c.attention_backend, longest=c.max_length, device=self.device)
        self.dev_metric: DevMetric | None = None
        if c.eval_metric != "loss":
            self.dev_metric = DevMetric(c.eval_metric, self.tokenizer, self.data.dev, seed=c.seed)
        ratio = c.loraplus_lr_ratio or 1.0
        self.optimizer = AdamW(
            model,
            decay=model.decay_parameters(),
            lr_scales={name: ratio for name, _ in model.named_parameters() if name.endswith(".lora.B")},
            betas=(c.adam_beta1, c.adam_beta2),
            eps=c.adam_epsilon,
            weight_decay=c.weight_decay,
            variant=c.optim,
            seed=c.seed,
            offload=offloaded(model) if c.offload_optimizer else (),
            gradients=not c.optim_in_backward,
            host_weights=model.host_weights,
            device=torch.device("meta") if model.device.type == "meta" else self.device,
        )
        objective = training_objective(c)
        self.training_step = TrainingStep(
            model,
            self.optimizer,
            objective,
            max_grad_norm=c.max_grad_norm,
            in_backward=c.optim_in_backward,
            graphs=None
            if self.optimizer.device.type == "meta"
            else open_graphs(c, model, self.optimizer, objective, self.device, self.log),
        )
        self.batches = Batches(
            self.data.train,
            batch_size=c.batch_size,
            accumulation=c.gradient_accumulation_steps,
            seed=c.seed,
            packing=c.packing,
        )
        self.total = c.max_steps or max(1, math.ceil(c.epochs * self.batches.steps_per_epoch))
        self.warmup = c.warmup_steps if c.warmup_steps is not None else math.ceil(c.warmup_ratio * self.total)
        self.eval_steps = c.eval_steps or math.ceil(self.total / 10)
        self.save_steps = c.save_steps or self.eval_steps
        self.writer = MetricsWriter(self.folder, c.report_to)
        self.launched: LaunchedStep | None = None  # the step whose result nobody has looked at yet
        self.clock = 0.0  # when it was last looked at one, or a step began after a pause
        self.saved_step = 0
        self.save_due = False
        self.dev_rows: DevRows | None = None  # also of a run that was begun by a version without them

    def begin(self) -> None:
        """Write, or check, recipe and facts; restore the newest checkpoint when resuming."""
        c, model = self.config, self.model
        count = model.config.num_parameters()
        trainable = sum(p.numel() for p in self.optimizer.params.values())
        self.folder.begin(c.to_dict(), facts(self.data, model), notes=self.notes, **self._bytes_needed())
        dtype = str(model.dtype).removeprefix("torch.")
        some = "" if c.method == "full" else f", {trainable:,} train ({c.method})"
        self.log(
            f"{c.model or c.config}: {count:,} parameters on {self.device.type} in {dtype}{some}; {self.total:,} steps "
            f"of {c.batch_size * c.gradient_accumulation_steps} rows, {self.batches.steps_per_epoch:,} steps an epoch"
        )
        self.log(self.memory.line())
        for name, note in self.notes.items():
            value = getattr(c, name)
            self.log(f"{name} {value if isinstance(value, str) else format(value, 'g')}: {note}")
        for reason in self.folder.skipped:
            self.log(f"damaged checkpoint skipped: {reason}")
        self.folder.record(data=data_facts(self.data), total_steps=self.total)
        if self.folder.checkpoint:
            self._restore(self.folder.checkpoint)

    def check(self) -> None:
        """Raise what ``begin`` would raise, and write nothing."""
        # The hash of a model takes time.
        depends_on = facts(self.data, self.model) if self.folder.resuming else {}
        self.folder.check(self.config.to_dict(), depends_on, **self._bytes_needed())

    def _bytes_needed(self) -> dict[str, int]:
        return bytes_needed(self.model, self.optimizer, checkpoints=self.config.save_total_limit)

    @cached_property
    def memory(self) -> MemoryPlan:
        """What a step will take if its longest rows come together."""
        return predicted_memory(self.config, self.model, self.optimizer, self.data)

    def loop(self, stop: Stop, *, show_bar: bool) -> None:
        """Measure, save and step until the last step; on a signal save what there is and raise Interrupted."""
        self.stop, progress = stop, self.progress
        with tqdm(total=self.total, initial=progress.step, unit="step", disable=not show_bar) as self.bar:
            try:
                while True:
                    ended = progress.step >= self.total or progress.stopped_early
                    if progress.evaluated_step != progress.step and (progress.step % self.eval_steps == 0 or ended):
                        self._evaluate()
                        ended |= progress.stopped_early
                    if self.saved_step != progress.step:
                        self.save_due |= progress.step % self.save_steps == 0 or ended
                        if self.save_due:
                            self._save()
                    if ended:
                        return
                    self._step()
            except Interrupted:
                if self.saved_step != progress.step:
                    self._save()
                waits = self.folder.path != self.folder.root
                then = "the run that was to be overwritten is as it was" if waits else "go on with --resume"
                self.log(f"stopped at step {progress.step:,} of {self.total:,}; {then}")
                raise

    def _poll(self) -> None:
        """Called between micro-batches: nothing half-done is lost by stopping here."""
        if self.stop.requested:
            raise Interrupted

    def _show(self, row: dict[str, Any]) -> None:
        line = f"loss {row['loss']:.4f}, lr {row['lr']:.2e}, {row['tokens_per_second']:,.0f} tokens/s"
        self.bar.set_postfix_str(line, refresh=False)
        self.bar.update()
        if self.bar.disable and (row["step"] % self.config.logging_steps == 0 or row["step"] == self.total):
            self.log(f"step {row['step']:,}/{self.total:,}: {line}")

    @property
    def deferred(self) -> bool:
        """Whether a step's result is looked at one step later. On a CPU it is there as soon as it is asked for."""
        return self.device.type == "cuda"

    def _step(self) -> None:
        """Run one training step. Raises Interrupted with nothing changed.

        Whether the step moves the weights is decided on the device, and on a GPU the host never waits for that: it
        looks at the result of a step when the next step's backward pass is under way.
        """
        progress = self.progress
        if self.launched is None:
            self.clock = time.perf_counter()
        micro_batches = self.batches.step(progress.step)
        lr = self.peak_lr * lr_factor(
            self.config.lr_scheduler_type, progress.step, self.total, self.warmup, self.config.min_lr_ratio
        )
        figures = self.training_step.update(micro_batches, lr, poll=self._poll, settle=self._settle)
        progress.step += 1
        self.launched = LaunchedStep(micro_batches, lr, figures)
        if not self.deferred:
            self._settle()

    def _settle(self) -> None:
        """Account for the step that was launched last, if its result has not been looked at yet: log it, and count it.

        Raises NonFiniteError when too many steps in a row were skipped.
        """
        step, progress = self.launched, self.progress
        if step is None:
            return
        self.launched = None
        loss, grad_norm = step.result()
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        row = step_row(progress.step, loss, step.lr, grad_norm, step.micro_batches, seconds)
        skipped = not (math.isfinite(loss) and math.isfinite(grad_norm))
        if skipped:
            self.optimizer.num_updates -= 1
            row |= {"skipped": True, "rows": [self.data.train.where(r) for mb in step.micro_batches for r in mb.rows]}
        progress.count(row)
        self.writer.write(row)
        if skipped:
            report_skipped(
                progress.step,
                row["rows"],
                whole=not (self.config.optim_in_backward and math.isfinite(loss)),
                in_a_row=progress.bad_in_a_row,
                go_on=self._go_on,
                log=self.log,
            )
        self._show(row)

    def _evaluate(self) -> None:
        """Measure the dev loss and ``eval_metric``: before the first step the mark to beat, later what picks the best
        model.

        The weights, gradients and random numbers of training are not touched.
        """
        self._settle()
        c, progress = self.config, self.progress
        held_out = evaluate_loss(self.model, self.data.dev, batch_size=c.batch_size, packing=c.packing, poll=self._poll)
        loss = held_out.loss
        row, told, figure = {"step": progress.step, "dev_loss": loss}, f"dev loss {loss:.4f}", 0.0
        if self.dev_metric:
            figure = row[f"dev_{c.eval_metric}"] = self.dev_metric.measure(self.model, poll=self._poll)
            told += f", {c.eval_metric} {figure:.4f} on {len(self.dev_metric.examples)} dev rows"
        progress.evaluated_step = progress.step
        self.folder.check_place()
        # Without a metric of its own it is 0 in all evaluations, and of equal ones the lower loss is better.
        better = progress.step > 0 and (figure, -loss) > (progress.best_dev_metric, -progress.best_dev_loss)
        self.writer.write({**row, "best": better})
        self.log(f"step {progress.step:,}: {told}" + (" (best so far)" if better else ""))
        if progress.step == 0:
            progress.dev_loss_before, progress.dev_metric_before = loss, figure
            where = [self.data.dev.where(number) for number in range(len(self.data.dev))]
            metric = MetricRows(self.dev_metric.name, self.dev_metric.values) if self.dev_metric else None
            self.dev_rows = DevRows(where, held_out.tokens, held_out.sums, metric=metric)
            self.dev_rows.write(self.folder.path)
            return
        if better:
            self._drain()
            self._check_weights()
            save = save_adapter if self.model.adapter else save_model
            publish_best(
                self.folder.path,
                lambda folder: save(self.model, self.tokenizer, folder),
                {"step": progress.step, "dev_loss": loss, **({c.eval_metric: figure} if self.dev_metric else {})},
            )
            if self.dev_rows:
                values = self.dev_metric.values if self.dev_metric else None
                self.dev_rows.best(progress.step, held_out.sums, values).write(self.folder.path)
            progress.best_dev_loss, progress.best_dev_metric = loss, figure
            progress.best_step, progress.evals_since_best = progress.step, 0
            return
        progress.evals_since_best += 1
        patience = c.early_stopping_patience
        if patience is not None and progress.evals_since_best >= patience and progress.step < self.total:
            progress.stopped_early = True
            what = "lower dev loss" if self.dev_metric is None else f"higher {c.eval_metric}"
            self.log(f"stopped early: {patience} evaluations without a {what}; best at step {progress.best_step:,}")

    def _drain(self) -> None:
        """Wait for weights on their way to the host."""
        if self.model.host_weights is not None:
            self.model.host_weights.drain()

    def _save(self) -> None:
        """Save a checkpoint, but none of a step that was skipped: it would push out one that is known to be good. It
        stays due until a step goes well."""
        self._settle()
        if self.progress.bad_in_a_row:
            self.log(f"step {self.progress.step:,} was skipped, so no checkpoint is made of it")
            return
        self._drain()
        self._check_weights()
        self.folder.check_place()
        meta = run_state(self.progress, self.optimizer, self.device)
        save_checkpoint(
            self.folder.path, self.progress.step, self.optimizer.state(), meta, keep=self.config.save_total_limit
        )
        self.folder.commit()
        self.saved_step, self.save_due = self.progress.step, False

    def _check_weights(self) -> None:
        """Raise NonFiniteError where a weight has gone wrong. A model that was so from the start, and is allowed to be,
        is not looked at."""
        if not self.config.allow_nonfinite:
            check_weights(self.model, step=self.progress.step, go_on=self._go_on)

    @property
    def _go_on(self) -> str:
        """What to do when the weights have gone wrong."""
        replaces = self.folder.path != self.folder.root
        return go_on(saved_step=self.saved_step, lr=self.peak_lr, replaces=replaces)

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint: weights, moments, counters, random numbers; the step gives the data order."""
        self.progress = progress = restore(checkpoint, self.optimizer, self.device)
        progress.stopped_early &= self.config.early_stopping_patience is not None
        self.saved_step = progress.step
        self.dev_rows = read_dev_rows(self.folder.path)
        self.log(f"resumed from {checkpoint.path.name}")
        check_best(progress, self.folder.path / "best", self.log)

    def finish(self) -> RunResult:
        """Return the figures of the whole run, resumed parts included."""
        progress, best = self.progress, self.folder.path / "best"
        if progress.best_step < 0:
            raise NonFiniteError(
                f"no evaluation gave a finite dev loss, so there is no best model in {self.folder.path}: look at the "
                f"dev rows, or begin again at a lower rate: --overwrite {lower_rate(self.peak_lr)}"
            )
        kept = read_manifest(best) or {}
        if kept.get("step", progress.best_step) != progress.best_step:
            # A run that went back to an earlier checkpoint, and took another way from there, left a better one.
            progress.best_step, progress.best_dev_loss = kept["step"], kept["dev_loss"]
            progress.best_dev_metric = kept.get(self.config.eval_metric, 0.0)
        before = (progress.dev_metric_before, -progress.dev_loss_before)
        if (progress.best_dev_metric, -progress.best_dev_loss) <= before:
            marks = f"the {progress.dev_loss_before:.4f} it had before training (lowest after it: "
            marks = f"dev loss never fell below {marks}{progress.best_dev_loss:.4f})"
            if self.dev_metric:
                marks = f"dev {self.config.eval_metric} never rose above the {before[0]:.4f} it had before training"
            self.log(f"the {marks}: the model you started from is the better one on these rows")
        metrics = {
            "output_dir": str(self.folder.path),
            "best": str(best),
            **run_metrics(progress, self.config.eval_metric),
            "peak_memory_gb": round(peak_memory_gb(self.device), 3),
            "predicted_memory": self.memory.to_dict(),
        }
        if warning := many_skipped(progress, lr=self.peak_lr, folder=self.folder.path):
            self.log(warning)
        self.writer.close()
        facts = {name: value for name, value in metrics.items() if name not in ("output_dir", "best")}
        self.folder.record(finished={"time": now(), **facts})
        return RunResult(self.folder.path, best, metrics)
