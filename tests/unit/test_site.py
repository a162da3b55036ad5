"""The site of the documentation is built without a warning, and no page is left out of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]


def test_it_is_built_without_warnings(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    text = (tmp_path / "reference" / "index.html").read_text()
    assert "encode_image" in text and "SampleOrder" in text
    fetched = re.findall(
        r'<(?:link|script|img)[^>]+(?:src|href)="(https?:[^"]+)', (tmp_path / "index.html").read_text()
    )
    assert fetched == [], "a reader's browser fetches nothing from elsewhere"


def test_every_page_is_in_its_navigation() -> None:
    (nav,) = re.findall(r"^nav:\n(?:[ ].*\n?)+", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    listed = set(re.findall(r"[\w/.-]+\.md", nav))
    assert listed == {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    assert yaml.safe_load(nav)
