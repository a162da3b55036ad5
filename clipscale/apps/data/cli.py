"""The sub-commands of ``clipscale data``; each imports what it needs when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

data_app = typer.Typer(
    name="data",
    help="Make, check, describe and change shards. KEY=VALUE are the keys of training: data.root=…, data.image_keys=…, "
    "data.caption_key=…, storage.endpoint_url=….",
    no_args_is_help=True,
)

Shards = Annotated[str, typer.Argument(help="Shards: brace patterns, `::` between them; below data.root if set.")]
Output = Annotated[Path, typer.Argument(help="Directory that is written; the same command goes on after a stop.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="data.… and storage.… keys.")]
Jobs = Annotated[int, typer.Option("--jobs", "-j", min=0, help="Processes on this node; 0: one per core.")]
Ray = Annotated[bool, typer.Option("--ray", help="Spread the work over a Ray cluster (pip install 'clipscale[ray]').")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Seed = Annotated[int, typer.Option(help="Seed of the order.")]
ShardSamples = Annotated[int, typer.Option(min=1, help="Samples per shard that is written.")]


@data_app.command("pack")
def pack_command(
    source: Annotated[
        Path,
        typer.Argument(
            help="A folder of images with same-named .txt files, or a table: .csv, .tsv, .jsonl, .parquet, or COCO "
            "captions .json; see docs/packing.md."
        ),
    ],
    output: Output,
    images: Annotated[
        Path | None, typer.Option(help="Directory of the table's image paths; by default the table's own.")
    ] = None,
    image_column: Annotated[str | None, typer.Option(help="Column of image paths, if its name does not tell.")] = None,
    caption_column: Annotated[str | None, typer.Option(help="Column of captions, if its name does not tell.")] = None,
    caption_template: Annotated[
        str | None, typer.Option(help="Caption made of columns, e.g. '{findings} {impression}'.")
    ] = None,
    split: Annotated[str, typer.Option(help="Shares of train, val and test, e.g. 0.9/0.05/0.05.")] = "1",
    group_by: Annotated[
        str | None, typer.Option(help="Column whose values are never in two splits, e.g. patient_id.")
    ] = None,
    size: Annotated[int, typer.Option(help="Largest shorter side in pixels; 0 keeps every file as it is.")] = 0,
    quality: Annotated[int, typer.Option(help="JPEG quality of what is shrunk.")] = 95,
    window: Annotated[
        str | None,
        typer.Option(help="LOW/HIGH: values of 16-bit greyscale images that become black and white; default each "
                     "image's own range."),
    ] = None,
    shard_samples: ShardSamples = 1000,
    seed: Seed = 0,
    jobs: Jobs = 0,
    ray: Ray = False,
) -> None:  # fmt: skip
    """Pack images and captions into shards, in a shuffled order."""
    from clipscale.apps.data.pack import pack

    pack(
        source, output, images=images, image_column=image_column, caption_column=caption_column,
        caption_template=caption_template, split=split, group_by=group_by, size=size, quality=quality, window=window,
        shard_samples=shard_samples, seed=seed, jobs=jobs, ray=ray,
    )  # fmt: skip


@data_app.command("index")
def index_command(
    shards: Shards,
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option(help="Directory for the index where the shards' own cannot be written.")
    ] = None,
    jobs: Jobs = 0,
    ray: Ray = False,
) -> None:
    """Count samples, and keep where they begin, beside the shards: training then starts without reading them all."""
    from clipscale.apps.data.index import index

    index(shards, overrides or [], output=output, jobs=jobs, ray=ray)


@data_app.command("check")
def check_command(
    shards: Shards,
    output: Annotated[Path, typer.Argument(help="Directory for the report; the same command goes on after a stop.")],
    overrides: Overrides = None,
    jobs: Jobs = 0,
    ray: Ray = False,
    as_json: AsJson = False,
) -> None:
    """Read every byte: archives, checksums of the index, images, captions. Exit code 4 if training would stop."""
    from clipscale.apps.data.check import check

    raise typer.Exit(check(shards, output, overrides or [], jobs=jobs, ray=ray, as_json=as_json))


@data_app.command("stats")
def stats_command(
    shards: Shards,
    output: Output,
    overrides: Overrides = None,
    jobs: Jobs = 0,
    ray: Ray = False,
    as_json: AsJson = False,
) -> None:
    """Describe captions, image sizes and tokens: a table, plots, and a page with samples."""
    from clipscale.apps.data.stats import stats

    stats(shards, output, overrides or [], jobs=jobs, ray=ray, as_json=as_json)


@data_app.command("balance")
def balance_command(
    shards: Shards,
    output: Output,
    overrides: Overrides = None,
    per_concept: Annotated[int, typer.Option(help="Most samples per concept.")] = 20_000,
    concepts: Annotated[Path | None, typer.Option(help="File of concepts, one a line, looked for in captions.")] = None,
    label_key: Annotated[
        str | None, typer.Option(help="Where a sample's concept stands instead, e.g. json:label.")
    ] = None,
    shard_samples: ShardSamples = 1000,
    seed: Seed = 0,
    jobs: Jobs = 0,
    ray: Ray = False,
) -> None:
    """Keep at most so many samples of each concept, as CLIP's data were made (paper, section 2.2)."""
    from clipscale.apps.data.balance import balance

    balance(
        shards, output, overrides or [], per_concept=per_concept, concepts=concepts, label_key=label_key,
        shard_samples=shard_samples, seed=seed, jobs=jobs, ray=ray,
    )  # fmt: skip


@data_app.command("filter")
def filter_command(
    shards: Shards,
    output: Output,
    overrides: Overrides = None,
    where: Annotated[
        str | None, typer.Option(help="Expression on the json fields, e.g. 'width >= 200 and similarity > 0.3'.")
    ] = None,
    keep: Annotated[Path | None, typer.Option(help="File of sample keys to keep, one a line.")] = None,
    drop: Annotated[Path | None, typer.Option(help="File of sample keys to leave out, one a line.")] = None,
    model: Annotated[
        Path | None, typer.Option(help="Run or checkpoint whose CLIP score (cosine of image and caption) decides.")
    ] = None,
    min_score: Annotated[float | None, typer.Option(help="Lowest CLIP score that is kept.")] = None,
    jobs: Jobs = 0,
    ray: Ray = False,
) -> None:
    """Keep the samples that meet every condition given."""
    from clipscale.apps.data.filter import filter_shards

    filter_shards(
        shards, output, overrides or [], where=where, keep=keep, drop=drop, model=model, min_score=min_score, jobs=jobs,
        ray=ray,
    )  # fmt: skip


@data_app.command("reshard")
def reshard_command(
    shards: Shards,
    output: Output,
    overrides: Overrides = None,
    shuffle: Annotated[bool, typer.Option("--shuffle", help="Put all samples in a random order.")] = False,
    shard_samples: ShardSamples = 1000,
    seed: Seed = 0,
    jobs: Jobs = 0,
    ray: Ray = False,
) -> None:
    """Write the same samples into shards of another size, shuffled over all of them if asked to."""
    from clipscale.apps.data.reshard import reshard

    reshard(
        shards, output, overrides or [], shuffle=shuffle, shard_samples=shard_samples, seed=seed, jobs=jobs, ray=ray
    )


@data_app.command("dedup")
def dedup_command(
    shards: Shards,
    output: Output,
    overrides: Overrides = None,
    against: Annotated[
        str | None, typer.Option(help="Evaluation shards: report which of their images are in the training shards.")
    ] = None,
    distance: Annotated[
        int, typer.Option(help="Bits of 64 in which two perceptual hashes of one picture may differ.")
    ] = 4,
    jobs: Jobs = 0,
    ray: Ray = False,
) -> None:
    """Drop images that come twice, exactly or nearly; or tell how much of an evaluation set was trained on."""
    from clipscale.apps.data.dedup import dedup

    dedup(shards, output, overrides or [], against=against, distance=distance, jobs=jobs, ray=ray)
