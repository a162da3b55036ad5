"""A Weights & Biases server of a few lines, in a process of its own, so that it can die."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PROJECT = {"id": "p", "name": "clipscale", "entity": {"id": "e", "name": "someone"}}
RUN = {
    "id": "b", "name": "abc", "displayName": "abc", "config": "{}", "historyLineCount": 0, "project": PROJECT,
    "description": None, "sweepName": None,
}  # fmt: skip
ANSWERS = {
    "viewer": {"id": "v", "entity": "someone", "username": "someone", "flags": "{}", "teams": {"edges": []}},
    "serverInfo": {"cliVersionInfo": {"max_cli_version": "9.9.9"}, "latestLocalVersionInfo": None, "features": []},
    "upsertBucket": {"bucket": RUN, "inserted": True}, "model": {"bucket": None}, "project": {"run": None},
    "createRunFiles": {"runID": "b", "uploadHeaders": [], "files": []}, "QueryType": {"fields": []},
    "MutationType": {"fields": []},
}  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        answer = json.dumps({"data": ANSWERS}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_PUT = do_POST


@contextmanager
def tracker() -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Its address, and the process to be killed."""
    process = subprocess.Popen([sys.executable, __file__], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip(), process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    sys.stderr = open("/dev/null", "w")  # noqa: SIM115  one line a request
    server.serve_forever()
