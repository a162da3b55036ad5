"""``clipscale composition``: does a model read captions, or does it see words in any order?"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import rich.console
import rich.table
from rich.markup import escape

from clipscale.apps.asking import ask, here
from clipscale.apps.probing.sets import images_of, watched
from clipscale.data.compositions import COUNTS, PAIRS, ensure_compositions
from clipscale.data.questions import read_questions
from clipscale.distributed.collectives import rank
from clipscale.evals.composition import Score, answer
from clipscale.trainer.build import once_per_node

BUILTIN = "shapes"  # questions about scenes that clipscale draws


def composition(
    where: str, sets: Sequence[str], images: Path | None, device: str, batch_size: int | None, as_json: bool
) -> dict[str, list[Score]]:
    """Ask a model which caption belongs to which image, and print a table, or JSON; the scores by set.

    ``sets`` are ``shapes``, the built-in questions, or what :func:`clipscale.data.questions.read_questions` reads.
    Raises ClipscaleError for a model or data that are not there.
    """
    runtime = here(device)
    context = ask(where, device, batch_size)
    places: dict[str, Path] = {}
    for name in sets or (BUILTIN,):
        if name == BUILTIN:
            folder = once_per_node(runtime, lambda: ensure_compositions(context.model.config.vision.image_size))
            places |= {f"{BUILTIN}: {part}": folder / part for part in (PAIRS, COUNTS)}
        else:
            places[name] = Path(name)
    found: dict[str, list[Score]] = {}
    for name, place in places.items():
        files, questions = read_questions(place, None if name.startswith(f"{BUILTIN}: ") else images)
        with watched(context, name) as shown:
            found[name], left_out = answer(shown, images_of(files, context.model), questions)
        if left_out and not rank():
            print(
                f"warning: {name}: {left_out} of {len(questions)} questions are about unusable images", file=sys.stderr
            )
    if not rank():
        print(_as_json(found)) if as_json else _print(where, found)
    return found


def _as_json(found: dict[str, list[Score]]) -> str:
    plain: dict[str, Any] = {}
    for name, scores in found.items():
        plain[name] = {score.name: {k: v for k, v in asdict(score).items() if k != "name"} for score in scores}
    return json.dumps(plain)


def _print(where: str, found: dict[str, list[Score]]) -> None:
    table = rich.table.Table("", "questions", "right", "95 % interval", "chance", title=escape(where))
    for column in table.columns[1:]:
        column.justify = "right"
    for name, scores in found.items():
        table.add_row(f"[bold]{escape(name)}")
        for score in scores:
            chance = f"{score.chance:.1%}"
            told = f"{score.low:.1%} to {score.high:.1%}"
            style = "" if score.low > score.chance else "dim"  # no better than guessing, as far as one can tell
            table.add_row(escape(score.name), f"{score.count:,}", f"{score.value:.1%}", told, chance, style=style)
        table.add_section()
    rich.console.Console().print(table)
