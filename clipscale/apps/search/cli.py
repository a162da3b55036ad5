"""``clipscale embed``, ``search`` and ``rerank``; each imports what it needs when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

search_app = typer.Typer(
    name="search", help="Search in images by texts and by images: build an index, query it, serve a page.",
    no_args_is_help=True,
)  # fmt: skip

Model = Annotated[str, typer.Argument(help="A run, a checkpoint, or what else clipscale.load takes.")]
Source = Annotated[str, typer.Argument(help="A folder of images, shards (a pattern or their directory), or a .csv.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="data.image_keys, .caption_key, .max_pixels; storage.…."),
]
Out = Annotated[Path, typer.Option(help="Directory to write; the same command goes on there after a stop.")]
Captions = Annotated[bool, typer.Option("--captions", help="Embed captions too; images without one are left out.")]
DType = Annotated[str, typer.Option(help="Type of the numbers: float16 or float32.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Jobs = Annotated[int, typer.Option("--jobs", "-j", min=0, help="Processes on this node's CPU; 0: one per core.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Index = Annotated[Path, typer.Argument(help="What search build, or embed, wrote.")]
MovedModel = Annotated[str | None, typer.Option("--model", help="Where the model lies, if it has moved.")]


def embed_command(
    model: Model,
    source: Source,
    out: Out,
    overrides: Overrides = None,
    captions: Captions = False,
    dtype: DType = "float16",
    parquet: Annotated[bool, typer.Option("--parquet", help="Write every part as Parquet too.")] = False,
    device: Device = "auto",
    jobs: Jobs = 0,
    as_json: AsJson = False,
) -> None:
    """Write the embeddings of images, with their keys, as .npy files that are read memory-mapped."""
    from clipscale.apps.search.embed import Wanted, embed, tell

    wanted = Wanted(model, source, tuple(overrides or ()), dtype, captions, parquet, device)
    tell(embed(wanted, out, jobs), as_json)


@search_app.command("build")
def build_command(
    model: Model,
    source: Source,
    out: Out,
    overrides: Overrides = None,
    index: Annotated[str, typer.Option(help="exact, or, by faiss, ivf or hnsw: for millions of images.")] = "exact",
    captions: Captions = False,
    dtype: DType = "float16",
    device: Device = "auto",
    jobs: Jobs = 0,
    as_json: AsJson = False,
) -> None:
    """Embed images into a directory that can be searched; under torchrun or Slurm, the ranks share the work."""
    from clipscale.apps.search.build import build
    from clipscale.apps.search.embed import Wanted

    build(Wanted(model, source, tuple(overrides or ()), dtype, captions, False, device), out, index, jobs, as_json)


@search_app.command("query")
def query_command(
    index: Index,
    text: Annotated[str | None, typer.Argument(help="What to look for.")] = None,
    image: Annotated[Path | None, typer.Option(help="An image to look for others like it.")] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Most results.")] = 10,
    min_score: Annotated[float, typer.Option(help="Lowest cosine of a result.")] = -1.0,
    words: Annotated[str, typer.Option(help="Words that the caption of a result must have.")] = "",
    folder: Annotated[str, typer.Option(help="What the key of a result must begin with.")] = "",
    model: MovedModel = None,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Print the images nearest to a text, or to an image."""
    from clipscale.apps.search.index import Filter
    from clipscale.apps.search.query import query

    query(index, text, image, k, Filter(min_score, words, folder), model, device, as_json)


@search_app.command("serve")
def serve_command(
    index: Index,
    host: Annotated[
        str, typer.Option(help="Address to listen at; any other than this machine's own opens the images to others.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="A name by which browsers may call the server; again for several.")
    ] = None,
    model: MovedModel = None,
    device: Device = "cpu",
) -> None:
    """Serve a page to search on, and JSON under it, on this machine alone unless told otherwise."""
    from clipscale.apps.search.query import serve

    serve(index, host, port, allow_host or [], model, device)


def rerank_command(
    model: Model,
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.")],
    caption: Annotated[str, typer.Option(help="What the images should show.")],
    top: Annotated[int | None, typer.Option(min=1, help="Only so many of the best.")] = None,
    sheet: Annotated[Path | None, typer.Option(help="Write a picture (.png) of the images in their order.")] = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Put images, e.g. those that a generator made for a caption, in the order of how well they match it."""
    from clipscale.apps.rerank import print_ranking

    print_ranking(model, caption, images, top, sheet, device, as_json)
