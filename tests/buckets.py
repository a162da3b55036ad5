"""An S3 server of our own, and a bucket in it."""

from __future__ import annotations

import os
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from clipscale.config.data import Storage

BUCKET = "models"
KEYS = {"AWS_ACCESS_KEY_ID": "somebody", "AWS_SECRET_ACCESS_KEY": "a secret"}


@contextmanager
def s3_server() -> Iterator[str]:
    """The address of a server whose bucket ``models`` is empty; anybody's credentials do."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    urllib.request.urlopen(urllib.request.Request(f"{address}/{BUCKET}", b"", method="PUT")).read()
    yield address
    server.stop()


def sign_in() -> None:
    """Give this process credentials."""
    os.environ |= KEYS


def storage(address: str) -> Storage:
    """How the server is reached."""
    return Storage(endpoint_url=address, region="us-east-1", allow_http=True, retries=2, timeout_s=10.0)


def overrides(address: str) -> list[str]:
    """The same for a command."""
    return [f"storage.endpoint_url={address}", "storage.region=us-east-1", "storage.allow_http=true"]
