"""An audit as a section of a model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clipscale.errors import DataError


def audit_section(path: Path) -> str:
    """Markdown of what ``clipscale audit --json`` printed into a file. Raises DataError for anything else."""
    try:
        found = json.loads(path.read_text())
        return _section(found)
    except OSError as error:
        raise DataError(f"--audit {path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"--audit {path} is not what `clipscale audit --json` prints") from None


def _section(found: Mapping[str, Any]) -> str:
    measured = {"accuracy": found["accuracy"]}
    measured |= {f"labelled {name}": of for name, of in found.get("labels", {}).get("sets", {}).items()}
    parts = [
        f"Of {_plain(found['model'])} with {found['images']:,} images, with 95 % intervals over {found['units']:,} "
        "units. Accuracy: an image's own "
        f"text is the most similar of {found['accuracy']['texts']:,}. Groups of fewer than {found['small']} units are "
        "marked with *, and are in no gap. These numbers say what the model did with these images, not why."
    ]
    for name in found["groups"]:
        parts += [_table(name, measured), *_gaps(name, measured)]
    for name, of in found.get("labels", {}).get("sets", {}).items():
        parts.append(f"Labels of {_plain(name)}: {', '.join(map(_plain, of['labels']))}.")
    if "captions" in found:
        parts.append(_words(found["captions"]))
    return "\n\n".join(parts) + "\n"


def _table(group: str, measured: Mapping[str, Any]) -> str:
    spreads = [of["by"][group]["groups"] for of in measured.values()]
    lines = [
        f"| {_plain(group)} | images | {' | '.join(map(_plain, measured))} |",
        "|---|---|" + "---|" * len(measured),
    ]
    for name, first in spreads[0].items():
        cells = (f"{r['rate']:.1%} [{r['low']:.1%}, {r['high']:.1%}]" for r in (spread[name] for spread in spreads))
        lines.append(f"| {_plain(name)}{'*' if first['small'] else ''} | {first['images']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _words(found: Mapping[str, Any]) -> str:
    lines = [
        f"Words in captions of {found['samples']:,} training samples ({found['without_caption']:,} more have none). "
        "Log odds with 95 % intervals; above 0, captions that name this group and no other have the attribute more "
        "often than those that name others and not this one.",
        "",
        "| group | attribute | captions with both | log odds |",
        "|---|---|---|---|",
    ]
    for group, row in found["associations"].items():
        for attribute, one in row.items():
            odds = f"{one['log_odds']:+.2f} [{one['low']:+.2f}, {one['high']:+.2f}]" if one["named"] else ""
            lines.append(f"| {_plain(group)} | {_plain(attribute)} | {one['both']:,} of {one['named']:,} | {odds} |")
    return "\n".join(lines)


def _gaps(group: str, measured: Mapping[str, Any]) -> list[str]:
    """The gaps that are more than chance gives, or that none is."""
    spreads = {name: of["by"][group] for name, of in measured.items()}
    sure = [
        f"{_plain(name)}: {of['gap']:.1%}, {_plain(of['lowest'])} to {_plain(of['highest'])} (p = {of['p']:.3f})"
        for name, of in spreads.items()
        if of["gap"] is not None and of["p"] < 0.05
    ]
    if sure:
        return [f"Gaps larger than dealing the groups at random gives: {'; '.join(sure)}."]
    if all(of["gap"] is None for of in spreads.values()):
        return ["No gap is given: fewer than two groups are large enough."]
    return ["No gap between these groups is larger than chance may give."]


def _plain(text: str) -> str:
    """A word of the user's as a cell of a table."""
    return str(text).replace("|", " ").replace("\n", " ").replace("<", "&lt;")
