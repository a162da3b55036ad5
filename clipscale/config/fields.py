"""How a config field may change when a run is resumed.

``fixed`` fields make the run what it is: a resume that differs in one is refused. ``event`` fields may change,
and the change is logged. ``free`` fields say where and how to run, and never matter to the result.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from enum import Enum
from typing import Any, get_type_hints


class Resume(Enum):
    """What a resume does with a changed field."""

    fixed = "fixed"
    event = "event"
    free = "free"


def _field(default: Any, resume: Resume) -> Any:
    metadata = {"resume": resume}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def fixed(default: Any) -> Any:
    """A field that a resume may not change."""
    return _field(default, Resume.fixed)


def event(default: Any) -> Any:
    """A field that a resume may change; the change is written to ``events.jsonl``."""
    return _field(default, Resume.event)


def free(default: Any) -> Any:
    """A field that never matters to what is trained."""
    return _field(default, Resume.free)


def group(schema: type) -> Any:
    """A nested schema."""
    return dataclasses.field(default_factory=schema)


def leaves(schema: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any], type]]:
    """Every leaf of a schema as ``(dotted key, field, dataclass that holds it)``, in order of definition."""
    hints = get_type_hints(schema)
    for field in dataclasses.fields(schema):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            yield from leaves(kind, f"{prefix}{field.name}.")  # type: ignore[arg-type]
        else:
            yield prefix + field.name, field, schema
