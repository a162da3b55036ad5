"""What became of every sample that a tool read: kept, or dropped for a reason; printed, and in ``account.json``."""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import rich.console
import rich.table

from clipscale.apps.data.jobs import MARKERS, share
from clipscale.apps.data.shards import named_shards
from clipscale.apps.writing import whole_text
from clipscale.config import Config
from clipscale.data.io import ELSEWHERE
from clipscale.data.manifest import ShardFile
from clipscale.errors import ConfigError, DataError

ENDING = re.compile(r"(\.tar)?(\.gz)?$|\.tgz$")


@dataclass
class Account:
    """Counts over all shards: ``read`` samples are ``kept`` or stand under a reason in ``dropped``.

    ``damaged`` says what is wrong with an archive, by shard name; ``shards`` is how many samples each output holds.
    """

    read: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    damaged: dict[str, str] = field(default_factory=dict)
    shards: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, files: Sequence[ShardFile], results: Mapping[str, Any]) -> Account:
        """The sum over all shards of what a step that reads them found."""
        account = cls()
        for file, result in zip(files, results.values(), strict=True):
            account.add(result, file.name)
        return account

    def add(self, result: Mapping[str, Any], shard: str = "") -> None:
        """Count a task's ``read``, ``kept`` and ``dropped``, and the ``damage`` of the shard that it read."""
        self.read += result["read"]
        self.kept += result["kept"]
        self.dropped.update(result["dropped"])
        if result.get("damage"):
            self.damaged[shard] = result["damage"]

    def close(self, output: Path, tool: str, following: str) -> None:
        """Print it, the command that follows, and write ``output/account.json``; of many nodes, the first one does.

        Raises DataError when a sample is unaccounted for, or a shard that was written is gone.
        """
        if self.read != self.kept + self.dropped.total():
            raise DataError(
                f"{self.read:,} samples were read, {self.kept:,} kept and {self.dropped.total():,} dropped: they do "
                f"not add up; delete {output} and begin anew"
            )
        refuse_gone(output, self.shards)
        if share()[0]:
            return
        told = {
            "tool": tool, "read": self.read, "kept": self.kept, "dropped": dict(self.dropped.most_common()),
            "damaged_shards": self.damaged, "shards": self.shards,
        }  # fmt: skip
        with whole_text(output / "account.json") as out:
            out.write(json.dumps(told, indent=1) + "\n")
        self._print(following)

    def _print(self, following: str) -> None:
        table = rich.table.Table("samples", "", show_header=False)
        table.columns[1].justify = "right"
        table.add_row("read", f"{self.read:,}")
        table.add_row("kept", f"{self.kept:,}")
        for reason, count in self.dropped.most_common():
            table.add_row(f"dropped: {reason}", f"{count:,}")
        rich.console.Console().print(table)
        for shard, damage in self.damaged.items():
            print(f"warning: shard {shard} {damage}")
        empty = sum(not count for count in self.shards.values())
        if empty:
            print(f"{empty} of {len(self.shards)} shards hold no sample; clipscale data reshard makes full ones")
        print(f"next: {following}")


def open_shards(
    shards: str, output: Path, overrides: Sequence[str], tool: str, writes: bool = True
) -> tuple[list[ShardFile], Config]:
    """The shards that a command reads, and its configuration, once it is sure that none of them is written over.

    Raises ConfigError when ``output`` holds shards that this tool did not write, and as ``named_shards`` does.
    """
    files, config = named_shards(shards, overrides)
    here = output.expanduser().resolve()
    local = [file.location for file in files if not file.location.startswith(ELSEWHERE)]
    if any(Path(location).resolve().parent == here for location in local):
        raise ConfigError(f"{output} holds the shards that are read; choose another directory")
    if writes:
        refuse_foreign(output, tool)
    return files, config


def refuse_foreign(output: Path, tool: str) -> None:
    """Raise ConfigError when ``output`` holds shards that this tool did not write."""
    if output.is_dir() and not (output / MARKERS / tool).is_dir() and any(output.glob("*.tar")):
        raise ConfigError(f"{output} holds shards that this command did not write; choose another directory")


def refuse_gone(output: Path, shards: Collection[str]) -> None:
    """Raise DataError when a shard that was written is gone."""
    if gone := [name for name in shards if not (output / name).is_file()]:
        raise DataError(
            f"{len(gone)} of {len(shards)} shards that were written are gone, first {output / gone[0]}; "
            f"delete {output} and begin anew"
        )


def at_least(option: str, value: int, least: int) -> None:
    """Raise ConfigError for an option below its least value."""
    if value < least:
        raise ConfigError(f"{option} {value}: at least {least}")


def output_names(files: Sequence[ShardFile]) -> list[str]:
    """A name for the output of each shard: ``NAME.tar`` of its own, with a number before it where two are the same."""
    plain = [re.sub(r"[^\w.-]", "_", ENDING.sub("", file.name)) + ".tar" for file in files]
    twice = {name for name, count in Counter(plain).items() if count > 1}
    return [f"{i:06d}-{name}" if name in twice else name for i, name in enumerate(plain)]


def train_command(root: Path, splits: Mapping[str, Iterable[str]], overrides: Sequence[str]) -> str:
    """The command that trains on shards in ``root``, named by split, with the keys that say what a sample is."""
    keys = [change for change in overrides if change.startswith(("data.caption_key=", "data.image_keys="))]
    named = [f"data.{name}.shards={brace_pattern(splits[name])}" for name in ("train", "val") if name in splits]
    return shlex.join(["clipscale", "train", "data=shards", root_override(root), *named, *keys])


def root_override(root: Path) -> str:
    """``data.root`` as the overrides' grammar takes it."""
    text = str(root.resolve())
    return "data.root=" + (text if re.fullmatch(r"[\w./~+-]+", text) else "'" + text.replace("'", "\\'") + "'")


def brace_pattern(names: Iterable[str]) -> str:
    """Names of shards as a pattern: ``a-{000..017}.tar::b.tar``."""
    parts = [(re.fullmatch(r"(.*?)(\d+)(\D*)", name), name) for name in names]

    def run(at: tuple[int, tuple[re.Match[str] | None, str]]) -> tuple[object, ...]:
        place, (match, name) = at
        return (match[1], match[3], len(match[2]), int(match[2]) - place) if match else (name, place)

    patterns = []
    for _, group in groupby(enumerate(parts), run):
        same = [part for _, part in group]
        first, last = same[0][0], same[-1][0]
        if len(same) == 1 or first is None or last is None:
            patterns.append(same[0][1])
        else:
            patterns.append(f"{first[1]}{{{first[2]}..{last[2]}}}{first[3]}")
    return "::".join(patterns)
