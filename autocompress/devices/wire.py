"""What a file in ONNX's protocol buffers refers to, read without the package onnx, which a device need not have.

Encodings are those of protobuf.dev/programming-guides/encoding, field numbers those of onnx.proto. Whatever is malformed, or another format
that a runtime might read all the same, counts as referring elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator

PARTS = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 10: "tensor", 6: "graph", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "function": {7: "node", 11: "attribute"},
    "training": {1: "graph", 2: "graph"},
    "tensor": {},
}
"""Fields of each message that hold messages with tensors in them."""
EXTERNAL_DATA, DATA_LOCATION = 13, 14
VARINT, EIGHT, BYTES, FOUR = 0, 1, 2, 5
ORT_FORMAT = b"ORTM"
"""Bytes 4 to 8 of ONNX Runtime's own format."""


def refers_elsewhere(content: bytes) -> bool:
    """Whether a model takes weights from other files, or cannot be told not to."""
    try:
        return content[4:8] == ORT_FORMAT or _refers(memoryview(content), "model")
    except (IndexError, ValueError, RecursionError):
        return True


def _refers(message: memoryview, kind: str) -> bool:
    parts = PARTS[kind]
    for number, value in _fields(message):
        if kind == "tensor" and (number == EXTERNAL_DATA or (number == DATA_LOCATION and value != 0)):
            return True
        if number in parts and (isinstance(value, int) or _refers(value, parts[number])):
            return True
    return False


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(number, value) of each field: a number where it is one, else its bytes."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        if key & 7 == VARINT:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        if key & 7 == BYTES:
            size, at = _varint(message, at)
        else:
            size = {EIGHT: 8, FOUR: 4}.get(key & 7, len(message))  # groups are of old versions, and in no model
        if at + size > len(message):
            raise ValueError("a field ends behind its message")
        yield key >> 3, message[at : at + size]
        at += size


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """A number, and where it ends."""
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("a number has ten bytes at most")
