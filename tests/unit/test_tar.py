"""The tar reader against ``tarfile``, on archives of every format and on damaged ones."""

from __future__ import annotations

import io
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipscale.data.tar import TarError, TarMember, members

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
KINDS = [tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE,
         tarfile.FIFOTYPE, tarfile.CHRTYPE]  # fmt: skip

part = st.text(st.characters(codec="utf-8", exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1)
# Up to four directories: short names, names that ustar splits, and names that only GNU and PAX can hold.
names = st.lists(st.one_of(part, part.map(lambda text: text * 20)), min_size=1, max_size=4).map("/".join)
entries = st.lists(
    st.tuples(names, st.sampled_from(KINDS), st.binary(max_size=1500), st.integers(0, 2**33)), max_size=8
)


def archive(content: list[tuple[str, bytes, bytes, int]], form: int, headers: dict[str, str] | None = None) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form, pax_headers=headers) as out:
        for name, kind, body, time in content:
            info = tarfile.TarInfo(name)
            info.type, info.mtime, info.linkname = kind, time, "there"
            info.size = len(body) if info.isreg() else 0
            try:
                out.addfile(info, io.BytesIO(body))
            except (ValueError, UnicodeError):  # ustar cannot hold every name
                continue
    return buffer.getvalue()


def theirs(data: bytes) -> list[tuple[str, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(data)) as opened:
        return [(m.name, opened.extractfile(m).read()) for m in opened if m.isreg()]  # type: ignore[union-attr]


def ours(data: bytes) -> list[tuple[str, bytes]]:
    return [(m.name, data[m.data : m.data + m.size]) for m in walk(data) if m.is_file]


def walk(data: bytes) -> list[TarMember]:
    return list(members(io.BytesIO(data)))


@settings(max_examples=300, deadline=None)
@given(entries, st.sampled_from(sorted(FORMATS)))
def test_every_format_reads_as_tarfile_reads_it(content: list[tuple[str, bytes, bytes, int]], form: str) -> None:
    data = archive(content, FORMATS[form])
    # tarfile takes the slash off a name that ends in one; a sample's key has none there anyway.
    assert [(name.rstrip("/"), body) for name, body in ours(data)] == [(n.rstrip("/"), b) for n, b in theirs(data)]


@settings(max_examples=200, deadline=None)
@given(entries, st.sampled_from(sorted(FORMATS)), st.data())
def test_a_walk_may_begin_at_every_member(
    content: list[tuple[str, bytes, bytes, int]], form: str, draw: st.DataObject
) -> None:
    data = archive(content, FORMATS[form])
    whole = walk(data)
    begin = draw.draw(st.integers(0, len(whole)))
    if begin < len(whole):
        stop = draw.draw(st.integers(begin, len(whole) - 1))
        assert list(members(io.BytesIO(data), whole[begin].start, whole[stop].start)) == whole[begin:stop]


@settings(max_examples=300, deadline=None)
@given(st.binary(min_size=1, max_size=512), st.integers(0, 4000), st.sampled_from(sorted(FORMATS)))
def test_damage_is_an_error_or_read_as_tarfile_reads_it(damage: bytes, place: int, form: str) -> None:
    content = [(f"{'deep/' * 30 * (n % 2)}{n}.txt", tarfile.REGTYPE, bytes([n]) * 300, 0) for n in range(4)]
    data = archive(content, FORMATS[form])
    data = data[:place] + damage + data[place + len(damage) :]
    try:
        read = [member.name for member in members(io.BytesIO(data)) if member.is_file]
        with tarfile.open(fileobj=io.BytesIO(data)) as opened:
            expected = [member.name for member in opened if member.isreg()]
    except (TarError, tarfile.TarError):
        return
    # tarfile reads a GNU long name on into the padding when its last byte, a zero, is damaged.
    assert len(read) == len(expected) and all(map(str.startswith, expected, read))


def test_global_pax_headers_and_large_sizes() -> None:
    data = archive([("a.txt", tarfile.REGTYPE, b"one", 0)], tarfile.PAX_FORMAT, {"comment": "made by hand"})
    assert ours(data) == [("a.txt", b"one")] == theirs(data)
    info = tarfile.TarInfo("huge.jpg")
    info.size = 9 * 1024**3
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        (only,) = members(io.BytesIO(info.tobuf(form)), 0, 1)
        assert (only.name, only.size) == ("huge.jpg", 9 * 1024**3)


def test_signed_checksums_of_old_archives() -> None:
    header = bytearray(tarfile.TarInfo("naïve.txt").tobuf(tarfile.USTAR_FORMAT))
    signed = sum(byte - 256 * (byte > 127) for byte in header[:148] + b" " * 8 + header[156:])
    header[148:156] = b"%06o\0 " % signed
    assert [m.name for m in members(io.BytesIO(bytes(header)))] == ["naïve.txt"]


def test_a_negative_size_is_refused() -> None:
    header = bytearray(archive([("a.txt", tarfile.REGTYPE, b"one", 0)], tarfile.USTAR_FORMAT))
    header[124:136] = b"-0000001000\0"
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:512]))
    with pytest.raises(TarError, match="not a tar header"):
        walk(bytes(header))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:300], "cut short"),
        (lambda data: b"<html>" + data[6:], "not a tar header"),
        (lambda data: data[:156] + b"S" + data[157:], "not a tar header|sparse"),
    ],
)
def test_what_is_no_header_is_refused(change: object, message: str) -> None:
    data = archive([("a.txt", tarfile.REGTYPE, b"one", 0)], tarfile.USTAR_FORMAT)
    with pytest.raises(TarError, match=message):
        walk(change(data))  # type: ignore[operator]
