"""What the documents say is so: the table of keys is the schema's, and every command in them is one."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
import typer

from clipscale.cli import _is_override, app
from clipscale.config import compose, validate
from clipscale.config.reference import render

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def lines(language: str = "bash|sh") -> list[str]:
    """Every line of every block for the shell."""
    pattern = re.compile(rf"```(?:{language})\n(.*?)```", re.DOTALL)
    blocks = [block for page in PAGES for block in pattern.findall(page.read_text())]
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def commands() -> list[str]:
    """Every line that trains, or would."""
    found = [line for line in lines("bash") if re.search(r"clipscale (train|plan|doctor|launch)|launch/\w", line)]
    for file in (ROOT / "conf" / "experiment").glob("*.yaml"):
        found += [line.lstrip("# ") for line in file.read_text().splitlines() if line.startswith("#   ")]
    return found


def test_the_table_of_keys_is_the_schemas() -> None:
    assert render() in (ROOT / "docs" / "configuration.md").read_text()


@pytest.mark.parametrize("command", commands())
def test_every_command_composes(command: str, tmp_path: Path) -> None:
    words = shlex.split(command, comments=True)
    overrides = [word for word in words if _is_override(word) and re.match(r"^[a-z]", word)]
    if "--config-dir" in words or "-m" in words:
        overrides = []
    overrides = [word for word in overrides if not word.startswith("python")]
    config, _ = compose(overrides)
    validate(config)


@pytest.mark.parametrize("line", [line for line in lines() if re.match(r"clipscale |.*-m clipscale.cli ", line)])
def test_every_command_has_its_options(line: str) -> None:
    words = shlex.split(re.sub(r"^.*? -m clipscale.cli", "clipscale", line), comments=True)
    ends = [number for number, word in enumerate(words) if word in ("&&", "|", ">")]
    command, given = typer.main.get_command(app), words[1 : ends[0] if ends else None]
    while isinstance(command, click.Group):
        name, *given = given
        assert name in command.commands, line
        command = command.commands[name]
    command.make_context(command.name, given)


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
