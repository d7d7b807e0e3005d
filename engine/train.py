"""Fine-tuning: the loop, top to bottom.

One step: its micro-batches run through the model and the objective, whose sum of losses is divided by the loss tokens
of the *whole step* (so the result does not depend on how rows fall into micro-batches), gradients add up, are clipped
once, and move the weights once. A held-out dev set is measured before the first step, every ``eval_steps`` and at the
end; the weights with the best dev loss (or ``eval_metric``) are kept in ``best/``. Everything needed to go on bit for
bit is in ``checkpoint-N/``.
"""

from __future__ import annotations

import contextlib
import heapq
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from afina.engine.checkpoint import STATE, Checkpoint, publish_best, save_checkpoint
from afina.engine.dev_metric import DevMetric
from afina.engine.dev_rows import DevRows, MetricRows, read_dev_rows
from afina.engine.evaluate import evaluate_loss
from afina.engine.fp8 import use_fp8
from afina.engine.lora import save_adapter
from afina.engine.memory import MemoryPlan, plan
from afina.engine.methods import choose_trained, default_learning_rate
from afina.engine.metrics import MetricsWriter, Progress, run_metrics, step_row
from afina.engine.model import GPT
from afina.engine.objectives import Objective, sft, training_objective
from afina.engine.optim import AdamW
from afina.engine.optim_in_backward import UpdatesInBackward
from afina.engine.optim_offload import offloaded
from afina.engine.run_folder import RunFolder, now
from afina.engine.runtime import flushed_denormals, peak_memory_gb, prepare_process
from afina.engine.schedule import lr_factor
from afina.engine.stop import Stop, StopRequest
from afina.engine.train_config import TrainConfig
from afina.engine.training_dtype import training_dtype
from afina.engine.weights import choose_device, load_model, new_model, save_model
from afina.errors import RunError, WeightsError
from afina.loaders.data.batches import Batches, MicroBatch
from afina.loaders.data.dataset import Data, prepare
from afina.loaders.jsonfile import show
from afina.loaders.text.source import load_tokenizer
from afina.loaders.text.tokenizer import Tokenizer, check_vocab
from afina.manifest import check_manifest, read_manifest
from afina.streams import is_terminal, say

MAX_BAD_STEPS = 3  # non-finite steps in a row before the run stops
MANY_SKIPPED = 3  # a run that skipped one step in so many says so at its end


class NonFiniteError(RuntimeError):
    """The loss or gradient stayed NaN or infinite for ``MAX_BAD_STEPS`` steps in a row."""


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
        notes = {}
        if config.dtype == "auto":
            # A run that goes on computes as it began, whatever this machine would choose.
            dtype = folder.recorded("dtype")
            if dtype is None:
                dtype, notes["dtype"] = training_dtype(choose_device(config.device))
            config = replace(config, dtype=dtype)
        model = _load(config, tokenizer, weights=weights)
        config = choose_trained(config, model)
        rate = folder.recorded("learning_rate")
        if config.learning_rate is None:  # a run that goes on has a rate, which may have been lowered
            if rate is None:
                rate, notes["learning_rate"] = default_learning_rate(config.method, model.config.hidden_size)
            config = replace(config, learning_rate=rate)
        elif rate not in (None, config.learning_rate):
            notes["learning_rate"] = f"it was {show(rate)} before the run went on here"
        if config.linear_dtype == "fp8":
            notes["linear_dtype"] = use_fp8(model, choose_device(config.device))
        yield Run(config, model, tokenizer, data, folder, log, notes)


def read_data(config: TrainConfig, tokenizer: Tokenizer, *, progress: bool) -> Data:
    """The run's training and dev rows: the same for the same config and files."""
    return prepare(
        str(config.data),
        tokenizer,
        max_length=config.max_length,
        on_long=config.on_long,
        train_on_prompt=config.train_on_prompt,
        val_file=config.val_file,
        val_size=config.val_size,
        seed=config.seed,
        columns=config.columns,
        skip_bad_lines=config.skip_bad_lines,
        roles=config.roles_to_train,
        progress=progress,
    )


def _load(config: TrainConfig, tokenizer: Tokenizer, *, weights: bool) -> GPT:
    if config.init == "random":
        assert config.config is not None  # TrainConfig checks it
        model = new_model(
            config.config,
            vocab_size=tokenizer.vocab_size,
            seed=config.seed,
            dtype=config.dtype,
            device=config.device,
            weights=weights,
            offload_params=config.offload_params,
        )
    else:
        model = load_model(
            str(config.model),
            dtype=config.dtype,
            device=config.device,
            allow_nonfinite=config.allow_nonfinite,
            quantize="nf4" if config.method == "qlora" else None,
            weights=weights,
            offload_params=config.offload_params,
        )
    check_vocab(tokenizer, model.config.vocab_size)
    policy, again = config.activation_policy, config.gradient_checkpointing or config.offload_params
    model.set_activation_policy("full" if again and policy == "auto" else policy)
    return model.train()


def accumulate(
    model: GPT,
    micro_batches: list[MicroBatch],
    objective: Objective = sft,
    *,
    poll: Callable[[], None] | None = None,
    before_backward: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Add the gradient of a step's loss, the mean over all its loss tokens, to ``.grad``; return that loss, fp32 ().

    ``poll`` is called before each micro-batch and may raise to stop; ``before_backward`` with a micro-batch's share of
    the loss before its backward pass.
    """
    loss_tokens = sum(mb.loss_tokens for mb in micro_batches)
    total = torch.zeros((), device=next(model.parameters()).device)
    for mb in micro_batches:
        if poll:
            poll()
        loss, _ = objective(model, mb, divisor=loss_tokens)
        if before_backward:
            before_backward(loss)
        loss.backward()
        total += loss.detach()
    return total


class LaunchedStep:
    """A training step on its way: on a GPU its ``figures``, the loss and the gradient's norm, fp32 (2,), are still to
    come. Their copy to the host starts at once, behind the step's own work, and nothing waits for it but ``result``."""

    def __init__(self, micro_batches: list[MicroBatch], lr: float, figures: Tensor) -> None:
        self.micro_batches, self.lr = micro_batches, lr
        self.figures = figures.to("cpu", non_blocking=True)  # into pinned memory, where they come from a GPU
        self.arrival: torch.cuda.Event | None = None
        if figures.is_cuda:
            self.arrival = torch.cuda.Event()
            self.arrival.record(torch.cuda.current_stream(figures.device))

    def result(self) -> tuple[float, float]:
        """The loss and the gradient's norm, once they are there."""
        if self.arrival is not None:
            self.arrival.synchronize()
        loss, grad_norm = self.figures.tolist()
        return loss, grad_norm


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
        self.device = next(model.parameters()).device
        if self.device.type == "meta":  # of a run that is only checked
            self.device = choose_device(c.device)
        model.set_attention_backend(c.attention_backend, longest=c.max_length, device=self.device)
        self.objective = training_objective(c)
        self.dev_metric: DevMetric | None = None
        if c.eval_metric != "loss":
            self.dev_metric = DevMetric(c.eval_metric, self.tokenizer, self.data.dev, seed=c.seed)
        self.trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
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
            device=torch.device("meta") if model.embed.weight.is_meta else self.device,
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
        self.folder.begin(c.to_dict(), self._facts(), notes=self.notes, **self._bytes_needed())
        dtype = str(model.embed.weight.dtype).removeprefix("torch.")
        some = "" if c.method == "full" else f", {self.trainable:,} train ({c.method})"
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
        self.folder.record(data=self._data_facts(), total_steps=self.total)
        if self.folder.checkpoint:
            self._restore(self.folder.checkpoint)

    def check(self) -> None:
        """Raise what ``begin`` would raise, and write nothing."""
        facts = self._facts() if self.folder.resuming else {}  # the hash of a model takes time
        self.folder.check(self.config.to_dict(), facts, **self._bytes_needed())

    def _facts(self) -> dict[str, Any]:
        """What the run depends on beyond its settings."""
        count = self.model.config.num_parameters()
        return {"data_sha256": self.data.fingerprint, "model_sha256": self.model.fingerprint, "parameters": count}

    def _data_facts(self) -> dict[str, Any]:
        """What became of the rows, and how long those are that are trained on."""
        lengths = self.data.train.lengths
        p50, p95 = (int(value) for value in np.quantile(lengths, [0.5, 0.95], method="higher"))
        return {**self.data.report, "train_lengths": {"p50": p50, "p95": p95, "max": int(lengths.max())}}

    def _bytes_needed(self) -> dict[str, int]:
        """The optimizer's state for every checkpoint kept and the one being written, and the best model in fp32."""
        state = sum(tensor.nbytes for group in self.optimizer.state().values() for tensor in group.values())
        best = 4 * (self.trainable if self.model.adapter else self.model.config.num_parameters())
        return {"bytes_needed": state * (self.config.save_total_limit + 1) + best, "first_bytes": state + best}

    @cached_property
    def memory(self) -> MemoryPlan:
        """What a step will take if its longest rows come together."""
        rows, count, packing = self.data.train, self.config.batch_size, self.config.packing
        longest = heapq.nlargest(count, rows.lengths.tolist())
        tokens = sum(longest) if packing else longest[0] * len(longest)
        loss_tokens = sum(heapq.nlargest(count, rows.loss_tokens.tolist()))
        return plan(
            self.model,
            self.optimizer,
            tokens=tokens,
            loss_tokens=min(tokens, loss_tokens),
            lean_loss=self.config.lean_loss,
            in_backward=self.config.optim_in_backward,
            offload_params=self.config.offload_params,
            accumulates=self.config.gradient_accumulation_steps > 1,
            longest=longest[0],
        )

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
        try:
            figures = (self._update_in_backward if self.config.optim_in_backward else self._update)(micro_batches, lr)
        finally:
            self.optimizer.zero_grad()
        progress.step += 1
        self.launched = LaunchedStep(micro_batches, lr, figures)
        if not self.deferred:
            self._settle()

    def _update(self, micro_batches: list[MicroBatch], lr: float) -> Tensor:
        """Move the weights, by gradients that add up first; the loss and the gradient's norm, fp32 (2,)."""
        away = self.optimizer.host_gradients

        def poll() -> None:
            self._poll()
            if away is not None:
                away.land()

        with contextlib.nullcontext() if away is None else away.leaving():
            loss = accumulate(self.model, micro_batches, self.objective, poll=poll)
        self._settle()  # the last step, of which the optimizer must know whether it was skipped
        figures = torch.stack([loss, self.optimizer.clip_(self.config.max_grad_norm)])
        self.optimizer.step(lr, skip=~figures.isfinite().all())
        return figures

    def _update_in_backward(self, micro_batches: list[MicroBatch], lr: float) -> Tensor:
        """As ``_update``, each weight as soon as its gradient is there; there is one micro-batch."""
        updates = UpdatesInBackward(self.optimizer, lr)

        def begin(loss: Tensor) -> None:
            self._settle()  # as in _update
            updates.begin(loss)

        with updates.attached():
            loss = accumulate(self.model, micro_batches, self.objective, poll=self._poll, before_backward=begin)
        return torch.stack([loss, updates.norm()])

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
            self._report_skipped(row["rows"], whole=not (self.config.optim_in_backward and math.isfinite(loss)))
        self._show(row)

    def _report_skipped(self, rows: list[str], *, whole: bool) -> None:
        """Name the rows of a step whose loss or gradient is not finite; too many such steps in a row end the run. So
        does one that was not skipped as a ``whole``: in the backward pass, below weights that had moved already."""
        step = self.progress.step
        where = f"{', '.join(rows[:10])}{' ...' if len(rows) > 10 else ''}"
        if not whole:
            raise NonFiniteError(
                f"step {step:,}: a gradient is not finite, and optim_in_backward has moved the weights above it; its "
                f"rows: {where}. Nothing of this is saved: look at those rows, or {self._go_on}; with "
                "--optim_in_backward false besides, such a step is skipped as a whole"
            )
        self.log(f"step {step:,}: loss or gradient not finite, weights left as they were; its rows: {where}")
        if self.progress.bad_in_a_row >= MAX_BAD_STEPS:
            raise NonFiniteError(
                f"{MAX_BAD_STEPS} steps in a row without a finite loss and gradient, the last one step {step:,} with "
                f"{where}; look at those rows, or {self._go_on}"
            )

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
        meta = {
            "progress": {k: v if math.isfinite(v) else None for k, v in asdict(self.progress).items()},
            "updates": self.optimizer.num_updates,
            "rng": torch.get_rng_state().tolist(),
        }
        if self.device.type == "cuda":  # dropout draws there
            meta["cuda_rng"] = torch.cuda.get_rng_state(self.device).tolist()
        save_checkpoint(
            self.folder.path, self.progress.step, self.optimizer.state(), meta, keep=self.config.save_total_limit
        )
        self.folder.commit()
        self.saved_step, self.save_due = self.progress.step, False

    def _check_weights(self) -> None:
        """Raise NonFiniteError where a weight that trains has become NaN or infinite: what is on the disk stays as it
        is. A model that was such from the start, and is allowed to be, is not looked at."""
        if self.config.allow_nonfinite:
            return
        trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        if not bool(torch.stack([torch.isfinite(p).all() for _, p in trained]).all()):
            bad = next(name for name, p in trained if not torch.isfinite(p).all())
            raise NonFiniteError(
                f"step {self.progress.step:,}: {bad} is not finite, so nothing was saved; {self._go_on}"
            )

    @property
    def _lower_rate(self) -> str:
        return f"--learning_rate {self.peak_lr / 3:.2g}"

    @property
    def _go_on(self) -> str:
        """What to do when the weights have gone wrong. At the same rate they would again, bit for bit."""
        if self.saved_step:
            return (
                f"go on from the checkpoint of step {self.saved_step:,} at a lower rate than {self.peak_lr:g}: "
                f"--resume {self._lower_rate}"
            )
        kept = ", the run that was to be overwritten is as it was" if self.folder.path != self.folder.root else ""
        return (
            f"begin again at a lower rate than {self.peak_lr:g} (there is no checkpoint yet{kept}): "
            f"--overwrite {self._lower_rate}"
        )

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint: weights, moments, counters, random numbers; the step gives the data order."""
        meta = checkpoint.meta
        try:
            progress = Progress.read(meta.get("progress"))
            size = len(torch.get_rng_state())
            if (type(meta.get("updates")), len(rng := bytes(meta.get("rng", ())))) != (int, size):
                raise ValueError(f"it needs updates (a count) and rng ({size:,} bytes)")
            gpu_rng = bytes(meta.get("cuda_rng", ()))
        except (TypeError, ValueError) as problem:
            mend = "go on with the version that run.json names, or begin again with --overwrite"
            raise RunError(f"{checkpoint.path / STATE}: not a state of this version ({problem}): {mend}") from problem
        try:
            state = {group: checkpoint.tensors(group) for group in checkpoint.groups}
            self.optimizer.load_state(state, meta["updates"])
        except ValueError as problem:
            raise RunError(f"{checkpoint.path}: {problem}") from problem
        self.progress = progress
        self.progress.stopped_early &= self.config.early_stopping_patience is not None
        self.saved_step = self.progress.step
        torch.set_rng_state(torch.tensor(list(rng), dtype=torch.uint8))
        if gpu_rng and self.device.type == "cuda":
            torch.cuda.set_rng_state(torch.tensor(list(gpu_rng), dtype=torch.uint8), self.device)
        self.dev_rows = read_dev_rows(self.folder.path)
        self.log(f"resumed from {checkpoint.path.name}")
        self._check_best()

    def _check_best(self) -> None:
        """A best model that is gone or damaged does not count: the next evaluation makes another."""
        progress, best = self.progress, self.folder.path / "best"
        if progress.best_step < 0:
            return
        problem = f"{best} is gone"
        try:
            if best.is_dir():
                check_manifest(best)
                return
        except WeightsError as error:
            problem = str(error)
        self.log(f"{problem}; the next evaluation makes another best model")
        progress.best_step, progress.best_dev_loss, progress.best_dev_metric = -1, math.inf, 0.0
        progress.evaluated_step = -1  # so that a run at its end has one

    def finish(self) -> RunResult:
        """Return the figures of the whole run, resumed parts included."""
        progress, best = self.progress, self.folder.path / "best"
        if progress.best_step < 0:
            raise NonFiniteError(
                f"no evaluation gave a finite dev loss, so there is no best model in {self.folder.path}: look at the "
                f"dev rows, or begin again at a lower rate: --overwrite {self._lower_rate}"
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
        if progress.skipped * MANY_SKIPPED >= max(1, progress.step) and progress.skipped > 1:
            self.log(
                f"WARNING: {progress.skipped:,} of {progress.step:,} steps were skipped, their loss or gradient not "
                f"finite: this model has learnt from the other rows alone; look at the rows that metrics.jsonl names, "
                f"or begin a new run with a lower rate, say {self._lower_rate}, which may go on from this one's best "
                f"model (--model {self.folder.path})"
            )
        self.writer.close()
        facts = {name: value for name, value in metrics.items() if name not in ("output_dir", "best")}
        self.folder.record(finished={"time": now(), **facts})
        return RunResult(self.folder.path, best, metrics)
