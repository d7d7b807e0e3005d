"""engine/train.py: the loop's arithmetic, dev set, best model, early stopping, non-finite steps, exact resume."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import CONFIG, saved, tiny_tokenizer
from tqdm import tqdm

import afina
from afina.engine import model as engine_model
from afina.engine import optim, train
from afina.engine.checkpoint import FORMAT, load_checkpoint
from afina.engine.methods import default_learning_rate
from afina.engine.optim import AdamW
from afina.engine.run_folder import RunFolder
from afina.engine.stop import StopRequest
from afina.engine.train import NonFiniteError, RunResult, finetune
from afina.engine.train_config import TrainConfig
from afina.errors import AfinaError
from afina.kernels.adamw import adamw_
from afina.kernels.attention import attention
from afina.kernels.cross_entropy import cross_entropy_reference, linear_cross_entropy
from afina.loaders.data.batches import Batches
from afina.loaders.data.dataset import prepare
from afina.loaders.text.source import load_tokenizer
from afina.manifest import write_manifest

WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "password", "settings", "page", "card", "one")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFINA_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(saved(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    """40 prompt/completion rows; completions of 1 to 12 words, so that rows weigh very differently."""
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    with path.open("w") as out:
        for i in range(40):
            prompt = f"{i} " + " ".join(draw.choices(WORDS, k=draw.randint(1, 6)))
            completion = " " + " ".join(draw.choices(WORDS, k=draw.randint(1, 12)))
            out.write(json.dumps({"prompt": prompt, "completion": completion}) + "\n")
    return str(path)


def fit(model: str, rows: str, out: Path, **changes: Any) -> RunResult:
    settings = {"max_length": 64, "max_steps": 8, "batch_size": 4, "learning_rate": 1e-3, "threads": 1} | changes
    flags = {name: settings.pop(name) for name in ("resume", "overwrite") if name in settings}
    return finetune(quiet=True, **flags, model=model, data=rows, output_dir=str(out), **settings)


def lines(result: RunResult, key: str) -> list[Any]:
    read = [json.loads(line) for line in (result.output_dir / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in read if key in line]


def gradient(model_dir: str, rows: str, batch_size: int, accumulation: int, clip: float) -> dict[str, torch.Tensor]:
    """The gradient of the last, partial step of an epoch of 36 rows in steps of 8."""
    tokenizer = load_tokenizer(model_dir)
    data = prepare(rows, tokenizer, max_length=64, val_size=0.1, seed=42, progress=False)
    model = afina.load_model(model_dir).train()
    batches = Batches(data.train, batch_size=batch_size, accumulation=accumulation, seed=1)
    micro_batches = batches.step(batches.steps_per_epoch - 1)
    assert sum(len(mb.rows) for mb in micro_batches) == 4
    optimizer = AdamW(model, decay=set())
    train.accumulate(model, micro_batches)
    optimizer.clip_(clip)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_accumulation_does_not_change_the_gradient(model: str, rows: str, clip: float) -> None:
    whole = gradient(model, rows, 8, 1, clip)
    assert len(whole) == len(dict(afina.load_model(model).named_parameters()))
    for batch_size, accumulation in ((2, 4), (1, 8)):
        parts = gradient(model, rows, batch_size, accumulation, clip)
        for name, grad in whole.items():
            assert (grad - parts[name]).norm() <= 1e-6 * grad.norm(), name


def test_packing_changes_nothing_but_the_speed(model: str, rows: str, tmp_path: Path) -> None:
    packed, padded = (fit(model, rows, tmp_path / str(p), packing=p) for p in (True, False))
    assert lines(packed, "loss") == pytest.approx(lines(padded, "loss"), abs=1e-5)
    assert lines(packed, "dev_loss") == pytest.approx(lines(padded, "dev_loss"), abs=1e-5)
    assert packed.metrics["tokens"] == padded.metrics["tokens"] == packed.metrics["processed_tokens"]
    assert padded.metrics["processed_tokens"] > padded.metrics["tokens"]


def test_a_run_learns_and_says_so(model: str, rows: str, tmp_path: Path) -> None:
    result = fit(model, rows, tmp_path / "run", max_steps=60, eval_steps=20)
    metrics = result.metrics
    assert metrics["dev_loss"] < metrics["dev_loss_before"] - 0.5
    assert metrics["steps"] == 60 == len(lines(result, "loss"))
    assert metrics["trained_tokens"] == sum(lines(result, "trained_tokens"))
    assert metrics["train_loss"] == pytest.approx(sum(lines(result, "loss")) / 60)
    assert lines(result, "dev_loss")[0] == metrics["dev_loss_before"]
    assert metrics["dev_loss"] == min(lines(result, "dev_loss")[1:])
    assert {p.name for p in result.output_dir.iterdir()} == {
        "best", "checkpoint-40", "checkpoint-60", "dev_rows.json", "metrics.jsonl", "recipe.yaml", "run.json"
    }  # fmt: skip
    # The model in best/ is the one with that dev loss.
    again = fit(str(result.best), rows, tmp_path / "again", max_steps=1)
    assert again.metrics["dev_loss_before"] == pytest.approx(metrics["dev_loss"], abs=1e-6)


def test_best_is_the_lowest_dev_loss_and_patience_stops(model: str, rows: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"learning_rate": 0.03, "lr_scheduler_type": "constant", "eval_steps": 1}
    result = fit(model, rows, tmp_path / "run", max_steps=200, early_stopping_patience=3, **options)
    losses = lines(result, "dev_loss")[1:]
    best = losses.index(min(losses))
    assert result.metrics["stopped_early"]
    assert len(losses) == best + 1 + 3 < 200
    assert result.metrics["best_step"] == best + 1
    again = fit(str(result.best), rows, tmp_path / "again", max_steps=1)
    assert again.metrics["dev_loss_before"] == pytest.approx(min(losses), abs=1e-6)


def test_evaluation_does_not_disturb_training(model: str, rows: str, tmp_path: Path) -> None:
    often, rarely = (fit(model, rows, tmp_path / str(n), eval_steps=n) for n in (1, 8))
    assert lines(often, "loss") == lines(rarely, "loss")
    assert len(lines(often, "dev_loss")) == 9
    assert len(lines(rarely, "dev_loss")) == 2


def test_a_learning_rate_left_open_goes_by_method_and_width_and_stands_in_the_recipe_with_its_reason(
    model: str, rows: str, tmp_path: Path
) -> None:
    width = CONFIG["hidden_size"]
    for method in ("full", "lora"):
        result = fit(model, rows, tmp_path / method, learning_rate=None, method=method, max_steps=2, warmup_steps=0)
        rate, reason = default_learning_rate(method, width)
        recipe = (tmp_path / method / "recipe.yaml").read_text()
        assert f"# {reason}\nlearning_rate: {rate}\n" in recipe
        assert lines(result, "lr")[0] == rate
        again = TrainConfig.resolve(tmp_path / method / "recipe.yaml")
        assert again.learning_rate == rate
        fit(model, rows, tmp_path / method, learning_rate=None, method=method, max_steps=3, warmup_steps=0, resume=True)
    fit(model, rows, tmp_path / "given", max_steps=1)
    assert reason not in (tmp_path / "given" / "recipe.yaml").read_text()


def test_every_weight_moves(model: str, rows: str, tmp_path: Path) -> None:
    result = fit(model, rows, tmp_path / "run", max_steps=1, warmup_steps=0)
    before, after = (dict(afina.load_model(m).named_parameters()) for m in (model, result.best))
    assert [name for name in before if torch.equal(before[name], after[name])] == []


def test_checkpointed_layers_give_the_same_run(model: str, rows: str, tmp_path: Path) -> None:
    plain, recomputed = (fit(model, rows, tmp_path / str(on), gradient_checkpointing=on) for on in (False, True))
    assert lines(plain, "loss") == lines(recomputed, "loss")


def test_from_scratch(rows: str, tmp_path: Path) -> None:
    tiny_tokenizer().save(tmp_path / "tokenizer")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    result = finetune(
        quiet=True, init="random", config=str(tmp_path / "config.json"), tokenizer=str(tmp_path / "tokenizer"),
        data=rows, output_dir=str(tmp_path / "run"), max_length=64, max_steps=40, learning_rate=1e-2, threads=1,
    )  # fmt: skip
    assert result.metrics["dev_loss_before"] == pytest.approx(math.log(320), rel=0.02)  # knows nothing yet
    assert result.metrics["dev_loss"] < 5.0


@pytest.fixture(params=["at once", "one step later"])
def result_read(request: pytest.FixtureRequest) -> Iterator[str]:
    """When a step's result is looked at: as on a CPU, and as on a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param != "at once":
            patch.setattr(train.Run, "deferred", True)
        yield request.param


class Stop:
    """Asks to stop at the n-th poll."""

    def __init__(self, polls: int) -> None:
        self.left = polls

    def __enter__(self) -> Stop:
        return self

    def __exit__(self, *error: object) -> None: ...

    @property
    def requested(self) -> bool:
        self.left -= 1
        return self.left < 0


@pytest.mark.usefixtures("result_read")
@pytest.mark.parametrize("polls", [0, 1, 6, 9, 17])
def test_stopped_anywhere_and_resumed_is_the_same_run_bit_for_bit(
    model: str, rows: str, tmp_path: Path, polls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"gradient_accumulation_steps": 2, "eval_steps": 3, "save_steps": 3}
    straight = fit(model, rows, tmp_path / "straight", **options)
    monkeypatch.setattr(train, "StopRequest", lambda: Stop(polls))
    with pytest.raises(train.Interrupted):
        fit(model, rows, tmp_path / "run", **options)
    monkeypatch.undo()
    monkeypatch.setenv("AFINA_CACHE", str(tmp_path / "cache"))
    resumed = fit(model, rows, tmp_path / "run", resume=True, **options)
    for key in ("loss", "grad_norm", "lr", "dev_loss"):
        assert lines(resumed, key) == lines(straight, key)
    ends = [load_checkpoint(r.output_dir / "checkpoint-8") for r in (resumed, straight)]
    for group in ("weights", "exp_avg", "exp_avg_sq"):
        ours, theirs = (end.tensors(group) for end in ends)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert ends[0].meta["rng"] == ends[1].meta["rng"]
    same = ("dev_loss", "dev_loss_before", "best_step", "trained_tokens", "train_loss", "steps")
    assert {k: resumed.metrics[k] for k in same} == {k: straight.metrics[k] for k in same}


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Make the losses of these (0-based) steps NaN."""
    accumulate, step = train.accumulate, iter(range(1000))

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss = accumulate(*args, **kwargs)
        return loss * math.nan if next(step) in steps else loss

    monkeypatch.setattr(train, "accumulate", poisoned)


@pytest.mark.usefixtures("result_read")
def test_a_non_finite_step_moves_nothing_and_names_its_rows(
    model: str, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, {2, 3, 5})
    result = fit(model, rows, tmp_path / "run", save_steps=1, eval_steps=1, save_total_limit=9)
    assert result.metrics["skipped_steps"] == 3
    losses = lines(result, "dev_loss")
    assert losses[2] == losses[3] == losses[4] != losses[5] == losses[6]
    # No checkpoint is made of a skipped step.
    assert sorted(path.name for path in result.output_dir.glob("checkpoint-*")) == [
        f"checkpoint-{n}" for n in (1, 2, 5, 7, 8)
    ]
    two, five = (load_checkpoint(result.output_dir / f"checkpoint-{n}") for n in (2, 5))
    assert any(not torch.equal(two.tensors("weights")[n], t) for n, t in five.tensors("weights").items())
    assert (two.meta["updates"], five.meta["updates"]) == (2, 3)
    (first, *_) = lines(result, "rows")
    assert len(first) == 4
    assert all(row.startswith(f"{rows}: line ") for row in first)


@pytest.mark.usefixtures("result_read")
def test_three_non_finite_steps_in_a_row_stop_the_run(
    model: str, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, {1, 3, 4, 5})
    with pytest.raises(NonFiniteError, match=r"3 steps in a row .* step 6 with .*rows\.jsonl: line \d+") as raised:
        fit(model, rows, tmp_path / "run", save_steps=1)
    assert str(raised.value).endswith(
        "go on from the checkpoint of step 3 at a lower rate than 0.001: --resume --learning_rate 0.00033"
    )
    kept = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert kept == ["checkpoint-1", "checkpoint-3"]
    assert all(
        torch.isfinite(t).all() for t in load_checkpoint(tmp_path / "run/checkpoint-3").tensors("weights").values()
    )


@pytest.mark.parametrize("step", [4, 6])
def test_a_poisoned_weight_pushes_out_no_good_checkpoint(
    step: int, model: str, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the step that made it was fine by its own figures: at a step that is saved, and between two."""
    settle = train.Run._settle

    def spoils(self: train.Run) -> None:
        settle(self)
        if self.progress.step == step:
            with torch.no_grad():
                next(p for p in self.model.parameters() if p.requires_grad).view(-1)[0] = math.nan

    monkeypatch.setattr(train.Run, "_settle", spoils)
    with pytest.raises(NonFiniteError, match=r"not finite.*go on from the checkpoint of step 3 at a lower rate than"):
        fit(model, rows, tmp_path / "run", save_steps=1 if step == 4 else 3, max_steps=12, eval_steps=20)
    kept = [path.name for path in (tmp_path / "run").glob("checkpoint-*")]
    assert "checkpoint-3" in kept
    for name in kept:
        weights = load_checkpoint(tmp_path / "run" / name).tensors("weights")
        assert all(torch.isfinite(t).all() for t in weights.values())
    monkeypatch.setattr(train.Run, "_settle", settle)
    assert fit(
        model, rows, tmp_path / "run", save_steps=1 if step == 4 else 3, max_steps=12, eval_steps=20, resume=True
    )


@pytest.mark.parametrize(("steps", "told"), [({1, 3, 5}, True), ({1, 3}, False), ({1}, False)])
def test_a_run_that_skipped_much_says_so(
    steps: set[int],
    told: bool,
    model: str,
    rows: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    poison(monkeypatch, steps)
    finetune(model=model, data=rows, output_dir=str(tmp_path / "run"), max_length=64, max_steps=8, batch_size=4)
    said = capsys.readouterr().err
    assert ("WARNING: 3 of 8 steps were skipped, their loss or gradient not finite" in said) == told
    assert ("WARNING" in said) == told


def test_when_a_result_is_looked_at_changes_nothing(
    model: str, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same lines in the same order, and the same checkpoints, skipped steps included."""
    left = []
    for deferred in (False, True):
        monkeypatch.setattr(train.Run, "deferred", deferred)
        with monkeypatch.context() as patch:
            poison(patch, {2, 3, 5})
            result = fit(model, rows, tmp_path / str(deferred), eval_steps=3, save_steps=2, save_total_limit=9)
        text = (result.output_dir / "metrics.jsonl").read_text()
        written = [{k: v for k, v in json.loads(line).items() if "second" not in k} for line in text.splitlines()]
        ends = [load_checkpoint(path) for path in sorted(result.output_dir.glob("checkpoint-*"))]
        left.append((written, [end.meta["updates"] for end in ends], [end.tensors("weights") for end in ends]))
    assert left[0][:2] == left[1][:2]
    assert left[0][1] == [2, 3, 4, 5]  # of steps 2 and 8, and of 5 and 7: 4 and 6 are skipped
    for before, after in zip(left[0][2], left[1][2], strict=True):
        assert all(torch.equal(before[name], after[name]) for name in before)


READS = ("item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__")  # these wait for a GPU


def test_on_a_gpu_nothing_is_read_between_backward_and_update(
    model: str, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the host reads there would stop it until the GPU is done. The result of the step before, which has long come
    by then, is all that it looks at."""
    read: list[torch.Tensor] = []
    between: list[list[torch.Tensor]] = []  # what was read before each update, after the last backward pass
    results: list[torch.Tensor] = []
    backward, launched = torch.Tensor.backward, train.LaunchedStep.__init__

    def watched(name: str) -> Any:
        method = getattr(torch.Tensor, name)
        return lambda tensor, *args: (read.append(tensor), method(tensor, *args))[1]

    def ran_backward(tensor: torch.Tensor) -> None:
        backward(tensor)
        read.clear()

    def updated(*args: Any, **kwargs: Any) -> None:
        between.append(list(read))
        adamw_(*args, **kwargs)

    def launch(step: train.LaunchedStep, *args: Any) -> None:
        launched(step, *args)
        results.append(step.figures)

    monkeypatch.setattr(train.Run, "deferred", True)
    for name in READS:
        monkeypatch.setattr(torch.Tensor, name, watched(name))
    monkeypatch.setattr(torch.Tensor, "backward", ran_backward)
    monkeypatch.setattr(optim, "adamw_", updated)
    monkeypatch.setattr(train.LaunchedStep, "__init__", launch)
    fit(model, rows, tmp_path / "run", gradient_accumulation_steps=2, eval_steps=4, weight_decay=0.0)
    assert len(between) == len(results) == 8
    for step, tensors in enumerate(between):
        # An evaluation begins with a look at the last step, so after it nothing is left to read.
        expected = [results[step - 1]] if step not in (0, 4) else []
        assert [id(tensor) for tensor in tensors] == [id(tensor) for tensor in expected], step


@pytest.mark.gpu
def test_steps_never_wait_for_the_gpu(model: str, rows: str, tmp_path: Path) -> None:
    config = afina.TrainConfig(
        model=model, data=rows, output_dir=str(tmp_path / "run"), max_length=64, max_steps=8, batch_size=4,
        gradient_accumulation_steps=2, device="cuda",
    )  # fmt: skip
    tokenizer = load_tokenizer(model)
    with RunFolder(tmp_path / "run") as folder:
        data = train.read_data(config, tokenizer, progress=False)
        loaded = afina.load_model(model, device="cuda").train()
        run = train.Run(config, loaded, tokenizer, data, folder, lambda text: None)
        run.begin()
        run.stop, run.bar = StopRequest(), tqdm(disable=True)
        run._step()  # compiles the kernels and makes what is made once
        run._step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(4):
                run._step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        run._settle()
    written = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in written] == list(range(1, 7))
    assert all(math.isfinite(line["loss"]) and line["seconds"] > 0 for line in written)


def test_smoothing_and_z_loss_are_in_the_training_loss_alone(model: str, rows: str, tmp_path: Path) -> None:
    changed: dict[str, Any] = {"label_smoothing": 0.2, "z_loss": 0.01}
    plain = fit(model, rows, tmp_path / "plain", max_steps=1)
    result = fit(model, rows, tmp_path / "changed", max_steps=1, **changed)
    assert lines(result, "dev_loss")[0] == lines(plain, "dev_loss")[0]
    config = afina.TrainConfig.resolve(result.output_dir / "recipe.yaml")
    assert (config.label_smoothing, config.z_loss) == (0.2, 0.01)
    data = train.read_data(config, load_tokenizer(model), progress=False)
    (batch,) = Batches(data.train, batch_size=4, seed=42).step(0)
    with torch.no_grad():
        logits = afina.load_model(model)(batch.input_ids, cu_seqlens=batch.cu_seqlens)[0]
    targets = batch.labels[0].roll(-1)
    for run, options in ((plain, {}), (result, changed)):
        expected = cross_entropy_reference(logits.double(), targets, **options).item()
        assert lines(run, "loss") == [pytest.approx(expected, rel=1e-5)]


STATE = {
    "adamw": {"weights": torch.float32, "exp_avg": torch.float32, "exp_avg_sq": torch.float32},
    "adamw_8bit": {
        "weights": torch.float32,
        "exp_avg": torch.uint8,
        "exp_avg_absmax": torch.float32,
        "exp_avg_sq": torch.uint8,
        "exp_avg_sq_absmax": torch.float32,
    },
    "adamw_bf16": {"weights": torch.bfloat16, "exp_avg": torch.bfloat16, "exp_avg_sq": torch.bfloat16},
}


@pytest.mark.parametrize("variant", STATE)
def test_each_optim_learns_holds_what_it_says_and_resumes_bit_for_bit(
    model: str, rows: str, tmp_path: Path, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"optim": variant, "dtype": "bfloat16", "max_steps": 12, "save_steps": 3, "eval_steps": 6}
    straight = fit(model, rows, tmp_path / "straight", **options)
    assert straight.metrics["dev_loss"] < straight.metrics["dev_loss_before"]
    end = load_checkpoint(straight.output_dir / "checkpoint-12")
    assert {group: {t.dtype for t in end.tensors(group).values()} for group in end.groups} == {
        group: {dtype} for group, dtype in STATE[variant].items()
    }
    with monkeypatch.context() as patch:
        patch.setattr(train, "StopRequest", lambda: Stop(12))
        with pytest.raises(train.Interrupted):
            fit(model, rows, tmp_path / "run", **options)
    resumed = fit(model, rows, tmp_path / "run", resume=True, **options)
    for key in ("loss", "grad_norm", "dev_loss"):
        assert lines(resumed, key) == lines(straight, key)
    for group in end.groups:
        ours = load_checkpoint(resumed.output_dir / "checkpoint-12").tensors(group)
        assert all(torch.equal(ours[name], tensor) for name, tensor in end.tensors(group).items())


def test_stochastic_rounding_draws_from_the_seed(
    model: str, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = []

    def watched(*args: Any, **kwargs: Any) -> None:
        seeds.append(kwargs["seed"])
        adamw_(*args, **kwargs)

    monkeypatch.setattr(optim, "adamw_", watched)
    options: dict[str, Any] = {"dtype": "bfloat16", "max_steps": 1, "seed": 2**40 + 7}
    fit(model, rows, tmp_path / "bf16", optim="adamw_bf16", **options)
    assert min(seeds) == 7  # of the first group of parameters, in the 32 bits that the kernel takes
    seeds.clear()
    fit(model, rows, tmp_path / "fp32", optim="adamw", **options)
    assert set(seeds) == {None}


def test_disk_space_is_what_the_optimizer_holds(
    model: str, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = []
    begin = RunFolder.begin

    def watched(*args: Any, bytes_needed: int, **kwargs: Any) -> None:
        needed.append(bytes_needed)
        begin(*args, bytes_needed=bytes_needed, **kwargs)

    monkeypatch.setattr(RunFolder, "begin", watched)
    count = afina.load_model(model).num_parameters()
    for variant, held in (("adamw", 12), ("adamw_8bit", 6), ("adamw_bf16", 6)):
        out = tmp_path / variant
        fit(model, rows, out, optim=variant, dtype="bfloat16", max_steps=1, save_total_limit=2)
        expected = 3 * held * count + 4 * count  # three checkpoints, and the best model in fp32
        assert expected <= needed[-1] <= 1.02 * expected  # one absmax in 256 values, and in each small tensor


@pytest.mark.parametrize("backend", ["auto", "triton", "sdpa", "torch"])
def test_the_attention_backend_is_the_one_that_runs(
    model: str, tmp_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: set[str | None] = set()

    def watched(*args: Any, backend: str | None, **kwargs: Any) -> torch.Tensor:
        used.add(backend)
        return attention(*args, backend=backend, **kwargs)

    # Few and short rows: Triton's interpreter takes its time.
    pairs = [{"prompt": f"{i}", "completion": (" five", " lazy dog")[i % 2]} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    options: dict[str, Any] = {"max_steps": 1, "batch_size": 2, "packing": backend != "sdpa"}
    plain = fit(model, str(tmp_path / "rows.jsonl"), tmp_path / "plain", **options)
    monkeypatch.setattr(engine_model, "attention", watched)
    result = fit(model, str(tmp_path / "rows.jsonl"), tmp_path / backend, attention_backend=backend, **options)
    assert used == {None if backend == "auto" else backend}
    for key in ("loss", "dev_loss"):
        assert lines(result, key) == pytest.approx(lines(plain, key), rel=1e-5)


def test_lean_loss_is_for_training_and_gives_the_same_loss(
    model: str, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []

    def watched(*args: Any, lean: bool, **kwargs: Any) -> torch.Tensor:
        used.append((lean, torch.is_grad_enabled()))
        return linear_cross_entropy(*args, lean=lean, **kwargs)

    plain = fit(model, rows, tmp_path / "plain", max_steps=2)
    monkeypatch.setattr(engine_model, "linear_cross_entropy", watched)
    lean = fit(model, rows, tmp_path / "lean", max_steps=2, lean_loss=True)
    assert set(used) == {(True, True), (False, False)}  # training steps, evaluations
    for key in ("loss", "dev_loss"):
        assert lines(lean, key) == pytest.approx(lines(plain, key), rel=1e-5)


def test_what_a_resumed_run_may_change(model: str, rows: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    fit(model, rows, out, max_steps=2)
    for name, value in (("label_smoothing", 0.1), ("z_loss", 1e-4), ("optim", "adamw_8bit")):
        with pytest.raises(AfinaError, match=f"cannot be resumed.*{name}: .* -> {value!r}"):
            fit(model, rows, out, max_steps=3, resume=True, **{name: value})
    resumed = fit(model, rows, out, max_steps=3, resume=True, attention_backend="torch", lean_loss=True)
    assert resumed.metrics["steps"] == 3


def test_a_state_of_another_version_is_refused_in_one_line(model: str, rows: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    fit(model, rows, out, max_steps=2, save_steps=2)
    with (out / "metrics.jsonl").open("a") as file:
        file.write("[" * 100_000 + "\n")  # no line of ours, and deeper than JSON is read
    (checkpoint,) = out.glob("checkpoint-*")
    state = json.loads((checkpoint / "state.json").read_text())
    del (fewer := json.loads(json.dumps(state)))["meta"]["progress"]["tokens"]
    del (older := json.loads(json.dumps(state)))["meta"]["rng"]
    newer, other = json.loads(json.dumps(state)), json.loads(json.dumps(state))
    newer["meta"]["progress"]["epoch"] = 1
    other["meta"]["progress"]["step"] = "2"
    words = {"progress has no tokens": fewer, "needs updates": older, "has a epoch": newer, "has step = '2'": other}
    words["this version reads"] = state | {"format": "afina-checkpoint-2"}
    for found, changed in words.items():
        (checkpoint / "state.json").write_text(json.dumps(changed))
        (checkpoint / "manifest.json").unlink()
        write_manifest(checkpoint, {}, format=FORMAT)
        with pytest.raises(AfinaError, match=found):
            fit(model, rows, out, max_steps=4, resume=True)
    (checkpoint / "state.json").write_text(json.dumps(state))
    (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint, {}, format=FORMAT)
    assert fit(model, rows, out, max_steps=4, resume=True).metrics["steps"] == 4


def test_finetune_takes_a_config_or_settings_but_not_both(model: str, rows: str, tmp_path: Path) -> None:
    config = afina.TrainConfig(model=model, data=rows, output_dir=str(tmp_path / "run"))
    with pytest.raises(TypeError, match="not both"):
        finetune(config, max_steps=3)
    with pytest.raises(AfinaError, match="batch_size"):
        fit(model, rows, tmp_path / "run", batch_size=0)
    assert not (tmp_path / "run").exists()
