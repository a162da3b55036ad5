"""clipscale's losses against open_clip's: time, memory and precision of forward and backward, side by side in one run.

    python benchmarks/loss.py [--sizes 4096 8192] [--rounds 5] [--json FILE] [--plot FILE.png]

One process without peers in a group, fp32 features of 512 dimensions, torch on one thread.

time       CPU seconds of the process. All losses of a size take turns; the least of the rounds counts, and so does
           their ratio to the peer's. The median of the rounds' own ratios tells how far to trust it.
memory     each loss and size in a fresh process: how far one forward and backward raises the resident memory above
           where it stood with the inputs made. The inputs' gradients (2·N·D·4 bytes) count. Linux only.
precision  2,048 pairs against float64 on the same features, at the scales of a training's start and end.

Memory at 16,384 pairs takes 6 GB on open_clip's side; ``--memory-sizes`` sets its sizes apart from those of the times.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402 - benchmarks run from anywhere, installed or not

from benchmarks.loss_sides import SCALES, Inputs, errors, peak_bytes, seconds, sides  # noqa: E402

MEASURES = ("time", "memory", "precision")
BLUE, ORANGE, GREY = "#2f6fb0", "#d9822b", "#888888"
# A block that is freed goes back to the system at once, whatever its size: what is resident is what is in use. glibc
# otherwise keeps up to 32 MB or not, as it happens.
MEASURED = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
# Colour, line and marker of each loss in the plot: colour tells whose it is, the line which.
LOOKS = {
    "open_clip clip": (ORANGE, "-", "o"),
    "open_clip siglip": (ORANGE, ":", "s"),
    "clip": (BLUE, "-", "o"),
    "siglip": (BLUE, ":", "s"),
    "clip, 256 MB of tiles": (BLUE, "--", "^"),
}


def times(pairs: int, width: int, rounds: int) -> list[dict]:
    """A row per loss: its least CPU seconds, and the ratio to its peer's."""
    losses = sides()
    measured: dict[str, list[float]] = {name: [] for name in losses}
    inputs = {scale: Inputs.make(pairs, width, scale) for scale in {side.scale for side in losses.values()}}
    for turn in range(rounds + 1):
        for name, side in losses.items():
            spent = seconds(inputs[side.scale], side)
            if turn:  # the first one only warms up
                measured[name].append(spent)
    rows = []
    for name, side in losses.items():
        row = {"loss": name, "pairs": pairs, "cpu_s": min(measured[name])}
        if side.peer:
            theirs = measured[side.peer]
            row["ratio"] = row["cpu_s"] / min(theirs)
            row["median_ratio"] = statistics.median(a / b for a, b in zip(measured[name], theirs, strict=True))
        rows.append(row)
    return rows


def memory(pairs: int, width: int) -> list[dict]:
    """A row per loss: the memory that it takes on top of its inputs, and the peer's as a multiple of it."""
    taken = {}
    for name in sides():
        command = [sys.executable, __file__, "--peak-of", name, "--sizes", str(pairs), "--width", str(width)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **MEASURED})
        if done.returncode:
            sys.exit(f"{name} at {pairs:,} pairs: {(done.stderr or f'ended with {done.returncode}').strip()}")
        taken[name] = int(done.stdout)
    rows = [{"loss": name, "pairs": pairs, "peak_bytes": taken[name]} for name in taken]
    for row in rows:
        peer = sides()[row["loss"]].peer
        if peer:
            row["less_by"] = taken[peer] / row["peak_bytes"]
    return rows


def precision(pairs: int, width: int) -> list[dict]:
    """A row per scale: the true loss, and each side's relative errors of loss, dX and dscale."""
    return [{"scale": scale, "pairs": pairs, **errors(pairs, width, scale)} for scale in SCALES]


def show(found: dict[str, list[dict]]) -> None:
    """Print the tables."""
    if "time" in found:
        print("\nCPU seconds, forward and backward       pairs        s   ratio to open_clip (median of rounds)")
        for row in found["time"]:
            ratio = f"{row['ratio']:8.2f} ({row['median_ratio']:.2f})" if "ratio" in row else ""
            print(f"{row['loss']:<36} {row['pairs']:>8,} {row['cpu_s']:>8.3f}{ratio}")
    if "memory" in found:
        print("\nmemory on top of the inputs             pairs       MB   open_clip's is so many times as much")
        for row in found["memory"]:
            less = f"{row['less_by']:8.1f}" if "less_by" in row else ""
            print(f"{row['loss']:<36} {row['pairs']:>8,} {row['peak_bytes'] / 1e6:>8,.0f}{less}")
    if "precision" in found:
        print(f"\nrelative errors of loss / dX / dscale against float64, {found['precision'][0]['pairs']:,} pairs")
        for row in found["precision"]:
            print(f"scale {row['scale']:g}, loss {row['loss'][0]:.2g}")
            for name, off in row.items():
                if isinstance(off, list) and len(off) == 3:
                    print(f"  {name:<26}" + " / ".join(f"{error:.1e}" for error in off))


def plot(found: dict[str, list[dict]], out: Path) -> None:
    """Memory on the left and time on the right, against the number of pairs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullLocator

    panels = {
        "memory": ("peak_bytes", 1e-6, "memory on top of the inputs, MB"),
        "time": ("cpu_s", 1, "time of forward and backward, CPU seconds"),
    }
    figure, both = plt.subplots(1, 2, figsize=(9, 3.9), layout="constrained")
    for axes, (measure, (key, unit, label)) in zip(both, panels.items(), strict=True):
        rows = found.get(measure, [])
        for name, (colour, line, marker) in LOOKS.items():
            points = [(row["pairs"], row[key] * unit) for row in rows if row["loss"] == name]
            label_of = name if name.startswith("open_clip") else f"clipscale {name}"
            axes.plot(*zip(*points, strict=True), line, marker=marker, color=colour, label=label_of, markersize=4)
        sizes = sorted({row["pairs"] for row in rows})
        axes.set(xscale="log", yscale="log", xlabel="pairs in the batch")
        axes.set_title(label, loc="left", fontsize=10)
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes], minor=False)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
        axes.grid(axis="y", color=GREY, alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*both[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(out, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measures", nargs="+", choices=MEASURES, default=MEASURES)
    parser.add_argument("--sizes", type=int, nargs="+", default=[4096, 8192], help="pairs")
    parser.add_argument("--memory-sizes", type=int, nargs="+", help="pairs; as --sizes without it")
    parser.add_argument("--precision-pairs", type=int, default=2048)
    parser.add_argument("--width", type=int, default=512, help="dimensions of the features")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where all figures go")
    parser.add_argument("--plot", type=Path, help="where the picture of time and memory goes")
    parser.add_argument("--peak-of", help="print one loss's peak memory alone, in bytes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak_of:
        print(peak_bytes(options.peak_of, options.sizes[0], options.width))
        return
    found: dict[str, list[dict]] = {}
    if "time" in options.measures:
        found["time"] = [row for n in options.sizes for row in times(n, options.width, options.rounds)]
    if "memory" in options.measures:
        found["memory"] = [row for n in options.memory_sizes or options.sizes for row in memory(n, options.width)]
    if "precision" in options.measures:
        found["precision"] = precision(options.precision_pairs, options.width)
    show(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if options.plot:
        plot(found, options.plot)


if __name__ == "__main__":
    main()
