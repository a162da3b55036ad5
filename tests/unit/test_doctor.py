"""What would break a run is found before it: each check on a machine, or a file, on which it must speak."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import wandb
from typer.testing import CliRunner

from clipscale.cli import app
from clipscale.config import Config, compose
from clipscale.planner import findings
from clipscale.planner.findings import Finding, Findings, Level
from tests.shards import write_shards


def config_of(*overrides: str) -> Config:
    return compose(overrides)[0]


def worst(found: Findings) -> Finding:
    """The gravest of them."""
    return max(found, key=lambda one: [*Level].index(one.level))


def test_libraries_that_are_missing_or_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    assert worst(findings.versions()).level is Level.ok
    for wanted, said in (
        ({"no-such-library": ("1", None)}, "no-such-library is not installed; pip install 'no-such-library>=1'"),
        ({"torch": ("99.1", None)}, "is too old; pip install 'torch>=99.1'"),
        ({"hydra-core": ("1.0", "1.3")}, "is too new; pip install 'hydra-core<1.3'"),
    ):
        monkeypatch.setattr(findings, "VERSIONS", wanted)
        found = worst(findings.versions())
        assert found.level is Level.error and said in found.text


def test_the_plugin_that_breaks_hydra(tmp_path: Path) -> None:
    """It is named, and nothing is composed, which would end in a traceback. In a process of its own: Hydra loads it."""
    assert worst(findings.plugins()).level is Level.ok
    plugin = tmp_path / "hydra_plugins" / "hydra_ax_sweeper"
    plugin.mkdir(parents=True)
    (plugin / "__init__.py").write_text("raise ValueError('mutable default')\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "clipscale.cli", "doctor", "--json"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    found = {row["check"]: row for row in json.loads(done.stdout)}
    assert "pip uninstall hydra-ax-sweeper" in found["plugins"]["text"] and "shards" not in found


@contextmanager
def open_files(count: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_limits_of_the_system() -> None:
    config = config_of("global_batch_size=512", "data.workers=2")
    with open_files(4096):
        assert worst(findings.files(config)).level is Level.ok
    with open_files(500):
        found = worst(findings.files(config))
    assert found.level is Level.error and "ulimit -n 65536" in found.text
    assert worst(findings.shared_memory(config)).level is Level.ok
    config.global_batch_size = 10**8
    found = worst(findings.shared_memory(config))
    assert found.level is Level.error and "--shm-size" in found.text


def test_the_disk(tmp_path: Path) -> None:
    config = config_of(f"runs_dir={tmp_path}/not/there/yet")
    assert worst(findings.disk(config, 10**6)).level is not Level.error
    found = worst(findings.disk(config, 10**18))
    assert found.level is Level.error and "checkpoint.keep_last" in found.text
    assert not [*tmp_path.iterdir()], "nothing stays"


class _Clock(BaseHTTPRequestHandler):
    date = "Mon, 01 Jan 2001 00:00:00 GMT"

    def do_HEAD(self) -> None:
        self.send_response_only(403)
        self.send_header("Date", self.date)
        self.end_headers()

    def log_message(self, *arguments: object) -> None: ...


def test_the_storage_and_its_clock() -> None:
    server = HTTPServer(("127.0.0.1", 0), _Clock)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    found = worst(findings.storage_clock(config_of(f"storage.endpoint_url={address}")))
    assert found.level is Level.error and "behind" in found.text and "chronyc" in found.text
    server.shutdown()
    server.server_close()
    found = worst(findings.storage_clock(config_of(f"storage.endpoint_url={address}")))
    assert found.level is Level.warning and "does not answer" in found.text


def test_shards(tmp_path: Path) -> None:
    write_shards(tmp_path, [3, 3])
    given = ["data=shards", f"data.root={tmp_path}", "data.train.shards={00000..00001}.tar"]
    found = [*findings.shards(config_of(*given))]
    assert [one.level for one in found] == [Level.ok] and "2 parts" in found[0].text
    found = [*findings.shards(config_of(*given, "data.val.shards=other.tar"))]
    assert [one.level for one in found] == [Level.ok, Level.error] and "data.val.shards: 1 of 1" in found[1].text


def test_the_tracker_never_breaks_a_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    online = config_of("tracking=online")
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{listening.getsockname()[1]}")
        wandb.teardown()  # it reads its variables once a process
        found = worst(findings.tracker(online))
        assert found.level is Level.warning and "wandb login" in found.text
        monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
        assert worst(findings.tracker(online)).level is Level.ok
    found = worst(findings.tracker(online))
    assert found.level is Level.warning and "goes offline" in found.text
    assert worst(findings.tracker(config_of("tracking=disabled"))).level is Level.ok
    wandb.teardown()


def test_a_check_that_fails_is_a_finding() -> None:
    def a_check() -> Findings:
        raise ValueError("no such thing")

    (found,) = findings.every([a_check])
    assert (found.check, found.level) == ("a check", Level.warning) and "no such thing" in found.text


def test_the_command_ends_as_the_run_would(tmp_path: Path) -> None:
    quiet = ["device=cpu", "tracking=disabled", f"runs_dir={tmp_path}"]
    done = CliRunner().invoke(app, ["doctor", "--json", *quiet])
    found = {row["check"]: row["level"] for row in json.loads(done.stdout)}
    assert done.exit_code == 0 and found.keys() >= {"versions", "plugins", "disk", "devices", "memory", "shards"}
    done = CliRunner().invoke(app, ["doctor", *quiet, "data=shards", "data.train.shards=/nowhere/0.tar"])
    assert done.exit_code == 2 and "/nowhere/0.tar" in done.stdout
    assert "error" in done.stdout and "devices" in done.stdout, "and all else is told as well"
