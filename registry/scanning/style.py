"""The style sheet of the HTML report: one palette for light and dark screens, and for paper."""

from __future__ import annotations

from typing import Final

STYLE: Final = """
:root{color-scheme:light dark;--paper:#fafaf8;--card:#fff;--ink:#26282f;--faint:#6c7080;--line:#e4e4e0;
--good:#1a7f4b;--good-bg:#e5f4ec;--warn:#8a5a00;--warn-bg:#fdf1d8;--bad:#b3261e;--bad-bg:#fbe9e7;
--accent:#3266c8;--cell:#f1f1ee;--out:#d2563f}
@media(prefers-color-scheme:dark){:root{--paper:#16171b;--card:#1f2127;--ink:#e8e8ea;--faint:#a0a4b2;
--line:#33363f;--good:#6fd3a0;--good-bg:#173326;--warn:#f0c36b;--warn-bg:#3a2d12;--bad:#ff9d91;
--bad-bg:#3d1d1a;--accent:#7aa5f7;--cell:#272a31;--out:#ee8a75}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:15px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1120px;margin:0 auto;padding:40px 24px 80px}
h1{font-size:27px;line-height:1.25;margin:0 0 6px;overflow-wrap:anywhere}
h2{font-size:19px;margin:44px 0 6px}h3{font-size:15px;margin:22px 0 6px}
p{margin:4px 0 10px;max-width:88ch;overflow-wrap:anywhere}.faint{color:var(--faint)}
a{color:var(--accent)}code{font:12.5px ui-monospace,SFMono-Regular,Menlo,monospace;overflow-wrap:anywhere}
.verdict{border-radius:12px;padding:16px 20px;margin:20px 0 8px;overflow-wrap:anywhere}
.verdict strong{font-size:17px}
.verdict.good{background:var(--good-bg)}.verdict.good strong{color:var(--good)}
.verdict.warn{background:var(--warn-bg)}.verdict.warn strong{color:var(--warn)}
.verdict.bad{background:var(--bad-bg)}.verdict.bad strong,.no{color:var(--bad)}.no{font-weight:600}
.chip{display:inline-block;border-radius:99px;padding:1px 10px;font-size:12px;font-weight:600}
.chip.good{background:var(--good-bg);color:var(--good)}.chip.warn{background:var(--warn-bg);color:var(--warn)}
.chip.bad{background:var(--bad-bg);color:var(--bad)}.chip.off{background:var(--cell);color:var(--faint)}
.card{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:16px;overflow-x:auto;
margin:0 0 14px}
.layer{border-top:1px solid var(--line);padding:10px 0}.layer:first-child{border-top:0;padding-top:0}
.layer h3{margin:0 0 4px}.finding{border-left:3px solid var(--line);padding:2px 0 2px 14px;margin:12px 0}
.finding p{margin:2px 0}.finding ul{margin:2px 0;padding-left:18px}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th{font-weight:600;font-size:13px;color:var(--faint);text-align:right;padding:4px 10px 8px;white-space:nowrap}
td{border-top:1px solid var(--line);padding:7px 10px;text-align:right;vertical-align:middle}
th:first-child,td:first-child{text-align:left;padding-left:2px;overflow-wrap:anywhere}
td.wide{width:46%}
dl{display:grid;grid-template-columns:max-content 1fr;gap:6px 18px;margin:0}dt{color:var(--faint)}
dd{margin:0;overflow-wrap:anywhere}
details{border-top:1px solid var(--line);margin-top:26px;padding-top:14px}
summary{cursor:pointer;font-weight:600;font-size:17px;overflow-wrap:anywhere}
.curves{display:grid;grid-template-columns:repeat(auto-fill,minmax(225px,1fr));gap:10px}
.gallery{display:grid;grid-template-columns:repeat(auto-fill,minmax(250px,1fr));gap:14px;margin:0 0 14px}
.gallery figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:12px;padding:12px}
.pair{display:grid;grid-template-columns:repeat(2,1fr);gap:6px}.pair span{font-size:12px;color:var(--faint)}
img{width:100%;display:block;border-radius:8px;image-rendering:pixelated}figcaption{margin-top:8px}
svg.chart{width:100%;height:auto;font:12px system-ui,sans-serif;fill:var(--ink);display:block}
svg.heat{margin:0 auto;min-width:380px}svg.strip{min-width:180px}svg.bar{min-width:100px}
.end{text-anchor:end}.mid{text-anchor:middle}.small{font-size:10.5px;fill:var(--faint)}
.tiny{font-size:9.5px}.strong{fill:#fff}.name{font-size:13px;font-weight:600}
.cell{fill:var(--cell)}.none{fill:none;stroke:var(--line);stroke-dasharray:2 2}.hit{fill:var(--accent)}
.grid{stroke:var(--line)}.ideal{stroke:var(--faint);stroke-dasharray:4 4}
.band{fill:var(--faint);opacity:.22}.line{fill:none;stroke:var(--accent);stroke-width:2}
.dots{stroke:var(--faint);stroke-width:5;stroke-linecap:round;opacity:.35;fill:none}
.in{fill:var(--accent)}.out{fill:var(--out)}
@media print{:root{--paper:#fff}main{padding:0;max-width:none}h2,h3{break-after:avoid}
figure,svg,.finding,tr{break-inside:avoid}.card{overflow:visible}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""
