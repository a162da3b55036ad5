"""Pages that need nothing else: one file, no scripts, no network, light and dark, wide and narrow."""

from __future__ import annotations

from html import escape

STYLE = """
:root { color-scheme: light dark; --ink: #22272d; --soft: #68717b; --page: #fbfbfa; --card: #fff; --line: #e3e5e8;
  --bar: #d6e3f0; --mark: #b3541a }
@media (prefers-color-scheme: dark) { :root { --ink: #dfe3e7; --soft: #98a1ab; --page: #14171a; --card: #1c2024;
  --line: #2f353b; --bar: #2c4055; --mark: #f0a35c } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 76rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 1.5rem; margin: 0 0 .25rem } h2 { font-size: 1.15rem; margin: 2.75rem 0 .5rem }
h3 { font-size: 1rem; margin: 1.5rem 0 .25rem } p { margin: .25rem 0 .75rem }
nav { margin: .5rem 0 1.25rem; display: flex; flex-wrap: wrap; gap: .25rem 1rem } nav a { color: inherit }
.soft, figcaption { color: var(--soft) } .bad { color: var(--mark) }
.tiles, .lists { display: grid; gap: .75rem }
.tiles { grid-template-columns: repeat(auto-fill, minmax(12rem, 1fr)) }
.lists { grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)) }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .7rem .8rem }
.tile strong { display: block; font-size: 1.3rem; font-weight: 600; line-height: 1.3 } .tile span { color: var(--soft) }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100% }
th, td { text-align: right; padding: .3rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap }
th { font-weight: 500; color: var(--soft) } th:first-child, td:first-child, .left td, .left th { text-align: left }
td.wrap { white-space: normal; min-width: 16rem; overflow-wrap: anywhere }
figure { margin: .75rem 0; padding: .75rem; background: var(--card); border: 1px solid var(--line); border-radius: 8px }
@media (max-width: 40rem) { .tiles { grid-template-columns: 1fr 1fr } }
"""


def document(title: str, style: str, body: str) -> str:
    """A whole page of HTML; ``style`` is CSS beside what all pages share."""
    head = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # Whatever is shown: nothing runs, nothing is fetched.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        f"style-src 'unsafe-inline'\"><style>{STYLE}{style}</style></head><body>"
    )
    # Surrogates, which JSON can hold, have no UTF-8.
    return f"{head}{body}</body></html>\n".encode(errors="replace").decode()


def section(name: str, title: str, *parts: str) -> str:
    """A part of a page, to which ``#name`` leads."""
    heading = f"<h2>{escape(title)}</h2>" if title else ""
    return f'<section id="{name}">{heading}{"".join(parts)}</section>'
