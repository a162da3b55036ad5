"""How right `clipscale plan` is: against steps on this machine, published runs, and what it says of many GPUs.

    python benchmarks/plan.py memory                     the peak of a step on this CPU
    python benchmarks/plan.py steps [--pairs 3]          plan --measure against clipscale train, in turns
    python benchmarks/plan.py published                  a table against the published runs of others
    python benchmarks/plan.py scaling --plot docs/img/scaling.png

``steps``: for every configuration, ``calibrate`` of the planner and a run of ``clipscale train`` on random data take
turns; of both, the lower quartile counts, of the run that of its intervals' seconds per step without waiting for
batches. The ratio is planned over real. The machine's own noise goes into both.

``published``: pairs per second and GPU of runs that others published, beside what is planned of the same model, batch
and GPU, with captions that are padded to the context, as those programs do.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from clipscale.config import compose, validate  # noqa: E402 - benchmarks run from anywhere, installed or not
from clipscale.hardware import find  # noqa: E402
from clipscale.planner.job import Job  # noqa: E402
from clipscale.planner.measure import calibrate  # noqa: E402
from clipscale.planner.memory import memory  # noqa: E402
from clipscale.planner.plan import Plan, make_plan  # noqa: E402

SMALL = [
    "tracking.log_every_steps=4",
    "model=vit_s_16",
    "model.vision.image_size=112",
    "model.vision.layers=6",
    "model.text.layers=4",
    "global_batch_size=8",
]
STEPS = {  # what is run: one process, and two
    "tiny": ["model=tiny", "global_batch_size=128"],
    "tiny, amp_bf16": ["model=tiny", "global_batch_size=128", "precision=amp_bf16"],
    "ViT-S/16, 112 px, 6 + 4 layers": SMALL,
    "ViT-S/16, 112 px, 6 + 4 layers, checkpointed": [*SMALL, "parallel.activation_checkpointing=full"],
}
WAYS = {"1": [], "2, ddp": ["cluster=cpu2"], "2, fsdp": ["cluster=cpu2", "parallel=fsdp"]}
QUIET = ["schedule.warmup_samples=0", "tracking=disabled", "checkpoint.every_samples=null", "eval.every_samples=null"]
INTERVALS = 4
AMP, AGAIN = "precision=amp_bf16", "parallel.activation_checkpointing"
PEAKS = [
    ("tiny", 64, []),
    ("tiny", 64, [AMP]),
    ("vit_b_32", 16, []),
    ("vit_b_32", 16, [AMP]),
    ("vit_b_32", 16, ["optim.microbatches=4"]),
    ("vit_b_32", 64, []),
    ("vit_b_32", 64, [AMP]),
    ("vit_b_32", 64, [AMP, f"{AGAIN}=full"]),
    ("vit_b_32", 64, [AMP, f"{AGAIN}=selective"]),
    ("vit_s_16", 24, [AMP]),
    ("rn50", 8, []),
    ("rn50", 16, [AMP]),
]


@dataclass(frozen=True)
class Published:
    """A run of others: pairs per second and GPU."""

    name: str
    model: str
    gpu: str
    gpus: int
    pairs: int
    per_s: float
    source: str
    checkpointing: str = "none"


RUNS = [
    Published("OpenCLIP B/32", "vit_b_32", "a100_40gb", 128, 256, 772, "open_clip docs/PRETRAINED.md"),
    Published("OpenCLIP B/32", "vit_b_32", "a100_40gb", 128, 256, 850, "scaling-laws paper's runs"),
    Published("OpenCLIP B/16", "vit_b_16", "a100_40gb", 176, 192, 331, "open_clip docs/PRETRAINED.md"),
    Published("OpenCLIP B/16", "vit_b_16", "a100_40gb", 344, 256, 390, "scaling-laws paper's runs"),
    Published("OpenCLIP L/14", "vit_l_14", "a100_40gb", 400, 96, 70, "open_clip docs/PRETRAINED.md", "full"),
    Published("OpenCLIP L/14", "vit_l_14", "a100_40gb", 1024, 84, 77.3, "scaling-laws paper's runs", "full"),
    Published("NeMo g/14", "vit_g_14", "a100", 8, 80, 69.9, "NeMo user guide, CLIP"),
    Published("NeMo g/14", "vit_g_14", "a100", 128, 80, 67.4, "NeMo user guide, CLIP"),
    Published("NeMo g/14", "vit_g_14", "h100", 8, 80, 116.9, "NeMo user guide, CLIP"),
    Published("NeMo g/14", "vit_g_14", "h100", 128, 80, 108.0, "NeMo user guide, CLIP"),
]
SCALED = {"vit_b_32": 32768, "vit_l_14": 90112, "vit_bigg_14": 163840}  # and their batches
GPUS = [2**n for n in range(3, 13)]


def planned(overrides: Sequence[str], hardware: str, tokens: float | None = None, measured: bool = False) -> Plan:
    """The plan of a configuration."""
    config, _ = compose(["data=synthetic", *overrides])
    validate(config)
    job = Job(config, find(hardware, config.cluster.processes_per_node), tokens)
    return make_plan(job, calibrate(job) if measured else None)


def real(overrides: Sequence[str]) -> float:
    """Seconds of a step of `clipscale train`, without what it waits for batches."""
    config, _ = compose(overrides)
    every = config.tracking.log_every_steps
    samples = config.global_batch_size * every * (INTERVALS + 1)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "clipscale.cli", "train", *overrides, *QUIET, "data=synthetic", "name=run"]
        command += [f"runs_dir={folder}", f"total_samples={samples}", "device=cpu"]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if ended.returncode:
            raise SystemExit(ended.stderr[-2000:])
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "train/samples_per_s" in row]
    taken = [every * config.global_batch_size / row["train/samples_per_s"] for row in rows]
    seconds = sorted(one - row["train/data_wait_s"] for one, row in zip(taken[1:], rows[1:], strict=True))
    return seconds[len(seconds) // 4] / every


def steps(pairs: int, models: Sequence[str], ways: Sequence[str]) -> str:
    """Planned against real, in turns."""
    lines = [
        "| model | processes | planned ms | real ms | planned / real: median | of each pair |",
        "|---|---|--:|--:|--:|---|",
    ]
    for name, overrides in STEPS.items():
        for way, more in WAYS.items():
            if name not in models or way not in ways:
                continue
            taken = []
            for _ in range(pairs):
                plan = planned([*overrides, *more, "device=cpu"], "cpu", measured=True)
                taken.append((plan.speed.step_s, real([*overrides, *more])))
                print(f"{name} {way}: {taken[-1]}", file=sys.stderr, flush=True)
            ratios = [one / other for one, other in taken]
            cells = [statistics.median(1e3 * row[i] for row in taken) for i in (0, 1)]
            each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
            median = statistics.median(ratios)
            lines.append(f"| {name} | {way} | {cells[0]:.0f} | {cells[1]:.0f} | {median:.2f} | {each} |")
    return "\n".join(lines)


def peaks() -> str:
    """The memory of steps of ViT-B/32 and others, planned against taken."""
    from benchmarks.peak import of_a_step

    lines = ["| model | pairs | | measured, MiB | planned | planned / measured |", "|---|--:|---|--:|--:|--:|"]
    for model, pairs, overrides in PEAKS:
        config, _ = compose([f"model={model}", f"global_batch_size={pairs}", *overrides])
        found, tokens = of_a_step(config, pairs)
        needed = memory(Job(config, find("cpu"), tokens)).total
        sizes = f"{found / 2**20:,.0f} | {needed / 2**20:,.0f} | {needed / found:.3f}"
        lines.append(f"| `{model}` | {pairs} | {' '.join(f'`{one}`' for one in overrides)} | {sizes} |")
        print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


def published() -> str:
    """What others' programs took of what is planned."""
    lines = [
        "| run | GPUs | pairs each | samples/s per GPU | MFU | planned | planned MFU | planned / published | source |",
        "|---|---|--:|--:|--:|--:|--:|--:|---|",
    ]
    for run in RUNS:
        overrides = [f"model={run.model}", "precision=amp_bf16", "cluster=slurm", f"cluster.nodes={run.gpus // 8}"]
        overrides += [f"global_batch_size={run.gpus * run.pairs}"]
        plan = planned([*overrides, f"parallel.activation_checkpointing={run.checkpointing}"], run.gpu)
        each = plan.samples_per_s / run.gpus
        used = run.per_s * plan.job.nominal / plan.job.hardware.peak["bf16"]
        lines.append(
            f"| {run.name} | {run.gpus} x {run.gpu} | {run.pairs} | {run.per_s:g} | {used:.1%} | {each:.0f} | "
            f"{plan.mfu[1]:.1%} | {each / run.per_s:.1f} | {run.source} |"
        )
    return "\n".join(lines)


def scaling(picture: Path | None) -> str:
    """Samples per second and GPU, over that of eight, as GPUs share one batch; and where each has as much as on 64."""
    found: dict[str, list[float]] = {}
    for model, batch in SCALED.items():
        common = [f"model={model}", "precision=amp_bf16", "cluster=slurm", "parallel=ddp", "loss.dtype=bf16"]
        if model == "vit_bigg_14":
            common[3] = "parallel=hsdp"
        strong = [_share(common, gpus, batch) for gpus in GPUS]
        weak = [_share(common, gpus, 256 * gpus) for gpus in GPUS]
        found[f"{model}, one batch of {batch:,}"] = [one / strong[0] for one in strong]
        found[f"{model}, 256 pairs per GPU"] = [one / weak[0] for one in weak]
    if picture is not None:
        _plot(found, picture)
    heads = " | ".join(f"{gpus:,}" for gpus in GPUS)
    rows = [f"| {name} | " + " | ".join(f"{one:.0%}" for one in row) + " |" for name, row in found.items()]
    return "\n".join([f"| GPUs | {heads} |", "|---|" + "--:|" * len(GPUS), *rows])


def _share(common: Sequence[str], gpus: int, batch: int) -> float:
    plan = planned([*common, f"cluster.nodes={gpus // 8}", f"global_batch_size={batch}"], "h200", 17.0)
    assert plan.job.world == gpus, "spares would spoil the comparison"
    return plan.samples_per_s / gpus


def _plot(found: dict[str, list[float]], picture: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = dict(zip(SCALED, ("#2f6fb0", "#d9822b", "#5a9e6f"), strict=True))
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained", sharey=True)
    for name, shares in found.items():
        model, _, how = name.partition(", ")
        axis = axes[0] if how.startswith("one batch") else axes[1]
        label = f"{model}, {how.removeprefix('one ')}" if axis is axes[0] else model
        axis.plot(GPUS, [100 * one for one in shares], "o-", color=colours[model], label=label, markersize=4)
    for axis, title in zip(axes, ("One batch, shared by more GPUs", "256 pairs for each GPU"), strict=True):
        axis.set(xscale="log", xlabel="H200 GPUs, eight a node", title=title, ylim=(0, 108), xticks=GPUS)
        axis.set_xticks([], minor=True)
        axis.set_xticklabels([f"{gpus:,}" for gpus in GPUS], fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#dddddd", linewidth=0.6)
        axis.legend(frameon=False, loc="lower left")
    axes[0].set_ylabel("samples/s per GPU, % of that of eight")
    figure.savefig(picture, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("memory", "steps", "published", "scaling"))
    parser.add_argument("--pairs", type=int, default=3, help="turns of each configuration")
    parser.add_argument("--models", nargs="+", default=[*STEPS], choices=STEPS)
    parser.add_argument("--processes", nargs="+", default=[*WAYS], choices=WAYS)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    if options.what == "steps":
        print(steps(options.pairs, options.models, options.processes))
    elif options.what == "memory":
        print(peaks())
    elif options.what == "published":
        print(published())
    else:
        print(scaling(options.plot))


if __name__ == "__main__":
    main()
