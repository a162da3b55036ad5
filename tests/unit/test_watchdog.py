"""A process that stands still says where, and ends; one that is slow for a reason does not."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

from clipscale.distributed.watchdog import PATIENCE, Watchdog
from tests.pool import Pool

STUCK = """
import sys, time
from pathlib import Path
from clipscale.distributed.watchdog import Watchdog

def stand_still():
    time.sleep(60)

watchdog = Watchdog(Path(sys.argv[1]), 3, 0.2, lambda text: print(text, flush=True))
watchdog.begin()
stand_still()
"""


def test_it_says_where_and_ends(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", STUCK, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "rank 3: this step has taken more than 0 s (distributed.watchdog_s=0.2)" in done.stdout
    stacks = (tmp_path / "rank3.stacks.txt").read_text()
    assert "in stand_still" in stacks and stacks.count("hread 0x") >= 2


def test_what_is_no_step_has_longer(tmp_path: Path) -> None:
    said: list[str] = []
    watchdog = Watchdog(tmp_path, 0, 0.2, said.append)
    watchdog.begin()
    with watchdog.during("evaluation"):
        time.sleep(0.2 * PATIENCE / 3)
    watchdog.release()
    time.sleep(0.5)
    assert not said and "watchdog" not in [thread.name for thread in threading.enumerate()]


def test_without_a_limit_nobody_watches(tmp_path: Path) -> None:
    Watchdog(tmp_path, 0, None, lambda text: None).begin()
    assert "watchdog" not in [thread.name for thread in threading.enumerate()]


def longer_than_it_would(rank_waits_s: float) -> float:
    import torch

    from clipscale.distributed.collectives import rank, total
    from clipscale.distributed.runtime import waiting_up_to

    with waiting_up_to(0.5, 120), waiting_up_to(60, 120):
        if rank():
            time.sleep(rank_waits_s)
        return total(torch.ones(1)).item()


def test_ranks_wait_for_each_other_as_long_as_they_are_told(pool2: Pool) -> None:
    assert pool2.run(longer_than_it_would, 1.5) == [2.0, 2.0]
