"""``clipscale search build``: embed, and index where that is asked for."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from clipscale.apps.data.jobs import share
from clipscale.apps.search.approximate import (
    KINDS,
    Approximate,
    Settings,
    build_index,
    has_index,
    remove,
    require_faiss,
)
from clipscale.apps.search.embed import Wanted, embed, tell
from clipscale.apps.search.vectors import Vectors
from clipscale.errors import ConfigError, DataError


def build(wanted: Wanted, output: Path, kind: str, jobs: int, as_json: bool) -> None:
    """Embed a source into ``output`` and build the index ``kind`` of its vectors: ``exact`` needs none.

    Under torchrun or Slurm the first rank indexes. Raises ClipscaleError as :func:`embed`, and without faiss.
    """
    if kind not in ("exact", *KINDS):
        raise ConfigError(f"--index {kind}: choose from exact, {', '.join(KINDS)}")
    if kind != "exact":
        require_faiss()
    vectors = embed(wanted, output, jobs)
    settings: Settings | None = None
    if share()[0] == 0:
        if kind == "exact" or not len(vectors):
            remove(output)
        else:
            settings = _present(vectors, kind) or build_index(vectors, kind)
    tell(vectors, as_json, settings)


def _present(vectors: Vectors, kind: str) -> Settings | None:
    """What was built before, if it is of this kind: the vectors of a directory never change."""
    if has_index(vectors.directory):
        with suppress(DataError):
            found = Approximate(vectors).settings
            return found if found.kind == kind else None
    return None
