"""Imported by Python itself where this directory is on PYTHONPATH: poisons named samples in every rank of a run.

On a sample whose key stands in CHAOS_POISON, one per line, the image tower gives what is no number.
"""

from __future__ import annotations

import os
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

STEP = "clipscale.trainer.step"


class _Poisoner(MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != STEP:
            return None
        found = PathFinder.find_spec(name, path)
        assert found is not None and found.loader is not None
        run = found.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            _poison(module)

        found.loader.exec_module = exec_module  # type: ignore[method-assign]
        return found


def _poison(module: Any) -> None:
    bad, forward = set(os.environ["CHAOS_POISON"].split("\n")), module.TrainStep._features

    def features(step: Any, batch: Any, ahead: Any) -> Any:
        found = forward(step, batch, ahead)
        hit = [key in bad for key in batch.keys]
        if any(hit):
            image = found.image.clone()
            image[hit] *= float("nan")
            found = found._replace(image=image)
        return found

    module.TrainStep._features = features


if os.environ.get("CHAOS_POISON"):
    sys.meta_path.insert(0, _Poisoner())
