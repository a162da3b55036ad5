"""What ``clipscale generalise`` found as one page that needs nothing else."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from PIL import Image

from clipscale.apps.data.stats_plots import DARK, LIGHT
from clipscale.apps.probing.contact import KINDS, Contact
from clipscale.apps.webpage import document, section
from clipscale.data.evalset import EvalItem, EvalSet

SHOWN = 12  # pairs of pictures of a kind
SIDE = 96  # pixels of a picture
COPIES = {"exact": "with equal bytes", "near": "alike", "mirrored": "mirrored"}
COLOURS = {"blur": "#2f6fb0", "noise": "#c4661f", "jpeg": "#3d8b57", "contrast": "#8a58b5"}
BRIGHT = {"blur": "#74a9dc", "noise": "#eb9d5e", "jpeg": "#7cc796", "contrast": "#c09ae0"}

STYLE = """
.pairs { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fill, minmax(13.5rem, 1fr)) }
.pair { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .6rem; font-size: 13px }
.pair div { display: flex; gap: .5rem } .pair img { width: 50%; aspect-ratio: 1; object-fit: contain;
  border-radius: 4px; background: var(--line) }
.pair small { display: block; color: var(--soft); overflow-wrap: anywhere }
.plot img { display: block; width: 100%; max-width: 44rem }
.tight .range { display: block } td.name { white-space: normal; min-width: 8.5rem }
.tiles + p { margin-top: 1rem } .range { color: var(--soft) }
@media (max-width: 40rem) { .range { display: block } .pairs { grid-template-columns: 1fr 1fr } }
"""


def page(told: Mapping[str, Any], train: EvalSet, held_out: EvalSet, found: Sequence[Contact]) -> str:
    """The page as HTML: ``told`` are the numbers; pictures of neighbours are read from both sets."""
    metrics = list(told["gap"])
    first = metrics[0]
    copied = sorted((one for one in found if one.copy), key=lambda one: one.cosine)
    near = sorted((one for one in found if not one.copy), key=lambda one: -one.cosine)
    parts = [
        _head(told, first, len(found)),
        section("gap", "Training and held-out images", _gap(told, metrics)),
        section("seen", "Images that are in the training data", _seen(told, metrics),
                _pairs(copied[:SHOWN], train, held_out)),
        section("nearest", "By likeness to the nearest training image", _similarity(told, metrics),
                "<h3>The most alike that are no copies</h3>", _pairs(near[:SHOWN], train, held_out)),
    ]  # fmt: skip
    if told["corruptions"]:
        parts.append(section("damage", "Damaged images", _plot(told["corruptions"], first), _damage(told, first)))
    return document("Generalising or memorising", STYLE, "".join(parts))


def _head(told: Mapping[str, Any], metric: str, count: int) -> str:
    scores, difference, copies = told["scores"], told["gap"][metric], told["contamination"]
    seen = sum(copies[kind] for kind in KINDS)
    tiles = {
        f"{metric}, training": _percent(scores["train"][metric]["value"]),
        f"{metric}, held out": _percent(scores["held out"][metric]["value"]),
        "gap": f"{100 * difference['value']:.1f} points",
        "held-out images that are in training": f"{seen:,} of {count:,}",
    }
    if told["corruptions"]:
        worst = [levels[-1]["scores"][metric]["value"] for levels in told["corruptions"].values()]
        tiles["mean under the worst damage"] = _percent(sum(worst) / len(worst))
    shown = "".join(
        f'<div class="tile"><strong>{value}</strong><span>{name}</span></div>' for name, value in tiles.items()
    )
    asked = (
        "Each image is asked for its class, by the best of the prompts."
        if told["question"] == "zeroshot"
        else "Each image is asked for its text, among all texts of its set."
    )
    return (
        f'<h1>Generalising or memorising</h1><p class="soft">{escape(str(told["model"]))}</p>'
        f'<div class="tiles">{shown}</div><p>{asked} Intervals are 95 %.</p>'
    )


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _cell(part: Mapping[str, float] | None) -> str:
    if part is None:
        return "none"
    return f'{_percent(part["value"])} <span class="range">{100 * part["low"]:.1f} to {100 * part["high"]:.1f}</span>'


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(head)}</th>" for head in heads)
    body = "".join(
        f'<tr><td class="name">{row[0]}</td>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>' for row in rows
    )
    return f'<div class="scroll"><table><tr>{top}</tr>{body}</table></div>'


def _row(name: str, scores: Mapping[str, Any], metrics: Sequence[str]) -> list[str]:
    count = scores[metrics[0]]["count"] if scores[metrics[0]] else 0
    return [escape(name), f"{count:,}", *(_cell(scores[metric]) for metric in metrics)]


def _gap(told: Mapping[str, Any], metrics: Sequence[str]) -> str:
    names = {"train": "training, a random sample", "held out": "held out"}
    rows = [_row(names.get(name, f"shifted: {name}"), scores, metrics) for name, scores in told["scores"].items()]
    rows.append(["<strong>gap, training less held out</strong>", "", *(_cell(told["gap"][m]) for m in metrics)])
    rows += [
        [f"chance, {escape(names.get(name, name))}", "", *(_percent(chance[m]) for m in metrics)]
        for name, chance in told["chance"].items()
    ]
    sets = "; ".join(
        f"{escape(name)}: {one['images']:,} images of <code>{escape(one['where'])}</code>"
        + (f", {one['unusable']:,} unusable" if one["unusable"] else "")
        for name, one in told["sets"].items()
    )
    return _table(("", "images", *metrics), rows) + f'<p class="soft">{sets}.</p>'


def _seen(told: Mapping[str, Any], metrics: Sequence[str]) -> str:
    copies = told["contamination"]
    rows = [
        _row("all held-out images", copies["all"], metrics),
        _row("not in the training data", copies["clean"], metrics),
        _row(", ".join(f"{copies[kind]:,} {COPIES[kind]}" for kind in KINDS), copies["in_training"], metrics),
    ]
    about = "Alike: a perceptual hash within 4 of 64 bits, and the same colours. On the left the held-out image."
    return _table(("", "images", *metrics), rows) + f'<p class="soft">{about}</p>'


def _similarity(told: Mapping[str, Any], metrics: Sequence[str]) -> str:
    rows = [
        _row(f"cosine {one['from']:.3f} to {one['to']:.3f}", one["scores"], metrics) for one in told["by_similarity"]
    ]
    about = (
        "Held-out images in four parts, by the cosine of their features with those of the nearest training image. A "
        "model that does well only on the part that is nearest leans on what it has seen."
    )
    return f'<p class="soft">{about}</p>' + _table(("", "images", *metrics), rows)


def _damage(told: Mapping[str, Any], metric: str) -> str:
    levels = next(iter(told["corruptions"].values()))
    heads = [f"{metric}, severity", *("none" if not one["severity"] else str(one["severity"]) for one in levels)]
    rows = [[kind, *(_cell(one["scores"][metric]) for one in found)] for kind, found in told["corruptions"].items()]
    return f'<div class="tight">{_table(heads, rows)}</div>'


def _plot(corruptions: Mapping[str, Sequence[Mapping[str, Any]]], metric: str) -> str:
    light, dark = (
        f"data:image/png;base64,{base64.b64encode(_figure(corruptions, metric, *colours)).decode()}"
        for colours in ((LIGHT, COLOURS), (DARK, BRIGHT))
    )
    return (
        f'<figure class="plot"><picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="Score by severity of each corruption"></picture></figure>'
    )


def _figure(
    corruptions: Mapping[str, Sequence[Mapping[str, Any]]],
    metric: str,
    page: Mapping[str, str],
    lines: Mapping[str, str],
) -> bytes:
    style: Any = {
        "font.size": 10, "text.color": page["text"], "axes.labelcolor": page["text"], "axes.edgecolor": page["line"],
        "xtick.color": page["line"], "ytick.color": page["line"], "xtick.labelcolor": page["text"],
        "ytick.labelcolor": page["text"], "axes.grid": True, "grid.color": page["line"], "grid.linewidth": 0.6,
        "axes.spines.top": False, "axes.spines.right": False, "figure.facecolor": page["page"],
        "axes.facecolor": page["page"], "axes.axisbelow": True,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(7, 3.4), layout="constrained")
        axes = figure.add_subplot()
        for kind, levels in corruptions.items():
            places = [one["severity"] for one in levels]
            scores = [one["scores"][metric] for one in levels]
            axes.fill_between(places, [s["low"] for s in scores], [s["high"] for s in scores], color=lines[kind],
                              alpha=0.13, linewidth=0)  # fmt: skip
            axes.plot(places, [s["value"] for s in scores], "o-", color=lines[kind], label=kind, markersize=4)
        axes.set_xticks(places, ["none", *map(str, places[1:])])
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
        axes.set(xlabel="severity", ylabel=metric)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()


def _pairs(found: Sequence[Contact], train: EvalSet, held_out: EvalSet) -> str:
    cards = []
    for one in found:
        other = one.copy_of if one.copy else one.nearest
        (image, key), (twin, name) = _picture(held_out, one.place), _picture(train, other)
        remark = COPIES.get(one.copy, f"cosine {one.cosine:.3f}")
        cards.append(
            f'<div class="pair"><div><img src="{image}" alt="held out"><img src="{twin}" alt="training"></div>{remark}'
            f"<small>{escape(_plain(key))}</small><small>{escape(_plain(name))}</small></div>"
        )
    return f'<div class="pairs">{"".join(cards)}</div>' if cards else '<p class="soft">None.</p>'


def _plain(text: str) -> str:
    return text.encode(errors="replace").decode()


def _picture(images: EvalSet, place: int) -> tuple[str, str]:
    """A data URI of an image, and its key."""
    (item,) = images.read(place, place + 1)
    assert isinstance(item, EvalItem), "it was usable a moment ago"
    image = Image.fromarray(item.image.permute(1, 2, 0).numpy())
    image.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}", item.key
