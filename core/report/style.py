"""The look of the report: calm on a screen, light or dark, on a phone and on paper."""

from __future__ import annotations

LIGHT = """
--bg:#fff; --panel:#f7f8f9; --ink:#1b1f24; --soft:#5b6570; --line:#dfe3e8; --tint:#eef4ff;
--good:#12703c; --bad:#b3261e; --busy:#0b57b0;
--s0:#0b62c4; --s1:#c2520a; --s2:#15803d; --s3:#8b2fb0; --s4:#0e7490; --s5:#b42360; --s6:#7a6200; --s7:#5b6570;
"""
DARK = """
--bg:#14171a; --panel:#1c2024; --ink:#e7eaee; --soft:#9aa5b1; --line:#30363d; --tint:#1b2a40;
--good:#5fd08f; --bad:#ff8a80; --busy:#7fb5ff;
--s0:#6cabff; --s1:#ff9d5c; --s2:#5fd08f; --s3:#d292f0; --s4:#56c7de; --s5:#ff86b5; --s6:#d9bd4a; --s7:#9aa5b1;
"""
COLOURS = 8  # s0 to s7, for lines

TEXT = """
* { box-sizing: border-box }
body { margin: 0; background: var(--bg); color: var(--ink); -webkit-text-size-adjust: 100%;
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, "DejaVu Sans", sans-serif }
main { max-width: 1080px; margin: 0 auto; padding: 40px 24px 56px }
h1 { font-size: 30px; line-height: 1.2; margin: 0; letter-spacing: -.01em; font-weight: 650; overflow-wrap: anywhere }
h2 { font-size: 19px; font-weight: 620; margin: 44px 0 10px; padding-top: 14px; border-top: 1px solid var(--line) }
h3 { font-size: 14.5px; font-weight: 620; margin: 24px 0 6px }
p { margin: 6px 0 10px; max-width: 82ch }
small { font-size: 12.5px }
.soft, small { color: var(--soft) }
code, pre, td.mono { font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace }
code { overflow-wrap: anywhere }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: 6px; padding: 12px 14px;
  margin: 8px 0 12px; overflow-x: auto; tab-size: 2 }
details { margin: 6px 0 }
summary { cursor: pointer; padding: 2px 0 }
.good { color: var(--good) } .bad { color: var(--bad) } .busy { color: var(--busy) }
.kicker { color: var(--soft); font-size: 12.5px; margin: 0 0 4px }
.top { display: flex; flex-wrap: wrap; gap: 6px 14px; align-items: center }
.state { font-size: 12.5px; font-weight: 600; border: 1px solid currentColor; border-radius: 99px; padding: 1px 11px }
.lead { font-size: 16.5px; max-width: none; margin: 10px 0 4px; overflow-wrap: anywhere }
.note { border-left: 3px solid var(--line); padding: 2px 0 2px 14px; margin: 14px 0 }
.note.bad { border-color: var(--bad); color: inherit } .note.busy { border-color: var(--busy); color: inherit }
footer { margin-top: 44px; padding-top: 12px; border-top: 1px solid var(--line); color: var(--soft); font-size: 12.5px;
  overflow-wrap: anywhere }
"""
NUMBERS = """
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(160px, 1fr)); gap: 1px; margin: 26px 0 0;
  border: 1px solid var(--line); border-radius: 8px; overflow: hidden }
.tile { padding: 13px 16px 12px; box-shadow: 0 0 0 1px var(--line) }
.tile dt { color: var(--soft); font-size: 12.5px }
.tile dd { margin: 0; font-size: 25px; line-height: 1.3; font-weight: 600; font-variant-numeric: tabular-nums }
.tile dd small { display: block; font-weight: 400; line-height: 1.4 }
.scroll { overflow-x: auto; margin: 8px 0 10px }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums lining-nums }
table.slim { width: auto; min-width: min(340px, 100%) }
th, td { text-align: left }
th.num, td.num { text-align: right; white-space: nowrap; width: 1% } table.slim .num { width: auto }
th { font-weight: 500; font-size: 12.5px; color: var(--soft); vertical-align: bottom }
th, td { padding: 6px 14px; border-bottom: 1px solid var(--line) }
td { vertical-align: top }
th:first-child, td:first-child { padding-left: 8px } th:last-child, td:last-child { padding-right: 8px }
td.name { white-space: nowrap }
td.model { width: 30%; min-width: 160px; overflow-wrap: anywhere }
td.wide { min-width: 110px } td.words { min-width: 26ch }
td.mono { overflow-wrap: anywhere; min-width: 24ch }
td.soft, th.soft { color: var(--soft) }
tr.strong td { background: var(--tint); font-weight: 650; color: var(--ink) } tr.strong td.soft { font-weight: 400 }
.bar { display: block; height: 9px; margin-top: 7px; border-radius: 2px; background: var(--s7); opacity: .45;
  -webkit-print-color-adjust: exact; print-color-adjust: exact }
tr.strong .bar { background: var(--s0); opacity: 1 }
dl.facts { display: grid; grid-template-columns: minmax(110px, max-content) 1fr; gap: 5px 22px; margin: 8px 0 12px;
  font-size: 14px }
dl.facts dt { color: var(--soft) } dl.facts dd { margin: 0; min-width: 0; overflow-wrap: anywhere }
"""
CURVES = """
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(290px, 1fr)); gap: 18px 26px;
  margin: 12px 0 6px }
.charts.large { grid-template-columns: repeat(auto-fill, minmax(min(420px, 100%), 1fr)) }
figure { margin: 0; min-width: 0; display: flex; flex-direction: column;
  justify-content: space-between; break-inside: avoid }
figcaption { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 12px; font-size: 13px;
  line-height: 1.4 }
figcaption b { font-weight: 600; overflow-wrap: anywhere } figcaption i { font-style: normal; color: var(--soft) }
.last { font-size: 12.5px; font-variant-numeric: tabular-nums }
.last span { white-space: nowrap } .last span + span { margin-left: 10px }
.keys { display: flex; flex-wrap: wrap; gap: 2px 20px; font-size: 13px; margin: 4px 0 }
.keys span { display: inline-flex; align-items: center; gap: 7px; overflow-wrap: anywhere }
.keys svg { width: 26px; height: 8px; flex: none }
svg { display: block; width: 100%; height: auto; overflow: visible }
svg text { fill: var(--soft); font-size: 10.5px; font-variant-numeric: tabular-nums }
.grid { stroke: var(--line); stroke-width: 1 } .axis { stroke: var(--soft); stroke-width: 1; opacity: .6 }
.stage { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 2 3 }
.curve { fill: none; stroke: currentColor; stroke-width: 1.3; stroke-linejoin: round; stroke-linecap: round }
.dot { fill: currentColor } .broken { stroke: var(--bad); stroke-width: 1.4 } .plain { color: var(--ink) }
"""
NARROW = """
@media (max-width: 560px) {
  main { padding: 24px 16px 40px } h1 { font-size: 25px } .tiles { grid-template-columns: 1fr 1fr }
  .tile dd { font-size: 21px } .large svg text { font-size: 14px }
  dl.facts { grid-template-columns: 1fr; gap: 0 } dl.facts dd { margin-bottom: 8px }
}
"""
PAPER = """
@media print {
  @page { margin: 14mm }
  body { font-size: 10pt } main { max-width: none; padding: 0 }
  .tile dd { font-size: 15pt } h2 { margin-top: 24px } h2, h3, .keys { break-after: avoid }
  tr, .tiles, .note { break-inside: avoid }
  .charts { grid-template-columns: repeat(3, 1fr) } .charts.large { grid-template-columns: repeat(2, 1fr) }
  .scroll { overflow: visible } pre { white-space: pre-wrap; overflow-wrap: anywhere }
  details::details-content { content-visibility: visible; block-size: auto }
}
"""


def style() -> str:
    """The style sheet; paper is always light."""
    lines = "".join(f".s{i} {{ color: var(--s{i}) }} " for i in range(COLOURS))
    light = f":root {{ color-scheme: light dark; {LIGHT} }}"
    dark = f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {DARK} }} }}"
    return "\n".join([light, dark, TEXT, NUMBERS, CURVES, lines, NARROW, PAPER])
