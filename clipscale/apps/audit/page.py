"""An audit as a page: one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from clipscale.apps.audit.command import gap_in_words, told
from clipscale.apps.report import parts
from clipscale.apps.webpage import document, section

WIDTH = 220  # of a drawn interval, in units of its own

STYLE = """
:root { --dot: #2f6fb0; --plus: #b2182b; --minus: #2166ac }
@media (prefers-color-scheme: dark) { :root { --dot: #74a9dc; --plus: #e58267; --minus: #67a9cf } }
table.rates { width: auto; min-width: min(100%, 46rem) } .both { display: flex; flex-wrap: wrap; gap: 0 1rem;
  justify-content: flex-end; align-items: center }
svg.rate { display: block; width: 13.75rem; height: 1.2rem } svg.rate .line { stroke: var(--dot); stroke-width: 2 }
svg.rate circle { fill: var(--dot) } svg.rate .all { stroke: var(--mark); stroke-width: 1; stroke-dasharray: 2 2 }
svg.rate .ends { stroke: var(--line); stroke-width: 1 } tr.small svg { opacity: .45 }
tr.small td { color: var(--soft) } .flag { color: var(--mark); font-size: 12px; white-space: nowrap }
td.name { white-space: normal; min-width: 7rem; overflow-wrap: anywhere } table.odds { width: auto; margin: .5rem 0 }
table.odds th + th, table.odds td + td { text-align: center; min-width: 7rem }
table.odds small { display: block; color: var(--ink); opacity: .75 }
.say { max-width: 46rem } .tiles { grid-template-columns: repeat(auto-fill, minmax(10.5rem, 1fr)) }
.tile { min-width: 0 } .tile strong { overflow-wrap: anywhere } .tile small { display: block; color: var(--soft) }
.often { columns: 20rem; padding: 0; list-style: none } .often li { break-inside: avoid; margin: 0 0 .5rem }
@media (max-width: 40rem) { svg.rate { width: 9rem } th, td { padding: .3rem .35rem } }
"""

READ = (
    "A number here says what this model did with these images, not why, and not what it does with others. The brackets "
    "hold 95 % intervals: had other images of the same kind been taken, the number would most likely lie there. Groups "
    "marked as small are too few to compare, and are in no gap. Many numbers are compared on this page: of twenty gaps "
    "between groups that are really alike, one has p below 0.05."
)


def page(found: Mapping[str, Any]) -> str:
    """The page as HTML, of the document that ``--json`` prints."""
    names = {"accuracy": "accuracy"} | ({"labels": "labels"} if "labels" in found else {})
    names |= {"captions": "captions"} if "captions" in found else {}
    links = "".join(f'<a href="#{name}">{name}</a>' for name in names)
    body = [
        f"<h1>Audit of {escape(str(found['model']))}</h1>",
        f'<p class="soft say">{READ}</p><nav>{links}</nav>',
        parts.tiles(_tiles(found)),
        section("accuracy", "Accuracy by group", _accuracy(found["accuracy"], found)),
    ]
    if "labels" in found:
        body.append(section("labels", "Which labels each group's images get", _labels(found["labels"])))
    if "captions" in found:
        body.append(section("captions", "Words beside words in the training captions", _captions(found["captions"])))
    return document(f"Audit of {found['model']}", STYLE, "".join(body))


def _tiles(found: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    accuracy = found["accuracy"]
    unit = f"by {found['unit']}" if found["unit"] else "each image is one"
    return {
        "images": (f"{found['images']:,}", f"{found['unusable']:,} could not be used"),
        "units, drawn anew for intervals": (f"{found['units']:,}", unit),
        "accuracy of all": (f"{accuracy['overall']['rate']:.1%}", f"chance {accuracy['chance']:.2%}"),
        "small groups": (f"< {found['small']}", "units, flagged"),
    }


def _accuracy(of: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    about = (
        f'<p class="say">An image is right if its own text (<code>{escape(of["of"])}</code>) is more similar to it '
        f"than the other {of['texts'] - 1:,} texts of the data set are. The dotted line is the rate of all images.</p>"
    )
    left_out = [
        f"{found['images'] - sum(groups.values()):,} of no {escape(name)}" for name, groups in found["groups"].items()
    ]
    return f'{about}{_spreads(of)}<p class="soft">Images that are in no group: {", ".join(left_out)}.</p>'


def _labels(of: Mapping[str, Any]) -> str:
    prompts = ", ".join(f"“{escape(one)}”" for one in of["templates"])
    about = (
        '<p class="say">Each image gets the one label, of all sets together, that is most similar to it (prompts: '
        f"{prompts}). The labels are the auditor's choice: another list gives other rates.</p>"
    )
    sets = "".join(
        f"<h3>{escape(name)}</h3><p class='soft'>{escape(', '.join(one['labels']))}</p>{_spreads(one)}"
        for name, one in of["sets"].items()
    )
    often = "".join(_often(name, groups) for name, groups in of["most_frequent"].items())
    return about + sets + f"<h3>The labels that each group gets most</h3>{often}"


def _often(name: str, groups: Mapping[str, Sequence[Sequence[Any]]]) -> str:
    items = "".join(
        f"<li><b>{escape(group)}</b>: {', '.join(f'{escape(label)} {share:.0%}' for label, share in labels)}</li>"
        for group, labels in groups.items()
    )
    return f'<p class="soft">{escape(name)}</p><ul class="often">{items}</ul>'


def _spreads(of: Mapping[str, Any]) -> str:
    return "".join(
        f"{_table(name, spread, of['overall']['rate'])}<p>{escape(gap_in_words(spread))}</p>"
        for name, spread in of["by"].items()
    )


def _table(name: str, spread: Mapping[str, Any], overall: float) -> str:
    top = max([overall, *(rate["high"] for rate in spread["groups"].values())])
    scale = WIDTH / min(max(top * 1.05, 0.02), 1.0)
    rows = "".join(_row(group, rate, overall, scale) for group, rate in spread["groups"].items())
    heads = "".join(f"<th>{escape(head)}</th>" for head in (name, "images", "units", "rate"))
    return f'<div class="scroll"><table class="rates"><tr>{heads}</tr>{rows}</table></div>'


def _row(group: str, rate: Mapping[str, Any], overall: float, scale: float) -> str:
    low, middle, high, everyone = (scale * value for value in (rate["low"], rate["rate"], rate["high"], overall))
    drawn = (
        f'<svg class="rate" viewBox="-4 0 {WIDTH + 8} 16" role="img" aria-label="{told(rate)}">'
        f'<line class="ends" x1="0" x2="{WIDTH}" y1="8" y2="8"/>'
        f'<line class="all" x1="{everyone:.1f}" x2="{everyone:.1f}" y1="0" y2="16"/>'
        f'<line class="line" x1="{low:.1f}" x2="{high:.1f}" y1="8" y2="8"/>'
        f'<circle cx="{middle:.1f}" cy="8" r="4"/></svg>'
    )
    flag = ' <span class="flag">small</span>' if rate["small"] else ""
    kind = ' class="small"' if rate["small"] else ""
    return (
        f'<tr{kind}><td class="name">{escape(group)}{flag}</td><td>{rate["images"]:,}</td><td>{rate["units"]:,}</td>'
        f'<td><div class="both">{told(rate)}{drawn}</div></td></tr>'
    )


def _captions(found: Mapping[str, Any]) -> str:
    without = f" ({found['without_caption']:,} more have no caption)" if found["without_caption"] else ""
    about = (
        f'<p class="say">Of {found["samples"]:,} training samples{without}, how often those whose captions name one '
        "group, and no other, also have an attribute's words. The number is the log of the odds ratio against those "
        "that name other groups: above 0, the attribute comes more often with this one. Coloured where the 95 % "
        "interval leaves out 0.</p>"
    )
    names = list(found["attributes"])
    heads = "".join(f"<th>{escape(name)} ({found['attributes'][name]:,})</th>" for name in names)
    rows = "".join(
        f'<tr><td class="name">{escape(group)} <span class="soft">({found["groups"][group]:,})</span></td>'
        f"{''.join(_odds(row[name]) for name in names)}</tr>"
        for group, row in found["associations"].items()
    )
    return f'{about}<div class="scroll"><table class="odds"><tr><th>captions</th>{heads}</tr>{rows}</table></div>'


def _odds(one: Mapping[str, Any]) -> str:
    if not one["named"]:
        return "<td></td>"
    sure = one["low"] > 0 or one["high"] < 0
    side = "plus" if one["log_odds"] > 0 else "minus"
    depth = min(abs(one["log_odds"]) / 3, 1) * 55
    shade = f"background: color-mix(in srgb, var(--{side}) {depth:.0f}%, transparent)" if sure else ""
    pmi = "never together" if one["pmi"] is None else f"PMI {one['pmi']:+.2f} bits"
    return (
        f'<td style="{shade}" title="{pmi}">{one["log_odds"]:+.2f}'
        f"<small>[{one['low']:+.2f}, {one['high']:+.2f}]</small>"
        f"<small>{one['both']:,} of {one['named']:,}, {one['both'] / one['named']:.1%}</small></td>"
    )
