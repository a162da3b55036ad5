"""What ``clipscale doctor`` looks at: each check is a function of a configuration that yields what it found."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import resource
import shutil
import socket
import ssl
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from enum import Enum
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from clipscale.config import Config
from clipscale.config.data import Builtin
from clipscale.config.running import TrackingMode
from clipscale.errors import ClipscaleError

# Oldest version that is tested, and the first that is known not to do.
VERSIONS: dict[str, tuple[str, str | None]] = {
    "torch": ("2.11", None), "torchvision": ("0.26", None), "timm": ("1.0.20", None), "webdataset": ("1.0", None),
    "hydra-core": ("1.3.8", "1.4"), "omegaconf": ("2.3", None), "wandb": ("0.31", None), "obstore": ("0.8", None),
    "open_clip_torch": ("3.2", None), "safetensors": ("0", None), "numpy": ("0", None), "pillow": ("0", None),
}  # fmt: skip
PROBE_BYTES = 64 * 2**20
SLOW_DISK = 50e6  # bytes per second
SKEW_S, BROKEN_SKEW_S = 5.0, 900.0  # S3 refuses signatures of clocks that differ by a quarter of an hour
OPEN_FILES, PREFETCHED = 256, 4  # of a process beside shards; batches that a worker makes ahead
CONNECT_S = 5.0


class Level(Enum):
    """What a finding means for a run."""

    ok = "ok"
    warning = "warning"
    error = "error"  # it would break


@dataclass(frozen=True)
class Finding:
    """What a check found: ``text`` says what, and what mends it."""

    check: str
    level: Level
    text: str


Findings = Iterator[Finding]


def _numbers(version: str) -> tuple[int, ...]:
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def versions() -> Findings:
    """Python and the libraries."""
    there: list[str] = []
    for name, (least, above) in VERSIONS.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding("versions", Level.error, f"{name} is not installed; pip install '{name}>={least}'")
            continue
        there.append(f"{name} {version}")
        if _numbers(version) < _numbers(least):
            yield Finding("versions", Level.error, f"{name} {version} is too old; pip install '{name}>={least}'")
        if above is not None and _numbers(version) >= _numbers(above):
            yield Finding("versions", Level.error, f"{name} {version} is too new; pip install '{name}<{above}'")
    yield Finding("versions", Level.ok, f"Python {sys.version.split()[0]}, {', '.join(there)}")


def plugins() -> Findings:
    """Hydra loads every plugin that is installed, and this one cannot be loaded by Pythons that clipscale needs."""
    try:
        broken = importlib.util.find_spec("hydra_plugins.hydra_ax_sweeper") is not None
    except ModuleNotFoundError:
        broken = False
    if broken:
        text = "hydra-ax-sweeper breaks every Hydra program on Python 3.11 and later; pip uninstall hydra-ax-sweeper"
        yield Finding("plugins", Level.error, text)
    else:
        yield Finding("plugins", Level.ok, "no Hydra plugin that is known to break it")


def files(config: Config) -> Findings:
    """Files that a process may have open: a shard for each of its streams, at worst."""
    most, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    world = config.cluster.nodes * config.cluster.processes_per_node
    streams = -(-(config.data.streams or min(512, config.global_batch_size)) // world)
    needed = OPEN_FILES + (0 if config.data.builtin is Builtin.synthetic else streams)
    text = f"{most} open files; a process needs about {needed}"
    if most != resource.RLIM_INFINITY and most < needed:
        level, text = Level.error, f"{text}: ulimit -n {max(65536, needed)} (at most {hard} here)"
    else:
        level = Level.ok
    yield Finding("open files", level, text)


def shared_memory(config: Config) -> Findings:
    """Workers of the loader leave batches in it."""
    shm = Path("/dev/shm")
    if not shm.is_dir():
        return
    free = shutil.disk_usage(shm).free
    pairs = config.global_batch_size // (config.cluster.nodes * config.cluster.processes_per_node)
    batch = 3 * config.model.vision.image_size**2 * max(pairs, 1)
    local = config.cluster.processes_per_node
    needed = 0
    if config.data.workers and config.data.builtin is not Builtin.synthetic:
        needed = batch * PREFETCHED * local  # its workers share a batch
    text = f"{_size(free)} free in /dev/shm; the loaders of {local} processes fill up to {_size(needed)}"
    if needed > free:
        text += "; give the container more (docker --shm-size, cluster.k8s shm), or use data.workers=0"
    yield Finding("shared memory", Level.error if needed > free else Level.ok, text)


def disk(config: Config, checkpoint_bytes: int | None) -> Findings:
    """Room and speed where the run and its checkpoints are written."""
    key, where = "runs_dir", config.runs_dir
    if config.checkpoint.dir is not None and "://" not in config.checkpoint.dir:
        key, where = "checkpoint.dir", config.checkpoint.dir
    place = next(parent for parent in [Path(where).absolute(), *Path(where).absolute().parents] if parent.is_dir())
    free = shutil.disk_usage(place).free
    needed = (checkpoint_bytes or 0) * (config.checkpoint.keep_last + 1)  # one is written before another goes
    if needed > free:
        text = f"{key}={where}: {_size(free)} free, and checkpoints take {_size(needed)}; use another {key}"
        yield Finding("disk", Level.error, f"{text}, or fewer checkpoint.keep_last")
    probe = place / f".clipscale-doctor-{os.getpid()}"
    try:
        before, took = _write(probe)
    except OSError as error:
        yield Finding("disk", Level.error, f"{place} cannot be written ({error.strerror}); set {key}")
        return
    finally:
        probe.unlink(missing_ok=True)
    skew, speed = before, PROBE_BYTES / took
    text = f"{place}: {_size(free)} free, {speed / 1e6:,.0f} MB/s written"
    if checkpoint_bytes:
        text += f"; a checkpoint of {_size(checkpoint_bytes)} takes {checkpoint_bytes / speed:.1f} s of one process"
    yield Finding("disk", Level.warning if speed < SLOW_DISK else Level.ok, text)
    yield _skew(f"the file system of {place}", skew, BROKEN_SKEW_S)


def _write(probe: Path) -> tuple[float, float]:
    """By how much the file system's clock is ahead, and seconds to write ``PROBE_BYTES``."""
    block, begun = os.urandom(2**20), time.perf_counter()
    with probe.open("wb", buffering=0) as file:
        for _ in range(PROBE_BYTES // len(block)):
            file.write(block)
        os.fsync(file.fileno())
    took = time.perf_counter() - begun
    return probe.stat().st_mtime - time.time(), took


def _skew(whose: str, seconds: float, broken: float) -> Finding:
    level = Level.error if abs(seconds) > broken else Level.warning if abs(seconds) > SKEW_S else Level.ok
    mend = "" if level is Level.ok else "; set this machine's clock (chronyc makestep)"
    return Finding("clock", level, f"{whose} is {abs(seconds):.1f} s {'ahead' if seconds > 0 else 'behind'}{mend}")


def storage_clock(config: Config) -> Findings:
    """The clock of the server that holds the shards, where it says: signatures hold for minutes."""
    where = config.storage.endpoint_url
    if where is None or not where.startswith("http"):
        return
    try:
        request = urllib.request.Request(where, method="HEAD")
        trusted = ssl.create_default_context()
        if config.storage.ca_bundle is not None:
            trusted.load_verify_locations(config.storage.ca_bundle)
        with closing(urllib.request.urlopen(request, timeout=CONNECT_S, context=trusted)) as answer:
            date = answer.headers["Date"]
    except urllib.error.HTTPError as error:  # it answers, and has a clock
        date = error.headers["Date"]
    except OSError as error:
        # Once, and for seconds: whether shards can be read is what the check of shards says.
        yield Finding("storage", Level.warning, f"storage.endpoint_url={where} does not answer: {error}")
        return
    if date:
        yield _skew(where, parsedate_to_datetime(date).timestamp() - time.time(), BROKEN_SKEW_S)


def shards(config: Config) -> Findings:
    """That each set of shards is there, and the first and the last one can be read."""
    from clipscale.data.io import ShardStore
    from clipscale.data.manifest import expand_shards

    data, store = config.data, ShardStore(config.storage)
    if data.builtin is not Builtin.none:
        yield Finding("shards", Level.ok, f"data.builtin={data.builtin.value} needs none")
        return
    sets = {"train": data.train.shards, "val": data.val.shards, "zeroshot": data.zeroshot.shards}
    for name, given in sets.items():
        if not given:
            continue
        key = f"data.{name}.shards"
        try:
            found = expand_shards(given, data.root, key, store, data.index)
            begun = time.perf_counter()
            for file in {found[0].location: found[0], found[-1].location: found[-1]}.values():
                with closing(store.open(file.location)) as raw:
                    raw.read(512)
            took = time.perf_counter() - begun
        except ClipscaleError as error:
            yield Finding("shards", Level.error, str(error))
        else:
            text = f"{key}: {len(found)} parts; the first and the last answer in {1e3 * took:.0f} ms"
            yield Finding("shards", Level.ok, text)


def tracker(config: Config) -> Findings:
    """Whether W&B can be reached, where it is wanted; whatever it does, a run goes on."""
    mode = config.tracking.mode
    if mode in (TrackingMode.disabled, TrackingMode.offline):
        yield Finding("W&B", Level.ok, f"tracking.mode={mode.value}: nothing is sent")
        return
    from clipscale.telemetry.wandb import has_key, server

    address = server()
    if not has_key():
        text = "no key (wandb login, or WANDB_API_KEY), so the run stays offline; RUN/metrics.jsonl has everything"
        yield Finding("W&B", Level.warning if mode is TrackingMode.online else Level.ok, text)
        return
    url = urlparse(address)
    port = url.port or (443 if url.scheme == "https" else 80)
    try:
        socket.create_connection((url.hostname or "", port), timeout=CONNECT_S).close()
    except OSError as error:
        yield Finding("W&B", Level.warning, f"{address} cannot be reached ({error}), so the run goes offline")
    else:
        yield Finding("W&B", Level.ok, f"{address} answers")


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


BEFORE: tuple[Callable[[], Findings], ...] = (versions, plugins)
"""Those that need no configuration; with an error in them there may be none."""
OF_A_RUN: tuple[Callable[[Config], Findings], ...] = (files, shared_memory, storage_clock, shards, tracker)


def every(checks: Any, *args: Any) -> Findings:
    """What all checks found; one that fails is a finding too."""
    for check in checks:
        try:
            yield from check(*args)
        except Exception as error:
            yield Finding(check.__name__.replace("_", " "), Level.warning, f"could not be looked at: {error}")
