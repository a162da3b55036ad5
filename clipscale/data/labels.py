"""Labels as class numbers: what a table's column says, and names found again in a list of classes."""

from __future__ import annotations

import re
from collections.abc import Sequence

from clipscale.errors import ConfigError

NUMBER = re.compile(r"([+-]?\d+)(\.0*)?", re.ASCII)  # a whole one; tables with gaps are written with a point
NONE = ("", "nan")


def numbered(values: Sequence[str]) -> tuple[tuple[str, ...], dict[str, int]]:
    """Of a column of labels: the names of the classes, if these are names, and the number of each label.

    Where all are whole numbers (``3``, ``03``, ``3.0``) these are the classes' own, and the empty, ``nan`` and negative
    ones are no label. Anything else are names, numbered in alphabetical order, the empty one is none.
    """
    found = sorted(set(values) - {""})
    matches = {value: NUMBER.fullmatch(value) for value in found if value.lower() not in NONE}
    whole = {value: int(match[1]) for value, match in matches.items() if match}
    if len(whole) == len(matches):
        return (), {value: number for value, number in whole.items() if number >= 0}
    return tuple(found), {value: number for number, value in enumerate(found)}


def places_among(listed: Sequence[str], own: Sequence[str], where: str) -> list[int]:
    """The place among ``listed``, of the file ``where``, of each of the names that a data set calls its classes by.

    They are found by name, whatever the case and the underscores. Where the file has other names for as many classes
    (as for folders that are called by codes), its order is theirs. Raises ConfigError where it is neither.
    """
    by_name = {_plain(name): place for place, name in reversed(list(enumerate(listed)))}
    found = [by_name.get(_plain(name)) for name in own]
    known = [place for place in found if place is not None]
    if len(known) == len(own):
        return known
    if len(listed) == len(own) and all(place in (None, number) for number, place in enumerate(found)):
        return list(range(len(own)))
    missing = own[found.index(None)]
    raise ConfigError(
        f"--classes {where}: {missing!r}, one of the {len(own)} classes of the data, is none of its {len(listed)} "
        "names; the file needs all of them, or other names for as many, in the alphabetical order of those of the data"
    )


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").split()).casefold()
