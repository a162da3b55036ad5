"""The commands ``clipscale explain`` and ``clipscale explain-check``; each imports what it needs when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="A run, a checkpoint, or what else init.weights takes.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def explain_command(
    model: Model,
    image: Annotated[Path, typer.Argument(help="An image file.")],
    caption: Annotated[str, typer.Argument(help="The caption whose similarity is explained.")],
    against: Annotated[
        list[str] | None, typer.Option(help="Another caption: explain what tells them apart. Give it again for more.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The picture (.png) to write.")] = None,
    method: Annotated[
        str | None, typer.Option(help="integrated, attention (ViTs) or gradcam (others); by default the best.")
    ] = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Show which parts of an image and which words of a caption made their similarity."""
    from clipscale.apps.explain.command import explain_image

    explain_image(model, image, caption, against or [], out, method, device, as_json)


def explain_check_command(
    model: Model,
    dataset: Annotated[str, typer.Argument(help="Images with captions: shards, a folder, or a table.")],
    caption_key: Annotated[str, typer.Option(help="Where a sample's caption stands: txt, json:FIELD.")] = "txt",
    images: Annotated[int, typer.Option(min=2, help="Images that are taken, evenly over the data.")] = 200,
    fill: Annotated[str, typer.Option(help="What stands where cells are gone: blur, or mean (colour).")] = "blur",
    contrast: Annotated[
        bool, typer.Option("--contrast", help="Explain what tells each caption from those of the other images.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="The picture (.png) of the curves to write.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 32,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure whether explanations are true: the score's fall as cells are deleted in their order, beside chance and
    edges."""
    from clipscale.apps.explain.check import Options, check

    check(model, dataset, Options(caption_key, images, fill, contrast, batch_size), out, device, as_json)
