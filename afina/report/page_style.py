"""The report's style. Colours are variables with a value for light and one for dark; text on them reaches AA."""

from __future__ import annotations

REPORT_CSS = """
:root { color-scheme: light dark;
  --page: #fcfcfd; --card: #ffffff; --ink: #1b1b21; --muted: #5d5d68; --line: #dcdce4; --accent: #1a5fd0;
  --series-1: #1a5fd0; --series-2: #b3500c; --series-faint: #a9bfe6;
  --good: #0d6e4f; --bad: #ab3412; --plain: #5d5d68;
  --heat-0: #edf2fb; --heat-1: #cfdff6; --heat-2: #a8c6ee; --heat-3: #7ba8e3; --heat-4: #4f87d3; --heat-5: #2b65b8;
  --heat-6: #123f80; }
@media (prefers-color-scheme: dark) { :root {
  --page: #131317; --card: #1b1b21; --ink: #ececf2; --muted: #a2a2b0; --line: #373742; --accent: #8bb8ff;
  --series-1: #8bb8ff; --series-2: #f2a65a; --series-faint: #46587c;
  --good: #5fcfa3; --bad: #ff9a76; --plain: #a2a2b0;
  --heat-0: #1f2735; --heat-1: #263a58; --heat-2: #2e5080; --heat-3: #3b6bab; --heat-4: #5a8fd6; --heat-5: #8bb8f2;
  --heat-6: #c8e0ff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
header, main, footer, nav { max-width: 72rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 1.75rem; }
header nav { padding: 0; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.75rem 0 .75rem; padding-top: .9rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
p { margin: .5rem 0; overflow-wrap: anywhere; }
a { color: var(--accent); }
.skip { position: absolute; left: -100vw; }
.skip:focus { left: 1rem; top: .5rem; background: var(--card); padding: .25rem .5rem; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
nav ul { display: flex; flex-wrap: wrap; gap: .1rem 1.1rem; list-style: none; margin: 1rem 0 0; padding: 0;
  font-size: .92rem; }
.note, .sub { color: var(--muted); font-size: .9rem; }
.verdict { border: 1px solid var(--line); border-left: 6px solid var(--tone, var(--plain)); border-radius: 8px;
  background: var(--card); padding: .9rem 1.1rem; margin: 1.1rem 0; }
.verdict p { margin: .15rem 0; font-size: 1.08rem; }
.verdict strong { color: var(--tone, var(--ink)); }
.verdict .note { font-size: .9rem; }
.good { --tone: var(--good); } .bad { --tone: var(--bad); }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 9.5rem), 1fr)); gap: .7rem 1.4rem;
  margin: 1rem 0; }
.facts dt { color: var(--muted); font-size: .85rem; }
.facts dd { margin: 0; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 27rem), 1fr)); gap: 1.1rem;
  align-items: start; }
.beside { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 0 1.4rem; }
.beside > *, .grid > * { min-width: 0; }
figure { margin: 0; padding: .9rem 1rem; border: 1px solid var(--line); border-radius: 8px; background: var(--card); }
figcaption { font-weight: 600; margin-bottom: .4rem; }
.chart { display: block; width: 100%; height: auto; font-family: system-ui, sans-serif; stroke-linejoin: round; }
details { margin: .6rem 0 0; }
summary { cursor: pointer; color: var(--accent); font-size: .92rem; width: fit-content; }
.scroll { overflow-x: auto; max-width: 100%; }
caption { text-align: left; color: var(--muted); padding: .3rem 0; }
.figures tbody th { text-align: left; font-weight: 500; background: var(--card); }
section > .scroll .figures tbody th { background: var(--page); }
.rows { margin: .5rem 0; padding-left: 1.5rem; }
.rows li { margin: .9rem 0; }
.where { font-size: .88rem; color: var(--muted); margin: 0 0 .2rem; }
.where .change { margin-left: .6rem; color: var(--ink); font-variant-numeric: tabular-nums; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: .88rem/1.5 ui-monospace, monospace; margin: 0; }
pre.text, pre.recipe { border: 1px solid var(--line); border-radius: 6px; background: var(--card);
  padding: .55rem .7rem; color: var(--muted); }
pre.text mark { background: none; color: var(--ink); border-bottom: 2px solid var(--accent); }
.answers { display: grid; grid-template-columns: auto 1fr; gap: .15rem .8rem; margin: 0; font-size: .92rem; }
.answers dt { color: var(--muted); }
.answers dd { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.scale { display: flex; flex-wrap: wrap; gap: .2rem .8rem; list-style: none; padding: 0; margin: .5rem 0 0;
  font-size: .82rem; color: var(--muted); }
.scale span { display: inline-block; width: .85rem; height: .85rem; border-radius: 2px; margin-right: .35rem;
  vertical-align: -.1rem; border: 1px solid var(--line); }
footer { color: var(--muted); font-size: .88rem; padding-bottom: 2.5rem; margin-top: 3rem; }
@media (max-width: 30rem) { header, main, footer, nav { padding-left: .9rem; padding-right: .9rem; }
  figure { padding: .7rem .6rem; } .where .change { display: block; margin-left: 0; } }
@media print { nav, .skip { display: none; } figure, .rows li { break-inside: avoid; } }
""" + "".join(f".heat-{n} {{ background: var(--heat-{n}); }}\n" for n in range(7))
