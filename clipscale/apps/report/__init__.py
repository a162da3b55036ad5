"""``clipscale report``: one page that shows a run, or several beside each other."""

from clipscale.apps.report.page import write_report

__all__ = ["write_report"]
