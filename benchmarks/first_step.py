"""From the command to the first step: `clipscale train` of the demo, and open_clip's command on the same shards.

    python benchmarks/first_step.py PEER_PYTHON [--rounds 5]

PEER_PYTHON is a virtualenv's with open_clip_torch and webdataset<=0.2.86, which its loader needs. The two take turns;
each is started on the demo's rendered shards, timed until it tells of its first step, and ended. open_clip has a model
of the demo's size, fp32, the same batch, on a CPU, with as many workers of its loader as the demo has.
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
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from clipscale.config import compose  # noqa: E402 - benchmarks run from anywhere, installed or not
from clipscale.data.shapes import ShapesSpec, ensure_shapes  # noqa: E402


def until(command: list[str], said: str, place: Path) -> float:
    """Seconds until a program prints a line that holds ``said``; it is ended then."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": str(os.cpu_count())}
    begun = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    told = []
    try:
        for line in process.stdout:
            told.append(line)
            if said in line:
                return time.perf_counter() - begun
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    raise SystemExit(f"{' '.join(command)} ended without a step:\n{''.join(told[-20:])}")


def ours(place: Path) -> list[str]:
    """The demo, telling of every step."""
    more = ["tracking=disabled", "tracking.log_every_steps=1", f"runs_dir={place}/runs{time.time_ns()}"]
    return [sys.executable, "-m", "clipscale.cli", "train", *more]


def theirs(peer: str, place: Path, shards: list[str]) -> list[str]:
    """open_clip on the same data."""
    config, _ = compose([])
    model = config.model
    size = {
        "embed_dim": model.embed_dim,
        "vision_cfg": {
            "image_size": model.vision.image_size, "patch_size": model.vision.patch_size,
            "layers": model.vision.layers, "width": model.vision.width, "head_width": 32,
        },
        "text_cfg": {
            "context_length": model.context_length, "vocab_size": 49408, "width": model.text.width,
            "heads": model.text.heads, "layers": model.text.layers,
        },
    }  # fmt: skip
    (place / "demo.json").write_text(json.dumps(size))
    start = f"import open_clip; open_clip.add_model_config({str(place / 'demo.json')!r}); "
    start += "import sys; from open_clip_train.main import main; main(sys.argv[1:])"
    # Its own syntax for a list of files.
    data = ["--train-data", "::".join(shards), "--dataset-type", "webdataset", "--train-num-samples", "8192"]
    rest = ["--model", "demo", "--batch-size", str(config.global_batch_size), "--precision", "fp32", "--device", "cpu"]
    rest += ["--workers", str(max(1, config.data.workers)), "--epochs", "1", "--log-every-n-steps", "1"]
    return [peer, "-c", start, *data, *rest, "--logs", str(place / "logs"), "--name", str(time.time_ns())]


def main() -> None:
    """Take turns, and print both and their ratio."""
    parser = argparse.ArgumentParser()
    parser.add_argument("peer")
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    rendered = ensure_shapes(ShapesSpec(**vars(compose([])[0].data.shapes)))
    shards = sorted(map(str, rendered.glob("train-*.tar")))
    taken: dict[str, list[float]] = {"clipscale": [], "open_clip": []}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for _ in range(asked.rounds):
            taken["clipscale"].append(until(ours(place), "step      1 ", place))
            taken["open_clip"].append(until(theirs(asked.peer, place, shards), "Train Epoch: 0 [", place))
            print({name: round(each[-1], 2) for name, each in taken.items()}, file=sys.stderr, flush=True)
    for name, each in taken.items():
        print(f"{name}: median {statistics.median(each):.1f} s, from {min(each):.1f} to {max(each):.1f}")
    ratio = statistics.median(taken["clipscale"]) / statistics.median(taken["open_clip"])
    print(f"clipscale / open_clip: {ratio:.2f}")


if __name__ == "__main__":
    main()
