"""The search page's server: what it answers, what it refuses, and that nothing sent to it ends or opens it."""

from __future__ import annotations

import http.client
import io
import json
import os
import re
import signal
import socket
import struct
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image

import clipscale
from clipscale.apps.search import connection
from clipscale.apps.search import server as module
from clipscale.apps.search.embed import Wanted, embed
from clipscale.apps.search.index import SearchIndex
from clipscale.apps.search.query import serve
from clipscale.apps.search.server import PAGE, UPLOAD_BYTES, listen, make_app, make_server
from clipscale.errors import ConfigError
from tests.shards import jpeg, sample, write_shards
from tests.unit.test_export import SMALL_TEXT, make_run

COUNT = 40
JSON = {"Content-Type": "application/json"}


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Site(NamedTuple):
    """A server that runs in a thread, its index, and the model that made it."""

    port: int
    index: SearchIndex
    run: Path

    def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
        """A request whose path is sent as it stands."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = json.dumps(body).encode() if isinstance(body, dict | list) else body
        sent = {"Host": f"localhost:{self.port}"} | (JSON if isinstance(body, dict | list) else {}) | (headers or {})
        connection.putrequest(method, path, skip_host=True)
        for name, value in ({"Content-Length": str(len(data or b""))} | sent).items():
            connection.putheader(name, value)
        connection.endheaders(data)
        response = connection.getresponse()
        found = Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        connection.close()
        return found

    def search(self, **body: Any) -> Answer:
        return self.ask("POST", "/search", body)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    root = tmp_path_factory.mktemp("site")
    run = make_run(root, "model=tiny", "model.vision.layers=1", *SMALL_TEXT)
    write_shards(
        root / "shards", [25, 15], {7: {"jpg": jpeg(7), "txt": "<b>ün\ud800safe</b>".encode(errors="replace")}}
    )
    embed(Wanted(str(run), f"{root}/shards/{{00000..00001}}.tar"), root / "index", jobs=1)
    index = SearchIndex(root / "index")
    there = listen("127.0.0.1", 0)
    running = make_server(make_app(index, ["search.example"]))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [there]})
    thread.start()
    yield Site(there.getsockname()[1], index, run)
    running.should_exit = True
    thread.join()


def png(width: int, height: int) -> bytes:
    """A small file that says it is a picture of any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


def test_the_page_needs_nothing_from_elsewhere(site: Site) -> None:
    for path, kind in (("/", "text/html"), ("/page.js", "text/javascript"), ("/page.css", "text/css")):
        answer = site.ask("GET", path)
        assert answer.status == 200 and answer.headers["content-type"].startswith(kind)
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert not re.search(rb"(https?:)?//[a-z]", answer.body.replace(b"// ", b"")), "a resource from elsewhere"
        assert not re.search(rb"\son[a-z]+=|style=\"|innerHTML|eval\(", answer.body), "what the policy would block"
    assert {path.name for path in PAGE.iterdir()} == {"index.html", "page.js", "page.css", "icon.svg"}
    about = site.ask("GET", "/about").json
    assert about["images"] == COUNT and about["exact"] and about["folders"] == ["00000.tar", "00001.tar"]
    api = site.ask("GET", "/openapi.json").json
    assert {"/search", "/embed", "/about", "/images/{number}"} == set(api["paths"])
    fields = api["paths"]["/search"]["post"]["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert {"text", "like", "k", "min_score", "words", "folder"} == set(fields)


def test_a_text_finds_what_the_index_finds(site: Site) -> None:
    found = site.search(text="a red thing", k=7).json["results"]
    expected = site.index.search(site.index.towers.encode_texts(["a red thing"])[0], 7)
    assert [(one["number"], one["key"]) for one in found] == [(hit.number, hit.row.key) for hit in expected]
    assert [one["score"] for one in found] == pytest.approx([hit.score for hit in expected], abs=1e-5)
    shard = site.search(text="a red thing", k=100, folder="00001.tar/").json["results"]
    assert len(shard) == 15 and all(one["key"].startswith("00001.tar/") for one in shard)
    worded = site.search(text="a red thing", k=100, words="GREEN red").json["results"]
    assert worded and all({"green", "red"} <= set(one["caption"].split()) for one in worded)
    least = found[3]["score"]
    assert len(site.search(text="a red thing", min_score=least - 1e-5).json["results"]) == 4
    assert site.search(text="a red thing", min_score=1).json["results"] == []


def test_an_image_finds_its_like(site: Site) -> None:
    found = site.ask("POST", "/search?k=3", sample(30)["jpg"], {"Content-Type": "image/jpeg"}).json["results"]
    assert found[0]["number"] == 30 and found[0]["score"] > 0.999 and len(found) == 3
    like = site.search(like=30, k=2).json["results"]
    assert [one["number"] for one in like] == [one["number"] for one in found[1:]], "but for itself"


def test_embeddings_are_the_models(site: Site, tmp_path: Path) -> None:
    model, preprocess, tokenizer = clipscale.load(site.run)
    texts = ["a red thing", "  two  "]
    told = site.ask("POST", "/embed", {"texts": texts}).json
    (picture := tmp_path / "p.jpg").write_bytes(jpeg(3))
    image = site.ask("POST", "/embed", jpeg(3), {"Content-Type": "application/octet-stream"}).json
    with torch.no_grad():
        text = model.encode_text(tokenizer([text.strip() for text in texts]), normalize=True)
        pixels = model.encode_image(preprocess(Image.open(picture))[None], normalize=True)
    torch.testing.assert_close(torch.tensor(told["embeddings"]), text, atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.tensor(image["embeddings"]), pixels, atol=1e-5, rtol=0)
    assert told["dim"] == image["dim"] == text.shape[1]


def test_images_come_as_they_are_in_the_source(site: Site) -> None:
    for size in ("", "?size=large"):
        answer = site.ask("GET", f"/images/11{size}")
        assert answer.status == 200 and answer.headers["content-type"] == "image/webp"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert Image.open(io.BytesIO(answer.body)).size == (16, 16)


@pytest.mark.parametrize(
    "path",
    [
        "/images/../../../../etc/passwd", "/images/..%2f..%2f..%2fetc%2fpasswd", "/../vectors.json", "/images/%00",
        "/page.js/../../../index.py", "/%2e%2e/server.py", "//etc/passwd", "/images/-1", "/images/40", "/images/1.5",
        "/images/1e1", "/images/9999999999999999999999", "/images/1?size=huge", "/vectors.json", "/parts/", "/docs",
        "/images/1/../../page.css/x", "/static/page.js", "/images/\\..\\..\\x", "/images/file:///etc/passwd",
    ],
)  # fmt: skip
def test_no_path_leads_out(site: Site, path: str) -> None:
    answer = site.ask("GET", path)
    assert answer.status in (404, 422) and answer.json.keys() == {"error"}
    assert b"root:" not in answer.body and b"weights" not in answer.body


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("localhost", True), ("LOCALHOST:8000", True), ("127.0.0.1:8000", True), ("[::1]:8000", True), ("[::1]", True),
        ("192.168.0.7", True), ("search.example:80", True), ("evil.example", False), ("localhost.evil.example", False),
        ("127.0.0.1.evil.example:8000", False), ("", False), ("evil.example:localhost", False), ("0x7f000001.a", False),
        ("localhost@evil.example", False), ("evil.example/localhost", False), ("search.example.", False),
    ],
)  # fmt: skip
def test_only_known_names_are_answered(site: Site, host: str, allowed: bool) -> None:
    """Another site whose name is made to lead to this address sends its own name."""
    for path in ("/", "/about", "/images/1"):
        answer = site.ask("GET", path, headers={"Host": host})
        assert (answer.status == 200) is allowed and (allowed or answer.status == 421)


def test_other_sites_may_not_ask(site: Site) -> None:
    for there in ("cross-site", "same-site"):
        asked = site.ask("GET", "/images/1", headers={"Sec-Fetch-Site": there, "Sec-Fetch-Mode": "no-cors"})
        assert asked.status == 403
        followed = site.ask("GET", "/", headers={"Sec-Fetch-Site": there, "Sec-Fetch-Mode": "navigate"})
        assert followed.status == 200, "a link to here"
    assert "access-control-allow-origin" not in site.ask("GET", "/about", headers={"Origin": "http://evil"}).headers


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{", 400, "this is not JSON"),
        (b"", 400, "this is not JSON"),
        (b"\xff\xfe", 400, "this is not JSON"),
        (b"[1]", 400, "the JSON must be an object"),
        (b"[" * 100_000, 400, "this is not JSON"),
        (b'{"text": "a", "min_score": NaN}', 400, "NaN is no number of JSON"),
        (b'{"text": "a", "min_score": Infinity}', 400, "Infinity is no number"),
        (b'{"text": "a", "min_score": 1e999}', 422, "min_score"),
        (b'{"text": "a", "min_score": "x"}', 422, "min_score"),
        (b'{"text": "a", "k": 0}', 422, "k: "),
        (b'{"text": "a", "k": 100000000}', 422, "k: "),
        (b'{"text": "a", "k": 2.5}', 422, "k: "),
        (b'{"text": "a", "kk": 2}', 422, "kk: "),
        (b'{"text": 5}', 422, "text: "),
        (b'{"text": "   "}', 422, "the query is empty"),
        (b'{"text": "\\ud800"}', 422, "text: "),
        (b"{}", 422, "either text or like"),
        (b'{"text": "a", "like": 1}', 422, "either text or like"),
        (b'{"like": 40}', 404, "there is no image 40; there are 40"),
        (b'{"like": -1}', 422, "like: "),
        (b'{"like": 1e30}', 422, "like: "),
        (b'{"text": "%s"}' % (b"a" * 2001), 422, "text: "),
        (b'{"text": "%s"}' % (b"a" * (1 << 20)), 413, "more than 1 MB"),
    ],
)
def test_bad_requests_are_told_in_one_line(site: Site, body: bytes, status: int, message: str) -> None:
    answer = site.ask("POST", "/search", body, JSON)
    assert answer.status == status and message in answer.json["error"] and "\n" not in answer.json["error"]


@pytest.mark.parametrize(
    ("body", "kind", "status", "message"),
    [
        (b"", "image/png", 422, "the file is empty"),
        (b"no image", "image/png", 422, "no image that can be read"),
        (jpeg(1)[:200], "image/jpeg", 422, "no image that can be read"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml", 422, "no image that can be read"),
        (png(60_000, 60_000), "image/png", 422, "more than 50 million pixels"),
        (png(100_000_000, 1), "image/png", 422, "more than 50 million pixels"),
        (jpeg(1), "text/html", 415, "application/json"),
        (jpeg(1), "multipart/form-data; boundary=x", 415, "application/json"),
    ],
)
def test_bad_uploads_are_told_in_one_line(site: Site, body: bytes, kind: str, status: int, message: str) -> None:
    for path in ("/search", "/embed"):
        answer = site.ask("POST", path, body, {"Content-Type": kind})
        assert answer.status == status and message in answer.json["error"]


def test_what_is_too_large_is_not_read(site: Site) -> None:
    for told in (str(UPLOAD_BYTES + 1), "1000000000000", "-5", "x"):
        headers = {"Content-Type": "image/png", "Content-Length": told}
        answer = site.ask("POST", "/search", b"", headers)
        assert answer.status in (400, 413), "before a byte of it was sent"
    connection = http.client.HTTPConnection("127.0.0.1", site.port, timeout=60)
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while sent < 10 * UPLOAD_BYTES:
            sent += 1 << 20
            yield bytes(1 << 20)

    headers = {"Content-Type": "image/png", "Host": "localhost", "Transfer-Encoding": "chunked"}
    try:
        connection.request("POST", "/embed", endless(), headers, encode_chunked=True)
    except OSError:  # it stopped listening
        pass
    else:
        assert sent < 10 * UPLOAD_BYTES, "all of it was read"
    assert site.search(text="still there").status == 200


def slow(site: Site, *parts: bytes, pause: float) -> bytes:
    """All that comes back when parts are sent with pauses between them, and then nothing."""
    with socket.create_connection(("127.0.0.1", site.port), timeout=30) as there:
        with suppress(OSError):  # it may be closed before all is sent
            for part in parts:
                there.sendall(part)
                time.sleep(pause)
        found = b""
        with suppress(ConnectionResetError):
            while part := there.recv(1 << 16):
                found += part
        return found


UPLOAD = b"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nContent-Length: 500\r\n"


def test_a_body_that_does_not_come_is_not_waited_for(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STALLED_S", 0.5)
    monkeypatch.setattr(module, "BODY_S", 2.0)
    for parts in ([UPLOAD + b"\r\n", b"a"], [UPLOAD + b"\r\n", *[b"a"] * 100]):  # it stalls; it comes drop by drop
        head, _, body = slow(site, *parts, pause=0.1).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408") and b"connection: close" in head
        assert json.loads(body)["error"].startswith("the rest of the request did not come: 0.5 s without a byte")
    assert site.search(text="still there").status == 200


@pytest.mark.parametrize("length", [500, UPLOAD_BYTES + 1])
def test_a_sender_that_goes_away_leaves_no_trace(site: Site, length: int, caplog: pytest.LogCaptureFixture) -> None:
    head = UPLOAD.replace(b"500", b"%d" % length)
    with socket.create_connection(("127.0.0.1", site.port)) as there:
        there.sendall(head + b"\r\nabc")
        time.sleep(0.2)
    time.sleep(0.3)
    assert site.search(text="still there").status == 200
    assert not caplog.records


def test_headers_that_do_not_come_are_not_waited_for(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEADERS_S", 0.5)
    assert slow(site, pause=0) == b"", "a connection that never asks"
    assert slow(site, UPLOAD, pause=0) == b""
    began = time.monotonic()
    assert slow(site, *[b"GET"] * 1000, pause=0.01) == b"" and time.monotonic() - began < 8
    again = slow(site, b"GET /about HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET /", pause=0.3)
    assert again.startswith(b"HTTP/1.1 200") and again.count(b"HTTP/1.1") == 1


def test_an_answer_that_is_not_taken_is_dropped(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "TAKEN_S", 0.5)
    ask = b"GET /page.js HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with socket.create_connection(("127.0.0.1", site.port), timeout=30) as there:
        there.settimeout(5)
        with pytest.raises(ConnectionError):
            for _ in range(100_000):
                there.sendall(ask)
    assert site.search(text="still there").status == 200


def test_too_many_at_once_are_told_so(site: Site) -> None:
    crowd = [socket.create_connection(("127.0.0.1", site.port)) for _ in range(module.MOST_CONNECTIONS)]
    try:
        assert site.ask("GET", "/about").status == 503
    finally:
        for one in crowd:
            one.close()
    deadline = time.monotonic() + 20
    while site.ask("GET", "/about").status == 503 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert site.search(text="still there").status == 200


@pytest.mark.parametrize("query", ["min_score=nan", "k=-1", "k=x", "unknown=1", "min_score=-inf"])
def test_options_of_an_upload_are_checked(site: Site, query: str) -> None:
    answer = site.ask("POST", f"/search?{query}", jpeg(1), {"Content-Type": "image/jpeg"})
    assert answer.status == 422 and query.partition("=")[0] in answer.json["error"]


def test_captions_are_text(site: Site) -> None:
    found = site.search(text="a", words="<b>").json["results"]
    assert [one["caption"] for one in found] == ["<b>ün?safe</b>"]
    assert site.ask("GET", "/search").status == 405
    assert site.ask("POST", "/embed", {"texts": []}).status == 422
    assert site.ask("POST", "/embed", {"texts": ["a"] * 65}).status == 422
    assert "empty" in site.ask("POST", "/embed", {"texts": ["a", " "]}).json["error"]


def test_an_address_that_is_taken_is_one_line(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=rf"127.0.0.1:{site.port} cannot be listened at .* choose another --port"):
        listen("127.0.0.1", site.port)
    with pytest.raises(ConfigError, match="cannot be listened at"):
        listen("no such host", 1)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.delitem(sys.modules, module.__name__)
    monkeypatch.delattr("clipscale.apps.search.server")
    with pytest.raises(ConfigError, match=r"search serve needs fastapi: pip install 'clipscale\[search\]'"):
        serve(site.index.vectors.directory, "127.0.0.1", 0, [], None, "cpu")


def test_ctrl_c_ends_it_with_one_line(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    with listen("127.0.0.1", 0) as free:
        there = Site(free.getsockname()[1], site.index, site.run)
    answers = []

    def press() -> None:
        deadline = time.monotonic() + 60
        while not answers and time.monotonic() < deadline:
            with suppress(ConnectionRefusedError):
                answers.append(there.ask("GET", "/about").json)
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    hand = threading.Thread(target=press)
    hand.start()
    serve(site.index.vectors.directory, "0.0.0.0", there.port, [], None, "cpu")
    hand.join()
    out, err = capsys.readouterr()
    assert answers[0]["images"] == COUNT
    assert out == f"40 images at http://0.0.0.0:{there.port}/ (Ctrl-C ends it)\nended\n"
    assert err.startswith("warning: whoever reaches 0.0.0.0 can search") and err.count("\n") == 1
