"""Who belongs to which group, and which words and labels are looked at: as a user writes it."""

from __future__ import annotations

import csv
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from clipscale.data.samples import BadSample, Member, find_field
from clipscale.errors import ConfigError, DataError

GroupOf = Callable[[Member], str | None]
_HYPHENS = {0x2010: "-", 0x2011: "-"}


def parse_group(text: str) -> tuple[str, GroupOf]:
    """``--group NAME=WHERE`` as a name, and a function that gives a sample's group, or None.

    WHERE is a field (``json:gender``), a field and a regular expression whose first parentheses are the group
    (``json:name~^(woman|man)``), or a .csv of two columns, ``key,group``. Raises ConfigError or DataError.
    """
    name, _, where = text.partition("=")
    if not name.strip() or not where.strip():
        raise ConfigError(f"--group {text}: write NAME=FIELD, NAME=FIELD~REGEX or NAME=FILE.csv")
    if where.lower().endswith(".csv"):
        return name, _from_table(Path(where))
    field, _, pattern = where.partition("~")
    if not pattern:
        return name, lambda sample: text_at(sample, field)
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"--group {text}: {pattern} is no regular expression ({error})") from None
    if compiled.groups < 1:
        raise ConfigError(f"--group {text}: put the part that names the group into parentheses")
    return name, lambda sample: _first(compiled.search(text_at(sample, field) or ""))


def text_at(sample: Member, field: str) -> str | None:
    """What stands in a field, as text; None where there is nothing."""
    try:
        value = find_field(sample, field)
    except BadSample:
        return None
    # JSON may hold half a surrogate pair, which can be written nowhere.
    return None if value is None else str(value).encode(errors="replace").decode().strip() or None


def _first(match: re.Match[str] | None) -> str | None:
    return match[1] or None if match else None


def _from_table(path: Path) -> GroupOf:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [row for row in csv.reader(file) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"--group {path} cannot be read: {error}") from None
    if not rows or any(len(row) != 2 for row in rows):
        raise DataError(f"--group {path}: every row needs two columns, key,group")
    if rows[0][0].strip().lower() != "key":
        raise DataError(f"--group {path}: its first row must be the heading key,group, and is {','.join(rows[0])}")
    table: dict[str, str] = {}
    for key, group in ((key.strip(), group.strip()) for key, group in rows[1:]):
        if table.setdefault(key, group) != group:
            raise DataError(f"--group {path}: {key} is in two groups, {table[key]!r} and {group!r}")

    def of(sample: Member) -> str | None:
        # A key is the sample's own, with the shard before it or without, or the last part of it.
        names = sample.key, sample.key.partition("/")[2], sample.key.rpartition("/")[2]
        return next((table[name] for name in names if table.get(name)), None)

    return of


@dataclass(frozen=True)
class Labels:
    """Sets of labels by name, and prompts with ``{}`` into which labels are put."""

    sets: dict[str, list[str]]
    templates: list[str]


def read_labels(path: Path) -> Labels:
    """``templates: [a photo of {}]`` and ``sets: {NAME: [label, …]}`` from a YAML or JSON file. Raises DataError."""
    content = _read(path, "--labels")
    sets, templates = _lists(content.get("sets"), f"--labels {path}"), content.get("templates", ["{}"])
    usable = isinstance(templates, list) and templates and all(str(one).count("{}") == 1 for one in templates)
    if not sets or sum(map(len, sets.values())) < 2 or not usable:
        raise DataError(f"--labels {path} needs sets: {{NAME: [label, …]}}, and templates that hold {{}} once each")
    known = [label for labels in sets.values() for label in labels]
    if twice := {label for label in known if known.count(label) > 1}:
        raise DataError(f"--labels {path}: {sorted(twice)[0]!r} stands in it twice")
    return Labels(sets, [str(one) for one in templates])


@dataclass(frozen=True)
class Words:
    """Words and phrases for groups, and for attributes, by name."""

    groups: dict[str, re.Pattern[str]]
    attributes: dict[str, re.Pattern[str]]


def read_words(path: Path) -> Words:
    """``groups: {NAME: [word, …]}`` and ``attributes: {NAME: [word, …]}`` from YAML or JSON. Raises DataError."""
    content = _read(path, "--words")
    groups, attributes = (_lists(content.get(part), f"--words {path}") for part in ("groups", "attributes"))
    if len(groups) < 2 or not attributes:
        raise DataError(f"--words {path} needs two groups or more, and attributes: {{NAME: [word, …]}} of each")
    return Words(*({name: _any_of(words) for name, words in part.items()} for part in (groups, attributes)))


def plain(text: str) -> str:
    """Text in the form that words are looked for in: an accent written by itself would end a word before it."""
    return unicodedata.normalize("NFC", text).translate(_HYPHENS)


def _any_of(words: list[str]) -> re.Pattern[str]:
    """Any of these as whole words; a hyphen belongs to a word: `light` does not stand in `medium-light`."""
    listed = "|".join(r"\s+".join(map(re.escape, plain(word).split())) for word in words)
    return re.compile(rf"(?<![\w-])(?:{listed})(?![\w-])", re.IGNORECASE)


def _read(path: Path, option: str) -> Mapping[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise DataError(f"{option} {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise DataError(f"{option} {path} is neither YAML nor JSON") from None
    return content if isinstance(content, dict) else {}


def _lists(value: Any, where: str) -> dict[str, list[str]]:
    """Lists of words by name. Raises DataError for a list that is none, and for what YAML takes for no word."""
    found: dict[str, list[str]] = {}
    for name, words in value.items() if isinstance(value, dict) else ():
        if not isinstance(words, list) or not words:
            raise DataError(f"{where}: {name} needs a list, [word, …], and has {words!r}")
        for word in words:
            if isinstance(word, bool) or not isinstance(word, (str, int, float)) or not str(word).strip():
                raise DataError(f"{where}: {name} holds {word!r}, which is no word; put it in quotes, or take it out")
        found[str(name)] = [str(word) for word in words]
    return found
