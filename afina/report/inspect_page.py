"""The page of `afina inspect --html`: one self-contained file, without scripts."""

from __future__ import annotations

import html
from collections.abc import Sequence

from afina.printable import printable
from afina.report.inspected import InspectedRow
from afina.report.tokens import TOKEN_CSS, legend, token_spans, token_table

# Nothing is fetched and nothing runs, whatever a row holds.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
PAGE_CSS = """
:root { color-scheme: light dark;
  --page: #ffffff; --ink: #1b1b1f; --muted: #62626b; --line: #d9d9e0; --accent: #1f6feb; }
@media (prefers-color-scheme: dark) {
  :root { --page: #16161a; --ink: #ececf1; --muted: #9a9aa6; --line: #34343d; --accent: #7fb2ff; }
}
body { margin: 0 auto; max-width: 76rem; padding: 1rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; overflow-wrap: anywhere; } h3 { font-size: 1rem; }
p, li { overflow-wrap: anywhere; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem; }
h3 { margin: 0 0 .5rem; }
.beside { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 0 1rem; }
figure { margin: 1rem 0; border: 1px solid var(--line); border-radius: 6px; padding: .75rem; }
caption { text-align: left; color: var(--muted); padding: 0 0 .4rem; }
"""


def inspect_page(rows: Sequence[InspectedRow], *, model: str, base: str | None) -> str:
    """The rows as an HTML page: their text in colour, the ids, and the table of their tokens."""
    title = "Token by token: " + ", ".join(f"row {row.number:,}" for row in rows)
    compared = "" if base is None else f", compared with {_text(base)}"
    body = "".join(_section(row) for row in rows)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{_text(title)}</title>
<style>{PAGE_CSS}{TOKEN_CSS}</style>
</head>
<body>
<main>
<h1>{_text(title)}</h1>
<p>As {_text(model)} sees it{compared}. Learnt tokens are underlined; a token leads to its figures in the table.</p>
{body}
</main>
</body>
</html>
"""


def _section(row: InspectedRow) -> str:
    anchor = f"d{row.document}t"
    if row.before is None:
        shown = _figure("Text", token_spans(row.views, link=anchor), legend())
    else:
        shown = _figure("Before: the base", token_spans(row.before, link=anchor), legend())
        shown += _figure("After: the model", token_spans(row.views, link=anchor), legend())
        shown = f'<div class="beside">{shown}</div>'
        shown += _figure("Change", token_spans(row.views, row.before, link=anchor), legend(change=True))
    ids = " ".join(str(view.id) for view in row.views)
    table = token_table(row.views, row.before, link=anchor, caption=f"Every token of row {row.number:,}")
    return f"""<section>
<h2>{_text(row.title)}</h2>
<p>{_text(row.losses)} nats. Document {row.document} of the packed sequence, from its token {row.start:,} on.</p>
{shown}
<details><summary>Ids</summary><pre>{ids}</pre></details>
{table}
</section>
"""


def _figure(heading: str, tokens: str, scale: str) -> str:
    return f"<figure><h3>{heading}</h3>{tokens}{scale}</figure>"


def _text(text: str) -> str:
    return html.escape(printable(text))
