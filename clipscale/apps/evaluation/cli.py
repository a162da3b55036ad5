"""The commands ``clipscale eval`` and ``clipscale results``; they import what they need when they run."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from clipscale.errors import ConfigError

KEY = re.compile(r"^[a-z_]+(\.\w+)+=")


def eval_command(
    model: Annotated[
        str,
        typer.Argument(help="A run, a checkpoint, open_clip:NAME/TAG, hf:NAME, or a path of weights."),
    ],
    datasets: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[DATASET | KEY=VALUE]...",
            help="Shards, a directory of CLIP_benchmark's layout or WinoGAViL's, a folder of images, a .csv or .tsv. "
            "None: what the run was validated on, with other data by KEY=VALUE (data.val.shards=…)",
        ),
    ] = None,
    suite: Annotated[str | None, typer.Option(help="A list of data sets: datacomp, or a YAML file.")] = None,
    data_dir: Annotated[str | None, typer.Option(help="Directory that the paths of a suite are below.")] = None,
    kind: Annotated[
        str, typer.Option(help="zeroshot, multilabel, retrieval, associations; else what the data tell.")
    ] = "",
    metric: Annotated[str, typer.Option(help="The score that counts.")] = "",
    split: Annotated[str, typer.Option(help="Of CLIP_benchmark's layout.")] = "test",
    classes: Annotated[str, typer.Option(help="Class names: a text, one a line, or JSON with classnames.")] = "",
    templates: Annotated[
        str, typer.Option(help="Prompts: a set (imagenet, simple, pets, …) or a file, one with {} a line.")
    ] = "",
    negatives: Annotated[str, typer.Option(help="Multi-label: file of prompts that deny a label.")] = "",
    labels: Annotated[str, typer.Option(help="Multi-label: columns or json fields of 0 and 1, with commas.")] = "",
    label_key: Annotated[str, typer.Option(help="Where labels stand: a member, json:FIELD, or a column.")] = "",
    caption_key: Annotated[str, typer.Option(help="Where captions stand; several columns with commas.")] = "",
    group_key: Annotated[
        str, typer.Option(help="Retrieval: the name that is right for several images. Zero-shot: groups.")
    ] = "",
    image_column: Annotated[str, typer.Option(help="Of a table, where its name does not tell.")] = "",
    clips: Annotated[bool, typer.Option("--clips", help="Folders of frames are videos: CLASS/CLIP/frame.jpg.")] = False,
    out: Annotated[Path | None, typer.Option(help="Directory for results.json, outcomes and pictures.")] = None,
    resamples: Annotated[int, typer.Option(help="Of the bootstrap.")] = 1000,
    batch_size: Annotated[int | None, typer.Option(help="Images or captions at a time, on each process.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Evaluate a model: zero-shot classification, multi-label sets, retrieval, associations; with intervals.

    torchrun --nproc-per-node N -m clipscale.cli eval … shares the work over N processes, with the same numbers.
    """
    named = [one for one in datasets or [] if not KEY.match(one)]
    overrides = [one for one in datasets or [] if KEY.match(one)]
    if overrides and (named or suite):
        raise ConfigError(f"{overrides[0]} changes what a run was validated on; leave out the data sets, or it")
    from clipscale.apps.evaluation.tasks import Task, read_suite

    listed = tuple(label.strip() for label in labels.split(",") if label.strip())
    options = Task(
        "", "", kind, metric, split, templates, negatives, classes, label_key, caption_key, group_key, image_column,
        listed, clips,
    )  # fmt: skip
    unread = [key for key, value in vars(options).items() if value != getattr(Task(""), key)] if not named else []
    if suite is None and not named:
        unread += [key for key, value in {"out": out, "batch_size": batch_size, "data_dir": data_dir}.items() if value]
    if unread:
        where = "is a key of a suite's tasks" if suite is not None else "needs a data set, and none is named"
        raise ConfigError(f"--{unread[0].replace('_', '-')} {where}")
    if not named and suite is None:
        from clipscale.apps.evaluation.own import evaluate

        evaluate(model, overrides, device, as_json)
        return
    from clipscale.apps.evaluation.run import evaluate_tasks

    tasks = read_suite(suite, data_dir) if suite is not None else []
    tasks += [replace(options, path=path) for path in named]
    evaluate_tasks(model, tasks, device=device, batch_size=batch_size, resamples=resamples, out=out, as_json=as_json)


def results_command(
    places: Annotated[list[Path] | None, typer.Argument(help="Directories that clipscale eval --out wrote.")] = None,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(help="Two of them: differences, with paired intervals.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw them: a .png.")] = None,
    resamples: Annotated[int, typer.Option(help="Of the bootstrap of --compare.")] = 1000,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show stored results of several models side by side, or compare two query by query."""
    from clipscale.apps.evaluation.run import show_results

    show_results(places or [], compare, plot, resamples, as_json)
