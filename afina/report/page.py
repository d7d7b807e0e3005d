"""The report's page: one self-contained HTML file, without scripts, for light and dark, wide and narrow.

Whatever comes from rows, files or settings is escaped, and a Content-Security-Policy forbids everything but the page's
own style. The page holds no time of its own making: the same run gives the same bytes.
"""

from __future__ import annotations

from pathlib import Path

from afina.report.facts import RunFacts
from afina.report.inspect_page import POLICY
from afina.report.measure import Measured
from afina.report.page_parts import Section, facts_list, note, text
from afina.report.page_style import REPORT_CSS
from afina.report.sections import duration, not_measured, sections
from afina.report.tokens import TOKEN_CSS
from afina.report.verdict import FEW_ROWS, Judged

MAX_BYTES = 3_000_000
TONES = {"better": "good", "worse": "bad", "no": "good", "yes": "bad"}


def report_page(facts: RunFacts, judged: Judged, found: Measured, curves: str) -> str:
    """The whole page, of at most ``MAX_BYTES``: what is longest is left out of it first. ``curves``: what
    ``sections.training`` made of the facts."""
    chapters = sections(facts, judged, found, curves)
    while len((page := _page(facts, judged, found, chapters)).encode()) > MAX_BYTES:
        longest = max(range(len(chapters)), key=lambda number: len(chapters[number].body))
        chapters[longest] = chapters[longest].emptied()
    return page


def _page(facts: RunFacts, judged: Judged, found: Measured, chapters: list[Section]) -> str:
    c = facts.config
    model, rows = ("/".join(Path(str(name)).parts[-2:]) for name in (c.model or c.config, c.data))
    title = f"{model} on {rows}: {judged.word}"
    links = "".join(f'<li><a href="#{s.anchor}">{text(s.heading)}</a></li>' for s in chapters)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}; base-uri 'none'; form-action 'none'">
<title>{text(title)}</title>
<style>{TOKEN_CSS}{REPORT_CSS}</style>
</head>
<body>
<a class="skip" href="#content">To the report</a>
<header>
<h1>{text(model)}, fine-tuned on {text(rows)}</h1>
<p class="sub">{text(facts.state)}; method {text(c.method)}; run folder {text(facts.folder.name)}</p>
<nav aria-label="Sections"><ul>{links}</ul></nav>
</header>
<main id="content">
{_verdict(facts, judged, found)}
{"".join(chapter.html for chapter in chapters)}
</main>
<footer>Written by afina from the run folder. It loads nothing and runs nothing.</footer>
</body>
</html>
"""


def _verdict(facts: RunFacts, judged: Judged, found: Measured) -> str:
    """The verdict, what it rests on, and what is left out."""
    first, _, rest = judged.line.partition(":")
    lines = f"<p><strong>{text(first)}</strong>:{text(rest)}.</p>"
    if found.forgetting:
        first, _, rest = found.forgetting.line.partition(":")
        tone = TONES.get(found.forgetting.word, "")
        lines += f'<p class="{tone}"><strong>{text(first)}</strong>:{text(rest)}.</p>'
    else:
        lines += note("Whether it forgot was not measured.")
    if 0 < judged.rows < FEW_ROWS and judged.found:
        lines += note(f"With fewer than {FEW_ROWS} dev rows an interval is itself uncertain.")
    missing = not_measured(found)
    if missing:
        items = "".join(f"<li>{text(line, 500)}</li>" for line in missing)
        lines += (
            f'<p class="note">Left out; afina report {text(facts.folder)} measures it:</p><ul class="note">{items}</ul>'
        )
    speed = facts.total("tokens") / facts.seconds if facts.seconds else 0.0
    peak = facts.finished.get("peak_memory_gb")
    short = [
        ("steps", f"{facts.last_step:,}"),
        ("training", duration(facts.seconds)),
        ("tokens a second", f"{speed:,.0f}"),
        ("peak memory", f"{peak:.2f} GB" if isinstance(peak, int | float) else "-"),
        ("best model", "none yet" if facts.best_step is None else f"step {facts.best_step:,}"),
    ]
    tone = TONES.get(judged.word, "")
    return f'<section class="verdict {tone}" aria-label="Verdict">{lines}</section>{facts_list(short)}'
