"""The command ``clipscale audit``; it imports what it needs when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def audit_command(
    model: Annotated[str, typer.Argument(help="A run, a checkpoint, or what else init.weights takes.")],
    dataset: Annotated[str, typer.Argument(help="Images: shards, a folder, or a table.")],
    group: Annotated[
        list[str],
        typer.Option(
            help="NAME=FIELD (json:gender), NAME=FIELD~REGEX, whose parentheses are the group, or NAME=FILE.csv "
            "(key,group). Give it again for more."
        ),
    ],
    labels: Annotated[
        Path | None, typer.Option(help="Label sets (.yaml): the share of each group's images that gets them.")
    ] = None,
    captions: Annotated[
        str | None, typer.Option(help="Training data whose captions are counted, with --words.")
    ] = None,
    words: Annotated[
        Path | None, typer.Option(help="Words of groups and attributes (.yaml), looked for in --captions.")
    ] = None,
    caption_key: Annotated[str, typer.Option(help="Where captions stand: txt, json:FIELD.")] = "txt",
    answer_key: Annotated[
        str | None,
        typer.Option(
            help="Text that must rank first of all such texts to be right; else the class's name, else the caption."
        ),
    ] = None,
    unit: Annotated[
        str | None, typer.Option(help="Field whose equal values mean images that are not independent: json:person.")
    ] = None,
    small: Annotated[int, typer.Option(min=1, help="Groups of fewer units are flagged.")] = 30,
    out: Annotated[Path | None, typer.Option(help="The page (.html) to write.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images at a time; else that of the model.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Compare groups: accuracy, which labels each group's images get, and what captions say beside words for groups."""
    from clipscale.apps.audit.command import Options, audit

    options = Options(group, labels, captions, words, caption_key, answer_key, unit, small, batch_size)
    audit(model, dataset, options, out, device, as_json)
