"""The page's style sheet: the system's own fonts, light or dark as the reader has it, one column on a phone."""

__all__ = ["STYLE"]

STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --panel: #fff; --ink: #1b1f24; --dim: #5a6370; --line: #e1e5ea;
  --accent: #1f6feb; --beaten: #7d8590; --good: #1a7f37; --bad: #b3401f; --heat: 31 111 235; --on-heat: #fff; }
@media (prefers-color-scheme: dark) { :root { --page: #0f1318; --panel: #181d24; --ink: #e6eaf0; --dim: #9aa5b3;
  --line: #2c333d; --accent: #6cabff; --beaten: #8b949e; --good: #57c272; --bad: #f0946f; --heat: 84 150 255;
  --on-heat: #fff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.5;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 20px 48px; }
h1 { font-size: 1.6rem; margin: 0 0 4px; letter-spacing: -.01em; }
h2 { font-size: 1.05rem; margin: 0 0 12px; }
h3 { font-size: .95rem; margin: 18px 0 8px; }
p { margin: 0 0 10px; }
.dim, .small { color: var(--dim); }
.small { font-size: .85rem; }
section { background: var(--panel); border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px;
  margin-top: 18px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(210px, 1fr)); gap: 14px; margin-top: 18px; }
.tile { background: var(--panel); border: 1px solid var(--line); border-radius: 10px; padding: 14px 18px; }
.tile b { display: block; font-size: 1.5rem; line-height: 1.3; font-weight: 650; }
.tile span { display: block; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.models { width: 100%; }
.models th, .models td { padding: 9px 10px; text-align: right; vertical-align: top;
  border-bottom: 1px solid var(--line); }
.models tbody tr:last-child > * { border-bottom: 0; }
.models thead th { color: var(--dim); font-weight: 500; font-size: .82rem; vertical-align: bottom; line-height: 1.3; }
.models thead small { display: block; font-size: inherit; opacity: .85; }
.models th:first-child { text-align: left; padding-left: 0; }
.models tbody th { font-weight: 600; overflow-wrap: anywhere; min-width: 8.5em; }
.models td:last-child, .models thead th:last-child { padding-right: 0; }
.models td small, .models th small { display: block; color: var(--dim); font-weight: 400; font-size: .78rem;
  white-space: nowrap; }
.models td .good { color: var(--good); font-weight: 600; }
.models td .bad { color: var(--bad); font-weight: 600; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 16px; }
.scatter { width: 100%; max-width: 560px; height: auto; display: block; margin: 0 auto; }
.scatter text { font-size: 12px; fill: var(--dim); }
.scatter .label { fill: var(--ink); }
.scatter .title { font-size: 12.5px; }
.scatter .grid { stroke: var(--line); }
.scatter .axis { stroke: var(--beaten); }
.best { --mark: var(--accent); --fill: var(--accent); }
.beaten { --mark: var(--beaten); --fill: var(--panel); }
.dot { fill: var(--fill); stroke: var(--mark); stroke-width: 2; }
.ring { fill: none; stroke: var(--mark); stroke-width: 1.5; }
.quartiles { stroke: var(--mark); stroke-width: 3; opacity: .45; }
.stack { display: grid; grid-template-columns: minmax(8em, 15em) 1fr 7.5em; gap: 12px; align-items: center;
  padding: 4px 0; }
.who { overflow-wrap: anywhere; }
.bar { display: flex; height: 20px; border-radius: 4px; overflow: hidden; }
.bar i { display: block; flex: none; }
.total { text-align: right; color: var(--dim); font-variant-numeric: tabular-nums; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; margin-bottom: 10px; font-size: .85rem; color: var(--dim); }
.legend i { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 6px; }
.c0 { background: #4e79a7; } .c1 { background: #e58a2c; } .c2 { background: #4f9a5b; }
.c3 { background: #a56fa0; } .c4 { background: #d4545b; } .c5 { background: #8d939b; }
.map td, .map th { font-size: .78rem; padding: 4px 6px; font-weight: 400; text-align: center; }
.map th { color: var(--dim); }
.map th[scope=row] { text-align: right; white-space: nowrap; padding-left: 0; }
.map th[scope=col] { vertical-align: bottom; min-width: 58px; max-width: 96px; line-height: 1.25; }
.map td[style] { background: rgb(var(--heat) / calc(.06 + .94 * var(--share))); border: 2px solid var(--panel);
  border-radius: 5px; min-width: 58px; }
.map .strong { color: var(--on-heat); }
ul { margin: 0; padding-left: 1.2em; }
li { margin-bottom: 5px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 3px 18px; margin: 0; }
dt { color: var(--dim); }
dd { margin: 0; overflow-wrap: anywhere; }
summary { cursor: pointer; color: var(--dim); margin-top: 12px; font-size: .85rem; }
@media (max-width: 720px) {
  main { padding: 18px 12px 32px; }
  section { padding: 14px; }
  .tiles { grid-template-columns: 1fr 1fr; gap: 10px; }
  .tile { padding: 10px 12px; }
  .tile b { font-size: 1.25rem; }
  .models thead { display: none; }
  .models tbody tr { display: grid; grid-template-columns: repeat(3, 1fr); gap: 8px 12px; padding: 12px 0;
    border-bottom: 1px solid var(--line); }
  .models tbody tr:last-child { border-bottom: 0; }
  .models tbody th, .models tbody td { display: block; border: 0; padding: 0; text-align: left; }
  .models tbody th { grid-column: 1 / -1; }
  .models td.nothing { display: none; }
  .models td small { white-space: normal; }
  .models td::before { content: attr(data-label); display: block; color: var(--dim); font-size: .78rem; }
  .stack { grid-template-columns: 1fr auto; gap: 2px 12px; padding: 7px 0; }
  .bar { grid-column: 1 / -1; grid-row: 2; }
}
@media print { body { background: none; } section, .tile { break-inside: avoid; } }
"""
