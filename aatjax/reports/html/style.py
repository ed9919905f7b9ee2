"""The report's style: one column that fits a phone, two where there is room, light and dark."""

STYLE = """
:root { --ink: #1b1d21; --quiet: #5b626c; --paper: #fff; --card: #f5f6f8; --rule: #d5d9df;
  --c1: #0072b2; --c2: #c44e00; --c3: #007a5a; --c4: #8f4a7a; --warn: #8a3b00; --warnbg: #fff1e3; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaee; --quiet: #a3abb7; --paper: #15171b;
  --card: #1f2329; --rule: #3a404a; --c1: #56b4e9; --c2: #f0a35e; --c3: #3cc79b; --c4: #dd9cc6;
  --warn: #ffc58a; --warnbg: #3a2613; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem clamp(.75rem, 3vw, 2rem) 3rem; max-width: 72rem;
  font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .5rem; border-top: 1px solid var(--rule);
  padding-top: 1rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; overflow-wrap: anywhere; }
p, li, figcaption { max-width: 46rem; overflow-wrap: anywhere; }
.lead { font-size: 1.1rem; }
.quiet, figcaption { color: var(--quiet); font-size: .875rem; }
.warn { color: var(--warn); background: var(--warnbg); border-left: 4px solid var(--warn);
  padding: .5rem .75rem; margin: .6rem 0; max-width: 46rem; overflow-wrap: anywhere; }
.columns { display: grid; gap: 1rem 1.5rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
figure { margin: .5rem 0; min-width: 0; }
svg.figure { display: block; width: 100%; max-width: 27rem; height: auto; }
svg text { font: 11px system-ui, sans-serif; fill: var(--ink); }
svg .grid { stroke: var(--rule); stroke-width: 1; }
svg .axis { stroke: var(--quiet); stroke-width: 1; }
svg .ideal { stroke: var(--quiet); stroke-width: 1; stroke-dasharray: 4 4; }
svg.spark { width: 5rem; height: .875rem; vertical-align: middle; }
.pixels { image-rendering: pixelated; }
.scroll { overflow-x: auto; margin: .5rem 0; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--rule);
  vertical-align: top; }
td.number, th.number { text-align: right; white-space: nowrap; }
td.name { overflow-wrap: anywhere; min-width: 7rem; max-width: 24rem; }
thead th { position: sticky; top: 0; background: var(--paper); }
.cards { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); }
.card { background: var(--card); border-radius: .5rem; padding: .75rem; min-width: 0; }
.card h3 { margin-top: 0; }
.card p { margin: .25rem 0; }
audio { width: 100%; margin-top: .4rem; }
.legend { max-width: 20rem; }
.experts { display: grid; gap: .75rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr)); }
img.map { display: block; width: 100%; height: 3.75rem; image-rendering: pixelated; }
pre { overflow-x: auto; background: var(--card); padding: .75rem; border-radius: .5rem;
  font-size: .8125rem; }
code { overflow-wrap: anywhere; font-size: .875em; }
details > summary { cursor: pointer; padding: .3rem 0; }
@media print { details { display: block; } body { max-width: none; } }
"""
