"""The sections of the report, one function each: from facts and measurements to HTML."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from afina.engine.intervals import Interval, bootstrap, ratio
from afina.engine.task_results import LOWER_IS_BETTER, TaskResult
from afina.printable import printable
from afina.report.charts import Chart, Dot, before_after, curves, heat_map, histogram, levels, spectra
from afina.report.facts import RunFacts
from afina.report.measure import PARTS, SAME_CHANGE, Answers, Measured
from afina.report.page_parts import Section, facts_list, figure, note, shown_rows, table, text
from afina.report.tokens import legend, token_spans, token_table
from afina.report.verdict import FORGOT, Judged
from afina.report.weights_change import MatrixChange, WeightsChange

OTHER_SCALES = {*LOWER_IS_BETTER, "chrf", "bleu", "log_likelihood"}  # than from 0 to 1, higher being better
SHOWN_ANSWERS = 4  # of the rows that won, and as many that lost
RECIPE_TEXT = 20_000


def sections(facts: RunFacts, judged: Judged, found: Measured, curves: str) -> list[Section]:
    """All sections that there is something to say in, in order."""
    return [
        Section("training", "Training", curves),
        Section("dev", "Dev rows, before and after", dev_rows(facts, judged, found)),
        Section("tokens", "Token by token", tokens(found)),
        Section("answers", "Answers, before and after", answers(found)),
        Section("forgetting", "Forgetting", forgetting(found)),
        Section("weights", "What changed in the weights", weights(found)),
        Section("data", "Data", data(facts)),
        Section("time", "Time and memory", time_and_memory(facts)),
        Section("recipe", "Recipe and versions", recipe(facts)),
    ]


def missing(found: Measured, part: str) -> str:
    """Why a part is not there, and the command that measures it."""
    return note(f"Not measured: {found.missing.get(part, 'nothing to measure')}. Measure it with: afina report RUN")


def training(facts: RunFacts) -> str:
    losses = facts.series(facts.steps, "loss")
    if not losses:
        return note("No training step has been done yet.")
    best = facts.best_step
    ring = (best, value) if best is not None and (value := facts.dev_loss(best)) is not None else None
    charts = [
        curves(
            "loss", "Loss, nats a token", line=losses, label="training loss", smooth=True, marks=facts.dev_losses,
            marks_label="dev loss", best=ring,
        )
    ]  # fmt: skip
    rates = facts.series(facts.steps, "lr")
    if rates:
        charts.append(curves("rate", "Learning rate", line=rates, label="learning rate"))
    clip = facts.config.max_grad_norm
    norms = [point for point in facts.series(facts.steps, "grad_norm") if point[1] > 0]
    if norms:
        level = (clip, f"clipped to {clip:g}") if clip else None
        charts.append(
            curves(
                "gradient", "Gradient norm, before clipping", line=norms, label="gradient norm", smooth=True,
                level=level, log=True,
            )
        )  # fmt: skip
    metric = facts.config.eval_metric
    if metric != "loss" and (points := facts.series(facts.evaluations, f"dev_{metric}")):
        charts.append(curves("metric", f"{metric} on dev rows", line=points, label=metric))
    skipped = sum(1 for line in facts.steps if line.get("skipped"))
    told = (
        note(f"{skipped:,} steps had no finite loss or gradient and left the weights as they were.") if skipped else ""
    )
    return told + f'<div class="grid">{"".join(map(figure, charts))}</div>'


def dev_rows(facts: RunFacts, judged: Judged, found: Measured) -> str:
    rows = facts.dev_rows
    if rows is None or rows.after is None:
        return note("The dev rows were not measured both before and after training, so there is nothing to compare.")
    before, after = (_loss(sums, rows.tokens) for sums in (rows.before, rows.after))
    dots = [("dev loss", Dot(*before), Dot(*after))]
    charts = [before_after("dev-loss", "Dev loss, with 95 % intervals", dots, unit="nats a token")]
    change = (rows.after - rows.before) / rows.tokens
    charts.append(histogram("changes", "Change of the loss, row by row", change.tolist(), of="dev rows"))
    perplexity = [(f"{math.exp(min(v, 700.0)):,.2f}" for v in interval) for interval in (before, after)]
    cells = ["{} ({} to {})".format(*values) for values in perplexity]
    metrics = [
        ("loss, nats a token", *(f"{i.value:.4f} ({i.low:.4f} to {i.high:.4f})" for i in (before, after))),
        ("perplexity", *cells),
    ]
    if judged.higher_is_better:
        metrics.append((judged.name, f"{judged.before:.4f}", f"{judged.after:.4f}"))
    fell, rose = int((change < -SAME_CHANGE).sum()), int((change > SAME_CHANGE).sum())
    body = f'<div class="grid">{"".join(map(figure, charts))}</div>'
    body += table(("metric", "before", "after"), metrics, "Dev rows before training and with the best model")
    if (count := len(facts.dev_losses) - 1) > 1:
        body += note(
            f"The best of {count} evaluations on these same rows was kept, so its figure is a little better than it "
            "would be on rows that had no part in the choice."
        )
    told = (
        f"{fell:,} rows won, {rose:,} lost and {len(change) - fell - rose:,} unchanged (by {SAME_CHANGE} nats a token)"
    )
    body += f"<p>{text(told)}.</p>"
    if "rows" in found.missing:
        return body + missing(found, "rows")
    for heading, shown in (
        ("Lost: the loss rose the most", found.lost),
        ("Won: the loss fell the most", found.won),
        ("Unchanged", found.same),
    ):
        if shown:
            body += f"<h3>{heading}</h3>{shown_rows(shown)}"
    return body + note("Underlined: what the model learns to write. The rest is its prompt.")


def _loss(sums: np.ndarray, counts: np.ndarray) -> Interval:
    return bootstrap(np.stack([sums, counts], axis=1), ratio)


def tokens(found: Measured) -> str:
    if not found.tokens:
        return missing(found, "tokens")
    body = note(
        "The row whose loss rose the most, the one where it fell the most, and two between. Each learnt token is "
        "underlined and coloured by its probability; in the change, blue is a loss that fell and orange one that rose."
    )
    body += legend() + legend(change=True)
    for row in found.tokens:
        end = row.start + len(row.after)
        part = "" if len(row.after) == row.length else f", tokens {row.start:,} to {end:,} of {row.length:,}"
        title = f"{row.where}{part}"
        body += f"<h3>{text(title)}</h3>"
        sides = "".join(
            f"<div><h4>{name}</h4>{token_spans(views)}</div>"
            for name, views in (("Before", row.before), ("After", row.after))
        )
        body += f'<div class="beside">{sides}</div>'
        body += f"<h4>Change</h4>{token_spans(row.after, row.before)}"
        numbers = token_table(row.after, row.before, caption=f"Every token of {printable(title)}")
        body += f"<details><summary>The numbers</summary>{numbers}</details>"
    return body


def answers(found: Measured) -> str:
    measured = found.answers
    if measured is None:
        return missing(found, "answers")
    one, two, compared = measured.before, measured.after, measured.comparison
    count = len(two.rows)
    of = "all" if count == measured.of else f"{count:,} of {measured.of:,}"
    body = f"<p>{text(f'Task {measured.task}, since {measured.why}. Asked: {of} dev rows.')}</p>"
    names = [name for name in two.intervals if name in one.intervals]
    rows = []
    for name in names:
        change = compared.differences.get(name)
        told = "-" if change is None else f"{change.difference:+.3f} ({change.low:+.3f} to {change.high:+.3f})"
        sides = (
            f"{r.metrics[name]:.3f} ({r.intervals[name][0]:.3f} to {r.intervals[name][1]:.3f})" for r in (one, two)
        )
        rows.append((f"{name} (lower is better)" if name in LOWER_IS_BETTER else name, *sides, told))
    body += table(("metric", "before", "after", "change"), rows, "Metrics with 95 % intervals")
    dots = [(n, _dot(one, n), _dot(two, n)) for n in names if n not in OTHER_SCALES]
    if dots:
        chart = before_after("answers-metrics", "Metrics of the answers, with 95 % intervals", dots)
        body += f'<div class="grid">{figure(chart)}</div>'
    won, lost, same = len(compared.won), len(compared.lost), len(compared.unchanged)
    body += f"<p>{text(f'By {compared.metric}: {won} rows won, {lost} lost, {same} unchanged.')}</p>"
    for heading, numbers in (("Lost", compared.lost), ("Won", compared.won), ("Unchanged", compared.unchanged)):
        if numbers:
            body += f"<h3>{heading}</h3>{_answer_rows(measured, numbers)}"
    return body


def _dot(result: TaskResult, name: str) -> Dot:
    return Dot(result.metrics[name], *result.intervals[name])


def _answer_rows(measured: Answers, numbers: Sequence[int]) -> str:
    """Rows with both answers, those whose score changed the most first."""
    one, two = measured.before, measured.after
    order = sorted(numbers, key=lambda n: (-abs(two.scores[n] - one.scores[n]), n))[:SHOWN_ANSWERS]
    items = []
    for n in order:
        row = two.rows[n]
        said = (
            ("asked", row["prompt"]),
            ("wanted", row["reference"]),
            ("before", one.rows[n]["prediction"]),
            ("after", row["prediction"]),
        )
        cells = "".join(f"<dt>{name}</dt><dd>{text(value, 500)}</dd>" for name, value in said)
        scores = f"{one.scores[n]:.3f} → {two.scores[n]:.3f}"
        items.append(
            f'<li><p class="where">{text(row["where"])}<span class="change">{scores}</span></p>'
            f'<dl class="answers">{cells}</dl></li>'
        )
    return f'<ol class="rows">{"".join(items)}</ol>'


def forgetting(found: Measured) -> str:
    measured = found.forgetting
    if measured is None:
        return missing(found, "forgetting")
    body = f"<p>{text(measured.line)}.</p>"
    body += facts_list(
        [
            ("before", f"{measured.before:.4f} nats a token"),
            ("after", f"{measured.after:.4f} nats a token"),
            ("text", f"{measured.source}: {measured.passages:,} passages, {measured.tokens:,} tokens"),
        ]
    )
    changes = list(found.passages)
    chart = histogram("passages", "Change of the loss, passage by passage", changes, of="passages", bins=20)
    body += f'<div class="grid">{figure(chart)}</div>'
    return body + note(
        f"Text that has nothing to do with the rows. The model forgot where the whole interval lies above {FORGOT:g}, "
        f"and did not where it lies below. A model that never read such text well has little to forget."
    )


def weights(found: Measured) -> str:
    measured = found.weights
    if measured is None:
        return missing(found, "weights")
    told = []
    if measured.relative is not None:
        told.append(("change of all weights", f"{measured.relative:.2%} of their size"))
    if measured.moved is not None:
        told.append(("elements that moved", f"{measured.moved:.2%}, as {measured.dtype}"))
    ranks = [m.effective_rank for m in measured.matrices if m.effective_rank is not None]
    if ranks:
        largest = max(len(m.spectrum) for m in measured.matrices)
        told.append(("effective rank", f"{np.mean(ranks):.1f} of {largest} on average"))
    body = facts_list(told)
    for line in measured.notes:
        body += note(f"{line}.")
    charts = list(_weight_charts(measured))
    body += f'<div class="grid">{"".join(map(figure, charts))}</div>'
    return body + _other_weights(measured)


def _weight_charts(measured: WeightsChange) -> Iterator[Chart]:
    inner = [m for m in measured.matrices if m.layer is not None]

    def cells(value: str) -> dict[tuple[str, int], float]:
        found = {(m.kind, m.layer): getattr(m, value) for m in inner if not m.kind.endswith((".bias", "norm"))}
        return {key: number for key, number in found.items() if number is not None}  # type: ignore[misc]

    if shown := cells("relative"):
        yield heat_map("relative", "Change relative to the matrix's size", "change", shown, lambda v: f"{v:.2%}")
    # Where every matrix has the same share, the figure of all together says it.
    if (shown := cells("moved")) and levels(shown.values()):
        yield heat_map("moved", f"Elements that moved, as {measured.dtype}", "share", shown, lambda v: f"{v:.1%}")
    if not (adapted := [m for m in inner if m.spectrum]):
        return
    rank = max(len(m.spectrum) for m in adapted)
    shown = {(m.kind, m.layer): m.effective_rank or 0.0 for m in adapted}  # type: ignore[misc]
    yield heat_map("ranks", f"Effective rank of B A, at most {rank}", "rank", shown, lambda v: f"{v:.1f}")
    kinds: dict[str, list[MatrixChange]] = {}
    for m in adapted:
        kinds.setdefault(m.kind, []).append(m)
    means = {kind: _mean_spectrum(matrices) for kind, matrices in kinds.items()}
    yield spectra("spectra", "Singular values of B A, mean over layers", means)


def _mean_spectrum(matrices: Sequence[MatrixChange]) -> list[float]:
    """The mean over layers of singular values as shares of the largest; zeros where an adapter is still zero."""
    size = min(len(m.spectrum) for m in matrices)
    shares = [[v / m.spectrum[0] if m.spectrum[0] else 0.0 for v in m.spectrum[:size]] for m in matrices]
    return np.mean(shares, axis=0).tolist()


def _other_weights(measured: WeightsChange) -> str:
    """What is in no layer, and the vectors."""
    others = [m for m in measured.matrices if m.layer is None or m.kind.endswith((".bias", "norm"))]
    if not others:
        return ""
    rows = [
        (
            m.name,
            "-" if m.relative is None else f"{m.relative:.2%}",
            "-" if m.moved is None else f"{m.moved:.1%}",
        )
        for m in others[:200]
    ]
    inner = table(("tensor", "relative change", "elements that moved"), rows, "Embeddings, norms and biases")
    return f"<details><summary>Embeddings, norms and biases</summary>{inner}</details>"


def data(facts: RunFacts) -> str:
    found = facts.data
    if not found:
        return note("The run folder does not say what became of the rows: it is of an earlier version.")
    lengths = found.get("train_lengths")
    pairs: list[tuple[str, object]] = [("training rows from", found.get("data")), ("kind of row", found.get("schema"))]
    pairs += [("dev rows from", found["val_file"])] if "val_file" in found else []
    names = {
        "rows": "rows read",
        "usable": "rows usable",
        "train_rows": "training rows",
        "dev_rows": "dev rows",
        "train_tokens": "training tokens",
        "train_trained_tokens": "of them learnt",
        "dev_trained_tokens": "dev tokens measured",
        "empty": "empty rows",
        "duplicates": "duplicates removed",
        "dropped": "too long, dropped",
        "truncated": "too long, cut",
        "untrained": "without a token to learn",
        "bad_lines": "bad lines skipped",
        "split": "split into pieces",
    }
    always = {"rows", "usable", "train_rows", "dev_rows", "train_tokens", "train_trained_tokens", "dev_trained_tokens"}
    pairs += [
        (told, f"{found[name]:,}")
        for name, told in names.items()
        if isinstance(found.get(name), int) and (name in always or found[name])
    ]
    if lengths and isinstance(lengths, dict):
        told = f"median {lengths.get('p50')}, 95 % below {lengths.get('p95')}, longest {lengths.get('max')} tokens"
        pairs.append(("length of rows", told))
    return facts_list(pairs)


def time_and_memory(facts: RunFacts) -> str:
    done, seconds = facts.finished, facts.seconds
    speed = facts.total("tokens") / seconds if seconds else 0.0
    learnt = facts.total("trained_tokens") / seconds if seconds else 0.0
    pairs: list[tuple[str, object]] = [
        ("training", duration(seconds)),
        ("tokens a second", f"{speed:,.0f}"),
        ("learnt tokens a second", f"{learnt:,.0f}"),
        ("tokens seen", f"{facts.total('tokens'):,.0f}"),
        ("learnt tokens seen", f"{facts.total('trained_tokens'):,.0f}"),
    ]
    if isinstance(peak := done.get("peak_memory_gb"), int | float):
        pairs.append(("peak memory", f"{peak:.2f} GB"))
    pairs += [("machine", facts.started.get("platform", "-")), ("begun", facts.started.get("time", "-"))]
    if facts.resumed:
        pairs.append(("resumed", ", ".join(map(_resumed, facts.resumed[:20]))))
    return facts_list(pairs)


def _resumed(one: dict[str, Any]) -> str:
    """Where a run was gone on with, and what was lowered there, as in "at step 8 (learning_rate 0.001 -> 0.00033)"."""
    lowered = one.get("lowered")
    pairs = lowered.items() if isinstance(lowered, dict) else ()
    told = [f"{name} {two[0]} -> {two[1]}" for name, two in pairs if isinstance(two, list) and len(two) == 2]
    return f"at step {one.get('step')}" + (f" ({', '.join(told)})" if told else "")


def recipe(facts: RunFacts) -> str:
    pairs = list(facts.versions.items())
    pairs.append(("git commit of the working folder", facts.started.get("git_commit") or "none"))
    for name, value in facts.contents.items():
        hashed = name.endswith("_sha256")
        told = f"{str(value)[:16]} …" if hashed else f"{value:,}" if isinstance(value, int) else value
        pairs.append((name.replace("_sha256", ", SHA-256"), told))
    shown = facts.config.to_yaml()
    inner = f'<pre class="recipe" tabindex="0" role="region" aria-label="The resolved recipe">{_lines(shown)}</pre>'
    return facts_list(pairs) + f"<details><summary>The resolved recipe</summary>{inner}</details>"


def _lines(shown: str) -> str:
    return "\n".join(text(line, 400) for line in shown[:RECIPE_TEXT].splitlines())


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def not_measured(found: Measured) -> list[str]:
    return [f"{PARTS[name]}: {why}" for name, why in found.missing.items()]
