"""The page's style sheet. Colours are Okabe and Ito's colour-blind safe set, lighter ones on dark ground.

c0..c7 are runs (and phases and kinds of bytes); o0..o3 shades of one hue, the parts of the optimizer.
"""

from __future__ import annotations

_LIGHT = {
    "ground": "#f6f7f9",
    "card": "#ffffff",
    "ink": "#1b2330",
    "soft": "#5a6575",
    "edge": "#dfe3e9",
    "accent": "#0068a5",
    "on-deep": "#ffffff",
    "warn": "#8f4a00",
    "warn-ground": "#fff1dc",
    "c0": "#0072b2",
    "c1": "#d55e00",
    "c2": "#009e73",
    "c3": "#c4689b",
    "c4": "#e69f00",
    "c5": "#56b4e9",
    "c6": "#6b7280",
    "c7": "#b9a800",
    "o0": "#f7c98b",
    "o1": "#eda53f",
    "o2": "#d55e00",
    "o3": "#9c4400",
}

_DARK = {
    "ground": "#12161c",
    "card": "#1b2129",
    "ink": "#e8ecf1",
    "soft": "#a3aebc",
    "edge": "#323b47",
    "accent": "#6cbcf2",
    "on-deep": "#10151c",
    "warn": "#ffcf8a",
    "warn-ground": "#3d2c12",
    "c0": "#4aa3e0",
    "c1": "#f0803c",
    "c2": "#2fc79a",
    "c3": "#e59ac4",
    "c4": "#f2b93b",
    "c5": "#9ad6f7",
    "c6": "#9aa4b2",
    "c7": "#e6db55",
    "o0": "#fbe0bb",
    "o1": "#f5bd6b",
    "o2": "#f0803c",
    "o3": "#c9631f",
}

_RULES = """
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1120px;margin:0 auto;padding:36px 24px 48px}
header{margin-bottom:22px}
.eyebrow{margin:0;color:var(--accent);font-weight:600;font-size:13px;letter-spacing:.06em;text-transform:uppercase}
h1{margin:2px 0 2px;font-size:30px;line-height:1.2;overflow-wrap:anywhere}
h2{margin:40px 0 12px;font-size:20px}
h3{margin:0 0 2px;font-size:15px;font-weight:600}
header p.caption{margin:0;color:var(--soft);overflow-wrap:anywhere}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin:0}
.cards>div,.card{background:var(--card);border:1px solid var(--edge);border-radius:10px}
.cards>div{padding:14px 16px;display:flex;flex-direction:column}
.cards dt{color:var(--soft);font-size:13px}
.cards dd{margin:0;font-size:25px;line-height:1.3;font-weight:650;font-variant-numeric:tabular-nums}
.cards dd.by{font-size:13px;line-height:1.4;font-weight:400;color:var(--soft);overflow-wrap:anywhere}
.card{padding:16px 18px;min-width:0}
.grid2{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:16px}
.card.spaced{margin-top:16px}
.grid2.uneven{align-items:start}
figure{margin:0}
.legend{display:flex;flex-wrap:wrap;gap:2px 16px;margin:0;padding:0;list-style:none;
color:var(--soft);font-size:13px}
.legend li{overflow-wrap:anywhere}
.legend.runs{margin-bottom:12px;color:var(--ink);font-size:14px}
figcaption .legend,.note{margin:0 0 6px;color:var(--soft);font-size:13px}
.legend-card{margin-bottom:16px;padding:10px 18px}
.legend-card .legend{color:var(--ink)}
.remarks{margin:12px 0 0;padding-left:20px;color:var(--warn);font-size:14px}
.warning{margin:0 0 16px;padding:10px 14px;border-radius:8px;background:var(--warn-ground);color:var(--warn)}
.badge{display:inline-block;padding:0 8px;border-radius:9px;background:var(--warn-ground);color:var(--warn);
font-size:12px;font-weight:600;line-height:18px;vertical-align:2px}
h1 .badge{font-size:14px;line-height:24px;border-radius:12px;vertical-align:5px;padding:0 11px}
.scroll{overflow-x:auto}
.scroll:focus-visible,summary:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
table{border-collapse:collapse;width:100%;font-size:14px;font-variant-numeric:tabular-nums}
th,td{padding:7px 12px;border-bottom:1px solid var(--edge);text-align:left;vertical-align:top}
tbody tr:last-child>*{border-bottom:0}
th:first-child{padding-left:2px}
thead th{color:var(--soft);font-weight:500;font-size:13px;vertical-align:bottom}
tbody th{font-weight:500;min-width:150px;overflow-wrap:anywhere}
th .run{display:inline-block;min-width:104px;overflow-wrap:anywhere}
tbody th .run{display:inline}
.runs-table tbody th{min-width:210px}
.keyed{display:flex;align-items:baseline}
.keyed svg{flex:none;position:relative;top:1px}
.child{padding-left:20px}
.numeric td,.numeric thead th:not(:first-child){text-align:right;white-space:nowrap}
.numeric thead th:not(:first-child){white-space:normal}
td strong{color:var(--accent)}
td small{display:inline-block;min-width:32px}
small{color:var(--soft);font-weight:400;font-size:12.5px}
tbody th>small{display:block;overflow-wrap:anywhere}
code{font:13px/1.45 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;
overflow-wrap:anywhere}
.settings{columns:2;column-gap:36px;margin:0}
.settings>div{display:flex;justify-content:space-between;gap:16px;padding:4px 2px;
border-bottom:1px solid var(--edge);break-inside:avoid}
.settings dt{color:var(--soft)}
.settings dd{margin:0;text-align:right;min-width:0}
details{margin-top:14px}
summary{cursor:pointer;color:var(--accent);font-size:14px;padding:4px 0}
footer{margin-top:32px;color:var(--soft);font-size:13px}
svg.chart{display:block;width:100%;height:auto;overflow:visible}
svg.key{width:12px;height:12px;margin-right:8px;vertical-align:-1px}
svg.key.wide{width:32px}
.chart text{fill:var(--soft);font-size:12.5px;font-variant-numeric:tabular-nums}
.chart text.strong{fill:var(--ink)}
.chart text.inside{fill:#10151c;font-size:12px}
.chart text.inside.c0,.chart text.inside.c6,.chart text.inside.o3{fill:var(--on-deep)}
.grid{stroke:var(--edge);stroke-width:1}
.axis{stroke:var(--soft);stroke-width:1}
.guide{stroke:var(--ink);stroke-width:1;stroke-dasharray:1 4;stroke-linecap:round}
.line{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.band{stroke:none;opacity:.16}
.dashed{stroke-dasharray:5 5;stroke-width:1.7}
.line.plain{stroke:var(--soft)}
.dot{stroke:var(--card);stroke-width:1}
.ring{fill:none;stroke-width:2}
.target{fill:transparent}
g:hover>.dot{stroke:var(--ink);stroke-width:2}
.chart .fill{stroke:var(--card);stroke-width:1}
@media(max-width:760px){
main{padding:24px 14px 36px}
h1{font-size:25px}
.grid2{grid-template-columns:minmax(0,1fr)}
.cards{grid-template-columns:repeat(2,minmax(0,1fr));gap:10px}
.cards dd{font-size:21px}
.card{padding:14px}
.settings{columns:1}
.runs-table tbody th{min-width:160px}
.chart text{font-size:14px}
}
@media print{body{background:none}.card,.cards>div{break-inside:avoid}}
"""


_OF_CHARTS = (".chart", ".grid{", ".axis", ".guide", ".line", ".dot", ".band", ".dashed", ".ring", ".target")


def style_sheet() -> str:
    """Return the page's CSS: light, and dark where the reader's system asks for it."""
    names = [name for name in _LIGHT if name[0] in "co" and name[1:].isdigit()]
    colours = "".join(
        f".line.{name},.ring.{name}{{stroke:var(--{name})}}.dot.{name},.fill.{name},.band.{name}{{fill:var(--{name})}}\n"
        for name in names
    )
    light = f":root{{color-scheme:light dark;{_variables(_LIGHT)}}}\n"
    dark = f"@media(prefers-color-scheme:dark){{:root{{{_variables(_DARK)}}}}}\n"
    return light + dark + _RULES.lstrip() + colours


def picture_style() -> str:
    """Return the CSS of a chart in a file of its own: the page's colours and rules of charts, light and dark."""
    rules = "\n".join(
        line for line in style_sheet().splitlines() if line.startswith((":root", "@media(prefers", *_OF_CHARTS))
    )
    return f'{rules}\nsvg{{font:13px system-ui,-apple-system,"Segoe UI",Roboto,Arial,sans-serif}}'


def _variables(palette: dict[str, str]) -> str:
    return ";".join(f"--{name}:{colour}" for name, colour in palette.items())
