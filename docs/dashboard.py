"""A W&B dashboard of a project's runs: the charts of the report, over samples seen.

pip install wandb-workspaces && python docs/dashboard.py ENTITY PROJECT
"""

from __future__ import annotations

import sys

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws

from clipscale.apps.report.charts import DATA, DERIVED, EVALUATION, SPEED, TIME, TRAINING, Chart

SECTIONS = {
    "Training": TRAINING, "Evaluations": EVALUATION, "Speed": SPEED, "Where the time went": TIME, "Data": DATA,
}  # fmt: skip
PICTURES = ("media/retrieval", "media/similarity", "media/confusion", "media/batch")


def workspace(entity: str, project: str) -> ws.Workspace:
    """Sections of line plots, and one of the pictures that `tracking.media=true` sends."""
    sections = [
        ws.Section(name=name, panels=[_panel(chart) for chart in charts if not set(chart.metrics) & set(DERIVED)])
        for name, charts in SECTIONS.items()
    ]
    sections.append(ws.Section(name="Pictures", panels=[wr.MediaBrowser(media_keys=[key]) for key in PICTURES]))
    sections[0].is_open = True
    return ws.Workspace(entity=entity, project=project, name="clipscale", sections=sections)


def _panel(chart: Chart) -> wr.LinePlot:
    chances = [f"{metric}_chance" for metric in chart.metrics] if chart.chance else []
    return wr.LinePlot(title=chart.title, x="samples_seen", y=[*chart.metrics, *chances])


if __name__ == "__main__":
    made = workspace(*sys.argv[1:3])
    made.save()
    print(made.url)
