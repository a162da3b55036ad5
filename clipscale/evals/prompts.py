"""Prompt templates: sets by name, CLIP's 80 of ImageNet among them (paper, section 3.1.4), and the user's files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from clipscale.errors import ConfigError, DataError


@cache
def template_sets() -> dict[str, list[str]]:
    """All sets by name; each template holds ``{}``."""
    return dict(json.loads(Path(__file__).with_name("prompts.json").read_text()))


def templates(where: str) -> list[str]:
    """The set of that name, or the file's: a text with one template a line, or a JSON list, or ``templates`` in one.

    Templates hold ``{}``, or ``{c}`` as in CLIP_benchmark's files. Raises ConfigError for a name that is none,
    DataError for a file without templates.
    """
    if where in template_sets():
        return template_sets()[where]
    path = Path(where)
    if not path.is_file():
        raise ConfigError(f"--templates {where}: it is no file, and no set: choose from {', '.join(template_sets())}")
    try:
        text = path.read_text()
        found = json.loads(text) if path.suffix == ".json" else text.splitlines()
        listed = found["templates"] if isinstance(found, dict) else found
        return usable([str(line).strip() for line in listed if str(line).strip()], where)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"--templates {where}: no list of templates in it ({type(error).__name__}: {error})") from None


def usable(found: Sequence[str], where: str) -> list[str]:
    """Templates with ``{}`` in place of ``{c}``. Raises DataError, naming ``where``, unless each has one slot."""
    made = [template.replace("{c}", "{}") for template in found]
    if wrong := next((template for template in made if template.count("{}") != 1), None):
        raise DataError(f"{where}: a template needs one {{}}, where the name goes; this has not: {wrong!r}")
    if not made:
        raise DataError(f"{where} has no template")
    return made


def fill(template: str, name: str) -> str:
    """The prompt of a class. Braces in names and templates are text."""
    return template.replace("{}", name)
