"""Known bugs of fine-tuning engines, put into the code one at a time: the tests must see every one.

    python tests/faults/mutants.py                          # all, a table at the end; status 1 if one was not seen
    python tests/faults/mutants.py packing-leak z-loss-sign   # these alone

Each ``Mutant`` is a replacement in one file, and a test that is to fail for it. All happens in a copy of the code.
``test_mutants.py`` keeps the list in step with it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

REPO = Path(__file__).resolve().parent.parent.parent


class Mutant(NamedTuple):
    """``old``, which stands in ``file`` once, becomes ``new``; ``test`` then fails. ``bug`` says what is wrong."""

    name: str
    bug: str
    file: str
    old: str
    new: str
    test: str

    def apply(self, root: Path) -> None:
        path = root / self.file
        path.write_text(path.read_text().replace(self.old, self.new))


def seen_by(file: str, test: str) -> str:
    """A test of the fast part, as pytest names it."""
    return f"tests/{file}::{test}"


MUTANTS = (
    Mutant(
        "mean-of-means",
        "accumulation averages the means of micro-batches",
        "engine/training_step.py",
        "objective(model, mb, divisor=loss_tokens)",
        "objective(model, mb, divisor=mb.loss_tokens * len(micro_batches))",
        seen_by("engine/test_training_step.py", "test_accumulation_does_not_change_the_gradient"),
    ),
    Mutant(
        "label-shift",
        "a token predicts itself",
        "engine/model.py",
        "targets = labels.roll(-1, dims=1)",
        "targets = labels.clone()",
        seen_by("engine/test_model.py", "test_loss_is_shifted_by_one"),
    ),
    Mutant(
        "mask-edge",
        "the first trained token of a completion is masked",
        "loaders/text/encode.py",
        "trained[first:last] = True",
        "trained[first + (first > 0) : last] = True",
        seen_by("loaders/text/test_render.py", "test_prompt_and_completion"),
    ),
    Mutant(
        "pad-is-eos",
        "a token is taken for padding by its id",
        "loaders/data/batches.py",
        "np.concatenate([loss_mask for _, loss_mask in pairs])",
        "np.concatenate([loss_mask & (ids != pairs[0][0][-1]) for ids, loss_mask in pairs])",
        seen_by("loaders/data/test_batches.py", "test_packed_rows_lie_one_after_another"),
    ),
    Mutant(
        "double-bos",
        "the template's BOS gets another in front",
        "loaders/text/tokenizer.py",
        "        while text.startswith(bos, start):\n            start += len(bos)\n",
        "",
        seen_by("loaders/text/test_render.py", "test_exactly_one_bos_everywhere"),
    ),
    Mutant(
        "packing-leak",
        "packed documents see each other",
        "engine/model.py",
        "context = ForwardContext(tables, cu_seqlens, cache,",
        "context = ForwardContext(tables, None if cache is None else cu_seqlens, cache,",
        seen_by("engine/test_model.py", "test_packed_documents_do_not_see_each_other"),
    ),
    Mutant(
        "positions-run-on",
        "positions do not restart in packed documents",
        "engine/rope_tables.py",
        "device=cu_seqlens.device) - starts[document]",
        "device=cu_seqlens.device) - starts[document] * 0",
        seen_by("engine/test_model.py", "test_padding_changes_nothing"),
    ),
    Mutant(
        "bf16-stagnation",
        "bfloat16 weights take small updates themselves",
        "engine/optim.py",
        "p.detach() if p.dtype == own else self._master(n, p) for n, p",
        "p.detach() for n, p",
        seen_by("engine/test_optim.py", "test_bf16_weights_move_under_updates_smaller_than_their_rounding"),
    ),
    Mutant(
        "decay-on-norms",
        "weight decay shrinks norms and biases",
        "engine/model.py",
        'if p.dim() == 2 and "embed." not in name}',
        'if "embed." not in name}',
        seen_by("engine/test_model.py", "test_decay_is_for_matrices"),
    ),
    Mutant(
        "untied-head",
        "of a tied matrix one use gives no gradient",
        "engine/model.py",
        "return self.embed.weight if self.config.tie_embeddings",
        "return self.embed.weight.detach() if self.config.tie_embeddings",
        seen_by("engine/test_model.py", "test_tied_gradient_is_the_sum_of_both_uses"),
    ),
    Mutant(
        "eval-with-dropout",
        "the dev set is measured in training mode",
        "engine/likelihood.py",
        "    was_training = model.training\n    model.eval()\n    result:",
        "    was_training = model.training\n    result:",
        seen_by("engine/test_evaluate.py", "test_dropout_is_off_while_the_loss_is_measured"),
    ),
    Mutant(
        "rope-scaling-dropped",
        "Llama 3's RoPE scaling is not applied",
        "engine/rope_tables.py",
        'if rope.kind == "llama3":',
        'if rope.kind == "llama 3":',
        seen_by("loaders/families/test_families.py", "test_rope_far_away"),
    ),
    Mutant(
        "lora-scale",
        "the adapter's product is added without alpha / r",
        "engine/linear.py",
        "out.addmm_(h[:, at], b[bt, : part.rank].t(), alpha=part.scale)",
        "out.addmm_(h[:, at], b[bt, : part.rank].t())",
        seen_by("engine/test_lora.py", "test_peft_computes_what_we_do_and_back"),
    ),
    Mutant(
        "merge-in-bf16",
        "an adapter is merged in 16 bits",
        "engine/linear.py",
        "        merged = self.sum(weight.float())",
        "        merged = self.sum(weight.float()).bfloat16().float()",
        seen_by("export/test_merge.py", "test_a_merged_model_computes_what_base_and_adapter_do"),
    ),
    Mutant(
        "schedule-off-by-one",
        "the schedule is one update late",
        "engine/train.py",
        "self.config.lr_scheduler_type, progress.step, self.total",
        "self.config.lr_scheduler_type, progress.step - 1, self.total",
        seen_by(
            "engine/test_run_inputs.py",
            "test_a_learning_rate_left_open_goes_by_method_and_width_and_stands_in_the_recipe_with_its_reason",
        ),
    ),
    Mutant(
        "clip-before-accumulation",
        "gradients are clipped before the last micro-batch is in them",
        "engine/training_step.py",
        "            loss = accumulate(self.model, micro_batches, self.objective, poll=poll_and_land)\n",
        "            kept, weights = self.max_grad_norm, self.optimizer.params.values()\n"
        "            clip = lambda: any(p.grad is not None for p in weights) and self.optimizer.clip_(kept)\n"
        "            loss = accumulate(self.model, micro_batches, self.objective, poll=clip)\n",
        seen_by("engine/test_training_step.py", "test_a_step_clips_its_whole_gradient_once"),
    ),
    Mutant(
        "epsilon-inside-root",
        "epsilon is added to the second moment and not to its root",
        "kernels/adamw_triton.py",
        "(m / (tl.sqrt(v) * v_correction + scalars.eps))",
        "(m / (tl.sqrt(v * v_correction * v_correction + scalars.eps)))",
        seen_by("kernels/test_adamw.py", "test_triton"),
    ),
    Mutant(
        "no-bias-correction",
        "moments are not corrected for their beginning at 0",
        "engine/optim.py",
        "            step=self.num_updates if count is None else count,\n",
        "            step=10**6,\n",
        seen_by("engine/test_optim.py", "test_equals_torch_adamw_over_twenty_steps"),
    ),
    Mutant(
        "z-loss-sign",
        "the z-loss is subtracted",
        "kernels/cross_entropy_torch.py",
        "loss += z_loss * lse.square()",
        "loss -= z_loss * lse.square()",
        seen_by("kernels/test_cross_entropy.py", "test_logits"),
    ),
    Mutant(
        "ignored-rows-counted",
        "the mean divides by ignored positions too",
        "kernels/cross_entropy_chunks.py",
        'scale = 1.0 / max(1, count) if options.reduction == "mean"',
        'scale = 1.0 / max(1, rows) if options.reduction == "mean"',
        seen_by("kernels/test_cross_entropy.py", "test_linear"),
    ),
    Mutant(
        "gqa-shuffled",
        "query heads use the key heads of others",
        "kernels/attention_torch.py",
        "x.unflatten(2, (heads, -1)).permute(0, 2, 3, 1, 4)",
        "x.unflatten(2, (-1, heads)).permute(0, 3, 2, 1, 4)",
        seen_by("kernels/test_attention.py", "test_rectangles"),
    ),
    Mutant(
        "window-off-by-one",
        "a query sees one key too many",
        "kernels/attention_torch.py",
        "seen & (j > i - window)",
        "seen & (j >= i - window)",
        seen_by("kernels/test_attention.py", "test_which_keys_are_seen"),
    ),
    Mutant(
        "softcap-after-mask",
        "hidden keys come back as the cap's lower end",
        "kernels/attention_torch.py",
        "    # This is in place, as the softmax kernels read",
        "    if options.softcap is not None:\n        s.clamp_(min=-options.softcap)\n"
        "    # This is in place, as the softmax kernels read",
        seen_by("kernels/test_attention.py", "test_rectangles"),
    ),
    Mutant(
        "rng-not-restored",
        "a resumed run draws other random numbers",
        "engine/run_state.py",
        "    torch.set_rng_state(torch.tensor(list(rng), dtype=torch.uint8))\n",
        "",
        seen_by("engine/test_run_state.py", "test_dropout_goes_on_with_the_random_numbers_of_the_checkpoint"),
    ),
    Mutant(
        "best-by-train-loss",
        "the best model is picked by the loss it trained on",
        "engine/train.py",
        "        better = progress.step > 0 and (figure, -loss) > (progress.best_dev_metric, -progress.best_dev_loss)",
        "        mean = progress.loss_sum / max(1, progress.step)\n"
        "        better = progress.step > 0 and mean < self.__dict__.setdefault('least', math.inf)\n"
        "        self.least = mean if better else self.__dict__.setdefault('least', math.inf)",
        seen_by("engine/test_train.py", "test_best_is_the_lowest_dev_loss_and_patience_stops"),
    ),
    Mutant(
        "moments-not-restored",
        "a resumed run begins with moments of 0",
        "engine/optim.py",
        "                tensor.copy_(state[group][name])\n",
        '                tensor.copy_(state[group][name] if group == "weights" else torch.zeros_like(tensor))\n',
        seen_by("engine/test_optim.py", "test_state_comes_back_bit_for_bit_and_foreign_state_is_refused"),
    ),
    Mutant(
        "cache-position",
        "a cached token stands one place further",
        "engine/kv_cache.py",
        "positions = before[:, None] + torch.arange(grown, device=input_ids.device)",
        "positions = before[:, None] + torch.arange(grown, device=input_ids.device) + (before[:, None] > 0)",
        seen_by("engine/test_kv_cache.py", "test_cached_equals_uncached"),
    ),
    Mutant(
        "adapter-grows-twice",
        "the gradient of an adapter's output lacks its scale",
        "engine/linear.py",
        "torch.mm(out, up, out=dh[:, at]).mul_(part.scale)",
        "torch.mm(out, up, out=dh[:, at])",
        seen_by("engine/test_lora.py", "test_five_steps_are_those_of_peft"),
    ),
)


class Copy:
    """The repository's files in a folder of their own, where tests run on them."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "afina"
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPO, check=True, capture_output=True, text=True)
        for name in filter(None, listed.stdout.split("\0")):
            source, target = REPO / name, self.root / name
            if source.is_symlink() or source.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target, follow_symlinks=False)
        if (REPO.parent / "shared").is_dir():
            (folder / "shared").symlink_to(REPO.parent / "shared")

    def fails(self, test: str) -> bool:
        """Whether what `make test` runs of ``test`` fails. Raises RuntimeError where pytest cannot run it."""
        environment = os.environ | {
            "PYTHONPATH": str(self.root),
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        options = ["-x", "-q", "-p", "no:cacheprovider", "--tb=no", "-m", "not slow"]
        command = [sys.executable, "-m", "pytest", *options, test]
        done = subprocess.run(command, cwd=self.root, env=environment, capture_output=True, text=True, timeout=1800)
        if done.returncode not in (0, 1):
            raise RuntimeError(
                f"{' '.join(command)}: status {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
            )
        return done.returncode == 1


def run(mutants: list[Mutant]) -> int:
    """Try ``mutants``, print a table, and return how many were not seen.

    A test that fails with a bug has seen it where it passes without: each is run again on the code as it is.
    """
    missed = 0
    with tempfile.TemporaryDirectory(prefix="afina-mutants-") as folder:
        copy = Copy(Path(folder))
        print("| bug | what is wrong | seen by | s |\n|---|---|---|---|", flush=True)
        for mutant in mutants:
            path = copy.root / mutant.file
            before, started = path.read_text(), time.monotonic()
            mutant.apply(copy.root)
            seen = copy.fails(mutant.test)
            path.write_text(before)
            if seen and copy.fails(mutant.test):
                sys.exit(f"{mutant.test} fails without any bug: mend that first")
            missed += not seen
            shown = mutant.test if seen else "NOTHING"
            print(f"| {mutant.name} | {mutant.bug} | {shown} | {time.monotonic() - started:.0f} |", flush=True)
    print(f"{len(mutants) - missed} of {len(mutants)} seen")
    return missed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="; ".join(mutant.name for mutant in MUTANTS))
    args = parser.parse_args()
    known = {mutant.name: mutant for mutant in MUTANTS}
    if unknown := [name for name in args.names if name not in known]:
        parser.error(f"no bug is called {unknown[0]}; expected of {', '.join(known)}")
    sys.exit(1 if run([known[name] for name in args.names] or list(MUTANTS)) else 0)


if __name__ == "__main__":
    main()
