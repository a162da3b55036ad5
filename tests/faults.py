"""An HTTP server whose answers go wrong on purpose: cut, hang, 503, no length, another version, a slow drip."""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple


class Fault(NamedTuple):
    """``kind`` of what happens to one answer; ``at``: after how many of its bytes."""

    kind: str
    at: int = 0


@dataclass
class FaultServer:
    """Serves the files of a directory; ``plan(request number)`` says what goes wrong with each GET."""

    directory: Path
    plan: Callable[[int], Fault | None] = lambda number: None
    tag: str = "v1"
    requests: list[tuple[str, str]] = field(default_factory=list)
    url: str = ""

    @contextlib.contextmanager
    def running(self, certificate: Path | None = None) -> Iterator[FaultServer]:
        """Serve; over TLS with a ``certificate`` and its key in one PEM file."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        self.url = f"{'https' if certificate else 'http'}://127.0.0.1:{server.server_port}"
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()


def _handler(faults: FaultServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(None, body=False)

        def do_GET(self) -> None:
            number = len(faults.requests)
            faults.requests.append((self.path, self.headers.get("Range", "")))
            self._answer(faults.plan(number), body=True)

        def _answer(self, fault: Fault | None, body: bool) -> None:
            kind = fault.kind if fault else ""
            file = faults.directory / self.path.lstrip("/")
            if not file.is_file() or kind in ("404", "403", "503"):
                return self._empty(int(kind or "404"))
            tag, data = f'"{faults.tag}-{file.name}"', file.read_bytes()
            if kind == "changed":
                tag = '"another"'
            if self.headers.get("If-Match", tag) != tag:
                return self._empty(412)
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            start, stop = 0, len(data)
            if asked:
                start, stop = int(asked[1]), min(int(asked[2] or len(data) - 1) + 1, len(data))
            self.send_response(206 if asked else 200)
            self.send_header("ETag", tag)
            if asked:
                self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
            if kind == "no-length":
                self.send_header("Connection", "close")
                self.close_connection = True
            else:
                self.send_header("Content-Length", str(stop - start))
            self.end_headers()
            if body:
                self._send(data[start:stop], fault)

        def _empty(self, code: int) -> None:
            self.send_response(code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def _send(self, data: bytes, fault: Fault | None) -> None:
            kind, at = fault or Fault("")
            with contextlib.suppress(OSError):
                if kind in ("cut", "reset", "hang"):
                    self.wfile.write(data[:at])
                    self.wfile.flush()
                    if kind == "hang":
                        time.sleep(3)
                    if kind == "reset":
                        linger = b"\x01\x00\x00\x00\x00\x00\x00\x00"
                        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    self.connection.shutdown(socket.SHUT_RDWR)
                    self.close_connection = True
                elif kind == "drip":
                    for start in range(0, len(data), 4096):
                        self.wfile.write(data[start : start + 4096])
                        self.wfile.flush()
                        time.sleep(0.002)
                else:
                    self.wfile.write(data)

    return Handler
