"""What the documents say is so: the table of keys is the schema's, and every command in them is one."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from clipscale.cli import _is_override
from clipscale.config import compose, validate
from clipscale.config.reference import render

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def commands() -> list[str]:
    """Every line of every bash block that trains, or would."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
            lines = block.replace("\\\n", " ").splitlines()
            found += [line for line in lines if re.search(r"clipscale (train|plan|doctor|launch)|launch/", line)]
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


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
