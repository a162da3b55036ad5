"""Rows as TensorBoard reads them, without TensorBoard: its file format is a few lines.

Records of TensorFlow's TFRecord format, each an ``Event`` in protocol buffers (tensorboard/compat/proto/event.proto).
"""

from __future__ import annotations

import math
import struct
import time
from pathlib import Path

VARINT, DOUBLE, BYTES, FLOAT = 0, 1, 2, 5  # kinds of a field
STARTED = 1  # of a session: readers forget what an earlier one wrote at this step and behind it
CASTAGNOLI = 0x82F63B78


class TensorBoard:
    """``RUN/tensorboard``, a file for each attempt, whose steps are samples seen."""

    def __init__(self, run: Path, samples_seen: int) -> None:
        folder = run / "tensorboard"
        folder.mkdir(exist_ok=True)
        self._file = (folder / f"events.out.tfevents.{time.time():.3f}.clipscale").open("wb")
        self._write(0, _field(3, BYTES, b"brain.Event:2"))
        self.rewind(samples_seen)

    def log(self, row: dict[str, float]) -> None:
        """Write the metrics of a row, each a scalar of its name."""
        values = [
            _field(1, BYTES, _field(1, BYTES, key.encode()) + _field(2, FLOAT, struct.pack("<f", value)))
            for key, value in row.items()
            if "/" in key and math.isfinite(value)
        ]
        self._write(int(row["samples_seen"]), _field(5, BYTES, b"".join(values)))

    def rewind(self, samples_seen: int) -> None:
        """The run goes on from here: what was written behind it is of a way that is not gone again."""
        self._write(samples_seen + 1, _field(7, BYTES, _field(1, VARINT, _varint(STARTED))))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, step: int, what: bytes) -> None:
        event = _field(1, DOUBLE, struct.pack("<d", time.time())) + _field(2, VARINT, _varint(step)) + what
        length = struct.pack("<Q", len(event))
        self._file.write(length + _checksum(length) + event + _checksum(event))
        self._file.flush()


def _field(number: int, kind: int, content: bytes) -> bytes:
    length = _varint(len(content)) if kind == BYTES else b""
    return _varint(number << 3 | kind) + length + content


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _checksum(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli) of some bytes, which Python's own library does not have (RFC 3720, B.4)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def _table_entry(value: int) -> int:
    for _ in range(8):
        value = value >> 1 ^ (CASTAGNOLI if value & 1 else 0)
    return value


_TABLE = [_table_entry(i) for i in range(256)]
