"""Faults of every kind, one after the other, on runs that must end as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tests.runs import events, kill_everything, last_step
from tests.tracker import tracker

BATCH, EVERY, STEPS = 32, 6, 60  # samples a step, steps between checkpoints, steps of a run
POISONED = (17, 33, 34)  # steps of the unpoisoned run: one bad batch alone, and two that make the run go back
PATIENCE_S = 300.0
KEY = "0" * 40
HOOKS = Path(__file__).parent / "hooks"
# What happens to a run, and how often it is drawn.
KINDS = {
    "kill a rank": 4, "kill the agent": 3, "SIGTERM": 3, "SIGTERM to a rank": 2, "SIGSTOP a rank": 2, "disk full": 3,
    "flip a byte": 3, "truncate a file": 3, "remove a file": 3, "kill all": 3, "W&B dies": 2,
}  # fmt: skip

OF_ONE_RANK = ("kill a rank", "SIGSTOP a rank", "SIGTERM to a rank")  # of a run that has several


class Fault(NamedTuple):
    """``kind`` of what happens, so many steps after the newest that there is; ``draw`` chooses a rank, file or byte."""

    kind: str
    world: int
    steps: int
    draw: int


def draw_faults(seed: int, count: int) -> list[Fault]:
    """A seeded list; every kind comes before any comes again as often as its weight."""
    draw = random.Random(seed)
    kinds = list(KINDS)
    while len(kinds) < count:
        kinds += draw.choices(list(KINDS), weights=list(KINDS.values()), k=1)
    draw.shuffle(kinds)
    return [
        Fault(kind, 2 if kind in OF_ONE_RANK else draw.choice((1, 2, 2)), draw.randint(1, 9), draw.getrandbits(32))
        for kind in kinds[:count]
    ]


def recipe(runs: Path, data: list[str]) -> list[str]:
    """A model that steps in milliseconds, with a rule that makes it go back soon."""
    return [
        f"runs_dir={runs}", *data, "data.workers=1", "data.trace=true", "tracking.mode=disabled",
        "tracking.log_every_steps=1", f"global_batch_size={BATCH}", "data.streams=4", f"total_samples={BATCH * STEPS}",
        "schedule.warmup_samples=64", f"checkpoint.every_samples={BATCH * EVERY}", "checkpoint.keep_last=6",
        "eval.every_samples=null", "data.val.shards=null", "data.zeroshot.shards=null", "ema.decay=0.9",
        "model.vision.image_size=32", "model.vision.patch_size=16", "model.vision.width=32", "model.vision.layers=1",
        "model.vision.heads=2", "model.text.width=32", "model.text.layers=1", "model.text.heads=2",
        "model.embed_dim=16", "model.context_length=16", "device=cpu",
        "divergence.bad_steps=2", "divergence.within_steps=4", "distributed.watchdog_s=8",
        "distributed.timeout_s=60", "cluster.max_restarts=3",
    ]  # fmt: skip


@dataclass
class Victim:
    """A run to which faults happen, and how it stands to the undisturbed one."""

    path: Path
    arguments: list[str]
    poison: list[str]
    process: subprocess.Popen[str] | None = None
    world: int = 2
    said: list[str] = field(default_factory=list)

    def start(self, world: int, *overrides: str, **variables: str) -> None:
        """Give the command."""
        path = os.pathsep.join([str(HOOKS), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"CHAOS_POISON": "\n".join(self.poison), "PYTHONPATH": path} | variables
        self.world = world
        self.process = subprocess.Popen(
            [sys.executable, "-m", "clipscale.cli", "train", *self.arguments, f"name={self.path.name}",
             f"cluster.processes_per_node={world}", f"parallel={'fsdp' if world > 1 else 'ddp'}", *overrides],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, env=environment,
        )  # fmt: skip

    def step(self) -> int:
        """The last step in ``metrics.jsonl``."""
        return last_step(self.path, BATCH)

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Lines of ``events.jsonl``."""
        return events(self.path, kind)

    def ranks(self) -> list[int]:
        """Process ids of the ranks that train, in their order; of a run alone, its own."""
        assert self.process is not None
        found = {}
        for child in _children(self.process.pid):
            environment = _environment(child)
            if "RANK" in environment and "clipscale.train" in _command(child):
                found[int(environment["RANK"])] = child
        return [found[rank] for rank in sorted(found)] or [self.process.pid]

    def wait_for(self, condition: Any, seconds: float = PATIENCE_S) -> bool:
        """Whether it comes true before the process ends; raises TimeoutError."""
        assert self.process is not None
        deadline = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None:
                return bool(condition())
            if time.monotonic() > deadline:
                raise TimeoutError(f"nothing for {seconds:.0f} s at step {self.step()}")
            time.sleep(0.05)
        return True

    def ended(self) -> int:
        """Wait for its end; the exit code."""
        assert self.process is not None
        output, _ = self.process.communicate(timeout=PATIENCE_S)
        self.said.append(output)
        return self.process.returncode

    def kill(self) -> None:
        """The end of all of it."""
        if self.process is not None and self.process.poll() is None:
            self.said.append(kill_everything(self.process, self.path))


def strike(victim: Victim, fault: Fault) -> str:
    """Let a fault happen to a run that is under way, or is started for it. Returns what came of it."""
    starts = len(victim.events("started"))
    if fault.kind in OF_ONE_RANK and victim.world != fault.world:
        victim.kill()  # it goes on with as many as the fault is for
    if victim.process is None or victim.process.poll() is not None:
        victim.start(fault.world)
        starts += 1
    goal = min(STEPS - 2, victim.step() + fault.steps)
    if not victim.wait_for(lambda: len(victim.events("started")) >= starts and victim.step() >= goal):
        return f"ended before, code {victim.ended()}"
    return _HAPPENINGS[fault.kind](victim, fault)


def _goes_on(victim: Victim, how: str) -> str:
    """After something that the launcher sees: it starts the ranks again."""
    starts, process = len(victim.events("started")), victim.process
    assert process is not None
    if victim.wait_for(lambda: len(victim.events("started")) > starts):
        return f"{how}; started again at {victim.events('started')[-1]['samples_seen']}"
    return f"{how}; ended with {victim.ended()}: {_result(victim).get('error', 'done')}"


def _kill_rank(victim: Victim, fault: Fault) -> str:
    ranks = victim.ranks()
    number = fault.draw % len(ranks)
    os.kill(ranks[number], signal.SIGKILL)
    return _goes_on(victim, f"rank {number} gone")


def _kill_agent(victim: Victim, fault: Fault) -> str:
    assert victim.process is not None
    ranks = victim.ranks()
    os.kill(victim.process.pid, signal.SIGKILL)
    victim.ended()
    deadline = time.monotonic() + PATIENCE_S
    while any(_alive(rank) for rank in ranks) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_alive(rank) for rank in ranks), "ranks outlive their agent"
    return f"ranks ended: {_result(victim).get('status', 'killed')}"


def _stop(victim: Victim, fault: Fault) -> str:
    assert victim.process is not None
    victim.process.send_signal(signal.SIGTERM)
    return _ends_well(victim)


def _stop_rank(victim: Victim, fault: Fault) -> str:
    ranks = victim.ranks()
    os.kill(ranks[fault.draw % len(ranks)], signal.SIGTERM)
    return _ends_well(victim)


def _ends_well(victim: Victim) -> str:
    """After it was asked to: saved, or done already."""
    code = victim.ended()
    assert (code, _result(victim)["status"]) in ((75, "preempted"), (0, "done")), (code, victim.said[-1])
    return f"code {code}, {_result(victim)['status']}"


def _freeze(victim: Victim, fault: Fault) -> str:
    ranks = victim.ranks()
    number = fault.draw % len(ranks)
    os.kill(ranks[number], signal.SIGSTOP)
    found = _goes_on(victim, f"rank {number} frozen")
    logs = victim.path / "logs"
    told = [file.name for file in logs.glob("*.stacks.txt")]  # the watchdog of the others; or, in a save, the time-out
    told += [file.name for file in logs.glob("rank*.log") if "does not answer" in file.read_text()]
    assert told, "the others noticed nothing"
    return f"{found}; {', '.join(sorted(told))}"


def _fill_disk(victim: Victim, fault: Fault) -> str:
    rank, starts = victim.ranks()[0], len(victim.events("started"))
    # To this process alone, every file beyond a few bytes is now too large: as a full disk, but for the number.
    resource.prlimit(rank, resource.RLIMIT_FSIZE, (64, 64))
    if victim.world == 1:
        code = victim.ended()
        error = _said(victim)
        assert code == 1 and "make room" in error, (code, victim.said[-1])
        return f"code 1: {error[:60]}"
    return _goes_on(victim, f"no room (after start {starts})")


def _kill_all(victim: Victim, fault: Fault) -> str:
    victim.kill()
    return "all gone"


def _damage(victim: Victim, fault: Fault) -> str:
    victim.wait_for(lambda: len(_checkpoints(victim.path)) >= 2)
    victim.kill()
    newest = _checkpoints(victim.path)[-1]
    files = sorted(newest.glob("*.distcp"))
    file = files[fault.draw % len(files)]
    content = bytearray(file.read_bytes())
    if fault.kind == "flip a byte":
        content[fault.draw % len(content)] ^= 1 << fault.draw % 8
        file.write_bytes(content)
    elif fault.kind == "truncate a file":
        file.write_bytes(content[: fault.draw % len(content)])
    else:
        file.unlink()
    victim.start(fault.world)
    starts = len(victim.events("started"))
    victim.wait_for(lambda: len(victim.events("started")) > starts)
    event, begun = victim.events("damaged_checkpoint")[-1], victim.events("started")[-1]
    assert event["checkpoint"] == newest.name and begun["checkpoint"] != newest.name
    return f"{newest.name} set aside, started again at {begun['samples_seen']}"


def _lose_tracker(victim: Victim, fault: Fault) -> str:
    victim.kill()
    with tracker() as (address, server):
        starts = len(victim.events("started"))
        victim.start(
            fault.world, "tracking.mode=online", WANDB_MODE="online", WANDB_BASE_URL=address, WANDB_API_KEY=KEY
        )
        victim.wait_for(lambda: len(victim.events("started")) > starts)
        goal = min(STEPS - 4, victim.step() + fault.steps)
        victim.wait_for(lambda: victim.step() >= goal)
        server.kill()
    assert victim.wait_for(lambda: victim.step() >= goal + 3)
    assert any(victim.path.glob("wandb/run-*")), "it never was online"
    return f"went on from {goal * BATCH} to {victim.step() * BATCH}"


_HAPPENINGS = {
    "kill a rank": _kill_rank, "kill the agent": _kill_agent, "SIGTERM": _stop, "SIGTERM to a rank": _stop_rank,
    "SIGSTOP a rank": _freeze, "disk full": _fill_disk, "flip a byte": _damage, "truncate a file": _damage,
    "remove a file": _damage, "kill all": _kill_all, "W&B dies": _lose_tracker,
}  # fmt: skip


def _checkpoints(path: Path) -> list[Path]:
    return sorted(file.parent for file in path.glob("checkpoints/step_*/manifest.json"))


def _result(victim: Victim) -> dict[str, Any]:
    file = victim.path / "result.json"
    return json.loads(file.read_text()) if file.exists() else {}


def _said(victim: Victim) -> str:
    return next((line for line in victim.said[-1].splitlines() if line.startswith("error: ")), "")


def _children(pid: int) -> Iterator[int]:
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            yield int(child)
            yield from _children(int(child))


def _environment(pid: int) -> dict[str, str]:
    try:
        pairs = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return {}
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
    except OSError:
        return ""


def _alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
