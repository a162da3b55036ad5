"""Does a tracker cost a run its time? Steps without one, offline, online, and with a server that dies or hangs midway.

    python benchmarks/tracking.py [--steps 300] [--rounds 3]

Runs of the demo's model in turns, every step a row. The server is one of this machine that answers as W&B's does; in
the middle of a run it is killed (``dies``) or stopped (``hangs``). Of a step it counts ``train/step_s`` of those after
the middle; ``end`` is what lies between the last step and the end of the process.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.tracker import tracker  # noqa: E402 - benchmarks run from anywhere, installed or not

BATCH = 32
ENDS = {"dies": signal.SIGKILL, "hangs": signal.SIGSTOP}
ARMS = ("disabled", "offline", "online", *ENDS)


@contextmanager
def served(arm: str) -> Iterator[tuple[dict[str, str], subprocess.Popen[str] | None]]:
    """The environment of a run, and the server that it speaks to."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "WANDB_API_KEY": "0" * 40}
    if arm in ("disabled", "offline"):
        yield environment, None
        return
    with tracker() as (address, server):
        yield environment | {"WANDB_BASE_URL": address}, server


def steps_of(path: Path) -> list[float]:
    """Seconds of each step so far."""
    file = path / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []
    return [row["train/step_s"] for row in rows if "train/step_s" in row]


def measure(arm: str, steps: int, place: Path) -> tuple[list[float], float]:
    """Seconds of the steps after the middle, and from the last of them to the end."""
    mode = "online" if arm in ENDS else arm
    command = [
        sys.executable, "-m", "clipscale.cli", "train", f"runs_dir={place}", f"name={arm}", f"tracking.mode={mode}",
        f"global_batch_size={BATCH}", f"total_samples={BATCH * steps}", "tracking.log_every_steps=1",
        "eval.every_samples=null", "checkpoint.every_samples=null", "data.val.shards=null", "data.zeroshot.shards=null",
        "schedule.warmup_samples=0",
    ]  # fmt: skip
    with served(arm) as (environment, server):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        last = 0.0
        while process.poll() is None:
            done = len(steps_of(place / arm))
            if arm in ENDS and server is not None and done >= steps // 2:
                server.send_signal(ENDS[arm])
                server = None
            last = last if done < steps else last or time.perf_counter()
            time.sleep(0.2)
        assert process.returncode == 0 and process.stderr is not None, process.stderr
        found = steps_of(place / arm)
        assert len(found) == steps, (arm, len(found))
        return found[steps // 2 :], time.perf_counter() - last


def main() -> None:
    """Print a table: of each arm the seconds of a step, and their ratio to those without a tracker, in each round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    found: dict[str, list[tuple[list[float], float]]] = {arm: [] for arm in ARMS}
    for number in range(options.rounds):
        with tempfile.TemporaryDirectory() as place:
            for arm in ARMS if number % 2 else ARMS[::-1]:
                found[arm].append(measure(arm, options.steps, Path(place)))
                print(f"{number + 1} of {options.rounds}, {arm}", file=sys.stderr)
    print(f"{'tracker':10}{'median ms':>10}{'99 % ms':>9}{'longest':>9}{'end s':>7}  ratio of the medians, each round")
    without = [statistics.median(steps) for steps, _ in found["disabled"]]
    for arm, rounds in found.items():
        every = sorted(1000 * second for steps, _ in rounds for second in steps)
        ratios = [statistics.median(steps) / base for (steps, _), base in zip(rounds, without, strict=True)]
        ends = statistics.median(end for _, end in rounds)
        print(
            f"{arm:10}{statistics.median(every):10.1f}{every[int(0.99 * len(every))]:9.1f}{every[-1]:9.1f}{ends:7.1f}  "
            + ", ".join(f"{ratio:.2f}" for ratio in ratios)
        )


if __name__ == "__main__":
    main()
