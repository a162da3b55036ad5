"""The parts of a report that are no curves: tables, tiles, where the time went, examples."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from clipscale.apps.quantities import duration, number
from clipscale.apps.record import Record
from clipscale.errors import masked

SPENT = {  # where time goes: what it is called, and its colour
    "step": ("steps that count", 2), "data_wait": ("waiting for data", 1), "checkpoint": ("checkpoints", 3),
    "evaluation": ("evaluations", 0), "start": ("starting", 6), "lost": ("lost to restarts", 4),
}  # fmt: skip
EVENTS = 200  # the newest, that are shown
SHOWN = 400  # characters of a value


def shown(value: Any) -> str:
    """A value of a configuration or an event, as YAML's flow style would have it, escaped and without secrets."""
    text = masked(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))
    return escape(text if len(text) <= SHOWN else text[:SHOWN] + " …")


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """Cells are HTML already; the first column stands left."""
    if not rows:
        return ""
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    body = "".join(
        f'<tr><td class="name">{row[0]}</td>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>' for row in rows
    )
    return f'<div class="scroll"><table class="{kind}"><tr>{head}</tr>{body}</table></div>'


def tiles(values: Mapping[str, tuple[str, str]]) -> str:
    """Large numbers, ``{name: (value, remark)}``."""
    shown_tiles = "".join(
        f'<div class="tile"><strong>{escape(value)}</strong><span>{escape(name)}</span><small>{escape(remark)}</small>'
        "</div>"
        for name, (value, remark) in values.items()
    )
    return f'<div class="tiles">{shown_tiles}</div>'


def shares(record: Record, title: str = "") -> str:
    """Where the time went, as a bar and a list."""
    wall = record.last.get("time/wall_s")
    if not wall:
        return ""
    seconds = {kind: record.last.get(f"time/{kind}_s", 0.0) for kind in SPENT}
    bar = "".join(
        f'<i class="s{SPENT[kind][1]}" style="width: {100 * value / wall:.2f}%" title="{SPENT[kind][0]}"></i>'
        for kind, value in seconds.items()
        if value > 0
    )
    legend = "".join(
        f'<span><i class="key s{colour}"></i>{name} <b>{seconds[kind] / wall:.1%}</b> · {duration(seconds[kind])}'
        "</span>"
        for kind, (name, colour) in SPENT.items()
    )
    heading = f"<h3>{escape(title)}</h3>" if title else ""
    return f'<div class="shares">{heading}<div class="share">{bar}</div><div class="legend">{legend}</div></div>'


def attempts(record: Record) -> str:
    """A row per start."""
    rows = [
        [str(event.get("attempt", i)), escape(event["time"]), f"{event.get('world_size', '')}",
         f"{event.get('samples_seen') or 0:,}", shown(event.get("checkpoint") or "the beginning"),
         duration(float(event.get("startup_s", 0)))]
        for i, event in enumerate(record.starts, start=1)
    ]  # fmt: skip
    return table(("start", "time, UTC", "processes", "samples seen", "from", "getting ready"), rows)


def evaluations(record: Record) -> str:
    """A row per metric of the evaluations: last, best, where, and chance."""
    rows = []
    for key in record.last:
        if not key.startswith("val/") or key.endswith(("_chance", "bad_samples")) or "/top1_" in key:
            continue
        points = record.series(key)
        if not points:
            continue
        best = (min if key.endswith("loss") else max)(points, key=lambda point: point[1])
        luck = record.last.get(f"{key}_chance")
        rows.append([
            escape(key.removeprefix("val/")), f"{points[-1][1]:.4f}", f"{best[1]:.4f}", f"{best[0]:,.0f}",
            "" if luck is None else f"{luck:.4f}", "" if not luck else f"{points[-1][1] / luck:.1f}×",
        ])  # fmt: skip
    return table(("metric", "last", "best", "best at, samples", "chance", "times chance"), rows)


def compared_evaluations(records: Sequence[Record]) -> str:
    """A row per metric, a column per run, the best in bold."""
    keys = dict.fromkeys(key for record in records for key in record.last if key.startswith("val/"))
    rows = []
    for key in keys:
        if key.endswith(("_chance", "bad_samples")) or "/top1_" in key:
            continue
        values = [record.last.get(key) for record in records]
        best = (min if key.endswith("loss") else max)(value for value in values if value is not None)
        cells = ["" if v is None else f"<strong>{v:.4f}</strong>" if v == best else f"{v:.4f}" for v in values]
        rows.append([escape(key.removeprefix("val/")), *cells])
    return table(("metric", *(record.name for record in records)), rows)


def data_health(record: Record) -> str:
    """Bad samples by reason and by shard, and archives that are damaged."""
    last, seen = record.last, record.samples_seen
    prefix = "train/bad_samples/"
    reasons = {key.removeprefix(prefix): value for key, value in last.items() if key.startswith(prefix)}
    rows = [[shown(reason), f"{n:,.0f}", f"{n / max(seen, 1):.3%}"] for reason, n in reasons.items() if n]
    told = [event for event in record.events if event["event"] == "bad_samples"]
    worst = [[shown(shard), f"{n:,}"] for shard, n in (told[-1].get("shards") or {}).items()] if told else []
    damaged = {
        str(event.get("shard")): event.get("damage") for event in record.events if event["event"] == "damaged_shard"
    }
    counts = {
        "samples seen": f"{seen:,}",
        "bad samples": f"{last.get('train/bad_samples', 0):,.0f}",
        "captions cut": f"{last.get('train/truncated_captions', 0):,.0f}",
        "tokens per caption": number(last.get("train/tokens_per_caption", 0)),
    }
    parts = [
        table(("", ""), [[name, value] for name, value in counts.items()]),
        table(("bad, by reason", "samples", "of those seen"), rows),
        table(("worst shards since the last start", "bad samples"), worst),
        table(("damaged archive", "what"), [[shown(name), shown(what)] for name, what in damaged.items()], "left"),
    ]
    return f'<div class="lists">{"".join(f"<div>{part}</div>" for part in parts if part)}</div>'


def keys(values: Mapping[str, Any]) -> str:
    """A table of keys and values."""
    return table(("key", "value"), [[escape(key), shown(value)] for key, value in values.items()], "left")


def events(record: Record) -> str:
    """The newest events."""
    rows = [
        [escape(event["time"]), shown(event["event"].replace("_", " ")),
         ", ".join(f"{escape(key)} {shown(value)}" for key, value in event.items() if key not in ("time", "event"))]
        for event in record.events[-EVENTS:]
    ]  # fmt: skip
    return table(("time, UTC", "event", "details"), rows, "left wide")


def examples(record: Record) -> str:
    """What retrieval found for some captions, similarities of some pairs, and which classes are taken for which."""
    found = record.examples
    parts = [_asked(one) for one in found.get("retrieval", [])]
    asks = f'<div class="asks">{"".join(parts)}</div>' if parts else ""
    if asks:
        asks = (
            '<p class="soft">Held-out captions, and the held-out images that the model ranks first for each; a frame '
            f"marks those it was written for. At {found.get('samples_seen', 0):,} samples.</p>{asks}"
        )
    similarity = found.get("similarity") or {}
    pairs = _matrix(similarity.get("captions", []), similarity.get("values", []), "{:.2f}")
    confusion = found.get("confusion") or {}
    classes = _matrix(confusion.get("classes", []), confusion.get("counts", []), "{:.0f}", written=True)
    if pairs:
        asks += (
            "<h3>Similarity of held-out pairs</h3><p class=soft>A row per caption, a column per image, in the same "
            f"order: the diagonal should be darkest.</p>{pairs}"
        )
    if classes:
        asks += (
            "<h3>Zero-shot confusion</h3><p class=soft>A row per class, a column per answer, in the same order; the "
            f"classes that are mistaken most.</p>{classes}"
        )
    return asks


def _asked(one: Mapping[str, Any]) -> str:
    pictures = "".join(
        f'<figure class="{"right" if found.get("right") else ""}"><img src="{escape(found["image"])}" loading="lazy" '
        f'alt="" title="{shown(found.get("caption", ""))}">{found["score"]:.3f}</figure>'
        for found in one.get("found", [])
        if str(found.get("image")).startswith("data:image/")
    )
    caption = f"<p><bdi>{shown(one.get('caption', ''))}</bdi></p>"
    return f'<div class="asked">{caption}<div class="ranked">{pictures}</div></div>'


def _matrix(names: Sequence[str], values: Sequence[Sequence[float]], tell: str, written: bool = False) -> str:
    if not names or not values:
        return ""
    flat = [value for row in values for value in row]
    low, high = min(flat), max(flat)
    rows = []
    for name, row in zip(names, values, strict=False):
        cells = []
        for other, value in zip(names, row, strict=False):
            depth = (value - low) / ((high - low) or 1)
            told = tell.format(value)
            text = told if written and value else ""
            shade = f"color-mix(in srgb, var(--s0) {100 * depth:.0f}%, var(--card))"
            cells.append(f'<td style="background: {shade}" title="{shown(name)} · {shown(other)}: {told}">{text}</td>')
        rows.append(f'<tr><th title="{shown(name)}">{shown(name)}</th>{"".join(cells)}</tr>')
    return f'<div class="scroll"><table class="matrix">{"".join(rows)}</table></div>'
