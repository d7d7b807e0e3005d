"""Fine-tuning: the loop, top to bottom.

One step: its micro-batches run through the model, each loss is a sum over loss tokens divided by the loss tokens of
the *whole step* (so the result does not depend on how rows fall into micro-batches), gradients add up, are clipped
once, and move the weights once. A held-out dev set is measured before the first step, every ``eval_steps`` and at the
end; the weights with the best dev loss are kept in ``best/``. Everything needed to go on bit for bit is in
``checkpoint-N/``.
"""

from __future__ import annotations

import heapq
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from afina.engine.checkpoint import Checkpoint, publish_best, save_checkpoint
from afina.engine.evaluate import evaluate_loss
from afina.engine.lora import choose_patterns, default_trainable, freeze, new_adapter, save_adapter
from afina.engine.memory import MemoryPlan, plan
from afina.engine.model import GPT
from afina.engine.optim import AdamW
from afina.engine.run_folder import RunFolder, StopRequest
from afina.engine.runtime import flushed_denormals, peak_memory_gb, prepare_process
from afina.engine.schedule import lr_factor
from afina.engine.train_config import ADAPTED, TrainConfig
from afina.engine.weights import load_model, new_model, save_model
from afina.errors import ConfigError
from afina.loaders.data.batches import Batches, MicroBatch
from afina.loaders.data.dataset import Data, prepare
from afina.loaders.text.tokenizer import Tokenizer, check_vocab, load_tokenizer
from afina.loaders.weights.peft import AdapterConfig

MAX_BAD_STEPS = 3  # non-finite steps in a row before the run stops


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


@dataclass
class Progress:
    """Where a run stands; saved with every checkpoint as JSON."""

    step: int = 0  # steps of the data order done, skipped ones included
    trained_tokens: int = 0
    seconds: float = 0.0  # spent in training steps
    tokens: int = 0  # real ones in training steps, padding aside
    processed_tokens: int = 0  # padding included
    loss_sum: float = 0.0  # of the steps that moved the weights
    bad_in_a_row: int = 0
    skipped: int = 0
    evaluated_step: int = -1  # last step whose dev loss was measured
    dev_loss_before: float = math.nan
    best_dev_loss: float = math.inf
    best_step: int = -1
    evals_since_best: int = 0
    stopped_early: bool = False


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
    prepare_process(threads=config.threads, seed=config.seed)
    log = (lambda text: None) if quiet else (lambda text: print(text, file=sys.stderr, flush=True))
    with RunFolder(str(config.output_dir), resume=resume, overwrite=overwrite) as folder:
        tokenizer = load_tokenizer(str(config.tokenizer or config.model))
        data = read_data(config, tokenizer, progress=not quiet)
        log(data.summary())
        model = _load(config, tokenizer)
        config = choose_trained(config, model)
        run = Run(config, model, tokenizer, data, folder, log)
        with StopRequest() as stop, flushed_denormals():
            run.begin()
            run.loop(stop, show_bar=not quiet and sys.stderr.isatty())
        return run.finish()


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
        progress=progress,
    )


def _load(config: TrainConfig, tokenizer: Tokenizer) -> GPT:
    if config.init == "random":
        assert config.config is not None  # TrainConfig checks it
        model = new_model(
            config.config, vocab_size=tokenizer.vocab_size, seed=config.seed, dtype=config.dtype, device=config.device
        )
    else:
        model = load_model(
            str(config.model),
            dtype=config.dtype,
            device=config.device,
            allow_nonfinite=config.allow_nonfinite,
            quantize="nf4" if config.method == "qlora" else None,
        )
    check_vocab(tokenizer, model.config.vocab_size)
    model.gradient_checkpointing = config.gradient_checkpointing
    return model.train()


def choose_trained(config: TrainConfig, model: GPT) -> TrainConfig:
    """Let train what ``config.method`` says, adding adapters where it asks for them; returns the config with what that
    depended on the model for. Raises ConfigError for names that the model does not have."""
    if model.adapter is not None:
        refuse_adapter(str(config.model), model.adapter.config.base)
    if config.method == "freeze":
        config = replace(config, trainable=config.trainable or default_trainable(model))
        freeze(model, choose_patterns(model, config.trainable or ()))
    elif config.method in ADAPTED:
        folder = Path(str(config.model)).expanduser()
        adapter = AdapterConfig(
            base=str(folder.resolve()) if folder.is_dir() else config.model,
            r=config.lora_r or 0,
            alpha=config.lora_alpha or 0,
            dropout=config.lora_dropout or 0.0,
            rslora=bool(config.use_rslora),
            dora=bool(config.use_dora),
        )
        new_adapter(
            model,
            adapter,
            targets=config.lora_target_modules or (),
            modules_to_save=config.modules_to_save or (),
            seed=config.seed,
        )
    return config


def refuse_adapter(source: str, base: str | None) -> None:
    raise ConfigError(
        f"model {source} is an adapter of {base}: merge it first (afina export {source} --to hf --output DIR) to train "
        "on from there, or train another on its base"
    )


def accumulate(model: GPT, micro_batches: list[MicroBatch], *, poll: Callable[[], None] | None = None) -> Tensor:
    """Add the gradient of a step's loss, the mean over all its loss tokens, to ``.grad``; return that loss, ().

    ``poll`` is called before each micro-batch and may raise to stop.
    """
    loss_tokens = sum(mb.loss_tokens for mb in micro_batches)
    device = next(model.parameters()).device
    total = torch.zeros((), device=device)
    for mb in micro_batches:
        if poll:
            poll()
        # Labels and boundaries stay on the CPU: what they say about shapes is read there, not off the GPU.
        ids = mb.input_ids.to(device, non_blocking=True)
        loss = model.loss(ids, mb.labels, cu_seqlens=mb.cu_seqlens, reduction="mean") * (mb.loss_tokens / loss_tokens)
        loss.backward()
        total += loss.detach()
    return total


@dataclass
class Run:
    """One training run: what it works on, and where it stands (``progress``)."""

    config: TrainConfig
    model: GPT
    tokenizer: Tokenizer
    data: Data
    folder: RunFolder
    log: Callable[[str], None]
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        c, model = self.config, self.model
        self.device = next(model.parameters()).device
        self.trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        ratio = c.loraplus_lr_ratio or 1.0
        self.optimizer = AdamW(
            model,
            decay=model.decay_parameters(),
            lr_scales={name: ratio for name, _ in model.named_parameters() if name.endswith(".lora.B")},
            betas=(c.adam_beta1, c.adam_beta2),
            eps=c.adam_epsilon,
            weight_decay=c.weight_decay,
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
        self.writer = _tensorboard_writer(self.folder.path) if c.report_to == "tensorboard" else None
        self.saved_step = 0

    def begin(self) -> None:
        """Write, or check, recipe and facts; restore the newest checkpoint when resuming."""
        c, model = self.config, self.model
        count = model.config.num_parameters()
        facts = {"data_sha256": self.data.fingerprint, "model_sha256": model.fingerprint, "parameters": count}
        # Weights and two moments in fp32 for every checkpoint kept and the one being written, and the best model.
        best = self.trainable if model.adapter else count
        self.folder.begin(c.to_dict(), facts, bytes_needed=12 * self.trainable * (c.save_total_limit + 1) + 4 * best)
        dtype = str(model.embed.weight.dtype).removeprefix("torch.")
        some = "" if c.method == "full" else f", {self.trainable:,} train ({c.method})"
        self.log(
            f"{c.model or c.config}: {count:,} parameters on {self.device.type} in {dtype}{some}; {self.total:,} steps "
            f"of {c.batch_size * c.gradient_accumulation_steps} rows, {self.batches.steps_per_epoch:,} steps an epoch"
        )
        self.log(self.memory.line())
        for reason in self.folder.skipped:
            self.log(f"damaged checkpoint skipped: {reason}")
        if self.folder.checkpoint:
            self._restore(self.folder.checkpoint)

    @cached_property
    def memory(self) -> MemoryPlan:
        """What a step will take if its longest rows come together."""
        rows, count, packing = self.data.train, self.config.batch_size, self.config.packing
        longest = heapq.nlargest(count, rows.lengths.tolist())
        tokens = sum(longest) if packing else longest[0] * len(longest)
        loss_tokens = sum(heapq.nlargest(count, rows.loss_tokens.tolist()))
        return plan(self.model, self.optimizer, tokens=tokens, loss_tokens=min(tokens, loss_tokens))

    def loop(self, stop: StopRequest, *, show_bar: bool) -> None:
        """Measure, save and step until the last step; on a signal save what there is and raise Interrupted."""
        self.stop, progress = stop, self.progress
        with tqdm(total=self.total, initial=progress.step, unit="step", disable=not show_bar) as bar:
            try:
                while True:
                    ended = progress.step >= self.total or progress.stopped_early
                    if progress.evaluated_step != progress.step and (progress.step % self.eval_steps == 0 or ended):
                        self._evaluate()
                        ended |= progress.stopped_early
                    if self.saved_step != progress.step and (progress.step % self.save_steps == 0 or ended):
                        self._save()
                    if ended:
                        return
                    self._show(bar, self._step())
            except Interrupted:
                if self.saved_step != progress.step:
                    self._save()
                self.log(f"stopped at step {progress.step:,} of {self.total:,}; go on with --resume")
                raise

    def _poll(self) -> None:
        """Called between micro-batches: nothing half-done is lost by stopping here."""
        if self.stop.requested:
            raise Interrupted

    def _show(self, bar: tqdm[Any], row: dict[str, Any]) -> None:
        line = f"loss {row['loss']:.4f}, lr {row['lr']:.2e}, {row['tokens_per_second']:,.0f} tokens/s"
        bar.set_postfix_str(line, refresh=False)
        bar.update()
        if bar.disable and (row["step"] % self.config.logging_steps == 0 or row["step"] == self.total):
            self.log(f"step {row['step']:,}/{self.total:,}: {line}")

    def _step(self) -> dict[str, Any]:
        """Run one training step, log it and return its line. Raises Interrupted with nothing changed."""
        progress, started = self.progress, time.perf_counter()
        micro_batches = self.batches.step(progress.step)
        loss_tokens = sum(mb.loss_tokens for mb in micro_batches)
        try:
            loss = accumulate(self.model, micro_batches, poll=self._poll)
        except Interrupted:
            self.optimizer.zero_grad()
            raise
        grad_norm = self.optimizer.clip_(self.config.max_grad_norm)
        lr = self.config.learning_rate * lr_factor(
            self.config.lr_scheduler_type, progress.step, self.total, self.warmup, self.config.min_lr_ratio
        )
        row: dict[str, Any] = {"step": progress.step + 1, "loss": loss.item(), "lr": lr, "grad_norm": grad_norm.item()}
        finite = math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])
        if finite:
            self.optimizer.step(lr)
        self.optimizer.zero_grad()
        seconds = time.perf_counter() - started
        tokens, processed = sum(mb.tokens for mb in micro_batches), sum(mb.input_ids.numel() for mb in micro_batches)
        progress.step += 1
        progress.seconds += seconds
        progress.tokens += tokens
        progress.processed_tokens += processed
        if finite:
            progress.bad_in_a_row = 0
            progress.trained_tokens += loss_tokens
            progress.loss_sum += row["loss"]
        row |= {
            "trained_tokens": loss_tokens,
            "tokens": tokens,
            "processed_tokens": processed,  # padding included
            "seconds": seconds,
            "tokens_per_second": round(tokens / seconds, 1),
            "trained_tokens_per_second": round(loss_tokens / seconds, 1),
        }
        if finite:
            self._record(row)
        else:
            self._skipped(row, micro_batches)
        return row

    def _skipped(self, row: dict[str, Any], micro_batches: list[MicroBatch]) -> None:
        """Account for a step whose loss or gradient is not finite: weights and moments were left as they were."""
        progress = self.progress
        progress.bad_in_a_row += 1
        progress.skipped += 1
        rows = [self.data.train.where(r) for mb in micro_batches for r in mb.rows]
        row |= {"skipped": True, "rows": rows}
        self._record(row)
        where = f"{', '.join(rows[:10])}{' ...' if len(rows) > 10 else ''}"
        self.log(f"step {progress.step:,}: loss or gradient not finite, weights left as they were; its rows: {where}")
        if progress.bad_in_a_row >= MAX_BAD_STEPS:
            raise NonFiniteError(
                f"{MAX_BAD_STEPS} steps in a row without a finite loss and gradient, the last one step "
                f"{progress.step:,} with {where}; look at those rows, or lower learning_rate (now "
                f"{self.config.learning_rate:g})"
            )

    def _evaluate(self) -> None:
        """Measure the dev loss: before the first step the mark to beat, later what picks the best model.

        The weights, gradients and random numbers of training are not touched.
        """
        c, progress = self.config, self.progress
        loss = evaluate_loss(self.model, self.data.dev, batch_size=c.batch_size, packing=c.packing, poll=self._poll)[
            "loss"
        ]
        progress.evaluated_step = progress.step
        better = progress.step > 0 and loss < progress.best_dev_loss
        self._record({"step": progress.step, "dev_loss": loss, "best": better})
        self.log(f"step {progress.step:,}: dev loss {loss:.4f}" + (" (best so far)" if better else ""))
        if progress.step == 0:
            progress.dev_loss_before = loss
            return
        if better:
            save = save_adapter if self.model.adapter else save_model
            publish_best(self.folder.path, lambda folder: save(self.model, self.tokenizer, folder))
            progress.best_dev_loss, progress.best_step, progress.evals_since_best = loss, progress.step, 0
            return
        progress.evals_since_best += 1
        patience = c.early_stopping_patience
        if patience is not None and progress.evals_since_best >= patience and progress.step < self.total:
            progress.stopped_early = True
            self.log(
                f"stopped early: {patience} evaluations without a lower dev loss; best at step {progress.best_step:,}"
            )

    def _save(self) -> None:
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
        self.saved_step = self.progress.step

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint: weights, moments, counters, random numbers; the step gives the data order."""
        self.optimizer.load_state({g: checkpoint.tensors(g) for g in checkpoint.groups}, checkpoint.meta["updates"])
        self.progress = Progress(**{k: v for k, v in checkpoint.meta["progress"].items() if v is not None})
        self.progress.stopped_early &= self.config.early_stopping_patience is not None
        self.saved_step = self.progress.step
        torch.set_rng_state(torch.tensor(checkpoint.meta["rng"], dtype=torch.uint8))
        if "cuda_rng" in checkpoint.meta and self.device.type == "cuda":
            torch.cuda.set_rng_state(torch.tensor(checkpoint.meta["cuda_rng"], dtype=torch.uint8), self.device)
        self.log(f"resumed from {checkpoint.path.name}")

    def finish(self) -> RunResult:
        """Return the figures of the whole run, resumed parts included."""
        progress, best = self.progress, self.folder.path / "best"
        if progress.best_step < 0:
            raise NonFiniteError(
                f"no evaluation gave a finite dev loss, so there is no best model in {self.folder.path}"
            )
        if progress.best_dev_loss >= progress.dev_loss_before:
            self.log(
                f"the dev loss never fell below the {progress.dev_loss_before:.4f} it had before training (lowest "
                f"after it: {progress.best_dev_loss:.4f}): the model you started from is the better one on these rows"
            )
        metrics = {
            "output_dir": str(self.folder.path),
            "best": str(best),
            "steps": progress.step,
            "train_loss": progress.loss_sum / max(1, progress.step - progress.skipped),
            "dev_loss_before": progress.dev_loss_before,
            "dev_loss": progress.best_dev_loss,
            "best_step": progress.best_step,
            "stopped_early": progress.stopped_early,
            "skipped_steps": progress.skipped,
            "trained_tokens": progress.trained_tokens,
            "tokens": progress.tokens,
            "processed_tokens": progress.processed_tokens,
            "tokens_per_second": round(progress.tokens / progress.seconds, 1) if progress.seconds else 0.0,
            "trained_tokens_per_second": round(progress.trained_tokens / progress.seconds, 1)
            if progress.seconds
            else 0.0,
            "train_seconds": round(progress.seconds, 2),
            "peak_memory_gb": round(peak_memory_gb(self.device), 3),
            "predicted_memory": self.memory.to_dict(),
        }
        if self.writer:
            self.writer.close()
        return RunResult(self.folder.path, best, metrics)

    def _record(self, row: dict[str, Any]) -> None:
        self.folder.log(row)
        if self.writer:
            for name, value in row.items():
                if name != "step" and isinstance(value, float) and math.isfinite(value):
                    self.writer.add_scalar(name, value, row["step"])


def _tensorboard_writer(folder: Path) -> Any:
    """Return a SummaryWriter for ``folder``/tensorboard; the package is an optional extra."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "report_to is 'tensorboard', which is not installed: pip install 'afina[tensorboard]'"
        ) from error
    return SummaryWriter(folder / "tensorboard")
