"""The style of a report's page: light and dark, a phone's width and paper, and the colours of its charts."""

__all__ = ["LIGHT", "STYLE"]

# The colours of page and charts by scheme; c0 to c7 are told apart by those who do not see all colours.
LIGHT = {
    "page": "#f7f7f5", "card": "#ffffff", "text": "#1c1c1a", "soft": "#63635d", "rule": "#e4e3dd", "strong": "#b9b8b0",
    "own": "#1d5fc4", "rest": "#a9b1bd", "wash": "#eef4fd", "good": "#12714a", "bad": "#b3261e",
    "c0": "#2a78d6", "c1": "#12a594", "c2": "#e59700", "c3": "#7a5af0", "c4": "#d6404f", "c5": "#5c8f00",
    "c6": "#d6609b", "c7": "#8a6d52", "c8": "#8d8d86",
}  # fmt: skip
_DARK = {
    "page": "#131312", "card": "#1c1c1a", "text": "#ecece8", "soft": "#a3a39b", "rule": "#33332f", "strong": "#5c5c55",
    "own": "#6ea8ff", "rest": "#66707e", "wash": "#1a2638", "good": "#5fd39a", "bad": "#ff8a80",
    "c0": "#5b9df0", "c1": "#2fc0ae", "c2": "#e0a030", "c3": "#a48cff", "c4": "#f0707c", "c5": "#8fc23a",
    "c6": "#ee8fbd", "c7": "#b8977a", "c8": "#96968f",
}  # fmt: skip


def _scheme(name: str, colours: dict[str, str]) -> str:
    return f":root {{ color-scheme: {name}; {' '.join(f'--{key}: {value};' for key, value in colours.items())} }}"


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
figure { margin: 0; max-width: 32rem; }
figcaption { font-size: .8125rem; line-height: 1.4; margin-bottom: .5rem; overflow-wrap: anywhere; }
figcaption strong { display: block; font-size: 1rem; font-weight: 600; }
.chip { display: inline-block; margin: .2rem .9rem 0 0; }
.chip::before { content: ""; display: inline-block; width: .7rem; height: .7rem; margin-right: .35rem;
  border-radius: 2px; background: var(--chip); }
svg { display: block; width: 100%; height: auto; overflow: visible; stroke-linejoin: round; }
svg text { font-variant-numeric: tabular-nums; paint-order: stroke; stroke: var(--card); stroke-width: 3px; }
"""
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
    _scheme("light", LIGHT),
    f"@media (prefers-color-scheme: dark) {{ {_scheme('dark', _DARK)} }}",
    _PAGE, _CHARTS,
    f"@media (max-width: 40rem) {{{_NARROW}}}",
    f"@media print {{ {_scheme('light', LIGHT)} {_PRINT} }}",
))  # fmt: skip
