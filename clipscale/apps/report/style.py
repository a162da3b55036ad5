"""How a report looks, beside what all pages share."""

STYLE = """
:root { --s0: #2f6fb0; --s1: #c4661f; --s2: #3d8b57; --s3: #8a58b5; --s4: #b33b54; --s5: #2f8d97; --s6: #8c7325;
  --s7: #6b7480; --good: #3d8b57 }
@media (prefers-color-scheme: dark) { :root { --s0: #74a9dc; --s1: #eb9d5e; --s2: #7cc796; --s3: #c09ae0; --s4: #e8879c;
  --s5: #6fc6cf; --s6: #d1b55e; --s7: #a7b0ba; --good: #7cc796 } }
h1 { overflow-wrap: anywhere } code, pre { font: 13px/1.5 ui-monospace, monospace }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .7rem .8rem; margin: .5rem 0;
  white-space: pre-wrap; overflow-wrap: anywhere }
.state { font-size: .85rem; font-weight: 600; padding: .15rem .6rem; border-radius: 99px; vertical-align: .2em;
  border: 1px solid currentColor; color: var(--mark); white-space: nowrap } .state.done { color: var(--good) }
.tile { min-width: 0 } .tile strong { overflow-wrap: anywhere } .tile small { color: var(--soft); display: block }
.found { background: var(--card); border: 1px solid var(--line); border-left: 4px solid var(--mark); border-radius: 8px;
  padding: .6rem 1rem .6rem 2rem; margin: 1rem 0 0 } .found li { margin: .2rem 0; overflow-wrap: anywhere }
.charts { display: grid; gap: .75rem; margin-bottom: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)) }
.chart { margin: 0; min-width: 0 } .chart figcaption { color: var(--ink); font-weight: 500 }
svg { display: block; width: 100%; height: auto } svg text { font-size: 11.5px; fill: var(--soft) }
.grid { stroke: var(--line); fill: none } .event { stroke: var(--mark); stroke-width: 1.5; stroke-dasharray: 2 3 }
.line { fill: none; stroke: var(--c); stroke-width: 1.8; stroke-linejoin: round } .band { fill: var(--c); opacity: .18 }
.line.dashed { stroke-dasharray: 4 4; stroke-width: 1.2; opacity: .8 } .dot { fill: var(--c) }
.dot.quiet { opacity: 0 } .dot.quiet:hover { opacity: 1 }
.s0 { --c: var(--s0) } .s1 { --c: var(--s1) } .s2 { --c: var(--s2) } .s3 { --c: var(--s3) } .s4 { --c: var(--s4) }
.s5 { --c: var(--s5) } .s6 { --c: var(--s6) } .s7 { --c: var(--s7) }
.legend { display: flex; flex-wrap: wrap; gap: 0 1rem; font-size: 13px; color: var(--soft); margin: .1rem 0 .4rem }
.legend b { color: var(--ink); font-weight: 600; font-variant-numeric: tabular-nums }
.legend span { overflow-wrap: anywhere } .key { display: inline-block; width: .9rem; height: .25rem; border-radius: 2px;
  background: var(--c); margin-right: .4rem; vertical-align: .2em }
.key.dashed { background: repeating-linear-gradient(90deg, var(--soft) 0 .25rem, transparent .25rem .4rem) }
.share { display: flex; height: 1.6rem; border-radius: 6px; overflow: hidden; background: var(--line); margin: .6rem 0 }
.share i { background: var(--c); min-width: 1px } .shares + .shares { margin-top: 1rem }
.asked { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .6rem .8rem;
  min-width: 0 }
.asked p { margin: 0 0 .5rem; overflow-wrap: anywhere } .asks { display: grid; gap: .75rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 34rem), 1fr)) }
.ranked { display: grid; grid-template-columns: repeat(6, minmax(0, 1fr)); gap: .4rem }
.ranked figure { margin: 0; padding: 0; border: 0; background: none; text-align: center; font-size: 12px }
.ranked img { display: block; width: 100%; aspect-ratio: 1; object-fit: cover; border-radius: 4px;
  border: 2px solid var(--line) } .ranked .right img { border: 3px solid var(--good) }
.matrix { border-collapse: collapse; width: auto; font-size: 12px } .matrix td { padding: 0; border: 0; width: 1.3rem;
  min-width: 1.3rem; height: 1.3rem; text-align: center }
.matrix th { padding: 0 .4rem; border: 0; max-width: 14rem; overflow: hidden; text-overflow: ellipsis }
td.name, .left td.name { overflow-wrap: anywhere; white-space: normal; min-width: 7rem }
.wide td.name { white-space: nowrap; min-width: 0 } .wide td:last-child { white-space: normal; min-width: 16rem;
  overflow-wrap: anywhere }
details { margin: .75rem 0 } summary { cursor: pointer; color: var(--soft) }
@media (max-width: 40rem) { body { padding: 1rem .75rem 3rem } .tile strong { font-size: 1.1rem }
  th, td { padding: .3rem .4rem } .ranked { grid-template-columns: repeat(3, minmax(0, 1fr)) }
  .tile { padding: .5rem .6rem } }
"""
