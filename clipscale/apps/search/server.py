"""The search page and the JSON under it: what a request may be, and what it gets."""

from __future__ import annotations

import asyncio
import io
import ipaddress
import json
import socket
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import torch
import uvicorn
from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from clipscale.apps.search.connection import Connection
from clipscale.apps.search.index import Filter, Hit, SearchIndex, to_picture
from clipscale.data.samples import BadSample
from clipscale.errors import ClipscaleError, ConfigError

PAGE = Path(__file__).parent / "page"
MOST_RESULTS, MOST_LETTERS, MOST_TEXTS = 200, 2000, 64
JSON_BYTES = 1 << 20
UPLOAD_BYTES = 20 << 20
UPLOAD_PIXELS = 50_000_000
STALLED_S, BODY_S = 10.0, 120.0  # longest wait for more of a body, and for all of it
MOST_CONNECTIONS, KEPT_OPEN_S = 100, 5  # at a time; how long one is kept after an answer
DRAINED, LINGER_S = 64 << 20, 1.0  # bytes, and for how long, that are still taken of what is refused
THUMBNAIL, WHOLE = 320, 1280  # longer sides in pixels
KEPT = 2000  # thumbnails that are kept, some 30 MB
HEADERS = {
    # Nothing is fetched from elsewhere, nothing runs but the page's own script, and no other site may show this one.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


class Options(BaseModel):
    """What may be asked of a search beside the query itself."""

    model_config = ConfigDict(extra="forbid")

    k: int = Field(24, ge=1, le=MOST_RESULTS, description="Most results.")
    min_score: float = Field(-1.0, ge=-1, le=1, allow_inf_nan=False, description="Lowest cosine.")
    words: str = Field("", max_length=MOST_LETTERS, description="Words that a caption must have, all of them.")
    folder: str = Field("", max_length=MOST_LETTERS, description="What a key must begin with.")


class SearchBody(Options):
    """A search by a text, or by an image of the index."""

    text: str | None = Field(None, max_length=MOST_LETTERS, description="What to look for.")
    like: int | None = Field(None, ge=0, description="The number of an image, as in a result.")


class EmbedBody(BaseModel):
    """Texts to be embedded."""

    model_config = ConfigDict(extra="forbid")

    texts: list[Annotated[str, Field(max_length=MOST_LETTERS)]] = Field(min_length=1, max_length=MOST_TEXTS)


class Service:
    """Answers requests about one index, one at a time: a search uses all cores."""

    def __init__(self, index: SearchIndex) -> None:
        self.index = index
        self._turn = asyncio.Lock()
        self._thumbnail = lru_cache(KEPT)(self._draw)

    async def search(self, body: SearchBody) -> dict[str, Any]:
        """Results for a text, or for an image of the index."""
        if (body.text is None) == (body.like is None):
            raise HTTPException(422, "give either text or like")
        if body.text is not None:
            return await self._found(self._text(body.text), body, exclude=None)
        number = self._known(body.like)
        return await self._found(lambda: self._like(number), body, exclude=number)

    async def search_image(self, data: bytes, options: Options) -> dict[str, Any]:
        """Results for an uploaded image."""
        return await self._found(lambda: self._uploaded(data), options, exclude=None)

    async def embed(self, make: Callable[[], torch.Tensor]) -> dict[str, Any]:
        """Embeddings, normalised."""
        vectors = await self._alone(make)
        return {"dim": vectors.shape[1], "embeddings": vectors.tolist()}

    async def picture(self, number: int, side: int) -> bytes:
        """An image of the index as a file that any browser shows, its longer side at most ``side``."""
        self._known(number)
        draw = self._thumbnail if side == THUMBNAIL else self._draw
        return await self._alone(lambda: draw(number, side))

    def texts(self, texts: Sequence[str]) -> Callable[[], torch.Tensor]:
        """How texts are embedded."""
        if not all(text.strip() for text in texts):
            raise HTTPException(422, "a text is empty")
        return lambda: self.index.towers.encode_texts([text.strip() for text in texts])

    def image(self, data: bytes) -> Callable[[], torch.Tensor]:
        """How an image is embedded."""
        return lambda: self._uploaded(data)[None]

    def _text(self, text: str) -> Callable[[], torch.Tensor]:
        if not text.strip():
            raise HTTPException(422, "the query is empty: say what to look for")
        encode = self.texts([text])
        return lambda: encode()[0]

    def _like(self, number: int) -> torch.Tensor:
        return torch.from_numpy(self.index.vectors.vector(number))

    def _known(self, number: int | None) -> int:
        if number is None or not 0 <= number < len(self.index.vectors):
            raise HTTPException(404, f"there is no image {number}; there are {len(self.index.vectors)}")
        return number

    def _uploaded(self, data: bytes) -> torch.Tensor:
        towers = self.index.towers
        try:
            return towers.encode_images(towers.crop(data, UPLOAD_PIXELS)[None])[0]
        except BadSample as error:
            raise HTTPException(422, _REASONS.get(str(error), str(error))) from None

    async def _found(self, query: Callable[[], torch.Tensor], only: Options, exclude: int | None) -> dict[str, Any]:
        filter_ = Filter(only.min_score, only.words, only.folder)
        more = only.k + (exclude is not None)
        hits = await self._alone(lambda: self.index.search(query(), more, filter_))
        return {"results": [_told(hit) for hit in hits if hit.number != exclude][: only.k]}

    def _draw(self, number: int, side: int) -> bytes:
        out = io.BytesIO()
        to_picture(self.index.image(number), side).save(out, "WEBP", quality=85)
        return out.getvalue()

    async def _alone(self, work: Callable[[], Any]) -> Any:
        async with self._turn:
            return await run_in_threadpool(work)


_REASONS = {
    "undecodable_image": "this file is no image that can be read; use JPEG, PNG, WebP or GIF",
    "empty_image": "the file is empty",
    "too_many_pixels": f"this image has more than {UPLOAD_PIXELS // 1_000_000} million pixels",
}


def make_app(index: SearchIndex, names: Sequence[str] = ()) -> FastAPI:
    """The application; ``names`` are host names by which it may be called, beside localhost and addresses."""
    app = FastAPI(title="clipscale search", docs_url=None, redoc_url=None, openapi_url="/openapi.json")
    service = Service(index)
    _guard(app, {"localhost", *(name.lower() for name in names)})
    _add_pages(app, service)
    _add_api(app, service)
    return app


def _guard(app: FastAPI, names: set[str]) -> None:
    @app.middleware("http")
    async def guard(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
        host = request.headers.get("host", "")
        if not _may_call(host, names):
            # A site elsewhere whose name was made to lead here must not read what is here.
            response: Response = _refusal(421, f"this server is not called {host[:100]!r}; see --allow-host")
        elif _is_elsewhere(request):
            response = _refusal(403, "other sites may not ask this server")
        else:
            response = await answer(request)
        response.headers.update(HEADERS)
        return response

    async def failed(_: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            response = _refusal(error.status_code, str(error.detail))
            response.headers.update(error.headers or {})
            return response
        if isinstance(error, RequestValidationError | ValidationError):
            return _refusal(422, _first_of(error.errors()))
        return _refusal(500, str(error))

    for kind in (HTTPException, RequestValidationError, ValidationError, ClipscaleError):
        app.add_exception_handler(kind, failed)


def _may_call(host: str, names: set[str]) -> bool:
    name = host.lower().rpartition(":")[0] if ":" in host and not host.endswith("]") else host.lower()
    if name in names:
        return True
    try:  # an address is nobody's name, so that nobody can make it lead elsewhere
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True


def _is_elsewhere(request: Request) -> bool:
    """Whether a page of another site makes its visitor's browser ask; a link to here may be followed."""
    asked = request.headers
    follows = request.method == "GET" and asked.get("sec-fetch-mode") == "navigate"
    return asked.get("sec-fetch-site", "none") not in ("none", "same-origin") and not follows


def _refusal(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": message}, status)


def _first_of(errors: Sequence[Any]) -> str:
    where = ".".join(str(part) for part in errors[0]["loc"] if part not in ("body", "query"))
    return f"{where}: {errors[0]['msg']}" if where else str(errors[0]["msg"])


def _told(hit: Hit) -> dict[str, Any]:
    row = {name: _plain(getattr(hit.row, name)) for name in ("key", "caption")}  # where files lie is nobody's business
    return {"number": hit.number, "score": round(hit.score, 6), **row}


def _plain(text: str) -> str:
    return text.encode(errors="replace").decode()


def _add_pages(app: FastAPI, service: Service) -> None:
    def serve(path: str, file: str, kind: str) -> None:
        content = (PAGE / file).read_bytes()

        @app.get(path, include_in_schema=False)
        async def page() -> Response:
            return Response(content, media_type=kind, headers={"Cache-Control": "no-cache"})

    serve("/", "index.html", "text/html; charset=utf-8")
    serve("/page.css", "page.css", "text/css; charset=utf-8")
    serve("/page.js", "page.js", "text/javascript; charset=utf-8")
    serve("/favicon.ico", "icon.svg", "image/svg+xml")

    @app.get("/images/{number}", responses={200: {"content": {"image/webp": {}}}}, response_class=Response)
    async def image(number: int, size: Annotated[str, Query(pattern="^(small|large)$")] = "small") -> Response:
        """An image by its number in the results; `small` or `large`."""
        data = await service.picture(number, THUMBNAIL if size == "small" else WHOLE)
        return Response(data, media_type="image/webp", headers={"Cache-Control": "private, max-age=3600"})


def _add_api(app: FastAPI, service: Service) -> None:
    vectors = service.index.vectors
    folders = service.index.folders()

    @app.get("/about")
    async def about() -> dict[str, Any]:
        """What is served: images, the model, and the folders or shards that a search can be kept to."""
        made = vectors.made
        exact = service.index.approximate is None
        return {
            "images": len(vectors), "model": Path(made.model).name, "source": Path(made.source).name, "dim": made.dim,
            "exact": exact, "folders": folders, "upload_bytes": UPLOAD_BYTES,
        }  # fmt: skip

    @app.post("/search", openapi_extra=_body(SearchBody))
    async def search(request: Request, options: Annotated[Options, Query()]) -> dict[str, Any]:
        """The images nearest to a text or to an image: JSON for a text, an image's bytes (with options in the query)
        for an image."""
        if _is_image(request):
            return await service.search_image(await _read(request, UPLOAD_BYTES), options)
        return await service.search(SearchBody.model_validate(await _json(request)))

    @app.post("/embed", openapi_extra=_body(EmbedBody))
    async def embed(request: Request) -> dict[str, Any]:
        """Embeddings, L2-normalised, of texts (JSON) or of one image (its bytes)."""
        if _is_image(request):
            return await service.embed(service.image(await _read(request, UPLOAD_BYTES)))
        return await service.embed(service.texts(EmbedBody.model_validate(await _json(request)).texts))


def _body(model: type[BaseModel]) -> dict[str, Any]:
    kinds: dict[str, Any] = {"application/json": {"schema": model.model_json_schema()}}
    kinds["image/*"] = {"schema": {"type": "string", "format": "binary"}}
    return {"requestBody": {"content": kinds, "required": True}}


def _is_image(request: Request) -> bool:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind.startswith("image/") or kind == "application/octet-stream":
        return True
    if kind != "application/json":
        raise HTTPException(415, "send JSON as application/json, or an image's bytes as image/…")
    return False


async def _json(request: Request) -> Any:
    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no number of JSON")

    try:
        content = json.loads(await _read(request, JSON_BYTES), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"this is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise HTTPException(400, "the JSON must be an object")
    return content


async def _read(request: Request, most: int) -> bytes:
    """The body, refused as soon as it is known to be too large, or does not come."""
    refusal = HTTPException(413, f"more than {most >> 20} MB; send less", {"Connection": "close"})
    told = request.headers.get("content-length", "0")
    if not told.isdecimal() or int(told) > most:
        await _drain(request)
        raise refusal
    parts, size, now = [], 0, asyncio.get_running_loop().time
    end = now() + BODY_S
    try:
        async with asyncio.timeout(STALLED_S) as limit:
            async for part in request.stream():
                limit.reschedule(min(now() + STALLED_S, end))
                size += len(part)
                if size > most:
                    break
                parts.append(part)
    except TimeoutError:
        told = f"the rest of the request did not come: {STALLED_S:g} s without a byte, or {BODY_S:g} s in all, end it"
        raise HTTPException(408, told, {"Connection": "close"}) from None
    except ClientDisconnect:
        raise HTTPException(400, "the sender is gone") from None
    if size > most:
        await _drain(request)
        raise refusal
    return b"".join(parts)


async def _drain(request: Request) -> None:
    """Read on for a moment what is refused: most senders read why only once they have sent it."""
    left = DRAINED
    with suppress(TimeoutError, ClientDisconnect):
        async with asyncio.timeout(LINGER_S):
            async for part in request.stream():
                left -= len(part)
                if left < 0:
                    return


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises ConfigError for an address that is not to be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"{host}:{port} cannot be listened at ({reason}); choose another --port, or --host") from None


def serve(index: SearchIndex, host: str, port: int, names: Sequence[str]) -> None:
    """Serve the page until Ctrl-C; says where on standard output."""
    index.towers  # noqa: B018  # a model that is not there is said before anything listens
    with listen(host, port) as there:
        app = make_app(index, [*names, host])
        if not _is_local(host):
            print(f"warning: whoever reaches {host} can search and see these images; there is no password",
                  file=sys.stderr)  # fmt: skip
        shown = f"[{host}]" if ":" in host else host
        print(f"{len(index.vectors):,} images at http://{shown}:{there.getsockname()[1]}/ (Ctrl-C ends it)", flush=True)
        with suppress(KeyboardInterrupt):
            make_server(app).run(sockets=[there])
    print("ended")


def make_server(app: FastAPI) -> uvicorn.Server:
    """What runs the application; nobody holds it by being slow, or by being many."""
    return uvicorn.Server(
        uvicorn.Config(
            app, http=Connection, log_level="warning", timeout_graceful_shutdown=2, server_header=False,
            limit_concurrency=MOST_CONNECTIONS, timeout_keep_alive=KEPT_OPEN_S,
        )
    )  # fmt: skip


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
