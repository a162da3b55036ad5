"""Statistics as one page that needs nothing else: no scripts, no network, images within."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from clipscale.apps.data.describe import READ_CHARACTERS
from clipscale.apps.data.examine import shown
from clipscale.apps.data.stats_pictures import Card
from clipscale.apps.data.stats_report import DISTRIBUTIONS, cells, values
from clipscale.apps.quantities import number, size
from clipscale.apps.webpage import document, section

SHEETS = {  # what the draws are called on the page, and what they are
    "random": ("Sample sheet", "A random draw of the usable samples, the same each time."),
    "longest": ("Longest captions", ""),
    "shortest": ("Shortest captions", ""),
    "smallest": ("Smallest images", ""),
    "largest": ("Largest images", ""),
    "widest": ("Most extreme aspect ratios", ""),
}

FULL = 1530  # pixels of the widest plots

STYLE = """
.sheet { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)) }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px }
.card { padding: 0; overflow: hidden; font-size: 13px; line-height: 1.35 }
.frame { height: 9.5rem; display: flex; align-items: center; justify-content: center; background: var(--line) }
.frame img { max-width: 100%; max-height: 100%; object-fit: contain }
.frame .tiny { image-rendering: pixelated; width: 4rem; height: 4rem }
.card div + div { padding: .5rem .65rem .65rem } .card p { margin: 0 0 .35rem; overflow-wrap: anywhere }
.card details { margin-bottom: .35rem } .card summary { color: var(--soft); cursor: pointer }
.card details p { border-top: 1px solid var(--line); padding-top: .35rem }
.card small { display: block; overflow-wrap: anywhere; color: var(--soft) }
.bars { list-style: none; margin: 0; padding: 0; font-size: 14px }
.bars li { display: flex; gap: .75rem; justify-content: space-between; padding: .12rem .4rem; margin: 2px 0;
  border-radius: 3px; background: linear-gradient(var(--bar) 0 0) 0 / var(--share) 100% no-repeat }
.bars li bdi { overflow-wrap: anywhere; min-width: 0 } .bars li span { color: var(--soft) }
figure img { display: block; width: 100%; max-width: calc(70rem * var(--share)) }
@media (max-width: 40rem) { .sheet { grid-template-columns: 1fr 1fr } figure { overflow-x: auto }
  figure img { min-width: calc(40rem * var(--share)) } }
"""


def page(
    found: Mapping[str, Any], sheet: Mapping[str, Sequence[Card]], plots: Mapping[str, tuple[bytes, bytes]]
) -> str:
    """The page as HTML. ``found`` is the document, ``sheet`` cards by draw, ``plots`` PNGs for light and dark pages."""
    captions = found["captions"]
    lists = [_bars("Words, by captions that hold them", captions["frequent_words"]),
             _bars("Pairs of words", captions["frequent_bigrams"]),
             _bars("Most frequent captions", captions["frequent_captions"])]  # fmt: skip
    kinds = [_bars(f"Image {name}", list(found["images"][name].items())) for name in ("formats", "modes")]
    parts = [
        _head(found),
        section("samples", "", "".join(_sheet(name, sheet.get(name, [])) for name in ("random",))),
        section("captions", "Captions", _plot("captions", plots), _table(found, "captions"), _cut(captions),
                 _grid(lists)),
        section("images", "Images", _plot("images", plots), _table(found, "images"), _grid(kinds)),
        section("shards", "Shards", _plot("shards", plots), _table(found, "shards"), _damage(found)),
        section("fields", "Members and JSON fields", _members(found), _plot("fields", plots), _fields(found)),
        section("extremes", "Extremes", *(_sheet(name, sheet.get(name, [])) for name in list(SHEETS)[1:])),
        section("unusable", "Samples that cannot be used", _unusable(found, sheet)),
    ]  # fmt: skip
    return document("Statistics of shards", STYLE, "".join(parts))


def _head(found: Mapping[str, Any]) -> str:
    captions, images = found["captions"], found["images"]
    bad = found["samples"] - found["usable"]
    tiles = {
        "samples": f"{found['samples']:,}", "shards": f"{found['shards']['count']:,}", "in all": size(found["bytes"]),
        "cannot be used": f"{bad / found['samples']:.2%}",
        "median image": f"{number(images['width']['median'])} × {number(images['height']['median'])}",
        "median image file": size(images["bytes_per_image"]["median"]),
        "median tokens per caption": number(captions["tokens"]["median"]),
        f"captions over {captions['context_length']} tokens": f"{captions['cut_fraction']:.2%}",
        "captions that repeat one": f"{captions['duplicate_fraction']:.1%}",
        "distinct captions": f"{captions['distinct']:,}",
    }  # fmt: skip
    shown_tiles = "".join(
        f'<div class="tile"><strong>{value}</strong><span>{name}</span></div>' for name, value in tiles.items()
    )
    names = ("samples", "captions", "images", "shards", "fields", "extremes", "unusable")
    links = "".join(f'<a href="#{name}">{name}</a>' for name in names)
    first, last = found["shards"]["first"], found["shards"]["last"]
    about = _text(first, 200) if first == last else f"{_text(first, 200)} … {_text(last, 200)}"
    title = f'<h1>Statistics of shards</h1><p class="soft">{about}</p>'
    return f'{title}<nav>{links}</nav><div class="tiles">{shown_tiles}</div>'


def _grid(parts: Sequence[str]) -> str:
    return f'<div class="lists">{"".join(parts)}</div>'


def _plot(name: str, plots: Mapping[str, tuple[bytes, bytes]]) -> str:
    if name not in plots:
        return ""
    light, dark = (f"data:image/png;base64,{base64.b64encode(data).decode()}" for data in plots[name])
    share = int.from_bytes(plots[name][0][16:20]) / FULL  # a PNG's width: one scale for all plots
    return (
        f'<figure style="--share: {share:.3f}"><picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="Histograms: {name}"></picture></figure>'
    )


def _table(found: Mapping[str, Any], part: str) -> str:
    rows = "".join(
        f"<tr><td>{title}</td>{''.join(f'<td>{cell}</td>' for cell in cells(name, found[part][name]))}</tr>"
        for name, title in DISTRIBUTIONS[part].items()
    )
    heads = "".join(f"<th>{name}</th>" for name in ("", "min", "5 %", "median", "mean", "95 %", "max"))
    return f'<div class="scroll"><table><tr>{heads}</tr>{rows}</table></div>'


def _cut(captions: Mapping[str, Any]) -> str:
    return (
        f"<p>Tokens are those of the tokenizer <code>{escape(captions['tokenizer'])}</code>, with the two at the ends; "
        f"{captions['cut']:,} captions exceed {captions['context_length']} and are cut in training. "
        f"Words and tokens are counted in the first {READ_CHARACTERS:,} characters of a caption.</p>"
    )


def _bars(title: str, counts: Sequence[Sequence[Any]]) -> str:
    most = max((count for _, count in counts), default=1)
    rows = "".join(
        f'<li style="--share: {100 * count / most:.1f}%"><bdi>{_text(text, 120)}</bdi><span>{count:,}</span></li>'
        for text, count in counts
    )
    return f'<div><h3>{title}</h3><ul class="bars">{rows or "<li>none</li>"}</ul></div>'


def _text(text: str, length: int) -> str:
    return escape(shown(text, length))


def _damage(found: Mapping[str, Any]) -> str:
    damaged = list(found["shards"]["damaged"].items())
    lines = "".join(f"<li>{_text(shard, 200)}: {_text(what, 300)}</li>" for shard, what in damaged[:20])
    more = f"<li>… and {len(damaged) - 20:,} more</li>" if len(damaged) > 20 else ""
    return f"<h3>Damaged archives</h3><ul>{lines}{more}</ul>" if damaged else ""


def _members(found: Mapping[str, Any]) -> str:
    held = ", ".join(f"<code>{_text(name, 40)}</code> in {count:,}" for name, count in found["members"].items())
    count = found["unreadable_json"]
    broken = f"; <code>json</code> is no object in {count:,}" if count else ""
    return f"<p>Members of the samples: {held}{broken}.</p>"


def _fields(found: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{_text(name, 60)}</td><td>{about['present'] / found['samples']:.1%}</td>"
        f"<td>{escape(' or '.join(about['types']))}</td>"
        f"<td class='wrap'><bdi>{escape(values(about, 8))}</bdi></td></tr>"
        for name, about in found["fields"].items()
    )
    heads = "<tr><th>field</th><th>present</th><th>type</th><th>values</th></tr>"
    return f'<div class="scroll"><table class="left">{heads}{rows}</table></div>' if rows else ""


def _sheet(name: str, cards: Sequence[Card]) -> str:
    title, about = SHEETS[name]
    level = "h2" if name == "random" else "h3"
    note = f'<p class="soft">{about}</p>' if about else ""
    return f'<{level}>{title}</{level}>{note}<div class="sheet">{"".join(map(_card, cards))}</div>'


def _unusable(found: Mapping[str, Any], sheet: Mapping[str, Sequence[Card]]) -> str:
    bad = [card for name, cards in sheet.items() if name.startswith("bad:") for card in cards]
    if not bad:
        return '<p class="soft">None.</p>'
    counts = _bars("Reasons", list(found["unusable"].items()))
    return f'{_grid([counts])}<h3>Some of them</h3><div class="sheet">{"".join(map(_card, bad))}</div>'


def _card(card: Card) -> str:
    picture = '<span class="bad">no image</span>'
    if card.image:
        tiny = ' class="tiny"' if max(card.width, card.height) <= 32 else ""
        picture = f'<img src="{card.image}" alt="" loading="lazy"{tiny}>'
    elif card.reason:
        picture = f'<span class="bad">{_text(card.reason, 60)}</span>'
    texts = [f"<p><bdi>{escape(text)}</bdi></p>" for text in card.captions] or ['<p class="soft">no caption</p>']
    if card.more_captions:
        texts.append(f'<p class="soft">and {card.more_captions:,} more</p>')
    if len(texts) > 1:
        count = len(card.captions) + card.more_captions - 1
        texts[1:] = [f"<details><summary>{count:,} more</summary>{''.join(texts[1:])}</details>"]
    facts = [f"{card.width:,} × {card.height:,}"] if card.image else []
    facts += [f"{card.characters:,} characters"] if card.characters > 240 else []
    return (
        f'<div class="card"><div class="frame">{picture}</div><div>{"".join(texts)}<small>{" · ".join(facts)}</small>'
        f"<small>{_text(card.shard, 200)}/{_text(card.key, 200)}</small></div></div>"
    )
