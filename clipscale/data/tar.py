"""Members of a tar archive: names, places and sizes, read from the headers.

``tarfile`` spends more time on a member's header than the decoder spends on many an image (a quarter of the loader's
time on small JPEGs), so the headers of ustar, GNU and PAX archives are read here; tests hold this against ``tarfile``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

BLOCK = 512
OCTAL = re.compile(rb"[0-7]+")
_FILE, _LINK_OR_DEVICE, _ABOUT_THE_NEXT = b"0\0" + b"7", b"123456", b"xXgLK"
_ZEROS = bytes(BLOCK)


class TarMember(NamedTuple):
    """One member: ``start`` is where its first header begins, ``data`` and ``size`` are where its bytes lie."""

    name: str
    start: int
    data: int
    size: int
    is_file: bool

    @property
    def end(self) -> int:
        """Where the next header begins."""
        return self.data + _padded(self.size)


class TarError(Exception):
    """Something that is no tar header; the message says where."""


def members(raw: BinaryIO, start: int = 0, stop: int | None = None) -> Iterator[TarMember]:
    """Members whose headers begin in ``start <= offset < stop``, up to the end-of-archive mark or the end of the file.

    The file is moved about between members, so the caller may read bodies in between. A member's body is not looked
    at: it may reach past the end of the file. Raises TarError at the first header that is none.
    """
    offset = start
    common: dict[str, str] = {}
    while stop is None or offset < stop:
        first, own = offset, dict(common)
        while True:
            raw.seek(offset)
            header = raw.read(BLOCK)
            if not header or header == _ZEROS:
                return
            kind, size = _check(header, offset)
            if kind not in _ABOUT_THE_NEXT:
                break
            body = raw.read(size) if size <= 1 << 20 else b""
            if len(body) < size:
                raise TarError(f"byte {offset}: a long name cut short")
            if kind == b"L":
                own["path"] = _text(body)
            elif kind == b"g":
                common |= _pax(body, offset)
                own = common | own
            elif kind in b"xX":
                own |= _pax(body, offset)
            offset += BLOCK + _padded(size)
        if "size" in own:
            size = _decimal(own["size"], offset)
        if kind in _LINK_OR_DEVICE:
            size = 0
        name = own.get("path") or _name(header)
        # The oldest archives mark a directory by its name alone.
        is_file = kind in _FILE and not (kind == b"\0" and name.endswith("/")) and "sparse" not in own
        member = TarMember(name, first, offset + BLOCK, size, is_file)
        yield member
        offset = member.end


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _check(header: bytes, offset: int) -> tuple[bytes, int]:
    """The type and the size of a header block."""
    if len(header) < BLOCK:
        raise TarError(f"byte {offset}: a header cut short")
    digits = header[148:156]
    # Most of a header is zeros; without them it adds up three times as fast.
    stored, total = _number(digits, offset), sum(header.translate(None, b"\0")) - sum(digits) + 8 * 0x20
    if stored != total and stored != total - 256 * sum(byte > 127 for byte in header):  # old tars added signed bytes
        raise TarError(f"byte {offset}: not a tar header")
    kind, size = header[156:157], _number(header[124:136], offset)
    if kind == b"S":
        raise TarError(f"byte {offset}: a sparse member")
    return kind, size


def _number(digits: bytes, offset: int) -> int:
    """Octal text, or binary where the first bit is set (GNU, above 8 GiB)."""
    if digits[0] & 0x80:
        if digits[0] != 0x80:
            raise TarError(f"byte {offset}: a negative number in a tar header")
        return int.from_bytes(digits[1:], "big")
    text = digits.split(b"\0", 1)[0].strip() or b"0"
    if not OCTAL.fullmatch(text):
        raise TarError(f"byte {offset}: not a tar header")
    return int(text, 8)


def _decimal(digits: str, offset: int) -> int:
    if not digits.isdecimal():
        raise TarError(f"byte {offset}: a PAX record with size {digits!r}")
    return int(digits)


def _name(header: bytes) -> str:
    name, prefix = _text(header[:100]), header[345:500]
    # GNU archives keep other things where ustar has the first half of a long path.
    return f"{_text(prefix)}/{name}" if prefix[0] and header[257:263] == b"ustar\0" else name


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _pax(body: bytes, offset: int) -> dict[str, str]:
    """The records that matter here: ``path``, ``size``, and whether the member is sparse."""
    found: dict[str, str] = {}
    while body.strip(b"\0"):
        length, _, rest = body.partition(b" ")
        if not length.isdigit() or not len(length) < int(length) <= len(body):
            raise TarError(f"byte {offset}: a damaged PAX record")
        key, _, value = rest[: int(length) - len(length) - 2].partition(b"=")
        if key in (b"path", b"size"):
            found[key.decode()] = value.decode("utf-8", "surrogateescape")
        elif key.startswith(b"GNU.sparse"):
            found["sparse"] = ""
        body = body[int(length) :]
    return found
