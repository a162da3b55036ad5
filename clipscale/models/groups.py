"""Groups of captions that are computed equally long, in numbers alone: packing makes them, the cost model counts."""

from __future__ import annotations

from collections.abc import Sequence

MOST_GROUPS = 10
STEP = 8  # tokens


def rounding(longest: int) -> int:
    """Tokens to a multiple of which captions are rounded up, so that few groups hold all of a batch."""
    return STEP * -(-longest // (STEP * MOST_GROUPS))


def rounded(lengths: Sequence[int]) -> list[int]:
    """The tokens that are computed for a batch's captions where they are computed in groups."""
    longest = max(lengths)
    step = rounding(longest)
    return [min(-(-length // step) * step, longest) for length in lengths]
