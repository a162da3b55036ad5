"""Imports point down only, and siblings meet only where the table says so."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import clipscale

PACKAGE = Path(clipscale.__file__).parent

LAYERS = {
    "errors": 0,
    "config": 1, "hardware": 1,
    "distributed": 2,
    "data": 3, "models": 3, "losses": 3, "optim": 3, "telemetry": 3,
    "parallel": 4, "checkpoint": 4, "evals": 4,
    "trainer": 5,
    "launch": 6, "planner": 6, "apps": 6,
    "train": 7, "cli": 7,
    "__init__": 7,
}  # fmt: skip

# (who, whom) within one layer.
SIBLINGS = {("cli", "train")}


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("clipscale"):
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("clipscale.")}
    return found


def _modules() -> list[tuple[str, Path]]:
    return [(path.relative_to(PACKAGE).parts[0].removesuffix(".py"), path) for path in PACKAGE.rglob("*.py")]


def test_every_package_has_a_layer() -> None:
    assert {name for name, _ in _modules()} <= set(LAYERS)


def test_imports_point_down() -> None:
    wrong = []
    for name, path in _modules():
        if name == "__init__":
            continue  # hands on `load`, lazily
        for other in _imports(path) - {name, "__version__"}:
            down = LAYERS[other] < LAYERS[name]
            if not down and (name, other) not in SIBLINGS:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {other}")
    assert not wrong


def test_config_and_help_import_no_torch() -> None:
    code = "import sys, clipscale.config, clipscale.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_what_a_model_costs_imports_no_torch() -> None:
    code = (
        "import sys, clipscale.losses.memory, clipscale.models.flops as flops; flops.render(); "
        "sys.exit(bool({'torch', 'timm'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_files_stay_short() -> None:
    for _, path in _modules():
        assert len(path.read_text().splitlines()) <= 420, path


def test_every_package_says_what_it_is() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path
