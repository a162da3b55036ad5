"""What one rank asks for, all know one step later, at the same step."""

from __future__ import annotations

import os
import signal

import torch

from clipscale.distributed.collectives import rank, world_size
from clipscale.distributed.faults import Agreed, Agreement
from tests.pool import Pool


def agree(asking: int) -> list[Agreed | None]:
    """Answers over five steps: rank ``asking`` wants a save at the second, and is told to stop in the third."""
    agreement, found = Agreement(torch.device("cpu")), []
    for step in range(5):
        if step == 2 and rank() == asking:
            os.kill(os.getpid(), signal.SIGUSR1)
        said = [torch.tensor(float(10 * step + rank())), torch.tensor(float("inf") if step == 3 else -1.0)]
        found.append(agreement.exchange(step == 1 and rank() == asking, said))
    found += [agreement.settle(), agreement.settle()]
    agreement.release()
    return found


def expected(world: int) -> list[Agreed | None]:
    largest = [
        Agreed(step >= 2, step == 1, [10.0 * step + world - 1, float("inf") if step == 3 else -1.0])
        for step in range(5)
    ]
    return [None, *largest, None]


def test_all_ranks_know_one_step_later(pool2: Pool) -> None:
    for asking in (0, 1):
        assert pool2.run(agree, asking) == [expected(2)] * 2


def test_a_process_alone_knows_it_too() -> None:
    assert world_size() == 1
    before = signal.getsignal(signal.SIGUSR1)
    assert agree(0) == expected(1)
    assert signal.getsignal(signal.SIGUSR1) == before
