"""Two hosts, each a network namespace of its own: one dies, its link is cut, it comes late."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos import BATCH, Victim, recipe
from tests.e2e.test_chaos import data
from tests.runs import keys, losses, run

STEPS = 480
PATIENCE_S = 400
RENDEZVOUS = "keep_alive_interval=2,keep_alive_max_attempt=2,last_call_timeout=3,read_timeout=20"
HAVE_NAMESPACES = os.geteuid() == 0 and shutil.which("ip") is not None
number = itertools.count()  # names of what was taken down are free a little later
pytestmark = [
    pytest.mark.hosts,
    pytest.mark.slow,
    pytest.mark.skipif(not HAVE_NAMESPACES, reason="needs network namespaces"),
]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


class Hosts:
    """Two of them, on one bridge."""

    def __init__(self) -> None:
        self.tag = f"cs{os.getpid() % 10000}x{next(number)}"
        ip("link", "add", f"{self.tag}br", "type", "bridge")
        ip("link", "set", f"{self.tag}br", "up")
        for i in (0, 1):
            name = f"{self.tag}h{i}"
            ip("netns", "add", name)
            ip("link", "add", f"{name}o", "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", f"{name}o", "master", f"{self.tag}br", "up")
            ip("-n", name, "addr", "add", f"10.77.0.{i + 1}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
            # Seconds, and not a quarter of an hour, until the kernel takes a host that says nothing for gone.
            ip("netns", "exec", name, "sysctl", "-qw", "net.ipv4.tcp_retries2=5")
        self.agents: dict[int, subprocess.Popen[str]] = {}

    def start(self, host: int, arguments: list[str]) -> None:
        torchrun = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=5",
            "--rdzv-backend=c10d", "--rdzv-endpoint=10.77.0.1:29400", "--rdzv-id=hosts", "--monitor-interval=1",
            f"--rdzv-conf=is_host={'false' if host else 'true'},{RENDEZVOUS}", f"--local-addr=10.77.0.{host + 1}",
            "-m", "clipscale.train", *arguments,
        ]  # fmt: skip
        environment = os.environ | {"GLOO_SOCKET_IFNAME": "eth0", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        self.agents[host] = subprocess.Popen(
            ["ip", "netns", "exec", f"{self.tag}h{host}", *torchrun],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip

    def processes(self, host: int) -> list[int]:
        """All that run on a host."""
        found = subprocess.run(["ip", "netns", "pids", f"{self.tag}h{host}"], capture_output=True, text=True)
        return [int(pid) for pid in found.stdout.split()]

    def die(self, host: int) -> None:
        """As when its power is cut: nobody says goodbye."""
        self.cut(host)
        for pid in self.processes(host):
            os.kill(pid, signal.SIGKILL)

    def cut(self, host: int) -> None:
        ip("link", "set", f"{self.tag}h{host}o", "down")

    def back(self, host: int) -> None:
        ip("link", "set", f"{self.tag}h{host}o", "up")

    def close(self) -> None:
        for host in (0, 1):
            while pids := self.processes(host):
                for pid in pids:
                    os.kill(pid, signal.SIGKILL)
                time.sleep(0.1)
            ip("link", "del", f"{self.tag}h{host}o")
            ip("netns", "del", f"{self.tag}h{host}")
        ip("link", "del", f"{self.tag}br")
        for agent in self.agents.values():
            agent.communicate()


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    found = Hosts()
    try:
        yield found
    finally:
        found.close()


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Victim]:
    """A recipe, and its run that nobody disturbed."""
    arguments = [
        *recipe(tmp_path_factory.mktemp("hosts"), data()), f"total_samples={BATCH * STEPS}",
        f"checkpoint.every_samples={BATCH * 15}", "distributed.timeout_s=20",
        "distributed.watchdog_s=15",
    ]  # fmt: skip
    run(*arguments, "name=undisturbed", "schedule=constant", timeout=900)
    return arguments, Victim(Path(arguments[0].removeprefix("runs_dir=")) / "undisturbed", arguments, [])


def until(victim: Victim, hosts: Hosts, starts: int, step: int) -> float:
    """Seconds until the run has been started so often and has come so far."""
    begun = time.monotonic()
    while len(victim.events("started")) < starts or victim.step() < step:
        assert time.monotonic() - begun < PATIENCE_S, f"nothing at step {victim.step()}"
        agent = hosts.agents[0]
        assert agent.poll() is None, agent.communicate()[0]
        time.sleep(0.1)
    return time.monotonic() - begun


def end(victim: Victim, hosts: Hosts, truth: Victim, happened: str, after_s: float) -> None:
    output, _ = hosts.agents[0].communicate(timeout=900)
    assert hosts.agents[0].returncode == 0, output
    worlds = [event["world_size"] for event in victim.events("started")]
    ours, theirs = losses(victim.path), losses(truth.path)
    assert list(ours) == list(theirs) and keys(victim.path) == keys(truth.path)
    furthest = max(abs(ours[seen] - theirs[seen]) for seen in theirs)
    print(
        f"{happened} | world sizes {worlds} | trained again after {after_s:.0f} s | largest difference {furthest:.1e}"
    )
    assert furthest < 1e-3 and len(worlds) >= 2


@pytest.mark.parametrize("happened", ["a host dies", "a link is cut", "a host comes late"])
def test_one_of_two_hosts(hosts: Hosts, truth: tuple[list[str], Victim], happened: str) -> None:
    arguments, undisturbed = truth
    victim = Victim(undisturbed.path.with_name(happened.replace(" ", "-")), arguments, [])
    command = [*arguments, f"name={victim.path.name}", "schedule=constant"]
    hosts.start(0, command)
    if happened != "a host comes late":
        hosts.start(1, command)
    until(victim, hosts, 1, 20)
    if happened == "a host comes late":
        hosts.start(1, command)
    elif happened == "a host dies":
        hosts.die(1)
    else:
        hosts.cut(1)
    begun = time.monotonic()
    until(victim, hosts, 2, 20)
    end(victim, hosts, undisturbed, happened, time.monotonic() - begun)


def test_a_lost_host_returns(hosts: Hosts, truth: tuple[list[str], Victim]) -> None:
    arguments, undisturbed = truth
    victim = Victim(undisturbed.path.with_name("returns"), arguments, [])
    command = [*arguments, f"name={victim.path.name}", "schedule=constant"]
    hosts.start(0, command)
    hosts.start(1, command)
    until(victim, hosts, 1, 20)
    hosts.die(1)
    until(victim, hosts, 2, 40)
    hosts.back(1)
    hosts.agents[1].communicate()
    hosts.start(1, command)
    begun = time.monotonic()
    until(victim, hosts, 3, 40)
    end(victim, hosts, undisturbed, "a lost host returns", time.monotonic() - begun)
    assert [event["world_size"] for event in victim.events("started")] == [2, 1, 2]


def test_the_host_of_the_rendezvous_dies(hosts: Hosts, truth: tuple[list[str], Victim]) -> None:
    """Nobody is left to agree with: the other ends with an error, and the same command goes on where it stood."""
    arguments, undisturbed = truth
    victim = Victim(undisturbed.path.with_name("rendezvous"), arguments, [])
    command = [*arguments, f"name={victim.path.name}", "schedule=constant"]
    hosts.start(0, command)
    hosts.start(1, command)
    until(victim, hosts, 1, 20)
    begun = time.monotonic()
    hosts.die(0)
    hosts.agents[1].communicate(timeout=PATIENCE_S)
    print(f"the host of the rendezvous dies | code {hosts.agents[1].returncode} after {time.monotonic() - begun:.0f} s")
    assert hosts.agents[1].returncode == 1
    run(*command, timeout=900)
    assert keys(victim.path) == keys(undisturbed.path)
