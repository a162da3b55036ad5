"""How much of a GPU a training step uses, clipscale's beside open_clip's on the same card.

    python benchmarks/mfu.py [--models vit_b_32 vit_b_16 vit_l_14 vit_h_14] [--write docs/benchmarks/mfu.md]

For every model and side: bf16 autocast, fused AdamW, captions of LAION's lengths, batches of doubled size until the
memory is full, and of all sizes the one of most pairs per second. clipscale with and without ``parallel.compile``,
open_clip with and without ``torch.compile``. MFU is the FLOPs that the batch needs, three forward passes of
``clipscale.models.flops``, over what the card could do in that time: for both sides the same FLOPs, so that padding,
and whatever else is computed in vain, is time and no use. ``nominal`` counts 77 tokens and every block in full, as
published figures do. A profile of clipscale's step says where its time goes.

Without a GPU, ``--device cpu --peak-tflops 0.1 --models tiny --most 8`` shows that it works, and measures nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402 - benchmarks run from anywhere, installed or not
from torch.profiler import ProfilerActivity, profile  # noqa: E402

from benchmarks.step import Ours, Pairs, Theirs, configure  # noqa: E402
from clipscale.config import Config  # noqa: E402
from clipscale.errors import ClipscaleError, ConfigError  # noqa: E402
from clipscale.hardware import TERA, find  # noqa: E402
from clipscale.models.flops import NOMINAL, Execution, flops  # noqa: E402

HEADING = "## Measured"
SIDES = ("clipscale", "clipscale, compiled", "open_clip", "open_clip, compiled")


@dataclass(frozen=True)
class Row:
    """The best batch of a side."""

    model: str
    side: str
    pairs: int
    samples_per_s: float
    mfu: float
    nominal: float

    def __str__(self) -> str:
        cells = [f"`{self.model}`", self.side, f"{self.pairs:,}", f"{self.samples_per_s:,.0f}"]
        return "| " + " | ".join([*cells, f"{self.mfu:.1%}", f"{self.nominal:.1%}"]) + " |"


def peak_of(name: str, given: float | None) -> float:
    """Dense bf16 TFLOP/s of a device. Raises ConfigError where neither the catalogue nor the user knows."""
    if given is not None:
        return given
    try:
        return find(name).peak["bf16"] / TERA
    except ConfigError:
        raise ConfigError(f"{name}: its peak is not known; give --peak-tflops, of dense bf16 products") from None


def build(side: str, config: Config, device: str) -> Ours | Theirs:
    """One of ``SIDES``."""
    config.parallel.compile = "compiled" in side
    if side.startswith("clipscale"):
        return Ours(config, None, device)
    return Theirs(config, device, config.parallel.compile)


def rate(side: Ours | Theirs, pairs: Pairs, device: str, steps: tuple[int, int]) -> float:
    """Pairs per second, after a warm-up."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    side(pairs, steps[0])
    wait()
    begun = time.perf_counter()
    side(pairs, steps[1])
    wait()
    return steps[1] * len(pairs.images) / (time.perf_counter() - begun)


def best(name: str, config: Config, device: str, peak: float, most: int, steps: tuple[int, int]) -> Row:
    """The fastest of batches of 8, 16, … pairs, until the memory is full or there are ``most``."""
    side, found, pairs = build(name, config, device), [], 8
    while pairs <= most:
        torch._dynamo.reset()
        batch = Pairs.draw(config.model, pairs, "laion")
        try:
            speed = rate(side, batch.pinned() if device == "cuda" else batch, device, steps)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            break
        needed = flops(config.model, Execution(batch.batch.text_lengths.tolist())).training
        used = [count * speed / (peak * 1e12) for count in (needed, flops(config.model, NOMINAL).training)]
        found.append(Row(config.model.name, name, pairs, speed, *used))
        print(found[-1], file=sys.stderr, flush=True)
        pairs *= 2
    if not found:
        raise ConfigError(f"model={config.model.name}: not even a batch of 8 pairs fits the memory of {device}")
    return max(found, key=lambda row: row.samples_per_s)


def where_time_goes(config: Config, pairs: int, device: str) -> str:
    """The profiler's table of a step of clipscale's, not compiled."""
    side = build("clipscale", config, device)
    batch = Pairs.draw(config.model, pairs, "laion")
    batch = batch.pinned() if device == "cuda" else batch
    side(batch, 2)
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=kinds) as profiler:
        side(batch, 1)
    by = "self_cuda_time_total" if device == "cuda" else "self_cpu_time_total"
    return profiler.key_averages().table(sort_by=by, row_limit=15, max_name_column_width=60)


def report(options: argparse.Namespace) -> str:
    """Markdown: the device, a row for each model and side, and the profiles."""
    device = options.device
    name = torch.cuda.get_device_name() if device == "cuda" else f"{device}, {torch.get_num_threads()} threads"
    peak = peak_of(name, options.peak_tflops)
    lines = [
        f"{name}, torch {torch.__version__}, {peak:g} TFLOP/s at most.",
        "",
        "| `model=` | side | best batch | pairs/s | MFU | nominal |",
        "|---|---|--:|--:|--:|--:|",
    ]
    profiles = []
    for model in options.models:
        config = configure(model, 8, "precision=amp_bf16")
        rows = [best(side, config, device, peak, options.most, options.steps) for side in options.sides]
        lines += [str(row) for row in rows]
        table = where_time_goes(config, rows[0].pairs, device)
        profiles += ["", f"Where a step of clipscale's with `{model}` and {rows[0].pairs:,} pairs spends its time:", ""]
        profiles += ["```text", table.strip(), "```"]
    return "\n".join([*lines, *profiles]) + "\n"


def write(path: Path, found: str) -> None:
    """Replace what stands in a document under its heading for figures."""
    before = path.read_text().partition(HEADING)[0]
    path.write_text(f"{before}{HEADING}\n\n{found}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 2 for a mistake of the user's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["vit_b_32", "vit_b_16", "vit_l_14", "vit_h_14"])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=[*SIDES])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--peak-tflops", type=float, help="of the device, dense bf16; needed where it is not known")
    parser.add_argument("--most", type=int, default=2**15, help="pairs of the largest batch")
    parser.add_argument("--steps", type=int, nargs=2, default=(5, 10), help="that warm up, that are timed")
    parser.add_argument("--write", type=Path, help="a document whose figures are replaced")
    options = parser.parse_args(arguments)
    try:
        if options.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("no GPU is here; --device cpu --peak-tflops 0.1 --models tiny --most 8 tries the rest")
        found = report(options)
    except ClipscaleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(found)
    if options.write:
        write(options.write, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
