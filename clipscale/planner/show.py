"""A plan as a table, and plans side by side as a table and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rich.table

from clipscale.planner.memory import state_bytes
from clipscale.planner.plan import Plan

GIB = 2**30
PARTS = ("compute", "loss", "communication", "data")
COLOURS = ("#2f6fb0", "#d9822b", "#5a9e6f", "#888888")


def size(count: float) -> str:
    """Bytes for reading."""
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / 2**20:.0f} MiB"


def duration(seconds: float) -> str:
    """Seconds for reading."""
    for unit, name in ((86400, "days"), (3600, "hours"), (60, "minutes"), (1, "s"), (1e-3, "ms")):
        if seconds >= unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds * 1e6:.0f} us"


def lines(plan: Plan) -> list[tuple[str, str]]:
    """What a plan says, as labels and texts; an empty text is a heading."""
    job, count, memory = plan.job, plan.job.parameters, plan.memory
    trained = "" if job.trained == count.total else f"; {job.trained:,} trained"
    spares = f", {job.asked - job.world} more idle" if job.asked > job.world else ""
    parts = f" in {job.microbatches} microbatches" if job.microbatches > 1 else ""
    config = job.config
    least, most = (factor * plan.speed.step_s for factor in plan.range)
    found = [
        ("processes", f"{job.world} x {job.hardware.name}{spares}; {job.pairs:,} pairs each{parts}"),
        ("parameters", f"{count.total:,} (vision {count.vision:,}, text {count.text:,}){trained}"),
        ("FLOPs per pair", f"{job.nominal:.3g}; {job.flops.training:.3g} needed, {job.executed:.3g} computed"),
        (f"Memory of a process, parallel={config.parallel.strategy.value}", ""),
        ("  state", f"{size(memory.state)} (weights, optimizer, averages, gradients that stay, casts)"),
        (
            "  activations",
            f"{size(memory.activations)} (checkpointing: {config.parallel.activation_checkpointing}; "
            f"captions of {job.tokens:.0f} tokens)",
        ),
        ("  loss, input", f"{size(memory.loss)}, {size(memory.input)}"),
        ("  in all", f"{size(memory.total)} of {size(job.hardware.usable_bytes)}{'' if plan.fits else ': TOO MUCH'}"),
        ("  least that fits", _fitting(plan)),
        ("A step", ""),
        ("  time", f"{duration(plan.speed.step_s)}; expect {duration(least)} to {duration(most)}"),
        *((f"  {part}", duration(getattr(plan.speed, f"{part}_s"))) for part in PARTS),
        ("  utilisation", f"MFU {plan.mfu[0]:.0%}, nominal {plan.mfu[1]:.0%}"),
        ("The run", ""),
        ("  samples/s", f"{plan.samples_per_s:,.0f}; {plan.samples_per_s / job.world:,.0f} per process"),
        ("  length", f"{job.steps:,} steps, {duration(plan.run_s)}"),
        ("  GPU-hours" if job.hardware.is_gpu else "  process-hours", f"{plan.gpu_hours:,.1f}"),
    ]
    if plan.cost is not None:
        found.append(("  cost", f"{plan.cost:,.2f}"))
    if plan.epochs is not None:
        found.append(("  epochs", f"{plan.epochs:,.2f}"))
    return [*found, ("  a checkpoint", size(state_bytes(job)))]


def _fitting(plan: Plan) -> str:
    fitting = plan.fitting
    if fitting is None:
        return "nothing: not even one pair at a time, sharded and computed again"
    return f"{' '.join(fitting.overrides())} ({size(fitting.memory.total)}, a step of {duration(fitting.step_s)})"


def table(plan: Plan) -> rich.table.Table:
    """For the terminal."""
    found = rich.table.Table(show_header=False, box=None, pad_edge=False, title=None)
    found.add_column(style="cyan", no_wrap=True)
    found.add_column()
    for label, text in lines(plan):
        found.add_row(label, text) if text else found.add_row(f"[bold]{label}[/bold]", "")
    return found


def sureness(plan: Plan) -> str:
    """What a plan's numbers rest on."""
    exact = "Parameters and FLOPs are exact; memory is within a tenth on CPUs, and unmeasured on GPUs."
    low, high = plan.range
    if plan.calibration is not None:
        here = f"Times were calibrated by steps of {plan.calibration.pairs} pairs on this machine"
        return f"{exact} {here}: expect {low:g} to {high:g} times the step's."
    assumed = (
        f"Times are assumed: products at {plan.job.hardware.attained:.0%} of the peak ({plan.job.hardware.source})"
    )
    return f"{exact} {assumed}, so expect {low:g} to {high:g} times the step's; --measure times this machine."


def sweep_table(names: Sequence[str], plans: Sequence[Plan]) -> rich.table.Table:
    """A row for each."""
    found = rich.table.Table(box=None, pad_edge=False)
    heads = ("", "processes", "memory", "fits", "step", "samples/s", "MFU", "efficiency", "run", "GPU-hours", "cost")
    for head in heads:
        found.add_column(head, justify="right" if head else "left", no_wrap=bool(head))
    for name, plan, share in zip(names, plans, efficiencies(plans), strict=True):
        cost = "" if plan.cost is None else f"{plan.cost:,.0f}"
        found.add_row(
            name, f"{plan.job.world}", size(plan.memory.total), "yes" if plan.fits else "no",
            duration(plan.speed.step_s), f"{plan.samples_per_s:,.0f}", f"{plan.mfu[0]:.0%}", f"{share:.0%}",
            duration(plan.run_s), f"{plan.gpu_hours:,.1f}", cost,
        )  # fmt: skip
    return found


def efficiencies(plans: Sequence[Plan]) -> list[float]:
    """Samples per second and process, over those of the plan with the fewest processes."""
    first = min(plans, key=lambda plan: plan.job.world)
    alone = first.samples_per_s / first.job.world
    return [plan.samples_per_s / plan.job.world / alone for plan in plans]


def plot(names: Sequence[str], plans: Sequence[Plan], file: Path) -> None:
    """What a step is made of, and the memory of a process, a bar for each plan."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    height = 1.6 + 0.36 * len(plans)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, height), layout="constrained", sharey=True)
    rows = range(len(plans))
    _bars(left, rows, PARTS, [[1e3 * getattr(plan.speed, f"{part}_s") for plan in plans] for part in PARTS])
    for row, plan in zip(rows, plans, strict=True):
        left.text(1e3 * plan.speed.step_s, row, f" {plan.samples_per_s:,.0f}/s", va="center", fontsize=8)
    left.set(xlabel="ms of a step, and samples per second", yticks=[*rows], yticklabels=[*names])
    left.margins(x=0.18)
    parts = ("state", "activations", "loss", "input")
    _bars(right, rows, parts, [[getattr(plan.memory, part) / GIB for plan in plans] for part in parts])
    usable = {plan.job.hardware.usable_bytes / GIB for plan in plans}
    most = max(plan.memory.total for plan in plans) / GIB
    for one in usable:
        if one < 3 * most:
            right.axvline(one, color="#b03030", linewidth=1, linestyle="--", label="usable")
    right.set(xlabel="GiB of a process")
    for axes in (left, right):
        axes.invert_yaxis() if axes is left else None
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=5)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def _bars(axes: Any, rows: range, parts: Sequence[str], values: Sequence[Sequence[float]]) -> None:
    begun = [0.0 for _ in rows]
    for part, colour, widths in zip(parts, COLOURS, values, strict=True):
        axes.barh(rows, widths, left=begun, color=colour, label=part, height=0.65)
        begun = [start + width for start, width in zip(begun, widths, strict=True)]
