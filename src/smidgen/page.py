"""The frame of a report: one HTML file with its style in it, light or dark as the reader's system is, no script."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

# Eight hues that stay apart for readers who see few colours, darker on light ground and lighter on dark.
_LIGHT = ("#1f5fa8", "#b8431f", "#2c7a4b", "#7a4aa0", "#8a6410", "#0f7c86", "#a8326e", "#55606e")
_DARK = ("#79b2f2", "#f2936f", "#7ccf9b", "#c39be6", "#dcb65c", "#66cbd4", "#ef8fbd", "#aab4c2")
_PARTS = ("#9aa5b4", "#c2674a", "#8b62b0", "#3f7fc4", "#3f9166", "#c79a35")


def _variables(colours: Sequence[str]) -> str:
    return "".join(f"--c{k}: {colour}; " for k, colour in enumerate(colours))


_STYLE = (
    ":root { color-scheme: light dark; --ink: #1b2230; --soft: #596273; --line: #dde1e8; --ground: #fff; --card: #f6f7f9; "
    f"--link: #1f5fa8; {_variables(_LIGHT)}}}\n"
    "@media (prefers-color-scheme: dark) { :root { --ink: #e7eaf0; --soft: #a3adbd; --line: #363e4c; --ground: #14181f; "
    f"--card: #1c222c; --link: #79b2f2; {_variables(_DARK)}}} }}\n"
    + "".join(f".s{k} {{ --colour: var(--c{k}) }} .p{k % 6} {{ --part: {_PARTS[k % 6]} }}\n" for k in range(8))
    + """
* { box-sizing: border-box }
body { font: 1rem/1.55 system-ui, sans-serif; color: var(--ink); background: var(--ground); max-width: 76rem; margin: 0 auto }
body { padding: 1.5rem 1rem 4rem }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .6rem }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; padding-top: .8rem; border-top: 1px solid var(--line) }
p, li { max-width: 70ch; margin: .3rem 0 } a { color: var(--link) }
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; list-style: none; padding: 0; margin: 0 }
.skip { position: absolute; left: -999rem } .skip:focus { position: static }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; margin: 1rem 0 }
figure { margin: 0; background: var(--card); border-radius: .5rem; padding: .8rem; min-width: 0 }
figcaption { font-size: .9rem; color: var(--soft); margin-bottom: .4rem }
svg { width: 100%; height: auto; display: block; font-size: 12px; overflow: visible }
svg text { fill: var(--ink) } svg text.soft { fill: var(--soft) } svg text.label { font-size: 11px }
svg text.label { paint-order: stroke; stroke: var(--card); stroke-width: 3px; stroke-linejoin: round }
.grid { stroke: var(--line); stroke-width: 1 } .axis { stroke: var(--soft); stroke-width: 1 }
.level { stroke: var(--soft); stroke-dasharray: 4 4 } .bar { stroke: var(--soft); stroke-width: 1.5 }
.mark { fill: var(--colour); stroke: var(--card); stroke-width: 1.2; fill-opacity: .88 }
.line { fill: none; stroke: var(--colour); stroke-width: 2 }
rect { fill: var(--part) } .measured { stroke: var(--ink); stroke-width: 2.5; fill: none }
svg g:focus { outline: 2px solid var(--link); outline-offset: 2px }
.swatch { width: 1rem; height: 1rem; flex: none; overflow: visible }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1rem; list-style: none; padding: 0; font-size: .9rem }
.legend li { display: flex; align-items: center; gap: .35rem }
.keys { display: flex; flex-wrap: wrap; gap: .1rem .9rem; font-size: .85rem; color: var(--soft) }
.key { display: inline-flex; align-items: center; gap: .3rem }
.key i { width: .8rem; height: .8rem; background: var(--part); display: inline-block }
.scroll { overflow-x: auto; margin: 1rem 0 } .scroll:focus-visible { outline: 2px solid var(--link) }
table { border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums }
caption { text-align: left; color: var(--soft); font-size: .85rem; padding-bottom: .3rem }
th, td { text-align: right; padding: .3rem .55rem; border-bottom: 1px solid var(--line); white-space: nowrap }
thead th { color: var(--soft); font-weight: 600 } tbody th { font-weight: 500 }
th:first-child, td:nth-child(2) { text-align: left } #failed ~ .scroll td { text-align: left; white-space: normal }
details { margin: .8rem 0 } summary { cursor: pointer; color: var(--link) }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; font-size: .92rem }
dt { color: var(--soft) } dd { margin: 0; overflow-wrap: anywhere }
@media (max-width: 40rem) { dl { grid-template-columns: 1fr } dd { margin-bottom: .4rem } }
pre { font-size: .8rem; white-space: pre-wrap; overflow-wrap: anywhere; background: var(--card); padding: .8rem }
@media print { details { display: block } }
"""
)


def frame(title: str, links: Sequence[tuple[str, str]], body: str) -> str:
    """A whole page. links: (id, text) of its sections; body: HTML."""
    items = "".join(f'<li><a href="#{escape(where)}">{escape(text)}</a></li>' for where, text in links)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{_STYLE}</style></head><body>
<a class="skip" href="#content">Skip to the content</a>
<header><h1>{escape(title)}</h1><nav aria-label="sections"><ul>{items}</ul></nav></header>
<main id="content">
{body}
</main></body></html>
"""
