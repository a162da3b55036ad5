"""``clipscale search query`` and ``serve``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import rich.console
import rich.table

from clipscale.apps.data.examine import shown
from clipscale.apps.search.index import Filter, Hit, SearchIndex
from clipscale.config.data import Data
from clipscale.data.samples import BadSample
from clipscale.errors import ConfigError, DataError


def query(
    directory: Path, text: str | None, image: Path | None, k: int, only: Filter, model: str | None, device: str,
    as_json: bool,
) -> list[Hit]:  # fmt: skip
    """Print the ``k`` rows nearest to a text or to an image. Raises ClipscaleError for neither, both, or a bad one."""
    if (text is None) == (image is None):
        raise ConfigError('name one thing to look for: a "text", or --image FILE')
    if text is not None and not text.strip():
        raise ConfigError("the text to look for is empty")
    index = SearchIndex(directory, model, device)
    hits = index.search(_encode_image(index, image) if image else index.towers.encode_texts([str(text)])[0], k, only)
    if as_json:
        print(json.dumps([{"score": hit.score, "number": hit.number, **hit.row._asdict()} for hit in hits]))
    else:
        table = rich.table.Table("score", "key", "caption", title=f"{text or image} in {len(index.vectors):,} images")
        table.columns[1].overflow = table.columns[2].overflow = "fold"
        for hit in hits:
            table.add_row(f"{hit.score:.4f}", rich.markup.escape(shown(hit.row.key, 200)),
                          rich.markup.escape(shown(hit.row.caption, 80)))  # fmt: skip
        rich.console.Console().print(table)
    return hits


def _encode_image(index: SearchIndex, path: Path):
    try:
        crop = index.towers.crop(path.read_bytes(), Data().max_pixels)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except BadSample as error:
        raise DataError(f"{path} cannot be used: {error}") from None
    return index.towers.encode_images(crop[None])[0]


def serve(directory: Path, host: str, port: int, names: Sequence[str], model: str | None, device: str) -> None:
    """Serve the page. Raises ConfigError without FastAPI and uvicorn."""
    try:
        from clipscale.apps.search import server
    except ImportError as error:
        raise ConfigError(f"search serve needs {error.name}: pip install 'clipscale[search]'") from None
    server.serve(SearchIndex(directory, model, device), host, port, names)
