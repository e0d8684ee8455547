"""The style of a report's page: light and dark, a phone's width and paper, and the colours of its charts."""

__all__ = ["STYLE"]

# Charts take their colours from here; the eight of each mode are told apart by those who do not see all colours.
_LIGHT = """
color-scheme: light; --page: #f7f7f5; --card: #ffffff; --text: #1c1c1a; --soft: #63635d; --rule: #e4e3dd;
--strong: #b9b8b0; --own: #1d5fc4; --rest: #a9b1bd; --wash: #eef4fd; --good: #12714a; --bad: #b3261e;
--c0: #2a78d6; --c1: #12a594; --c2: #e59700; --c3: #7a5af0; --c4: #d6404f; --c5: #5c8f00; --c6: #d6609b;
--c7: #8a6d52; --c8: #8d8d86;
"""
_DARK = """
color-scheme: dark; --page: #131312; --card: #1c1c1a; --text: #ececE8; --soft: #a3a39b; --rule: #33332f;
--strong: #5c5c55; --own: #6ea8ff; --rest: #66707e; --wash: #1a2638; --good: #5fd39a; --bad: #ff8a80;
--c0: #5b9df0; --c1: #2fc0ae; --c2: #e0a030; --c3: #a48cff; --c4: #f0707c; --c5: #8fc23a; --c6: #ee8fbd;
--c7: #b8977a; --c8: #96968f;
"""

_PAGE = """
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, sans-serif; }
header, main, footer { max-width: 72rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 2.5rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.01em; }
h2 { font-size: 1.25rem; margin: 0 0 .5rem; letter-spacing: -.005em; }
p { margin: 0 0 .75rem; max-width: 46rem; }
h1, p { overflow-wrap: anywhere; }
header p, .says { color: var(--soft); }
nav { display: flex; flex-wrap: wrap; gap: .35rem 1.1rem; margin: 1rem 0 0; font-size: .9rem; }
a { color: var(--own); text-decoration-thickness: 1px; text-underline-offset: .18em; }
section { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 1.25rem 1.25rem .75rem;
  margin: 1.25rem 0; }
footer { padding-bottom: 3rem; color: var(--soft); font-size: .9rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); gap: 1.5rem 2.25rem;
  margin: .75rem 0 1.25rem; }
.scroll { overflow-x: auto; margin: 0 0 1.25rem; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .25rem 0; white-space: nowrap; }
th, td { padding: .32rem .8rem .32rem 0; border-bottom: 1px solid var(--rule); text-align: left; vertical-align: top; }
thead th { color: var(--soft); font-weight: 500; vertical-align: bottom; border-bottom-color: var(--strong); }
tbody th { font-weight: 400; min-width: 10rem; max-width: 24rem; overflow-wrap: anywhere; }
.n { text-align: right; padding-left: .4rem; }
td.n { white-space: nowrap; }
.own th, .own td { font-weight: 600; background: var(--wash); }
.yes { color: var(--good); font-weight: 600; }
.no { color: var(--bad); font-weight: 700; }
ul { padding-left: 1.15rem; margin: 0 0 1rem; max-width: 60rem; overflow-wrap: anywhere; }
pre { margin: .15rem 0 .9rem; padding: .55rem .75rem; background: var(--page); border: 1px solid var(--rule);
  border-radius: 6px; white-space: pre-wrap; overflow-wrap: anywhere; font: .8125rem/1.45 ui-monospace, Menlo, Consolas,
  monospace; }
.command { margin: 0; font-size: .875rem; color: var(--soft); }
"""

_CHARTS = """
.chart { display: block; width: 100%; max-width: 36rem; height: auto; font-family: inherit; }
.chart text { fill: var(--text); paint-order: stroke; stroke: var(--card); stroke-width: 3px; }
.chart .title { font-weight: 600; }
.chart .axis { fill: var(--soft); }
.chart .own-label { font-weight: 600; }
.chart .figure { font-variant-numeric: tabular-nums; }
.grid { stroke: var(--rule); stroke-width: 1; }
.mark { stroke: var(--text); stroke-width: 2; }
.whisker { stroke: var(--text); stroke-width: 1.25; fill: none; }
.bar { fill: var(--c); stroke: var(--card); stroke-width: 1; }
.chip { fill: var(--c); }
.chip.mark { fill: var(--text); stroke: none; }
.dot { fill: var(--c); stroke: var(--card); stroke-width: 1.5; }
.line { stroke: var(--c); stroke-width: 2; fill: none; }
circle { fill: var(--c); stroke: var(--card); stroke-width: 1.5; }
.asked { stroke: var(--c); stroke-width: 2; }
.asked.mark { stroke: var(--text); }
.own { --c: var(--own); }
.rest { --c: var(--rest); }
"""
_COLOURS = "\n".join(f".s{number} {{ --c: var(--c{number}); }}" for number in range(9))
_NARROW = """
header, main, footer { padding-left: .75rem; padding-right: .75rem; }
header { padding-top: 1.5rem; }
section { padding: 1rem .85rem .5rem; }
tbody th { min-width: 8rem; }
"""
_PRINT = """
body { background: #fff; font-size: 10.5pt; }
header, main, footer { max-width: none; padding: 0; }
nav { display: none; }
section { border: 0; padding: 0; }
h2, .command { break-after: avoid; }
svg, .scroll, pre { break-inside: avoid; }
.charts { grid-template-columns: 1fr 1fr; }
.scroll { overflow: visible; }
table { font-size: 7.5pt; }
* { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
"""

STYLE = "\n".join((
    f":root {{{_LIGHT}}}",
    f"@media (prefers-color-scheme: dark) {{ :root {{{_DARK}}} }}",
    _PAGE, _CHARTS, _COLOURS,
    f"@media (max-width: 40rem) {{{_NARROW}}}",
    f"@media print {{ :root {{{_LIGHT}}} {_PRINT} }}",
))  # fmt: skip
