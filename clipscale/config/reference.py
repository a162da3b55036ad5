"""Every key, its default and its meaning, as a table: ``python -m clipscale.config.reference``."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
from enum import Enum
from typing import Any

from clipscale.config.fields import leaves
from clipscale.config.schema import Config


def render() -> str:
    """Markdown: a row per key, with the schema's own default and docstring."""
    lines = ["| key | default | on resume | meaning |", "|---|---|---|---|"]
    for key, field, holder in leaves(Config):
        meaning = " ".join(_docstrings(holder)[field.name].split()).replace("|", "\\|")
        lines.append(f"| `{key}` | `{_default(field)}` | {field.metadata['resume'].value} | {meaning} |")
    return "\n".join(lines) + "\n"


def _docstrings(schema: type) -> dict[str, str]:
    """The string after each field of a dataclass."""
    body = ast.parse(inspect.getsource(schema)).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, text in itertools.pairwise(body.body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            assert isinstance(text.value, ast.Constant)
            found[field.target.id] = str(text.value.value)
    return found


def _default(field: dataclasses.Field[Any]) -> str:
    value = field.default_factory() if callable(field.default_factory) else field.default
    if isinstance(value, Enum):
        return str(value.value)
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))


if __name__ == "__main__":
    print(render(), end="")
