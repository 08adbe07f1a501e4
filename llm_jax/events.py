"""TensorBoard event files: scalars only, so they need no package.

A file is a sequence of records (length, its checksum, content, its checksum: the TFRecord format), each one a
serialized `Event` protocol buffer. The field numbers below are those of tensorflow/core/util/event.proto and
tensorflow/core/framework/summary.proto.
"""

import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path

FLOAT32_MAX = 3.4e38


class EventFile:
    """Appends to a new event file in `folder`; every event is in the system's hands when a call returns.

    purge_step: viewers drop what earlier files hold from this step on (a resumed run goes over it again).
    """

    def __init__(self, folder: str | Path, purge_step: int | None = None) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns() // 1000}.{socket.gethostname()}"
        self._file = (folder / name).open("xb", buffering=0)
        self._write(_bytes(3, b"brain.Event:2"))  # file_version
        if purge_step is not None:
            start = _integer(1, 1)  # SessionLog.status = START
            self._write(_integer(2, purge_step) + _bytes(7, start))

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """Adds one event with all of `scalars` (shown as float32); what isn't finite is left out."""
        values = (
            _bytes(1, _bytes(1, name.encode()) + _float(2, value))  # Summary.value = (tag, simple_value)
            for name, value in scalars.items()
            if abs(value) < FLOAT32_MAX  # false for nan
        )
        self._write(_integer(2, step) + _bytes(5, b"".join(values)))

    def close(self) -> None:
        self._file.close()

    def _write(self, event: bytes) -> None:
        event = struct.pack("<Bd", 1 << 3 | 1, time.time()) + event  # wall_time
        length = struct.pack("<Q", len(event))
        self._file.write(length + _checksum(length) + event + _checksum(event))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _integer(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _float(field: int, value: float) -> bytes:
    return struct.pack("<Bf", field << 3 | 5, value)


def _crc32c_table() -> list[int]:
    table = list(range(256))
    for _ in range(8):
        table = [crc >> 1 ^ (0x82F63B78 if crc & 1 else 0) for crc in table]
    return table


_TABLE = _crc32c_table()


def _checksum(data: bytes) -> bytes:
    """CRC-32C (Castagnoli), rotated and shifted as the TFRecord format asks."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 255] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
