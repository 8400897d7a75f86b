"""Arrays through a pipe: a line of JSON with type and shape, then the bytes."""

from __future__ import annotations

import json
import math
from typing import IO

import numpy as np


def write_array(pipe: IO[bytes], array: np.ndarray) -> None:
    """Send one array, now."""
    pipe.write(json.dumps([array.dtype.str, array.shape]).encode() + b"\n" + array.tobytes())
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
