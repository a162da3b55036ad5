"""A Slurm cluster of two nodes on this machine, for as long as a test session lasts."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

HAVE_SLURM = os.geteuid() == 0 and all(shutil.which(name) for name in ("slurmctld", "slurmd", "munged"))
CONF = """\
ClusterName=two
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
ReturnToService=2
SlurmdTimeout=30
KillWait={kill_wait}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
SchedulerParameters=sched_interval=5
NodeName=n1 NodeAddr=127.0.0.1 NodeHostname={host} Port={first} CPUs=2 RealMemory=4000
NodeName=n2 NodeAddr=127.0.0.1 NodeHostname={host} Port={second} CPUs=2 RealMemory=4000
PartitionName=train Nodes=n1,n2 Default=YES PriorityTier=1 GraceTime={kill_wait} MaxTime=60
PartitionName=urgent Nodes=n1,n2 PriorityTier=10
"""


@contextmanager
def cluster(root: Path, kill_wait: int = 60) -> Iterator[None]:
    """Two nodes, ``n1`` and ``n2``, partitions ``train`` and ``urgent``, which preempts; ``SLURM_CONF`` names it."""
    ports = _free_ports(3)
    conf = CONF.format(
        host=socket.gethostname(), root=root, port=ports[0], first=ports[1], second=ports[2], kill_wait=kill_wait
    )
    (root / "state").mkdir(parents=True)
    (root / "slurm.conf").write_text(conf)
    before, os.environ["SLURM_CONF"] = os.environ.get("SLURM_CONF"), str(root / "slurm.conf")
    try:
        _start_munge(root)
        subprocess.run(["slurmctld", "-c"], check=True)
        for node in ("n1", "n2"):
            (root / f"spool.{node}").mkdir()
            subprocess.run(["slurmd", "-N", node], check=True)
        _wait_for_nodes()
        yield
    finally:
        subprocess.run(["scancel", "--user=root"], capture_output=True)
        for file in root.glob("*.pid"):
            with suppress(ProcessLookupError, ValueError):
                os.kill(int(file.read_text()), signal.SIGTERM)
        if before is None:
            del os.environ["SLURM_CONF"]
        else:
            os.environ["SLURM_CONF"] = before


def state(job: str) -> str:
    """As ``RUNNING``; empty when Slurm has forgotten it."""
    found = subprocess.run(["squeue", "-h", "-j", job, "-t", "all", "-o", "%T"], capture_output=True, text=True)
    return found.stdout.strip()


def _start_munge(root: Path) -> None:
    key = root / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    options = [f"--key-file={key}", f"--socket={root}/munge.socket", f"--pid-file={root}/munged.pid"]
    options += [f"--log-file={root}/munged.log", f"--seed-file={root}/munged.seed", "--force"]
    subprocess.run(["munged", *options], check=True, stderr=subprocess.DEVNULL)


def _wait_for_nodes(seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while True:
        nodes = subprocess.run(["sinfo", "-h", "-N", "-p", "train", "-o", "%t"], capture_output=True, text=True).stdout
        if nodes.split() == ["idle", "idle"]:
            return
        assert time.monotonic() < deadline, nodes
        time.sleep(0.5)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
