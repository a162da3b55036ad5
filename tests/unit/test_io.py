"""Shards from a server that misbehaves, from commands and from gzip: every byte, or an error."""

from __future__ import annotations

import dataclasses
import datetime
import gzip
import hashlib
import ipaddress
import pickle
import random
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import obstore
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from obstore.store import S3Store

from clipscale.apps.data.index import index
from clipscale.config.data import Storage
from clipscale.data import io as shard_io
from clipscale.data.index import walk
from clipscale.data.io import ShardStore, resolve
from clipscale.data.manifest import ShardFile, expand_shards
from clipscale.data.stream import read_samples
from clipscale.errors import DataError
from tests.faults import Fault, FaultServer
from tests.shards import STORE, write_shards

SAMPLES = 200
FAST = Storage(retries=4, timeout_s=1.0)


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("served"), [SAMPLES])[0]


@pytest.fixture
def server(shard: Path) -> Iterator[FaultServer]:
    with FaultServer(shard.parent).running() as running:
        yield running


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(shard_io.time, "sleep", lambda seconds: None)  # retry at once
    walk.cache_clear()


def keys(location: str, store: ShardStore, start: int = 0, stop: int = SAMPLES) -> list[str]:
    return [sample.key.rpartition("/")[2] for sample in read_samples(ShardFile(store, location), start, stop)]


def expected(start: int = 0, stop: int = SAMPLES) -> list[str]:
    return [f"{number:06d}" for number in range(start, stop)]


def test_a_server_that_behaves(server: FaultServer, shard: Path) -> None:
    url = f"{server.url}/{shard.name}"
    assert keys(url, ShardStore(FAST)) == expected()
    assert keys(url, pickle.loads(pickle.dumps(ShardStore(FAST))), 150, 160) == expected(150, 160)
    ranges = [asked for _, asked in server.requests]
    assert all(ranges), "only ranges are asked for"


def test_reading_a_stretch_asks_for_little_more(server: FaultServer, shard: Path) -> None:
    store, url = ShardStore(FAST, burst=1 << 15), f"{server.url}/{shard.name}"
    offsets = ShardFile(store, url).index.offsets
    server.requests.clear()
    keys(url, store, 100, 120)
    asked = [tuple(map(int, text.removeprefix("bytes=").split("-"))) for _, text in server.requests]
    assert max(last for _, last in asked) <= offsets[120] + shard_io.FIRST_BURST
    assert sum(last - first for first, last in asked) <= offsets[120] - offsets[100] + 2 * shard_io.FIRST_BURST


RECOVERABLE = {
    "cut": Fault("cut", 5000),
    "cut at a file boundary": Fault("cut", 4096),
    "cut at once": Fault("cut", 0),
    "reset": Fault("reset", 7000),
    "503": Fault("503"),
    "hang": Fault("hang", 3000),
    "drip": Fault("drip"),
}


@pytest.mark.parametrize("name", RECOVERABLE)
def test_a_recoverable_fault_costs_no_sample(server: FaultServer, shard: Path, name: str) -> None:
    server.plan = lambda number: RECOVERABLE[name] if number in (0, 2, 3) else None
    assert keys(f"{server.url}/{shard.name}", ShardStore(FAST)) == expected()


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (lambda number: Fault("503"), "could not be read in 5 tries"),
        (lambda number: Fault("cut", 0), "could not be read in 5 tries"),
        (lambda number: Fault("no-length"), "does not say how long its answers are"),
        (lambda number: Fault("403"), "access was refused"),
        (lambda number: Fault("404"), "does not exist"),
        (lambda number: Fault("changed") if number > 1 else None, "changed since its samples were counted"),
    ],
)
def test_an_unrecoverable_fault_is_an_error(
    server: FaultServer, shard: Path, plan: Callable[[int], Fault | None], message: str
) -> None:
    server.plan = plan
    with pytest.raises(DataError, match=message):
        keys(f"{server.url}/{shard.name}", ShardStore(FAST, burst=1 << 15))


def test_another_version_is_never_mixed_in(server: FaultServer, shard: Path) -> None:
    store, url = ShardStore(FAST, burst=1 << 15), f"{server.url}/{shard.name}"
    assert len(keys(url, store, 0, 20)) == 20
    server.tag = "v2"
    with pytest.raises(DataError, match="changed since its samples were counted"):
        keys(url, store, 20, 40)


def random_schedule(seed: int) -> Callable[[int], Fault | None]:
    def plan(number: int) -> Fault | None:
        draw = random.Random(seed * 1000 + number)
        if draw.random() < 0.5:
            return None
        kind = draw.choice(["cut", "cut", "reset", "503", "drip"])
        return Fault(kind, draw.randrange(0, 60_000))

    return plan


def run_schedules(server: FaultServer, shard: Path, seeds: range) -> dict[str, int]:
    """Read the shard under a random schedule of faults per seed: all samples, or an error; never fewer."""
    outcomes = {"whole": 0, "error": 0}
    for seed in seeds:
        walk.cache_clear()
        server.plan, server.tag = random_schedule(seed), f"v{seed}"
        burst = random.Random(seed).choice([1 << 15, 1 << 17, 1 << 20])
        try:
            found = keys(f"{server.url}/{shard.name}", ShardStore(FAST, burst))
        except DataError:
            outcomes["error"] += 1
        else:
            assert found == expected(), f"schedule {seed} lost samples silently"
            outcomes["whole"] += 1
    return outcomes


def test_random_faults_are_never_silent(server: FaultServer, shard: Path) -> None:
    outcomes = run_schedules(server, shard, range(12))
    assert outcomes["whole"] >= 8


@pytest.mark.slow
def test_many_random_faults_are_never_silent(server: FaultServer, shard: Path) -> None:
    print(run_schedules(server, shard, range(100, 320)))


def test_gzip_is_undone(tmp_path: Path, shard: Path, server: FaultServer) -> None:
    zipped = shard.with_name("zipped.tar.gz")
    zipped.write_bytes(gzip.compress(shard.read_bytes(), 1))
    assert keys(str(zipped), STORE) == expected()
    assert keys(str(zipped), STORE, 190, 195) == expected(190, 195)
    assert keys(f"{server.url}/{zipped.name}", ShardStore(FAST)) == expected()
    cut = tmp_path / "cut.tar.gz"
    cut.write_bytes(zipped.read_bytes()[: zipped.stat().st_size // 2])
    index = ShardFile(STORE, str(cut)).index
    assert 0 < index.samples < SAMPLES and "unreadable after" in index.damage
    assert keys(str(cut), STORE, 0, index.samples) == expected(0, index.samples)


def test_commands(shard: Path) -> None:
    assert keys(f"pipe:cat {shard}", STORE) == expected()
    assert keys(f"pipe:cat {shard}", STORE, 50, 60) == expected(50, 60)
    with pytest.raises(DataError, match="ended with code 3 after 5,000 bytes"):
        keys(f"pipe:head -c 5000 {shard}; exit 3", STORE)


def test_a_local_shard_that_changes_is_an_error(tmp_path: Path) -> None:
    path = write_shards(tmp_path, [10])[0]
    assert len(keys(str(path), STORE, 0, 10)) == 10
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(DataError, match="changed since its samples were counted"):
        keys(str(path), STORE, 0, 10)


def test_names_and_roots() -> None:
    assert resolve("a.tar", "/data") == "/data/a.tar"
    assert resolve("/x/a.tar", "/data") == "/x/a.tar"
    assert resolve("a.tar", None) == "a.tar"
    assert resolve("a.tar", "s3://bucket/pairs/") == "s3://bucket/pairs/a.tar"
    assert resolve("https://host/a.tar", "/data") == "https://host/a.tar"
    assert ShardFile(STORE, "s3://bucket/pairs/2.tar").name == "2.tar"


@pytest.fixture(scope="module")
def bucket(shard: Path) -> Iterator[str]:
    """The address of an S3 server whose bucket ``pairs`` holds the shard."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    urllib.request.urlopen(urllib.request.Request(f"{address}/pairs", b"", method="PUT")).read()
    client = {"allow_http": True}
    place = S3Store("pairs", endpoint=address, region="us-east-1", skip_signature=True, client_options=client)
    obstore.put(place, f"set/{shard.name}", shard.read_bytes())
    yield address
    server.stop()


def test_an_s3_server(bucket: str, shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a secret")
    settings = Storage(endpoint_url=bucket, region="us-east-1", allow_http=True, retries=2, timeout_s=5.0)
    url = f"s3://pairs/set/{shard.name}"
    assert keys(url, ShardStore(settings)) == expected()
    assert keys(url, ShardStore(settings), 30, 40) == expected(30, 40)
    with pytest.raises(DataError, match=r"s3://pairs/set/none\.tar does not exist"):
        keys("s3://pairs/set/none.tar", ShardStore(settings))


def test_an_s3_server_takes_an_index(bucket: str, shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a secret")
    storage = [f"storage.endpoint_url={bucket}", "storage.region=us-east-1", "storage.allow_http=true"]
    index(f"s3://pairs/set/{shard.name}", storage, jobs=1)
    settings = Storage(endpoint_url=bucket, region="us-east-1", allow_http=True, retries=2, timeout_s=5.0)
    (file,) = expand_shards(shard.name, "s3://pairs/set", "k", ShardStore(settings))
    assert file.declared is not None and file.summary.samples == SAMPLES
    assert file.declared.sha256 == hashlib.sha256(shard.read_bytes()).hexdigest()
    assert [one.key.rpartition("/")[2] for one in read_samples(file, 20, 30)] == expected(20, 30)


def test_a_local_cache(server: FaultServer, shard: Path, tmp_path: Path) -> None:
    settings = dataclasses.replace(FAST, cache_dir=str(tmp_path / "kept"), cache_gib=0.01)
    url, store = f"{server.url}/{shard.name}", ShardStore(settings)
    server.plan = lambda number: RECOVERABLE["cut"] if number % 3 == 1 else None
    assert keys(url, store) == expected()
    before = len(server.requests)
    assert keys(url, store, 20, 60) == expected(20, 60) and keys(url, ShardStore(settings)) == expected()
    assert len(server.requests) == before
    server.tag = "v2"
    walk.cache_clear()
    assert keys(url, ShardStore(settings)) == expected() and len(server.requests) > before, "another version"


def test_a_server_with_a_certificate_of_our_own(shard: Path, tmp_path: Path) -> None:
    authority, certificate = _authority(tmp_path)
    with FaultServer(shard.parent).running(certificate) as server:
        url = f"{server.url}/{shard.name}"
        trusted = dataclasses.replace(FAST, ca_bundle=str(authority))
        assert keys(url, ShardStore(trusted)) == expected()
        with pytest.raises(DataError, match="could not be read in"):
            keys(url, ShardStore(FAST))
        with pytest.raises(DataError, match=r"storage\.ca_bundle=.*nowhere.pem cannot be read"):
            keys(url, ShardStore(dataclasses.replace(FAST, ca_bundle=str(tmp_path / "nowhere.pem"))))


def _authority(directory: Path) -> tuple[Path, Path]:
    """A certificate authority, and a key with its certificate for the loopback address."""
    keys_of = {name: ec.generate_private_key(ec.SECP256R1()) for name in ("authority", "server")}
    now, address = datetime.datetime.now(datetime.UTC), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))

    def certificate(name: str) -> bytes:
        subject, issuer = (x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, n)]) for n in (name, "authority"))
        is_ca = x509.BasicConstraints(ca=name == "authority", path_length=None)
        return (
            x509.CertificateBuilder(issuer, subject, keys_of[name].public_key(), x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.SubjectAlternativeName([address]), critical=False)
            .add_extension(is_ca, critical=True)
            .sign(keys_of["authority"], hashes.SHA256())
            .public_bytes(serialization.Encoding.PEM)
        )

    private = keys_of["server"].private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    authority, server = directory / "authority.pem", directory / "server.pem"
    authority.write_bytes(certificate("authority"))
    server.write_bytes(certificate("server") + private)
    return authority, server
