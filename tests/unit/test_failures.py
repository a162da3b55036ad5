"""What goes wrong outside is one line that says what to do, and torchrun is told what it must do."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from clipscale.config import compose
from clipscale.config.rundir import ended_on_purpose, report, write_result
from clipscale.errors import ExitCode
from clipscale.train import _for_torchrun
from clipscale.trainer.failures import in_one_line

OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 139.72 GiB."
Agent = Callable[[int, int], dist.Store]


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> Agent:
    """As torchrun starts rank 0 of so many, with so many restarts left of three; the store that they share."""

    def start(world: int, left: int) -> dist.Store:
        known = {"RANK": 0, "WORLD_SIZE": world, "TORCHELASTIC_MAX_RESTARTS": 3, "TORCHELASTIC_RESTART_COUNT": 3 - left}
        for name, value in known.items():
            monkeypatch.setenv(name, str(value))
        return dist.HashStore()

    return start


def test_ranks_that_come_to_the_same_mistake_say_it_once(tmp_path: Path) -> None:
    """Two processes with a store between them, as torchrun's agent has it."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    agent = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}

    def ask(model: str, rank: int) -> subprocess.Popen[str]:
        here = agent | {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
        command = [sys.executable, "-m", "clipscale.cli", "search", "query", model, "a text"]
        return subprocess.Popen(command, env=os.environ | here, stderr=subprocess.PIPE, text=True, cwd=tmp_path)

    for models in (["gone", "gone"], ["one", "another"]):
        ranks = [ask(model, rank) for rank, model in enumerate(models)]
        told = "".join(process.communicate()[1] for process in ranks)
        assert [process.returncode for process in ranks] == [2, 2]
        assert told.count("error: ") == len(set(models)) and all(model in told for model in models)


@pytest.mark.parametrize(
    ("overrides", "mends"),
    [
        ([], "optim.microbatches=auto optim.max_microbatch=64 or parallel.activation_checkpointing=full"),
        (["cluster=cpu2"], "optim.max_microbatch=32 or"),
        (["optim.microbatches=auto", "optim.max_microbatch=10"], "optim.max_microbatch=5 or"),
        (
            ["optim.microbatches=auto", "optim.max_microbatch=1", "parallel.activation_checkpointing=full"],
            "use a smaller model.vision.image_size, which",
        ),
    ],
)
def test_out_of_memory_names_what_helps(overrides: list[str], mends: str) -> None:
    config, _ = compose(overrides)
    told = in_one_line(torch.OutOfMemoryError(OUT_OF_MEMORY), config, Path("runs/one"))
    assert told is not None and told.exit_code == ExitCode.USER_ERROR
    assert "out of memory on the device: CUDA out of memory. Tried to allocate 20.00 GiB;" in str(told)
    assert mends in str(told) and "\n" not in str(told)


@pytest.mark.parametrize(
    "text",
    [
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:8093",
        "NCCL communicator was aborted on rank 1.",
    ],
)
def test_a_rank_that_is_gone_is_no_traceback(text: str) -> None:
    told = in_one_line(RuntimeError(text), compose([])[0], Path("runs/one"))
    assert told is not None and told.exit_code == ExitCode.FAILED and "see runs/one/logs" in str(told)


def test_what_nobody_expected_keeps_its_traceback() -> None:
    config, _ = compose([])
    assert in_one_line(RuntimeError("shape '[2]' is invalid"), config, Path("runs")) is None
    assert in_one_line(OSError(errno.ENOENT, "No such file"), config, Path("runs")) is None


@pytest.mark.parametrize(
    ("code", "left", "expected"),
    [
        (ExitCode.DONE, 3, 0), (ExitCode.PREEMPTED, 0, 0), (ExitCode.FAILED, 3, 1), (ExitCode.FAILED, 0, 1),
        (ExitCode.USER_ERROR, 3, 0), (ExitCode.DIVERGED, 1, 0), (ExitCode.DATA_BUDGET, 2, 0), (ExitCode.DIVERGED, 0, 3),
    ],
)  # fmt: skip
def test_torchrun_starts_again_only_what_failed(agent: Agent, code: ExitCode, left: int, expected: int) -> None:
    assert _for_torchrun(code, agent(1, left)) == expected


def test_a_rank_that_fails_alone_has_torchrun_end_the_others(agent: Agent) -> None:
    store = agent(2, 3)
    assert _for_torchrun(ExitCode.USER_ERROR, store, 0.3) == ExitCode.USER_ERROR, "the other is in a collective"
    assert _for_torchrun(ExitCode.USER_ERROR, store, 0.3) == 0, "the other one has ended, too"


def test_what_would_come_again_is_not_tried_again(tmp_path: Path) -> None:
    assert ended_on_purpose(tmp_path) is None
    for code in ExitCode:
        status = {ExitCode.DONE: "done", ExitCode.PREEMPTED: "preempted"}.get(code, "failed")
        write_result(tmp_path, status, code)
        stays = code in (ExitCode.USER_ERROR, ExitCode.DIVERGED, ExitCode.DATA_BUDGET)
        assert ended_on_purpose(tmp_path) == (code if stays else None)


def test_an_error_is_told_over_what_an_attempt_before_said(tmp_path: Path) -> None:
    write_result(tmp_path, "preempted", ExitCode.PREEMPTED)
    assert report(tmp_path, "no such device", ExitCode.USER_ERROR) is ExitCode.USER_ERROR
    assert json.loads((tmp_path / "result.json").read_text())["error"] == "no such device"


def test_the_first_rank_that_fails_speaks_for_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report(tmp_path, "no such shard", ExitCode.USER_ERROR) is ExitCode.USER_ERROR
    assert report(tmp_path, "connection lost", ExitCode.FAILED) is ExitCode.USER_ERROR
    assert capsys.readouterr().err == "error: no such shard\n"
    assert json.loads((tmp_path / "result.json").read_text())["error"] == "no such shard"
