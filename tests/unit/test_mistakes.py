"""docs/mistakes.md says what mistakes are answered with: each command of its tables is given here, and answers so."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

from clipscale import cli

PAGE = Path(__file__).parents[2] / "docs" / "mistakes.md"


def rows() -> list[tuple[str, str]]:
    """Command and answer of every row; an answer that ends in `…` is cut there."""
    found = re.findall(r"^\| `clipscale (.+?)` \| (.+?) \|$", PAGE.read_text(), re.MULTILINE)
    assert len(found) >= 25
    return found


@pytest.mark.parametrize(("command", "answer"), rows())
def test_a_mistake_is_told(
    command: str, answer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["clipscale", *shlex.split(command)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert "Traceback" not in told
    said = " ".join(told.removeprefix("error: ").split()) if told.startswith("error: ") else _of_typer(told)
    said = said.replace(" - ", "<br>").replace(" <br>", "<br>")
    if answer.endswith("…"):
        assert said.startswith(answer.removesuffix("…")), said
    else:
        assert said == answer
    assert not [*tmp_path.rglob("step_*")], "nothing was trained"


def _of_typer(told: str) -> str:
    """What typer says of a command line in its box."""
    return " ".join(line.strip("│ ") for line in told.splitlines() if line.startswith("│"))
