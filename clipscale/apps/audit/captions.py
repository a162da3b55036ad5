"""Words for groups and words for attributes in the same captions: the bias that a training set has before any model."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

import numpy as np
import rich.console
from rich.progress import track

from clipscale.apps.audit.groups import Words, plain
from clipscale.data.collections import Collection
from clipscale.data.samples import BadSample, find_captions
from clipscale.errors import DataError
from clipscale.evals.audit import associate

AT_ONCE = 1000  # samples read at a time


def count_words(samples: Collection, caption_key: str, words: Words) -> dict[str, Any]:
    """Plain values: how many samples name each group and attribute, and the association of each pair among those that
    name one group only.

    A sample counts once, whichever of its captions has the word. Memory is that of the combinations of words that
    occur. Raises DataError where no caption names a group.
    """
    patterns = [*words.groups.values(), *words.attributes.values()]
    kinds: Counter[tuple[bool, ...]] = Counter()
    without = 0
    console = rich.console.Console(stderr=True)
    for start in track(range(0, len(samples), AT_ONCE), "captions", console=console):
        for sample in samples.read(start, start + AT_ONCE):
            try:
                texts = [plain(text) for text in find_captions(sample, caption_key)]
            except BadSample:
                without += 1
                continue
            kinds[tuple(any(pattern.search(text) for text in texts) for pattern in patterns)] += 1
    table = np.array(list(kinds), dtype=bool).reshape(-1, len(patterns))
    count = np.array(list(kinds.values()), dtype=np.int64)
    groups = dict(zip(words.groups, table.T[: len(words.groups)], strict=True))
    attributes = dict(zip(words.attributes, table.T[len(words.groups) :], strict=True))
    if not table[:, : len(groups)].any():
        raise DataError("--words: none of the captions names a group; check the words and --caption-key")
    others = {name: np.logical_or.reduce([of for other, of in groups.items() if other != name]) for name in groups}
    return {
        "samples": int(count.sum()),
        "without_caption": without,
        "groups": {name: int(count[of].sum()) for name, of in groups.items()},
        "attributes": {name: int(count[of].sum()) for name, of in attributes.items()},
        "associations": {
            group: {name: asdict(associate(of, has, others[group], count)) for name, has in attributes.items()}
            for group, of in groups.items()
        },
    }
