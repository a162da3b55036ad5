"""What the user sees: a progress bar on a terminal, a line per interval elsewhere, a table at the end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import rich.console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table


class Console:
    """The main rank's voice; silent on the others."""

    def __init__(self, samples_seen: int, total_samples: int, main: bool) -> None:
        self._out = rich.console.Console(quiet=not main, soft_wrap=True, highlight=False)
        self._total = total_samples
        self._bar: Progress | None = None
        if main and self._out.is_terminal:
            self._bar = Progress(
                TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("samples · {task.fields[news]}"),
                TimeRemainingColumn(), console=self._out,
            )  # fmt: skip
            self._task = self._bar.add_task("train", total=total_samples, completed=samples_seen, news="starting")
            self._bar.start()

    def say(self, text: str) -> None:
        """One line."""
        self._out.print(text, markup=False)

    def log(self, row: dict[str, float]) -> None:
        """Show a row of metrics."""
        if "val/loss" in row or "val/zeroshot/top1" in row:
            self.say(f"[{row['samples_seen']:,} samples] " + self._evaluation(row))
        if "train/loss" not in row:
            return
        news = f"loss {row['train/loss']:.4f}, {row['train/samples_per_s']:,.0f}/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=row["samples_seen"], news=news)
            return
        self.say(
            f"step {row['step']:>6}  {row['samples_seen']:>10,}/{self._total:,} samples  {news}  "
            f"lr {row['train/lr']:.2e}  scale {row['train/logit_scale']:.2f}"
        )

    def close(self) -> None:
        """Take the progress bar down."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def summary(self, title: str, metrics: Mapping[str, Any]) -> None:
        """A table of evaluation metrics, each beside what chance (or a named baseline) would score."""
        self._out.print(summary_table(title, metrics))

    @staticmethod
    def _evaluation(row: dict[str, float]) -> str:
        shown = {
            "val/loss": "val loss",
            "val/retrieval/i2t_r1": "i2t R@1",
            "val/zeroshot/top1": "zero-shot top-1",
            "val/top1": "top-1",
        }
        parts = []
        for key, label in shown.items():
            if key in row:
                luck = row.get(f"{key}_chance")
                parts.append(f"{label} {row[key]:.3f}" + (f" (chance {luck:.3f})" if luck is not None else ""))
        return ", ".join(parts)


def summary_table(title: str, metrics: Mapping[str, Any]) -> Table:
    """Validation metrics with their chance levels; baselines such as ``top1_colour_alone`` get rows of their own."""
    table = Table(title=title, title_justify="left")
    for heading in ("metric", "value", "chance", "times chance"):
        table.add_column(heading, justify="left" if heading == "metric" else "right")
    for key, value in metrics.items():
        if not key.startswith("val/") or key.endswith("_chance") or value is None:
            continue
        if key.endswith("bad_samples"):
            if value:
                table.add_row(key, f"{value:.0f}", "", "")
            continue
        luck = metrics.get(f"{key}_chance")
        name, is_baseline = key.removeprefix("val/"), key.startswith("val/zeroshot/top1_")
        if is_baseline:
            name = f"  what {name.removeprefix('zeroshot/top1_').replace('_', ' ')} would score in top1"
            times = f"top1 is {metrics['val/zeroshot/top1'] / value:.1f} times this" if value else ""
            table.add_row(name, f"{value:.4f}", "", times)
        else:
            table.add_row(
                name,
                f"{value:.4f}",
                "" if luck is None else f"{luck:.4f}",
                "" if not luck else f"{value / luck:.1f}",
            )
    return table
