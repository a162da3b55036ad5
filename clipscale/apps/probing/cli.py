"""The commands ``probe``, ``composition`` and ``generalise``; each imports what it needs when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clipscale.errors import ConfigError

probing_app = typer.Typer()

Model = Annotated[str, typer.Argument(help="A run, a checkpoint, open_clip:NAME/TAG, hf:NAME, or the path of weights.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
BatchSize = Annotated[int | None, typer.Option(help="Images encoded at a time; the model's own eval.batch_size.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
ClassFile = Annotated[
    Path | None,
    typer.Option(help="Class names, where the data do not tell: a text, one a line, or JSON with classnames."),
]
LabelKey = Annotated[
    str | None, typer.Option(help="Where labels stand: a member, json:FIELD or a column; else cls, json:label.")
]


@probing_app.command("probe")
def probe_command(
    model: Model,
    train: Annotated[str, typer.Option(help="Labelled images: shards, a directory of them, a folder, a .csv.")],
    test: Annotated[str, typer.Option(help="Labelled images that accuracy is measured on.")],
    val: Annotated[
        str | None, typer.Option(help="Images by which C and k are chosen; else a fifth of each training class is.")
    ] = None,
    shots: Annotated[str | None, typer.Option(help="Few-shot probes too: images per class, e.g. 1,2,4,8,16.")] = None,
    draws: Annotated[int, typer.Option(help="Of the few images, each with a seed of its own.")] = 3,
    k: Annotated[int | None, typer.Option("--k", help="Nearest neighbours that vote; else chosen.")] = None,
    embedding: Annotated[
        bool, typer.Option("--embedding", help="Probe what search and zero-shot see, not the features before it.")
    ] = False,
    float32: Annotated[bool, typer.Option("--float32", help="Fit in single precision: half the memory.")] = False,
    classes: ClassFile = None,
    label_key: LabelKey = None,
    plot: Annotated[Path | None, typer.Option(help="Write the few-shot curve (.png).")] = None,
    seed: Annotated[int, typer.Option(help="Of what is held back and of the few images.")] = 0,
    device: Device = "auto",
    batch_size: BatchSize = None,
    as_json: AsJson = False,
) -> None:
    """Classify by frozen features: linear probe as in the CLIP paper, nearest neighbours, few-shot curves."""
    from clipscale.apps.probing.probe import Options, probe

    options = Options(val, classes, label_key, _numbers(shots), draws, k, embedding, float32, seed, plot)
    probe(model, train, test, options, device, batch_size, as_json)


def _numbers(text: str | None) -> list[int]:
    """Numbers with commas between them. Raises ConfigError for anything else."""
    try:
        return [int(part) for part in text.split(",")] if text else []
    except ValueError:
        raise ConfigError(f"--shots {text}: give numbers with commas between them, e.g. 1,2,4,8,16") from None


@probing_app.command("composition")
def composition_command(
    model: Model,
    sets: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SET]...",
            help="`shapes` (built in, the default), a directory with Winoground's examples.jsonl, a .json in "
            "SugarCrepe's layout or a directory of such.",
        ),
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Directory of their images; else `images` beside them.")] = None,
    device: Device = "auto",
    batch_size: BatchSize = None,
    as_json: AsJson = False,
) -> None:
    """Ask which caption belongs to which image where they differ in little: swapped attributes, counts, places."""
    from clipscale.apps.probing.composition import composition

    composition(model, sets or [], images, device, batch_size, as_json)


@probing_app.command("generalise")
def generalise_command(
    model: Model,
    train: Annotated[str, typer.Option(help="What it was trained on, or a part of it; every image is compared with.")],
    held_out: Annotated[str, typer.Option(help="Images that it was not trained on.")],
    out: Annotated[Path, typer.Option(help="Directory for report.html, report.json and neighbours.csv.")],
    shifted: Annotated[
        list[str] | None, typer.Option(help="NAME=DATASET: naturally shifted images, measured as well; repeatable.")
    ] = None,
    classes: ClassFile = None,
    label_key: LabelKey = None,
    text_key: Annotated[
        str, typer.Option(help="Without classes: where the text stands that an image is to find among all.")
    ] = "txt",
    most: Annotated[int, typer.Option(help="Held-out images that are damaged in twenty ways, at most.")] = 5000,
    corruptions: Annotated[bool, typer.Option(help="Measure on damaged images.")] = True,
    seed: Annotated[int, typer.Option(help="Of the sample of training images.")] = 0,
    device: Device = "auto",
    batch_size: BatchSize = None,
    as_json: AsJson = False,
) -> None:
    """Generalising or memorising: training against held-out data, images seen before, damaged and shifted images."""
    from clipscale.apps.probing.generalise import Options, generalise

    options = Options(shifted or [], classes, label_key, text_key, most, corruptions, seed)
    generalise(model, train, held_out, out, options, device, batch_size, as_json)
