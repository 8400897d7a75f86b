"""Arrays through a pipe: a line of JSON with type and shape, then the bytes."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import IO

import numpy as np

Feed = tuple[np.ndarray, ...]
"""What a file is run on: an array for each of its inputs, in their order."""


def stacked(batches: Sequence[Feed]) -> Feed:
    """Several batches together: for each input an array of batches x rows x ..."""
    return tuple(np.stack(arrays) for arrays in zip(*batches, strict=True))


def framed(array: np.ndarray) -> tuple[bytes, memoryview]:
    """The line, and the bytes, which are not copied where they lie together: answers may be as large as the memory of a small device."""
    content = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data if array.size else memoryview(b"")
    return json.dumps([array.dtype.str, array.shape]).encode() + b"\n", content


def write_array(pipe: IO[bytes], array: np.ndarray) -> None:
    """Send one array, now."""
    for part in framed(array):
        pipe.write(part)
    pipe.flush()


def read_array(pipe: IO[bytes]) -> np.ndarray | None:
    """The next array; None where the other side has ended, be it in the middle of one."""
    try:
        kind, shape = json.loads(pipe.readline())
    except (ValueError, TypeError):  # the end, or no frame
        return None
    size = np.dtype(kind).itemsize * math.prod(shape)
    received = bytearray(pipe.read(size))
    return np.frombuffer(received, kind).reshape(shape) if len(received) == size else None
